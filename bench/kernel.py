"""The C kernel by itself: ns per operation, bytes per norm, beside its rivals in C++ and one dependent load."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.common import (
    QUICK_NOTE,
    Key,
    Measurements,
    build_kernel,
    cache_bytes,
    facts_table,
    machine_facts,
    parse,
    parser,
    power,
    ratio,
    run_kernel,
    say,
    shown,
    table,
)

OPENING = """\
What this isolates: the cost of the data structure alone, in C, without Python and without training. Every subject gets
equal norms (log-normal, seeded) in the same process, and they take turns in every round; each number is the median of
{rounds} rounds. A structure is built by single pushes in the order of the stream, as training does, never by a bulk
load. Times are per operation in a warm loop unless a section says otherwise.

Streams: *stationary*, log-normal around one level; *drifting*, the level falls over three decades from the first norm
to the last; *sawtooth*, it falls over three decades every thousand steps and starts again.

The yardstick is one dependent random load: a pointer chase over all cache lines of as many bytes as the kernel's
history holds, on huge pages (as the kernel asks for) and on 4 KiB pages. Where the footprint fits into the machine's
last cache the load comes from there, for the kernel and the yardstick alike."""

RIVALS = {
    "pb_ds": "GNU pb_ds red-black tree with order statistics, keys (norm, number), from the compiler",
    "pb_ds, huge pages": "the same under GLIBC_TUNABLES=glibc.malloc.hugetlb=1: how much is page policy alone",
    "boost ranked_index": "boost::multi_index with a ranked_non_unique index",
    "absl::btree_multiset": "no rank in it, so it cannot answer a percentile: push alone",
    "std::multiset": "no rank in it, so it cannot answer a percentile: push alone",
}
STREAMS = ("stationary", "drifting", "sawtooth")
EXPERIMENTS = ("growth", "query", "cold", "window", "extend", "snapshot", "merge", "memory", "load")
HUGE = "dependent load, huge pages"
SMALL = "dependent load, 4 KiB pages"


class Sizes(NamedTuple):
    """The round sizes that the targets speak of."""

    low: int
    middle: int
    high: int

    def growth(self) -> list[int]:
        return [10**k for k in range(len(str(self.low)) - 1, len(str(self.high)))]


def measure(sizes: Sizes, *, rounds: int, quick: bool, large: bool, only: list[str]) -> Measurements:
    """Run every experiment that is wanted."""
    program = build_kernel()
    measured = Measurements()
    operations = 2_000 if quick else 100_000
    # Twice the largest cache, in reason: a training step walks over more than that.
    flush_bytes = 2**26 if quick else min(max(2 * cache_bytes(), 2**26), 2**30)

    def run(experiment: str, stream: str, size: int, **other: object) -> Measurements:
        settings = {"rounds": rounds, "operations": operations, **other}
        return run_kernel(program, experiment, stream, size, **settings)  # type: ignore[arg-type]

    if "growth" in only:
        for size in sizes.growth():
            for stream in STREAMS:
                measured.update(
                    run("growth", stream, size, subjects="all" if stream == "stationary" else "autoclip+pb_ds")
                )
        for size in (sizes.middle, sizes.high):
            advised = run(
                "growth", "stationary", size, subjects="pb_ds", environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
            )
            for key, values in advised.values.items():
                if key.subject == "pb_ds":
                    measured.values[key._replace(subject="pb_ds, huge pages")] = values
        if large:
            for stream in STREAMS:
                measured.update(run("growth", stream, 10 * sizes.high, subjects="autoclip"))
    if "query" in only:
        for size in (sizes.middle, sizes.high):
            measured.update(run("query", "stationary", size, subjects="autoclip+pb_ds+boost ranked_index"))
    if "cold" in only:
        for size in (sizes.middle, sizes.high):
            cold = {"operations": 10 if quick else 256, "flush_bytes": flush_bytes}  # the kernel's buffer fills once
            measured.update(run("cold", "stationary", size, subjects="autoclip+pb_ds+boost ranked_index", **cold))
    if "window" in only:
        for stream in ("stationary", "drifting"):
            measured.update(run("window", stream, sizes.middle))
    if "extend" in only:
        measured.update(run("extend", "stationary", sizes.middle))
        measured.update(extend_from_python(sizes.middle, rounds))
    if "snapshot" in only:
        measured.update(run("snapshot", "stationary", sizes.high))
    if "merge" in only:
        for size in (sizes.middle // 10, sizes.middle, sizes.high):
            measured.update(run("merge", "stationary", size))
    if "memory" in only:
        measured.update(run("memory", "any", sizes.high))
    if "load" in only:
        for size in (2**20, 2**24, 2**28) if quick else (2**20, 2**24, 2**27, 2**30, 2**32):
            measured.update(run("load", "any", size))
    return measured


def extend_from_python(size: int, rounds: int) -> Measurements:
    """NormHistory.extend of an unsorted array against numpy.sort of the same one, in ns per norm."""
    from autoclip_core import NormHistory

    measured = Measurements()
    random = np.random.default_rng(1)

    def timed(subject: str, work: Callable[[Any], object], norms: Any) -> None:
        start = time.perf_counter_ns()
        work(norms)
        measured.add(Key("extend", "stationary", size, subject, "extend"), (time.perf_counter_ns() - start) / size)

    for _ in range(rounds):
        norms = random.lognormal(sigma=0.5, size=size)
        history = NormHistory()
        timed("numpy.sort", np.sort, norms)
        timed(f"NormHistory.extend ({history.backend})", history.extend, norms)
    return measured


def targets(measured: Measurements, sizes: Sizes) -> list[list[str]]:
    """Question, value, target: the ratios that the kernel is built for."""
    middle, high = sizes.middle, sizes.high
    get = measured.median

    def growth(stream: str, size: int, subject: str = "autoclip", metric: str = "observe") -> float | None:
        return get("growth", stream, size, subject, metric)

    def memory(metric: str) -> str:
        return shown(get("memory", "any", high, "autoclip", metric), 4)

    rows = []
    for stream in STREAMS:
        gain = ratio(growth(stream, middle, "pb_ds"), growth(stream, middle))
        rows.append([f"push + percentile at {power(middle)}, {stream}: pb_ds / autoclip", shown(gain), "at least 6"])
    for stream in STREAMS:
        loads = ratio(growth(stream, high), growth(stream, high, HUGE, "load"))
        rows.append([f"push + percentile at {power(high)}, {stream}, in dependent loads", shown(loads), "at most 2.0"])
    top = 10 * high if growth("stationary", 10 * high) else high
    for stream in STREAMS:
        grown = ratio(growth(stream, top), growth(stream, sizes.low))
        span = f"from {power(sizes.low)} to {power(top)}"
        rows.append([f"growth of push + percentile {span}, {stream}", shown(grown), "at most 6 to 10^8"])
    cold = get("cold", "stationary", high, "autoclip", "cold observe mean")
    for metric, load in (
        ("dependent loads of a warm loop", get("cold", "stationary", high, HUGE, "load")),
        ("single cold loads", get("cold", "stationary", high, HUGE, "cold load p50")),
    ):
        rows.append(
            [f"cold push + percentile at {power(high)}, mean, in {metric}", shown(ratio(cold, load)), "at most 8"]
        )
    rival = ratio(get("cold", "stationary", high, "pb_ds", "cold observe mean"), cold)
    rows.append([f"cold push + percentile at {power(high)}, mean: pb_ds / autoclip", shown(rival), "-"])
    same = get("query", "stationary", high, "autoclip", "percentile, p unchanged")
    rows.append([f"percentile, p unchanged, at {power(high)}", shown(same, 3, "ns"), "at most 25 ns"])
    load = get("query", "stationary", high, HUGE, "load")
    for metric in ("percentile, p random", "select, rank random"):
        loads = ratio(get("query", "stationary", high, "autoclip", metric), load)
        rows.append([f"{metric}, at {power(high)}, in dependent loads", shown(loads), "at most 3"])
    for kind, target in (
        ("pushed stationary", "10.5"),
        ("pushed drifting", "10.5"),
        ("pushed sawtooth", "10.5"),
        ("pushed ascending", "8.3"),
        ("loaded", "8.3"),
    ):
        rows.append(
            [f"bytes per norm at {power(high)}, {kind}", memory(f"bytes per norm, {kind}"), f"at most {target}"]
        )
    rows.append(["bytes of an empty history", memory("bytes, empty"), "at most 1024"])
    rows.append(["bytes of 1,000 histories of 100 norms", memory("bytes, 1000 histories of 100"), "at most 4,194,304"])
    sort = get("extend", "stationary", middle, "numpy.sort", "extend")
    in_c = ratio(get("extend", "stationary", middle, "autoclip", "extend"), sort)
    rows.append([f"extend of {power(middle)} unsorted, in C / numpy.sort", shown(in_c), "at most 3.5"])
    for key in measured.values:
        if key.subject.startswith("NormHistory.extend"):
            called = ratio(measured.median(*key), sort)
            rows.append([f"{key.subject} of {power(middle)} unsorted / numpy.sort", shown(called), "at most 1.5"])
    for verb in ("save", "load"):
        speed = get("snapshot", "stationary", high, "autoclip", verb)
        rows.append([f"{verb} of {power(high)} norms", shown(speed, 3, "GB/s"), "at least 1 GB/s"])
    for stream in ("stationary", "drifting"):
        moving, alone = (get("window", stream, middle, "autoclip", metric) for metric in ("push, window", "push"))
        label = f"push with eviction / push alone, {power(middle)}, {stream}"
        rows.append([label, shown(ratio(moving, alone)), "at most 2.2"])
    return rows


def grid(measured: Measurements, experiment: str, stream: str, metric: str, digits: int = 3) -> str:
    """A table of one metric: subjects down, sizes across."""
    keys = [key for key in measured.values if (key.experiment, key.stream) == (experiment, stream)]
    keys = [key for key in keys if key.metric in (metric, "load")]
    sizes = sorted({key.size for key in keys})
    rows = [
        [subject, *(shown(measured.median(experiment, stream, size, subject, name), digits) for size in sizes)]
        for subject, name in dict.fromkeys((key.subject, key.metric) for key in keys)
    ]
    return table([f"{metric}, {stream} (ns)", *map(power, sizes)], rows)


def distribution(measured: Measurements, experiment: str, size: int, metric: str) -> str:
    """A table of single-operation times on the stationary stream: subjects down, percentiles across."""
    columns = ("p50", "mean", "p99", "p99.9", "max")
    found = dict.fromkeys(
        (key.subject, key.metric.rpartition(" ")[0])
        for key in measured.values
        if (key.experiment, key.stream, key.size) == (experiment, "stationary", size)
        and key.metric.startswith(f"{metric} ")
    )
    rows = [
        [subject, *(shown(measured.median(experiment, "stationary", size, subject, f"{name} {of}")) for of in columns)]
        for subject, name in found
    ]
    return table([f"{metric}, {power(size)} norms (ns)", *columns], rows)


def listing(measured: Measurements, experiment: str, unit: str) -> str:
    """A table of everything that an experiment measured, one line each."""
    rows = [
        [
            f"{key.subject}: {key.metric}" + (f", {key.stream}" if key.stream != "any" else ""),
            f"{key.size:,}",
            shown(measured.median(*key)),
        ]
        for key in measured.values
        if key.experiment == experiment
    ]
    return table([experiment, "size", unit], rows)


def missing(measured: Measurements) -> list[str]:
    """The rivals that this machine could not run."""
    subjects = {key.subject for key in measured.values if key.experiment == "growth"}
    return [name for name in RIVALS if subjects and name not in subjects]


def report(measured: Measurements, facts: dict[str, str], sizes: Sizes, *, rounds: int, quick: bool) -> str:
    """The Markdown page."""
    parts = ["# The kernel", OPENING.format(rounds=rounds)]
    if quick:
        parts.append(QUICK_NOTE)
    parts += [
        facts_table(facts),
        "## Against the targets",
        table(["question", "measured", "target"], targets(measured, sizes)),
    ]
    absent = missing(measured)
    rivals = [[name, text + (" (MISSING on this machine)" if name in absent else "")] for name, text in RIVALS.items()]
    parts += ["## Rivals", table(["rival", "what it is"], rivals).replace("---:", "---")]
    parts.append("## Growth: push + percentile(10), one after the other")
    parts += [grid(measured, "growth", stream, "observe") for stream in STREAMS]
    parts.append("## Growth: push alone")
    parts += [grid(measured, "growth", stream, "push") for stream in STREAMS]
    parts.append(
        "## Single operations\n\nEach operation timed by itself, the timer's own time taken off. Norms gather in a"
        " buffer that enters the tree at once every few hundred pushes: p50 is a push into the buffer, p99.9 shows an"
        " entry into the tree, and the mean is the whole. The largest also holds whatever the system did in between."
    )
    for metric in ("single push", "single observe"):
        for size in (sizes.low, sizes.middle, sizes.high):
            parts.append(distribution(measured, "growth", size, metric))
    parts.append("## Questions to a history at rest")
    metrics = ("percentile, p unchanged", "percentile, p random", "select, rank random", "rank, norm random")
    parts += [grid(measured, "query", "stationary", metric) for metric in metrics]
    parts.append(
        "## Cold: the caches walked over before every single operation\n\nWhat a training step leaves behind: code,"
        " stack and tables are cold too. A cold load is one load of the same kind under the same conditions."
    )
    parts += [distribution(measured, "cold", size, "cold") for size in (sizes.middle, sizes.high)]
    for experiment, title, unit in (
        ("window", "Moving window: each push evicts the oldest norm", "ns per push, or bytes"),
        ("extend", "Many norms at once", "ns per norm"),
        ("snapshot", "Save and load", "GB/s"),
        ("merge", "Merge of two histories of this size", "ns per norm of both"),
        ("memory", "Memory", "bytes"),
        ("load", "One dependent load over this many bytes", "ns"),
    ):
        parts += [f"## {title}", listing(measured, experiment, unit)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument(
        "--large", action="store_true", help="growth to 10^8 norms too: ten minutes, and 6 GB of memory"
    )
    arguments.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="these experiments; a dash for the others"
    )
    options = parse(arguments)
    facts = machine_facts()
    sizes = Sizes(10**3, 10**4, 10**5) if options.quick else Sizes(10**4, 10**6, 10**7)
    say("python -m bench kernel")
    measured = measure(sizes, rounds=options.rounds, quick=options.quick, large=options.large, only=list(options.only))
    measured.write(options.output / "kernel.csv")
    page = report(measured, facts, sizes, rounds=options.rounds, quick=options.quick)
    (options.output / "kernel.md").write_text(page, encoding="utf-8")
    print(table(["question", "measured", "target"], targets(measured, sizes)))
    say(f"written: kernel.csv and kernel.md in {options.output}")


if __name__ == "__main__":
    main()
