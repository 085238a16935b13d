"""What every report shares: the machine's facts, measurements and their medians, CSV and Markdown, the C benchmark.

Measurements are kept as they came, one value per round; a median, smallest and largest value are taken from them here
and nowhere else. A quick run shows that a report works: its sizes are tiny, so its results never land in bench/results.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoclip_core import NormHistory
from bench import ROOT

RESULTS = ROOT / "bench" / "results"
QUICK_NOTE = "**A quick run at tiny sizes: it shows that the report works, and nothing else.**"


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class Options(argparse.Namespace):
    """What every report can be asked."""

    quick: bool
    rounds: int
    output: Path


def parser(docstring: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments of every report."""
    made = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="tiny sizes, and the results in a temporary folder")
    made.add_argument("--rounds", type=int, default=None, help=f"rounds per measurement (default {rounds}, quick 3)")
    made.add_argument("--output", type=Path, default=None, help="folder of the results (default bench/results/REPORT)")
    made.set_defaults(usual_rounds=rounds)
    return made


def parse(arguments: argparse.ArgumentParser) -> Options:
    """The options, with the defaults that depend on each other filled in."""
    options = arguments.parse_args(namespace=Options())
    options.rounds = options.rounds or (3 if options.quick else options.usual_rounds)
    if options.output is None:
        report = arguments.prog.rpartition(" ")[2]  # of `python -m bench REPORT`
        options.output = Path(tempfile.mkdtemp(prefix="autoclip-bench-")) if options.quick else RESULTS / report
    options.output.mkdir(parents=True, exist_ok=True)
    return options


# --- The machine ------------------------------------------------------------------------------------------------------


def _output(*command: str) -> str:
    """The output of a command, empty where there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _first_match(path: str, key: str) -> str:
    """The value of `key : value` in a file such as /proc/cpuinfo."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def cache_bytes() -> int:
    """The size of the largest cache that the system reports, 0 if it reports none."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("ascii").strip()
        largest = max(largest, int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return largest


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit of this checkout, marked when there are changes on top of it (other than in bench/results)."""
    changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return (_output("git", "rev-parse", "--short", "HEAD") or "none") + (" with changes" if changed else "")


def machine_facts(packages: Iterable[str] = ()) -> dict[str, str]:
    """What the numbers depend on. Nothing here names the machine itself."""
    cpu = _first_match("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    model = _first_match("/proc/cpuinfo", "model\t")
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    facts = {
        "CPU": f"{cpu}, model {model}" if model else cpu,
        "cores": str(os.cpu_count()),
        "largest cache": f"{cache_bytes() / 2**20:.0f} MiB as reported" if cache_bytes() else "not reported",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "huge pages": huge_pages.read_text("ascii").strip() if huge_pages.exists() else "not reported",
        "system": f"{platform.system()} on {platform.machine()}",
        "compiler": _output(os.environ.get("CXX", "c++"), "--version").partition("\n")[0] or "none",
        "Python": platform.python_version(),
    }
    facts |= {name: _package(name) for name in ("autoclip-core", "numpy", *packages)}
    facts["backend"] = NormHistory().backend
    facts["commit"] = commit()
    facts["load when it began"] = f"{os.getloadavg()[0]:.2f} running processes"
    return facts


# --- Measurements -----------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What one series of values is about; `size` is the number of norms, or of bytes for the loads by themselves."""

    experiment: str
    stream: str
    size: int
    subject: str
    metric: str


@dataclass
class Measurements:
    """Values by key, in the order in which they came."""

    values: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, key: Key, value: float) -> None:
        self.values.setdefault(key, []).append(value)

    def update(self, other: "Measurements") -> None:
        self.values.update(other.values)

    def median(self, experiment: str, stream: str, size: int, subject: str, metric: str) -> float | None:
        """The median over the rounds, None if this was not measured."""
        values = self.values.get(Key(experiment, stream, size, subject, metric))
        return statistics.median(values) if values else None

    def lines(self) -> Iterator[str]:
        """Every value on a line of its own, for another process."""
        for key, values in self.values.items():
            yield from ("\t".join(map(str, [*key, number, value])) for number, value in enumerate(values))

    @classmethod
    def from_lines(cls, text: str) -> "Measurements":
        """Read `lines` back; the C benchmark prints the same."""
        measured = cls()
        for line in text.splitlines():
            experiment, stream, size, subject, metric, _, value = line.split("\t")
            measured.add(Key(experiment, stream, int(size), subject, metric), float(value))
        return measured

    def write(self, path: Path) -> None:
        """One line per key: the number of rounds, their median, smallest and largest value."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Key._fields, "rounds", "median", "smallest", "largest"])
            for key, values in self.values.items():
                numbers = (statistics.median(values), min(values), max(values))
                writer.writerow([*key, len(values), *(f"{number:.6g}" for number in numbers)])


def ratio(value: float | None, reference: float | None) -> float | None:
    """value / reference, None if either is missing or the reference is 0."""
    return value / reference if value is not None and reference else None


def shown(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number as a reader wants it: `digits` significant ones, thousands separated; a dash where there is none."""
    if value is None:
        return "-"
    text = f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")
    return f"{text} {unit}".rstrip()


def power(size: int) -> str:
    """10^k for round numbers."""
    exponent = len(str(size)) - 1
    return f"10^{exponent}" if size == 10**exponent else f"{size:,}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts_table(facts: dict[str, str]) -> str:
    """The machine's facts as a Markdown table."""
    return table(["machine", "of this run"], facts.items()).replace("---:", "---")


# --- Training steps ---------------------------------------------------------------------------------------------------

CONSTANT = "constant threshold"


class StepSubject(NamedTuple):
    """A training step whose clipping is measured; `home` is where the norms of its history are."""

    kind: str
    name: str
    size: int
    home: str
    target: str = "-"


def norms_like(measured: Sequence[float], size: int) -> NDArray[np.float32]:
    """So many norms distributed like the measured ones, each a little different."""
    random = np.random.default_rng(2)
    return (random.choice(measured, size) * random.uniform(0.98, 1.02, size)).astype(np.float32)


def measure_steps(
    experiment: str,
    subjects: Sequence[StepSubject],
    build: Callable[[StepSubject], Callable[[int], float]],
    *,
    rounds: int,
    steps: int,
    quick: bool,
) -> Measurements:
    """Every subject in every round, and how it compares with the constant threshold of its kind in that round.

    What `build` returns takes so many steps and returns the microseconds per step. Each subject is built twice (once if
    quick), because where one lies in memory makes it some percent faster or slower, and in each round all of them take
    turns in an order drawn anew, because one that follows another finds the caches as that one left them.
    """
    runs = []
    for subject in subjects:
        say(f"  {subject.kind}: {subject.name}, {subject.size:,}")
        runs += [(subject, build(subject)) for _ in range(1 if quick else 2)]
    measured = Measurements()
    order = random.Random(0)
    for count in range(rounds):
        say(f"  round {count + 1} of {rounds}")
        order.shuffle(runs)
        times: dict[StepSubject, list[float]] = {subject: [] for subject in subjects}
        for subject, run in runs:
            run(steps // 10)
            times[subject].append(run(steps))
        means = {subject: statistics.mean(values) for subject, values in times.items()}
        constants = {subject.kind: mean for subject, mean in means.items() if subject.name == CONSTANT}
        for (kind, name, size, _, _), mean in means.items():
            measured.add(Key(experiment, kind, size, name, "us per step"), mean)
            measured.add(Key(experiment, kind, size, name, "us more"), mean - constants[kind])
            measured.add(Key(experiment, kind, size, name, "ratio"), mean / constants[kind])
    return measured


def step_rows(
    experiment: str, measured: Measurements, subjects: Iterable[StepSubject], comparisons: Sequence[str]
) -> list[list[str]]:
    """One row per subject: what it is, its time, the comparisons asked for, its target."""
    return [
        [
            f"{kind}: {name}" + (f", {size:,} norms" if size else ""),
            shown(measured.median(experiment, kind, size, name, "us per step")),
            *(
                "-" if name == CONSTANT else shown(measured.median(experiment, kind, size, name, comparison))
                for comparison in comparisons
            ),
            target,
        ]
        for kind, name, size, _, target in subjects
    ]


# --- The C benchmark --------------------------------------------------------------------------------------------------


class NoCompilerError(RuntimeError):
    """The C benchmark cannot be built here; the message says what is missing."""


def build_kernel() -> Path:
    """Build bench/c with cmake, and the kernel with it; the path of the program.

    Raises:
        NoCompilerError: if cmake or a C++ compiler is missing, or the build fails.
    """
    for tool in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(tool) is None:
            raise NoCompilerError(f"{tool} is not installed")
    build = ROOT / "build" / "bench"
    source = ["-S", str(ROOT / "bench" / "c"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    for command in (["cmake", *source], ["cmake", "--build", str(build), "--target", "kernel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoCompilerError(f"the C benchmark does not build:\n{done.stdout}{done.stderr}")
    return build / "kernel"


def run_kernel(
    program: Path,
    experiment: str,
    stream: str,
    size: int,
    *,
    rounds: int,
    operations: int,
    subjects: str = "all",
    flush_bytes: int = 0,
    environment: dict[str, str] | None = None,
) -> Measurements:
    """One run of the C benchmark: what bench/c/kernel.cpp prints, read back."""
    say(f"  C: {experiment}, {stream}, {size:,}, {subjects}")
    command = [program, experiment, stream, size, rounds, operations, subjects, flush_bytes]
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **(environment or {})},
    )
    return Measurements.from_lines(done.stdout)
