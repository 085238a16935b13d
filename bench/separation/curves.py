"""What clipping changes while networks learn: SI-SDR and losses along the way, over seeds.

Every point is in the CSV as soon as it is measured, so a study that is interrupted shows how far it came. A run that
did not come to its end is trained again.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from bench.common import facts_table, replace, say, shown, table
from bench.separation.evaluate import evaluate
from bench.separation.losses import LOSSES
from bench.separation.table import (
    AUTOCLIP,
    NEVER,
    PAPER,
    csv_line,
    csv_of,
    keep_settings,
    plan,
    read_rows,
    settings_table,
    spread,
)
from bench.separation.train import Settings, Training, run_all


class Point(NamedTuple):
    """A network after so many steps. `si_sdr` is the mean over the test set; losses are those of its loss function."""

    loss: str
    percentile: float
    seed: int
    step: int
    si_sdr: float
    train_loss: float  # the mean since the point before
    validation_loss: float


def follow(settings: Settings, loss: str, percentile: float, seed: int, every: int, path: Path) -> None:
    """Train a network, and add a point to the CSV after every so many epochs."""
    training, losses = Training(settings, loss, percentile, seed), []
    for number, waves in enumerate(training.batches(), 1):
        losses.append(training.step(waves).loss_value)
        if number % (every * training.steps_per_epoch) == 0:
            si_sdr = evaluate(training.network, settings.mixtures()["test"], settings.device)
            point = Point(loss, percentile, seed, number, si_sdr, fmean(losses), training.validate())
            with path.open("a", encoding="utf-8") as file:
                file.write(csv_line(point))
            losses.clear()


def make_curves(
    settings: Settings,
    losses: Sequence[str],
    percentiles: Sequence[float],
    seeds: int,
    every: int,
    jobs: int,
    output: Path,
) -> list[Point]:
    """Train every network whose end is not in the CSV; the page is made at the end, or when interrupted."""
    facts = keep_settings(output / "separation_curves.json", settings)
    path = output / "separation_curves.csv"
    last = settings.epochs // every * every * settings.steps_per_epoch
    points = read_rows(Point, path)
    done = {point[:3] for point in points if point.step == last}
    replace(path, csv_of(Point, (point for point in points if point[:3] in done)))
    wanted = [run for run in plan(losses, percentiles, seeds) if run not in done]
    say(f"{len(done)} networks are there, {len(wanted)} to train, {jobs} at a time")
    try:
        for _ in run_all(follow, [(settings, *run, every, path) for run in wanted], jobs):
            say(f"{len({point[:3] for point in read_rows(Point, path) if point.step == last})} networks are there")
    finally:
        replace(output / "separation_curves.md", report(read_rows(Point, path), last, settings, facts))
    return read_rows(Point, path)


def by_step(points: Sequence[Point], loss: str, percentile: float, name: str) -> dict[int, dict[int, float]]:
    """Values by step and seed, of the steps where there are as many seeds as at any."""
    found: dict[int, dict[int, float]] = {}
    for point in sorted(points, key=lambda point: (point.step, point.seed)):
        if point[:2] == (loss, percentile):
            found.setdefault(point.step, {})[point.seed] = getattr(point, name)
    most = max(map(len, found.values()), default=0)
    return {step: seeds for step, seeds in found.items() if len(seeds) == most}


def by_percentile(points: Sequence[Point], loss: str) -> list[str]:
    """A heading and a table of all percentiles at the latest step that all have reached; nothing for two of them."""
    ends = {point[1:4]: point for point in points if point.loss == loss}
    percentiles = sorted({percentile for percentile, _, _ in ends})
    if len(percentiles) <= 2:
        return []
    common = set.intersection(*({end[1:] for end in ends if end[0] == percentile} for percentile in percentiles))
    if not common:
        return []
    step = max(step for _, step in common)
    seeds = [seed for seed, at in sorted(common) if at == step]
    rows = []
    for percentile in percentiles:
        found = [ends[percentile, seed, step] for seed in seeds]
        losses = fmean(point.train_loss for point in found)
        rows.append([f"{percentile:g}", spread([point.si_sdr for point in found]), shown(losses)])
    heading = f"### By percentile, after {step:,} steps, seeds: {len(seeds)}"
    return [heading, table(["p", "SI-SDR", "training loss"], rows)]


OPENING = """\
How far networks have come after so many steps, with AutoClip (p = 10) and without (p = 100): the mean SI-SDR in dB over
the test set, higher is better, and the mean training loss since the row before, lower is better. Means over seeds ±
their standard deviation; within a seed both have the same weights, data and order. The paper's networks, a hundred
times as large and trained four times as long, end at {paper}."""


def report(points: Sequence[Point], last: int, settings: Settings, facts: dict[str, str]) -> str:
    """The Markdown page; the study is whole when all networks have come to the last step."""
    losses = [loss for loss in LOSSES if any(point.loss == loss for point in points)]
    ends = dict(zip(LOSSES, zip(PAPER[AUTOCLIP], PAPER[NEVER], strict=True), strict=True))
    paper = ", ".join("{} against {} dB with {}".format(*ends[loss], LOSSES[loss].label) for loss in losses)
    parts = ["# Separating speech: along the way", OPENING.format(paper=paper)]
    came = max((point.step for point in points), default=0)
    if came < last:
        parts.append(f"The study was stopped after {came:,} of {last:,} steps.")
    for loss in losses:
        clipped, never, clipped_loss, never_loss = (
            by_step(points, loss, percentile, name)
            for name in ("si_sdr", "train_loss")
            for percentile in (AUTOCLIP, NEVER)
        )
        rows = [
            [
                f"{step:,}",
                *(spread([*found[step].values()]) for found in (clipped, never)),
                ", ".join(f"{value - never[step][seed]:+.2f}" for seed, value in clipped[step].items()),
                *(shown(fmean(found[step].values())) for found in (clipped_loss, never_loss)),
            ]
            for step in clipped
            if step in never and clipped[step].keys() == never[step].keys()
        ]
        heads = ["steps", "SI-SDR, p = 10", "p = 100", "seed by seed", "training loss, p = 10", "p = 100"]
        parts += [f"## {LOSSES[loss].label}", table(heads, rows), *by_percentile(points, loss)]
    parts += ["## Settings", settings_table(settings), facts_table(facts)]
    return "\n\n".join(parts) + "\n"
