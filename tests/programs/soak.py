"""The long forms of the tests, and the figures that they give: bench/results/soak/soak.md.

    python -P tests/programs/soak.py                  everything, one part after the other: most of a day
    python -P tests/programs/soak.py fuzz kills       some of it; the figures of the other parts stay as they are

A part that finds a fault ends the run with exit status 1, and its figures stay those of its last good run. Processor
time is told beside the time on the clock: the machine may have been shared.
"""

import argparse
import csv
import datetime as dt
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from inspect import getdoc
from pathlib import Path

PROGRAMS = Path(__file__).resolve().parent
ROOT = PROGRAMS.parent.parent
RESULTS = ROOT / "bench/results"
sys.path += [str(ROOT), str(PROGRAMS)]  # behind what is installed

from bench.common import facts_table, machine_facts, replace, say, table  # noqa: E402

OPENING = """\
What `make soak` counted when each part ran last; `make test` runs the same in short. How a promise is tested, and by
what command, is in [tests/RELIABILITY.md](../../../tests/RELIABILITY.md). None of the latest runs found a fault."""


class FaultError(Exception):
    """A part found something; the message says what."""


def run(*command, cwd=ROOT, **environment):
    """Run a command to its end; what it printed."""
    command = list(map(str, command))
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise FaultError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def build(preset):
    """Build the C tests of a preset."""
    run("cmake", "--preset", preset, cwd=ROOT / "csrc")
    run("cmake", "--build", "--preset", preset, cwd=ROOT / "csrc")


def c_tests(preset):
    """Build and run the C tests of a preset; what they printed."""
    build(preset)
    return run("ctest", "--preset", preset, "--verbose", cwd=ROOT / "csrc")


def counted(pattern, text):
    """The numbers that a pattern finds in a text; a part that counts nothing shows nothing."""
    numbers = [int(number.replace(",", "")) for number in re.findall(pattern, text)]
    if not numbers or not all(numbers):
        raise FaultError(f"{pattern!r} was to be counted and is {numbers or 'not there'} in:\n{text[-4000:]}")
    return numbers


def passed(said):
    """How many tests CTest saw pass."""
    return len(counted(r" Test +#(\d+): \S+ \.+ +Passed", said))


# --- The parts: each gives pairs of what was counted, and how much it was ---------------------------------------------


def faults(_):
    """Memory refused, bits flipped: the C tests under ASan and UBSan, with tiny and with real nodes."""
    said = c_tests("asan")
    return [
        ("test programs passed", f"{passed(said)}"),
        ("allocations refused", f"{sum(counted(r'([0-9]*[1-9][0-9]*) allocations refused', said)):,}"),
        ("flips of a bit refused", f"{sum(counted('([0-9]+) flips refused', said)):,}"),
    ]


def valgrind(_):
    """The C tests under memcheck, every leak an error."""
    return [("test programs passed", f"{passed(c_tests('valgrind'))}")]


# By fuzzer: what its inputs become, and how many bytes they may have. Snapshots of 55 norms have trees of three levels.
INPUTS = {
    "operations": ("streams of operations, against the model", 2048),
    "snapshot": ("byte strings, loaded as snapshots", 512),
    "arrays": ("programs with norms in arrays of their own, against the model", 2048),
    "frameworks": ("programs of XLA and TensorFlow that call the entry points, right and wrong", 512),
}
FUZZING_GOAL = 10**9  # executions, over as many runs as it takes
ASAN, UBSAN = "ASan and UBSan", "UBSan alone"


def fuzz(options):
    """Inputs that the fuzzers executed in all runs so far, and what of the kernel the latest ones reached.

    Under UBSan alone an execution costs half or less, so there the fuzzers begin. Then they go on under ASan and UBSan,
    from all inputs that reached something new.
    """
    kept = RESULTS / "soak/fuzzing.json"
    totals = json.loads(kept.read_text(encoding="utf-8"))
    presets = (("fuzz-fast", UBSAN), ("fuzz", ASAN))
    for preset, _ in presets:
        build(preset)  # both begin with the corpus of the second
    for (preset, sanitizers), seconds in zip(presets, options.fuzz_seconds, strict=True):
        folder = ROOT / "build" / preset / "tests"
        logs = {name: folder / f"{name}.log" for name in options.fuzzers}
        processes = {}
        for name, log in logs.items():
            limits = (f"-max_len={INPUTS[name][1]}", f"-max_total_time={seconds}", "-print_final_stats=1")
            found = ROOT / "build/fuzz/tests/corpus" / name
            corpora = (found, ROOT / "tests/c/corpus/failed")
            command = [f"./fuzz_{name}", *limits, f"-artifact_prefix=failed-{name}-", *corpora]
            with log.open("w", encoding="utf-8") as file:
                processes[name] = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        for name, process in processes.items():
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said = logs[name].read_text(encoding="utf-8", errors="replace")
            if status:
                raise FaultError(f"the fuzzer ended with {process.returncode}; {logs[name]} ends:\n{said[-3000:]}")
            total = totals[name]
            [executed] = counted(r"stat::number_of_executed_units: (\d+)", said)
            total["executions"][sanitizers] += executed
            total["processor_hours"] = round(total["processor_hours"] + (usage.ru_utime + usage.ru_stime) / 3600, 4)
            reached = re.search(r"DONE +cov: (\d+) ft: (\d+) corp: (\d+)", said).groups()
            total["edges"], total["features"], total["inputs"] = map(int, reached)
            replace(kept, json.dumps(totals, indent=2) + "\n")
    return fuzzing_figures(totals)


def fuzzing_figures(totals):
    """What stands in fuzzing.json, for the page."""
    figures = []
    for name, total in totals.items():
        figures += [(f"{INPUTS[name][0]}, under {by}", f"{count:,}") for by, count in total["executions"].items()]
        reached = f"{total['edges']:,} and {total['features']:,}; {total['inputs']:,}"
        figures.append(("edges and features reached; inputs that reach them", reached))
    by_sanitizers = Counter()
    for total in totals.values():
        by_sanitizers.update(total["executions"])
    hours = sum(total["processor_hours"] for total in totals.values())
    return [
        *figures,
        (f"all, of {FUZZING_GOAL:,}", f"{by_sanitizers.total():,} in {hours:.2f} hours of the processor"),
        ("of these under ASan and UBSan", f"{by_sanitizers[ASAN]:,}"),
    ]


def kills(options):
    """Trainings killed (SIGKILL) at random moments and resumed: thresholds as if nothing had been."""
    from kills import FRAMEWORKS, survive

    figures = []
    for framework in FRAMEWORKS:
        say(f"  {framework}")
        with tempfile.TemporaryDirectory() as folder:
            struck = survive(framework, Path(folder), options.kills)
        figures.append((framework, f"{options.kills} kills, {struck} while it was saving"))
    return figures


def threads(options):
    """Eight threads that push and ask one history."""
    seconds = str(options.thread_seconds)
    test = "tests/core/test_threads.py::test_history_of_eight_threads_holds_what_all_of_them_pushed"
    said = run(sys.executable, "-P", "-m", "pytest", "-rP", test, AUTOCLIP_THREAD_SECONDS=seconds)
    [norms] = counted(r"([\d,]+) norms of 8 threads", said)
    return [("seconds", seconds), ("norms at the end, the union of what each thread pushed", f"{norms:,}")]


def load(_):
    """A billion steps through a window, a hundred million without one, in one process: load.md has it all."""
    run(sys.executable, "-m", "bench", "load")
    with (RESULTS / "load/load.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figures = []
    for name in dict.fromkeys(row["history"] for row in rows):
        first, *_, last = (row for row in rows if row["history"] == name)
        figures += [
            (f"{name}, steps", f"{int(last['steps']):,}"),
            ("ns per step, at first; at last", f"{first['ns_per_step']}; {last['ns_per_step']}"),
            ("MiB of the history at last", f"{int(last['history_bytes']) / 2**20:.1f}"),
        ]
    return figures


def coverage(_):
    """Lines and branches that the tests reach: of the kernel (what is excluded is named), of the Python packages."""
    said = run("make", "coverage")
    [kernel] = re.findall("^[0-9]+ lines and .+ of the kernel.+", said, re.MULTILINE)
    packages = re.findall(r"^(autoclip_\w+) +(.+)$", said, re.MULTILINE)
    return [("kernel", kernel.rstrip(".")), *((name, " ".join(figures.split())) for name, figures in packages)]


def mutants(options):
    """Small faults put into kernel and core, one at a time; the tests must notice."""
    return judge(options.mutants)


def adapters(options):
    """Small faults put into the adapters, one at a time; a verdict stands until its file or its tests are edited."""
    return judge(options.adapter_mutants, "adapters", ROOT / "build/mutants")


def judge(count, under="", kept=None):
    """Of each kind of mutants, how many were killed."""
    from mutation import campaign, reason_of

    judged, survived = campaign(count, say=say, under=under, kept=kept)
    unexplained = [mutant for mutant in survived if not reason_of(mutant)]
    if unexplained or len(survived) > len(judged) / 10:
        found = "\n".join(map(str, unexplained or survived))
        raise FaultError(f"{len(survived)} of {len(judged)} survive\n{found}")
    killed = Counter(mutant.kind for mutant in judged if mutant not in survived)
    kinds = Counter(mutant.kind for mutant in judged)
    return [
        *((kind, f"{killed[kind]} of {count} killed") for kind, count in kinds.items()),
        ("survivors, each with its reason in tests/programs/register.toml", f"{len(survived)}"),
    ]


PARTS = {part.__name__: part for part in (faults, valgrind, coverage, mutants, adapters, fuzz, kills, threads, load)}


# --- The record -------------------------------------------------------------------------------------------------------


def report(record):
    """The Markdown page."""
    page = ["# Long runs", OPENING]
    for name, part in PARTS.items():
        if name in record:
            kept = record[name]
            page.append(f"## {name.capitalize()}\n\n{getdoc(part)}")
            page.append(table(["counted", "how much"], kept["figures"]))
            page.append(f"{kept['date']}, commit {kept['machine']['commit']}, {kept['minutes']} min.")
    page.append(facts_table({fact: value for fact, value in kept["machine"].items() if fact != "commit"}))
    return "\n\n".join(page) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    seconds = {"type": int, "nargs": 2, "metavar": ("UBSAN", "ASAN"), "default": [3600, 3600]}
    parser.add_argument("--fuzz-seconds", **seconds, help="of each fuzzer, under either (default: an hour each)")
    parser.add_argument("--fuzzers", nargs="+", choices=INPUTS, default=[*INPUTS], help="(default: all)")
    parser.add_argument("--mutants", type=int, default=220, help="how many to draw (default: %(default)s)")
    parser.add_argument("--adapter-mutants", type=int, default=150, help="how many to draw (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=30, help="of each framework (default: %(default)s)")
    parser.add_argument("--thread-seconds", type=int, default=60, help="(default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    path = RESULTS / "soak/soak.json"
    for name in options.parts or PARTS:
        say(f"{name}: {getdoc(PARTS[name])}")
        facts, began = machine_facts(), time.monotonic()
        figures = PARTS[name](options)
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record[name] = {
            "figures": figures,
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "minutes": round((time.monotonic() - began) / 60),
            "machine": facts,
        }
        replace(path, json.dumps(record, indent=2) + "\n")
        replace(path.with_suffix(".md"), report(record))
        say("\n".join(f"  {what}: {much}" for what, much in figures))


if __name__ == "__main__":
    try:
        main()
    except (FaultError, AssertionError) as error:
        raise SystemExit(f"error: {error}") from None
