"""Growth of one NormHistory.observe from 10^3 to 10^7 norms, beside everything else that answers a percentile."""

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoclip_core import AutoClip, NormHistory
from bench.common import (
    QUICK_NOTE,
    Key,
    Measurements,
    NoCompilerError,
    build_kernel,
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
What this isolates: what one training step pays to remember a gradient norm and learn the 10th percentile of all norms
so far, when that many are stored already. Nothing is trained. All subjects get log-normal norms of the same stream, one
at a time, and take turns in every round; each number is the median of {rounds} rounds, in microseconds per norm, of as
many steps as fit into a round (at least one for those that take a second). The garbage collector rests while a round is
timed, and the structures are warm.

The rivals answer exactly what NormHistory answers, bit for bit, except KLL: it keeps a sample, and its answer is
approximate.{kll}"""

PERCENTILE = 10.0
STREAM = "stationary"
OURS = "NormHistory.observe"
CLIP = "AutoClip.observe"
MANY = "NormHistory.observe_many"
NUMBA = "NormHistory.observe_many (Numba)"
LIST = "numpy.percentile of a list"
SORTED = "sortedcontainers.SortedList"
KLL = "DataSketches KLL"
PB_DS = "GNU pb_ds (C++)"
KERNEL = "autoclip_history_observe (C)"

Norms = NDArray[np.float64]
# Takes the next norms, as a list and as an array, and spends exactly one step on each.
Steps = Callable[[list[float], Norms], object]


def numpy_of_list(start: Norms, _: int) -> Steps:
    """As in the authors' code: append to a list, np.percentile of the list."""
    history = start.tolist()

    def steps(norms: list[float], _: Norms) -> None:
        for norm in norms:
            history.append(norm)
            np.percentile(history, PERCENTILE)

    return steps


def numpy_of_array(start: Norms, room: int) -> Steps:
    """A preallocated array, np.percentile of the part in use."""
    buffer = np.concatenate([start, np.empty(room)])
    size = len(start)

    def steps(norms: list[float], _: Norms) -> None:
        nonlocal size
        for norm in norms:
            buffer[size] = norm
            size += 1
            np.percentile(buffer[:size], PERCENTILE)

    return steps


def sorted_list(start: Norms, _: int) -> Steps:
    """SortedList.add, then the two neighbours of the rank, interpolated."""
    from sortedcontainers import SortedList

    history = SortedList(start.tolist())

    def steps(norms: list[float], _: Norms) -> None:
        for norm in norms:
            history.add(norm)
            rank = (len(history) - 1) * (PERCENTILE / 100.0)
            below = int(rank)
            fraction = rank - below
            low, high = history[below], history[min(below + 1, len(history) - 1)]
            _ = low + (high - low) * fraction if fraction < 0.5 else high - (high - low) * (1.0 - fraction)

    return steps


def kll(start: Norms, _: int) -> Steps:
    """The sketch at its default size (k = 200): update, get_quantile."""
    from datasketches import kll_doubles_sketch

    sketch = kll_doubles_sketch(200)
    sketch.update(start)

    def steps(norms: list[float], _: Norms) -> None:
        for norm in norms:
            sketch.update(norm)
            sketch.get_quantile(PERCENTILE / 100.0)

    return steps


def norm_history(start: Norms, _: int) -> Steps:
    history = pushed(start)
    observe = history.observe

    def steps(norms: list[float], _: Norms) -> None:
        for norm in norms:
            observe(norm, PERCENTILE)

    return steps


def auto_clip(start: Norms, _: int) -> Steps:
    clip = AutoClip(PERCENTILE)
    push = clip.history.push
    for norm in start.tolist():
        push(norm)
    observe = clip.observe

    def steps(norms: list[float], _: Norms) -> None:
        for norm in norms:
            observe(norm)

    return steps


def observe_many(start: Norms, _: int) -> Steps:
    """The whole array in one call: what Python adds vanishes."""
    history = pushed(start)
    return lambda _, norms: history.observe_many(norms, [PERCENTILE])


def observe_many_on_numba(start: Norms, _: int) -> Steps:
    """The same on the other backend: a jitted loop."""
    history = pushed(start, "numba")
    return lambda _, norms: history.observe_many(norms, [PERCENTILE])


def pushed(start: Norms, backend: str | None = None) -> NormHistory:
    """A NormHistory filled as training fills it: one push after the other."""
    history = NormHistory(backend=backend)
    push = history.push
    for norm in start.tolist():
        push(norm)
    return history


class Subject(NamedTuple):
    make: Callable[[Norms, int], Steps]
    package: str
    note: str


SUBJECTS = {
    LIST: Subject(numpy_of_list, "numpy", "the authors' code: append to a list, then percentile of the list"),
    "numpy.percentile of an array": Subject(numpy_of_array, "numpy", "the same on a preallocated array"),
    SORTED: Subject(sorted_list, "sortedcontainers", "add, then interpolate at the rank; filled in bulk"),
    KLL: Subject(kll, "datasketches", "approximate: k = 200, update, then get_quantile"),
    OURS: Subject(norm_history, "autoclip_core", "push and percentile in one call"),
    CLIP: Subject(auto_clip, "autoclip_core", "the whole rule, with its ClipStep"),
    MANY: Subject(observe_many, "autoclip_core", "a whole array of norms in one call"),
    NUMBA: Subject(observe_many_on_numba, "numba", "the same without a compiled kernel"),
}
IN_C = {
    PB_DS: ("pb_ds", "red-black tree with order statistics, called from C++"),
    KERNEL: ("autoclip", "our kernel, called from C"),
}


class Stream:
    """Log-normal norms, never the same twice."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(7)

    def next(self, count: int) -> Norms:
        return self.random.lognormal(sigma=0.5, size=count)


def time_steps(steps: Steps, norms: Norms) -> float:
    """Seconds per norm."""
    as_list = norms.tolist()
    gc.disable()
    start = time.perf_counter_ns()
    steps(as_list, norms)
    elapsed = time.perf_counter_ns() - start
    gc.enable()
    return elapsed / len(as_list) / 1e9


def measure_python(
    size: int, *, rounds: int, operations: int, available: list[str], experiment: str = "history"
) -> Measurements:
    """Seconds per step of every subject at one size.

    A round is one block of steps on a structure that lives on, or many blocks on small structures made anew, so that
    the size stays what it is said to be. Where one step is slow, a round has as few as one.
    """
    measured = Measurements()
    stream = Stream()
    block = min(operations, max(100, size // 50))
    afresh = size <= 100_000
    living: dict[str, Steps] = {}
    counts = dict.fromkeys(available, block)
    room = 1 + 2 * block * (1 if afresh else rounds)  # a pilot step, the warm-up, the round
    for _ in range(rounds):
        spent = dict.fromkeys(available, 0.0)
        blocks = dict.fromkeys(available, 0)
        for turn in range(max(1, operations // block) if afresh else 1):
            if afresh or not living:
                start = stream.next(size + turn % 64)
                living = {}
            for name in available:
                if blocks[name] and spent[name] > ROUND_SECONDS:
                    continue
                if name not in living:
                    living[name] = SUBJECTS[name].make(start, room)
                    pilot = time_steps(living[name], stream.next(1))
                    counts[name] = max(1, min(block, int(ROUND_SECONDS / pilot)))
                time_steps(living[name], stream.next(counts[name]))
                spent[name] += time_steps(living[name], stream.next(counts[name])) * counts[name]
                blocks[name] += counts[name]
        for name in available:
            measured.add(Key(experiment, STREAM, size, name, "us per step"), 1e6 * spent[name] / blocks[name])
    return measured


ROUND_SECONDS = 0.3


def measure_memory(sizes: list[int]) -> Measurements:
    """Bytes per norm after single pushes in random order."""
    measured = Measurements()
    for size in sizes:
        value = pushed(Stream().next(size)).nbytes / size
        measured.add(Key("memory", STREAM, size, "NormHistory", "bytes per norm after random single pushes"), value)
    return measured


def measure_start(rounds: int, *, has_numba: bool) -> Measurements:
    """Seconds to start Python and import, in turns; run in an empty folder, so that the installed package is found."""
    programs = {
        "the interpreter alone": "pass",
        "import autoclip_core": "import autoclip_core",
        "import autoclip_core, a first observe": "import autoclip_core as a; a.NormHistory().observe(1.0, 10.0)",
        "import numpy, for comparison": "import numpy",
    } | (
        {
            "import autoclip_core, a first observe on Numba": "import autoclip_core as a; "
            "a.NormHistory(backend='numba').observe(1.0, 10.0)",
            "import numba, for comparison": "import numba",
        }
        if has_numba
        else {}
    )
    measured = Measurements()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + max(5, 3 * rounds)):
            for name, program in programs.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
                measured.add(Key("start", "any", 0, name, "s"), time.perf_counter() - start)
    for values in measured.values.values():
        del values[0]  # reads the files from disk
    return measured


def kll_error(size: int) -> str:
    """How far from the 10th percentile the sketch's answer is."""
    from datasketches import kll_doubles_sketch

    norms = Stream().next(size)
    sketch = kll_doubles_sketch(200)
    sketch.update(norms)
    share = float(np.mean(norms < sketch.get_quantile(PERCENTILE / 100.0)))
    return f" Asked for percentile 10 of {size:,} norms, it gave percentile {100 * share:.2f} in this run."


def find_subjects() -> tuple[list[str], dict[str, str]]:
    """The subjects that this machine has, and for the others what is missing."""
    import importlib.util

    absent = {
        name: f"{subject.package} is not installed"
        for name, subject in SUBJECTS.items()
        if importlib.util.find_spec(subject.package) is None
    }
    return [name for name in SUBJECTS if name not in absent], absent


def measure(sizes: list[int], *, rounds: int, operations: int) -> tuple[Measurements, dict[str, str]]:
    """Everything, and what could not be measured with the reason."""
    available, absent = find_subjects()
    measured = Measurements()
    try:
        program = build_kernel()
    except NoCompilerError as reason:
        absent |= dict.fromkeys(IN_C, str(reason).partition("\n")[0])
        program = None
    for size in sizes:
        say(f"  {size:,} norms")
        measured.update(measure_python(size, rounds=rounds, operations=operations, available=available))
        if program is not None:
            in_c = run_kernel(
                program, "growth", STREAM, size, rounds=rounds, operations=operations, subjects="autoclip+pb_ds"
            )
            for name, (subject, _) in IN_C.items():
                key = Key("growth", STREAM, size, subject, "observe")
                measured.values[Key("history", STREAM, size, name, "us per step")] = [
                    ns / 1000 for ns in in_c.values[key]
                ]
    say("  ours alone")
    # One after the other, as the kernel runs in C: beside each other they would share the caches.
    for name in [name for name in available if name in (OURS, CLIP, MANY, NUMBA)]:
        measured.update(
            measure_python(sizes[-2], rounds=rounds, operations=operations, available=[name], experiment="alone")
        )
    say("  memory and start")
    measured.update(measure_memory(sizes[-2:]))
    measured.update(measure_start(rounds, has_numba=NUMBA in available))
    return measured, absent


def step(measured: Measurements, size: int, name: str) -> float | None:
    return measured.median("history", STREAM, size, name, "us per step")


def targets(measured: Measurements, sizes: list[int]) -> list[list[str]]:
    """Question, value, target."""
    middle, low, high = sizes[-2], sizes[min(1, len(sizes) - 2)], sizes[-1]
    ours = step(measured, middle, OURS)
    rows = [[f"{OURS} at {power(middle)}", shown(ours, 3, "us"), "at most 1 us"]]
    for name, target in ((SORTED, "10"), (KLL, "10"), (LIST, "50,000"), (PB_DS, "-")):
        gain = ratio(step(measured, middle, name), ours)
        rows.append(
            [f"{name} / {OURS} at {power(middle)}", shown(gain), f"at least {target}".replace("at least -", "-")]
        )
    grown = ratio(step(measured, high, OURS), step(measured, low, OURS))
    rows.append([f"growth of {OURS} from {power(low)} to {power(high)}", shown(grown), "at most 4"])
    for more, less, target in (
        (OURS, KERNEL, "at most 350 ns"),
        (CLIP, OURS, "at most 1,000 ns"),
        (MANY, KERNEL, "at the C cost"),
    ):
        pair = [
            measured.median("history" if name == KERNEL else "alone", STREAM, middle, name, "us per step")
            for name in (more, less)
        ]
        added = 1000 * (pair[0] - pair[1]) if pair[0] is not None and pair[1] is not None else None
        rows.append([f"{more} above {less} at {power(middle)}, each alone", shown(added, 3, "ns"), target])
    jitted = ratio(*(measured.median("alone", STREAM, middle, name, "us per step") for name in (NUMBA, MANY)))
    rows.append([f"{NUMBA} / {MANY} at {power(middle)}, each alone", shown(jitted), "at most 3"])
    for size in sizes[-2:]:
        held = measured.median("memory", STREAM, size, "NormHistory", "bytes per norm after random single pushes")
        rows.append([f"bytes per norm at {power(size)}, random single pushes", shown(held, 4), "at most 13"])
    bare = measured.median("start", "any", 0, "the interpreter alone", "s")
    for key in measured.values:
        if key.experiment == "start" and key.subject != "the interpreter alone" and bare is not None:
            added = (measured.median(*key) or bare) - bare
            target = "at most 0.05 s" if key.subject == "import autoclip_core" else "-"
            rows.append(
                [f"{key.subject}: above the interpreter's start of {shown(bare, 3, 's')}", shown(added, 2, "s"), target]
            )
    return rows


def report(
    measured: Measurements, absent: dict[str, str], facts: dict[str, str], sizes: list[int], *, rounds: int, quick: bool
) -> str:
    """The Markdown page."""
    error = kll_error(sizes[-1]) if KLL not in absent else ""
    notes = {name: subject.note for name, subject in SUBJECTS.items()} | {
        name: note for name, (_, note) in IN_C.items()
    }
    rows = []
    for name, note in notes.items():
        what = f"{name}: {note}" + (f" (MISSING: {absent[name]})" if name in absent else "")
        rows.append([what, *(shown(step(measured, size, name)) for size in sizes)])
    ratios = [
        [name, *(shown(ratio(step(measured, size, name), step(measured, size, OURS))) for size in sizes)]
        for name in notes
    ]
    parts = ["# One step of AutoClip as the history grows", OPENING.format(rounds=rounds, kll=error)]
    if quick:
        parts.append(QUICK_NOTE)
    parts += [
        "![Microseconds per step over the number of norms](history.png)",
        table(["microseconds per step, with this many norms stored", *map(power, sizes)], rows),
        f"The same, as multiples of {OURS}:",
        table(["times as long", *map(power, sizes)], ratios),
        table(["question", "measured", "target"], targets(measured, sizes)),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


# Okabe and Ito's colours, apart for every kind of sight; ours are drawn thicker, and every line carries its name.
LOOKS = {
    LIST: ("#D55E00", "o", "-"),
    "numpy.percentile of an array": ("#E69F00", "s", "-"),
    SORTED: ("#009E73", "^", "-"),
    KLL: ("#CC79A7", "v", "--"),
    PB_DS: ("#56B4E9", "D", "-"),
    CLIP: ("#000000", "o", "-"),
    OURS: ("#0072B2", "o", "-"),
    KERNEL: ("#0072B2", "s", ":"),
}


def spread(positions: list[float], distance: float) -> list[float]:
    """Positions in ascending order, moved apart as little as needed to keep a distance."""
    groups: list[list[float]] = []
    for position in positions:
        groups.append([position])
        while len(groups) > 1:
            below, above = groups[-2:]
            if sum(above) / len(above) - sum(below) / len(below) >= distance * (len(below) + len(above)) / 2:
                break
            groups[-2:] = [below + above]
    return [
        sum(group) / len(group) + distance * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))
    ]


def plot(measured: Measurements, sizes: list[int], path: Path) -> None:
    """Microseconds per step over the number of norms, both on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    ends = []
    for name, (color, marker, line) in LOOKS.items():
        points = [(size, value) for size in sizes if (value := step(measured, size, name)) is not None]
        if not points:
            continue
        ours = name in (OURS, CLIP)
        x, y = zip(*points, strict=True)
        axes.loglog(
            x, y, color=color, marker=marker, linestyle=line, linewidth=3 if ours else 1.5, markersize=6 if ours else 5
        )
        ends.append((np.log10(y[-1]), x[-1], name, color))
    ends.sort()
    low, high = np.log10(axes.get_ylim())
    heights = spread([end[0] for end in ends], 0.045 * (high - low))
    for (height, x, name, color), placed in zip(ends, heights, strict=True):
        label = name + (" (approximate)" if name == KLL else "")
        weight = "bold" if name in (OURS, CLIP) else "normal"
        axes.annotate(
            label,
            (x, 10**height),
            (sizes[-1] * (sizes[-1] / sizes[0]) ** 0.04, 10**placed),
            color=color,
            fontweight=weight,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )
    axes.set_xticks(sizes)
    axes.set_xlabel("norms in the history")
    axes.set_ylabel("microseconds per step")
    axes.set_title("Remember a norm, learn the 10th percentile of all", loc="left")
    axes.grid(visible=True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    options = parse(parser(__doc__, rounds=7))
    facts = machine_facts(["sortedcontainers", "datasketches"])
    sizes = [10**3, 10**4] if options.quick else [10**k for k in range(3, 8)]
    say("python -m bench history")
    measured, absent = measure(sizes, rounds=options.rounds, operations=1_000 if options.quick else 20_000)
    measured.write(options.output / "history.csv")
    page = report(measured, absent, facts, sizes, rounds=options.rounds, quick=options.quick)
    (options.output / "history.md").write_text(page, encoding="utf-8")
    plot(measured, sizes, options.output / "history.png")
    print(table(["question", "measured", "target"], targets(measured, sizes)))
    for name, reason in absent.items():
        say(f"missing: {name}: {reason}")
    say(f"written: history.csv, history.md and history.png in {options.output}")


if __name__ == "__main__":
    main()
