"""A billion observes in one process: does the time of a step, or the memory, drift?"""

import csv
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoclip_core import NormHistory
from bench.common import QUICK_NOTE, facts_table, machine_facts, parse, parser, say, shown, table

OPENING = """\
What this isolates: whether a history that is used for longer than any training lasts grows slow or large. Both
histories live in one process, the window first, and every norm is observed: remembered, and answered with the 10th
percentile. The norms are log-normal around a scale that drifts over four decades, there and back again every {period:,}
steps, and come by `observe_many` in blocks of {block:,}. Time is that of the thread, so that a shared machine shows
little; memory is what the history holds (`nbytes`) and what the process occupies, a block of norms and its answers
included.

At the end `check()` looks at every norm, and the percentile is compared with `numpy.percentile` of what the history
holds: in the window also of the norms that were sent last."""

PERCENTILE = 10.0
WINDOW = 131_072
PERIOD = 10**7
DECADES = 4.0
WINDOWED, UNBOUNDED = f"window of {WINDOW:,}", "the whole history"


class Point(NamedTuple):
    """What was seen after so many steps; the time is the mean over the block that ended there."""

    history: str
    steps: int
    ns_per_step: float
    history_bytes: int
    process_bytes: int


def occupied() -> int:
    """The resident memory of this process, in bytes."""
    words = Path("/proc/self/status").read_text("ascii").split()
    return int(words[words.index("VmRSS:") + 1]) * 1024


def blocks(steps: int, block: int) -> Iterator[NDArray[np.float64]]:
    """So many norms in blocks, their scale drifting."""
    random = np.random.default_rng(0)
    for start in range(0, steps, block):
        place = np.arange(start, min(start + block, steps)) / PERIOD
        yield 10.0 ** (DECADES / 2 * np.sin(2 * np.pi * place)) * random.lognormal(0.0, 0.5, len(place))


def observe(name: str, history: NormHistory, steps: int, block: int) -> list[Point]:
    """Send so many norms through a history, look at it after every block, and at all of it at the end."""
    points: list[Point] = []
    done = 0
    last = np.empty(0)
    for norms in blocks(steps, block):
        begin = time.thread_time_ns()
        thresholds = history.observe_many(norms, [PERCENTILE])
        taken = time.thread_time_ns() - begin
        done += len(norms)
        points.append(Point(name, done, taken / len(norms), history.nbytes, occupied()))
        if history.window:
            last = np.concatenate([last, norms])[-history.window :]
        if len(points) % max(1, steps // block // 20) == 0:
            say(f"  {name}: {done:,} steps, {points[-1].ns_per_step:.0f} ns")
    history.check()
    values = history.values()
    assert len(values) == (min(steps, history.window) if history.window else steps)
    assert thresholds[-1, 0] == np.percentile(values, PERCENTILE)
    assert not history.window or np.array_equal(values, np.sort(last))
    return points


def stretches(points: list[Point], ends: list[int]) -> Iterator[list[str]]:
    """A row for every stretch of a run: the median time within, the memory at its end."""
    for begin, end in pairwise([0, *ends]):
        inside = [point for point in points if begin < point.steps <= end]
        held = min(end, WINDOW) if inside[-1].history == WINDOWED else end
        yield [
            f"to {end:,}",
            shown(statistics.median(point.ns_per_step for point in inside)),
            shown(inside[-1].history_bytes / 2**20, 4),
            shown(inside[-1].history_bytes / held, 4),
            shown(inside[-1].process_bytes / 2**20, 4),
        ]


def plot(points: list[Point], path: Path) -> None:
    """Time per step above, memory below; the window to the left, the whole history to the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", sharey="row", layout="constrained")
    for column, name in enumerate((WINDOWED, UNBOUNDED)):
        own = [point for point in points if point.history == name]
        steps = [point.steps for point in own]
        above, below = panels[:, column]
        above.plot(steps, [point.ns_per_step for point in own], ".", markersize=3, color="#0072B2")
        below.semilogy(steps, [point.process_bytes / 2**20 for point in own], color="#D55E00", label="the process")
        below.semilogy(steps, [point.history_bytes / 2**20 for point in own], color="#0072B2", label="the history")
        above.set_title(name, loc="left")
        below.set_xlabel("steps")
        for panel in (above, below):
            panel.set_xscale("linear" if name == WINDOWED else "log")
            panel.grid(visible=True, which="major", color="0.9")
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylim(bottom=0.0)
    panels[0, 0].set_ylabel("nanoseconds per step")
    panels[1, 0].set_ylabel("MiB")
    panels[1, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    options = parse(parser(__doc__, rounds=1))
    facts = machine_facts()
    scale = 10**4 if options.quick else 1
    block = 10**6 // scale
    sizes = {WINDOWED: 10**9 // scale, UNBOUNDED: 10**8 // scale}
    say("python -m bench load")
    points = observe(WINDOWED, NormHistory(window=WINDOW), sizes[WINDOWED], block)
    points += observe(UNBOUNDED, NormHistory(), sizes[UNBOUNDED], block)
    kept = [point for point in points if point.steps % (sizes[point.history] // 100) == 0]
    with (options.output / "load.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        writer.writerows(point._replace(ns_per_step=round(point.ns_per_step, 1)) for point in kept)
    header = ["steps", "ns per step", "MiB of the history", "bytes per norm", "MiB of the process"]
    page = ["# A billion steps", OPENING.format(period=PERIOD, block=block), *([QUICK_NOTE] if options.quick else [])]
    page.append("![Time per step and memory over the steps](load.png)")
    tenths = [sizes[WINDOWED] * tenth // 10 for tenth in range(1, 11)]
    doublings = [sizes[UNBOUNDED] // part for part in (100, 50, 20, 10, 5, 2, 1)]
    for (name, steps), ends in zip(sizes.items(), (tenths, doublings), strict=True):
        rows = stretches([point for point in points if point.history == name], ends)
        page += [f"## {steps:,} steps, {name}", table(header, rows)]
    page.append(facts_table(facts))
    (options.output / "load.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    plot(kept, options.output / "load.png")
    say(f"written: load.csv, load.md and load.png in {options.output}")


if __name__ == "__main__":
    main()
