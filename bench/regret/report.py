"""Progress lost: tables of every clipper over every task, and the picture of thresholds beside percentiles.

Lost = (test loss - best) / (trivial - best): 0 % for the best that any clipper reached, 100 % for a prediction that
ignores its inputs; a training that diverged lost 100 %. Losses are means over the seeds.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.common import QUICK_NOTE, Options, facts_table, machine_facts, shown, table
from bench.regret.clippers import (
    DRIFTING,
    LONG,
    MAKERS,
    NONE,
    OTHERS,
    PERCENTILES,
    THRESHOLDS,
    VARIANTS,
    fixed_name,
    percentile_name,
)
from bench.regret.study import OPTIMIZERS, Cell, Results
from bench.regret.tasks import CLEAN, DRIFTS, SPOILED, TWINS, Task

RUINED = 0.5
DRAWN = (10.0, 50.0, 90.0)

OPENING = """\
What this isolates: what a clipper does to the loss on data not learned from, everything else being equal. {tasks} small
tasks (networks of a few thousand weights, 300 to 1,000 steps, a learning rate that falls to 0), rates in half decades
from one grid per optimizer, every clipper as its authors publish it.

*Progress lost* is (test loss - best) / (loss of the trivial predictor - best): 0 for the best that any clipper reached
in this task, 100 for a network that learned nothing or diverged. With **the rate one has** every clipper runs with the
learning rate that is best *without clipping* on clean batches; nothing is tuned for it. With **its own rate** each runs
with the one that is best for it. Rates are chosen by validation rows, the figures are of test rows.

{cells:,} of {all_cells:,} trainings are in `regret.csv`: {seeds}. {rest}Differences
of a few per cent say little: that is what the seeds alone do."""
SHORT = f"""\
Progress lost, %: mean / worst over the tasks. *Ruined*: they lose more than {RUINED:.0%} with the rate one has."""
OPEN = """\
Variants of AutoClip. The library has the windows and the scope per tensor; the others exist in this study only."""
RATES = """\
The best rate of each setting, as a multiple of the best without clipping."""
DRIFT = """\
Tasks of 6,000 steps whose norms fall or rise a hundred times, with windows of up to half of them. *Clipped*: the share
of the steps, with the rate one has; without drift it is 100 - p. Seeds: {seeds}."""
SCALES = """\
Norms without clipping, with the rate one has; and the fixed decade that loses least with that rate."""


class Lost(NamedTuple):
    """Of one clipper in one task, from 0 to 1; None where trainings are missing."""

    same_rate: float | None
    own_rate: float | None


Table = dict[str, dict[str, Lost]]  # task, clipper


def complete_seeds(results: Results, task: str) -> set[int]:
    """Nothing is taken of a seed that has only a part of the trainings: clippers are compared over the same seeds."""
    trained = Counter(cell.seed for cell in results if cell.task == task)
    return {seed for seed, count in trained.items() if count == max(trained.values())}


def means(results: Results, task: str) -> dict[str, dict[float, tuple[float, float]]]:
    """Validation and test losses by clipper and rate: means over seeds, none above the trivial loss."""
    found: dict[str, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    seeds = complete_seeds(results, task)
    for cell, result in results.items():
        if cell.task == task and cell.seed in seeds:
            losses = (min(result.validation, result.trivial), min(result.test, result.trivial))
            found[cell.clipper][cell.rate].append(losses)
    return {
        clipper: {rate: (statistics.fmean(v), statistics.fmean(t)) for rate, (v, t) in unzipped(by_rate).items()}
        for clipper, by_rate in found.items()
    }


def unzipped(by_rate: dict[float, list[tuple[float, float]]]) -> dict[float, tuple[Sequence[float], ...]]:
    return {rate: tuple(zip(*losses, strict=True)) for rate, losses in by_rate.items()}


def best_rate(by_rate: dict[float, tuple[float, float]]) -> float:
    return min(by_rate, key=lambda rate: by_rate[rate][0])


def rate_without_clipping(results: Results, task: Task) -> float | None:
    """The one that a user has: the best on clean batches."""
    twin = next((twin.name for twin in TWINS if twin.twin_of == task.name), task.name)
    unclipped = means(results, twin).get(NONE)
    return best_rate(unclipped) if unclipped else None


def lost_in(results: Results, task: Task) -> dict[str, Lost]:
    by_clipper = means(results, task.name)
    rate = rate_without_clipping(results, task)
    trivial = next((result.trivial for cell, result in results.items() if cell.task == task.name), math.nan)
    own = {clipper: by_rate[best_rate(by_rate)][1] for clipper, by_rate in by_clipper.items()}
    same = {clipper: by_rate[rate][1] for clipper, by_rate in by_clipper.items() if rate in by_rate}
    best = min([*own.values(), *same.values()], default=math.nan)

    def share(loss: float | None) -> float | None:
        return None if loss is None else (loss - best) / (trivial - best)

    return {clipper: Lost(share(same.get(clipper)), share(own.get(clipper))) for clipper in by_clipper}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def of(lost: Table, tasks: Iterable[Task], clipper: str, kind: str) -> list[float | None]:
    return [getattr(lost[task.name].get(clipper, Lost(None, None)), kind) for task in tasks]


def mean_and_worst(shares: Sequence[float | None]) -> list[float | None]:
    """Of all tasks, or of none: a mean over others would not compare."""
    known = [share for share in shares if share is not None]
    return [statistics.fmean(known), max(known)] if known and len(known) == len(shares) else [None, None]


def rows_of(lost: Table, clippers: Iterable[str], tasks: Sequence[Task], kind: str) -> list[list[str]]:
    found = []
    for clipper in clippers:
        shares = of(lost, tasks, clipper, kind)
        found.append([clipper, *map(percent, [*shares, *mean_and_worst(shares)])])
    return found


def summary(lost: Table, clippers: Iterable[str], groups: dict[str, Sequence[Task]], *, ruined: bool = True) -> str:
    """Means and worst cases over groups of tasks; how many tasks are ruined with the rate one has."""
    rows = []
    for clipper in clippers:
        row = [clipper]
        for tasks in groups.values():
            shares = [mean_and_worst(of(lost, tasks, clipper, kind)) for kind in Lost._fields]
            row += [" / ".join(map(percent, share)) for share in shares]
        known = [share for share in of(lost, CLEAN + SPOILED, clipper, "same_rate") if share is not None]
        row += [f"{sum(share > RUINED for share in known)} of {len(known)}"] * ruined
        rows.append(row)
    header = [f"{group}, {kind}" for group in groups for kind in ("the rate one has", "its own rate")]
    return table(["", *header, *["ruined"] * ruined], rows)


def own_rates(results: Results, clippers: Iterable[str], tasks: Sequence[Task]) -> str:
    """The rate that is best for each setting, beside the one that is best without clipping."""
    found = {task: (rate_without_clipping(results, task), means(results, task.name)) for task in tasks}
    rows = [
        [
            clipper,
            *(shown(best_rate(m[clipper]) / rate, 1) if rate and clipper in m else "-" for rate, m in found.values()),
        ]
        for clipper in clippers
    ]
    return table(["", *(task.name for task in tasks)], rows)


def drifts(results: Results, lost: Table) -> str:
    """Windows where norms drift: what is lost, and how many of the steps are clipped."""
    rows = []
    for clipper in DRIFTING:
        row = [clipper]
        for task in DRIFTS:
            rate = rate_without_clipping(results, task)
            cells = (Cell(task.name, clipper, rate, seed) for seed in complete_seeds(results, task.name))
            shares = [results[cell].clipped for cell in cells if cell in results]
            row += [percent(of(lost, [task], clipper, kind)[0]) for kind in Lost._fields]
            row.append(percent(statistics.fmean(shares) if shares else None))
        rows.append(row)
    kinds = ("the rate one has", "its own rate", "clipped, %")
    return table(["", *(f"{task.name}, {kind}" for task in DRIFTS for kind in kinds)], rows)


def norms(results: Results, lost: Table, tasks: Iterable[Task]) -> str:
    """The scales: norms without clipping at the rate one has, and the decade that a search would have found there."""
    rows = []
    for task in tasks:
        rate = rate_without_clipping(results, task)
        runs = [r for c, r in results.items() if c[:3] == (task.name, NONE, rate)]
        if not runs:
            continue
        fixed = {threshold: lost[task.name].get(fixed_name(threshold)) for threshold in THRESHOLDS}
        known = {threshold: cell.same_rate for threshold, cell in fixed.items() if cell and cell.same_rate is not None}
        decade = min(known, key=known.__getitem__, default=None)
        rows.append(
            [
                task.name,
                task.about,
                shown(rate, 1),
                *(
                    shown(statistics.median(getattr(run, name) for run in runs))
                    for name in ("median_norm", "high_norm", "largest_norm")
                ),
                "-" if decade is None else f"{decade:g}",
                percent(known.get(decade)) if decade is not None else "-",
            ]
        )
    header = ["task", "what it is", "rate", "median norm", "99 %", "largest", "best decade", "lost there, %"]
    return table(header, rows)


# --- The picture ------------------------------------------------------------------------------------------------------


def draw(lost: Table, tasks: Sequence[Task], kind: str, path: Path) -> None:
    """Fixed thresholds, a line per task; beside them columns of no clipping and AutoClip, a dot per task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (valleys, columns) = plt.subplots(
        1, 2, figsize=(11, 4.8), sharey=True, width_ratios=[3, 1.7], layout="constrained"
    )
    shown_tasks = [task for task in tasks if lost[task.name]]
    colours = plt.get_cmap("tab20")
    choices = [NONE, *map(percentile_name, DRAWN)]
    for number, task in enumerate(shown_tasks):
        style = {"color": colours(number), "label": task.name, "linestyle": "--" if task.spoiled else "-"}
        shares = [of(lost, [task], fixed_name(threshold), kind)[0] for threshold in THRESHOLDS]
        points = [(at, 100 * share) for at, share in zip(THRESHOLDS, shares, strict=True) if share is not None]
        valleys.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, **style)
        for place, clipper in enumerate(choices):
            (share,) = of(lost, [task], clipper, kind)
            if share is not None:
                aside = place + 0.5 * (number / max(1, len(shown_tasks) - 1) - 0.5)
                columns.plot(aside, 100 * share, marker="o", markersize=6, color=colours(number))
    valleys.set_xscale("log")
    valleys.set_xlabel("a fixed threshold")
    valleys.set_ylabel("progress lost, %\n(0: the best found, 100: nothing learned)")
    columns.set_xticks(range(len(choices)), ["no\nclipping", *(f"AutoClip\n{name}" for name in choices[1:])])
    columns.set_xlim(-0.6, len(choices) - 0.4)
    for panel in (valleys, columns):
        panel.set_ylim(-3, 103)
        panel.grid(visible=True, axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
        title="a line and a dot per task; dashed: with bad batches",
        title_fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- The page ---------------------------------------------------------------------------------------------------------


def make_report(results: Results, all_cells: int, options: Options) -> list[Path]:
    tasks = CLEAN + SPOILED
    lost = {task.name: lost_in(results, task) for task in tasks + DRIFTS}
    batches = {"clean batches": CLEAN, "bad batches": SPOILED}
    optimizers = {name: [task for task in CLEAN if task.optimizer == name] for name in OPTIMIZERS}
    own = [clipper for clipper in MAKERS if clipper not in {*OTHERS, *VARIANTS, *LONG}]
    ends = [NONE, percentile_name(10.0), percentile_name(90.0)]
    by_seed = Counter(cell.seed for cell in results)
    opening = OPENING.format(
        tasks=len(tasks),
        cells=len(results),
        all_cells=all_cells,
        seeds=", ".join(f"{count:,} with seed {seed}" for seed, count in sorted(by_seed.items())),
        rest="" if len(results) == all_cells else "`python -m bench regret` goes on with the others. ",
    )
    page = ["# Does it help?", opening, *([QUICK_NOTE] if options.quick else [])]
    page += [
        "With the rate one has:",
        "![Progress lost by fixed thresholds, beside AutoClip, with the rate one has](regret.png)",
        "With the own rate of each setting, searched for it:",
        "![The same with the best rate of each setting](own_rate.png)",
        "## In short",
        SHORT,
        summary(lost, own, batches),
        "### By optimizer, clean batches",
        summary(lost, [NONE, *map(percentile_name, PERCENTILES)], optimizers, ruined=False),
        "### Its own rate",
        RATES,
        own_rates(results, [fixed_name(1.0), *map(percentile_name, PERCENTILES)], tasks),
        "### Others, as their authors publish them",
        summary(lost, [*ends, *OTHERS], batches),
        "### What the paper leaves open",
        OPEN,
        summary(lost, [*ends, *VARIANTS], batches),
        "### Norms that drift",
        DRIFT.format(seeds=min(len(complete_seeds(results, task.name)) for task in DRIFTS)),
        drifts(results, lost),
        "## The scales",
        SCALES,
        norms(results, lost, tasks),
        "## Task by task",
    ]
    for title, group in (("Clean batches", CLEAN), ("Bad batches", SPOILED)):
        for words, kind in (("the rate one has", "same_rate"), ("its own rate", "own_rate")):
            header = ["", *(task.name for task in group), "mean", "worst"]
            page += [f"### {title}, {words}", table(header, rows_of(lost, [*own, *OTHERS, *VARIANTS], group, kind))]
    page.append(facts_table(machine_facts(("torch", "scikit-learn"))))
    written = [options.output / name for name in ("regret.md", "regret.png", "own_rate.png")]
    written[0].write_text("\n\n".join(page) + "\n", encoding="utf-8")
    draw(lost, tasks, "same_rate", written[1])
    draw(lost, tasks, "own_rate", written[2])
    return written
