"""The pictures: Table 1 as a heat map beside the paper's, learning curves, and the four panels of Fig. 1."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from bench.separation.curves import Point, by_step
from bench.separation.dynamics import Run
from bench.separation.losses import LOSSES
from bench.separation.table import AUTOCLIP, NEVER, PAPER, PERCENTILES, Cell

COLOURS = {AUTOCLIP: "#0072B2", NEVER: "#D55E00"}
SMOOTHED = 10
NAMES = {AUTOCLIP: "AutoClip, p = 10", NEVER: "no clipping, p = 100"}


def draw_table(cells: Sequence[Cell], path: Path) -> None:
    """SI-SDR by percentile and loss beside the paper's, coloured by how far it is above p = 100 with the same seeds."""
    found = {cell[:3]: cell.si_sdr for cell in cells}
    values, above = np.full((2, len(PERCENTILES), len(LOSSES)), np.nan)
    for (row, percentile), (column, loss) in product(enumerate(PERCENTILES), enumerate(LOSSES)):
        seeds = {seed for name, p, seed in found if (name, p) == (loss, percentile)}
        if seeds:
            values[row, column] = fmean(found[loss, percentile, seed] for seed in seeds)
        if shared := [seed for seed in seeds if (loss, NEVER, seed) in found]:
            above[row, column] = fmean(found[loss, percentile, seed] - found[loss, NEVER, seed] for seed in shared)
    paper = np.array([*PAPER.values()])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    drawn = (("this run", values, above), ("the paper", paper, paper - paper[-1]))
    for panel, (title, numbers, colours) in zip(panels, drawn, strict=True):
        image = panel.imshow(colours, cmap="RdBu", vmin=-2.0, vmax=2.0, aspect="auto")
        for (row, column), number in np.ndenumerate(numbers):
            if np.isfinite(number):
                ink = "white" if abs(colours[row, column]) > 1.3 else "black"
                panel.text(column, row, f"{number:.1f}", ha="center", va="center", color=ink)
        panel.set_title(title)
        panel.set_xticks(range(len(LOSSES)), [loss.label for loss in LOSSES.values()])
        panel.set_yticks(range(len(PERCENTILES)), [f"{percentile:g}" for percentile in PERCENTILES])
        panel.set_xlabel("loss")
    panels[0].set_ylabel("percentile p")
    figure.colorbar(image, ax=panels, label="dB above no clipping (p = 100) with the same seeds", extend="both")
    figure.savefig(path, dpi=150)


def draw_curves(points: Sequence[Point], path: Path) -> None:
    """SI-SDR above and the training loss below, over the steps, a column per loss; bands reach from seed to seed."""
    losses = [loss for loss in LOSSES if any(point.loss == loss for point in points)]
    figure = Figure(figsize=(1.5 + 4.0 * len(losses), 6.0), layout="constrained")
    panels = figure.subplots(2, len(losses), sharex=True, squeeze=False)
    for column, loss in enumerate(losses):
        for percentile in (NEVER, AUTOCLIP):
            for panel, name in zip(panels[:, column], ("si_sdr", "train_loss"), strict=True):
                curve = by_step(points, loss, percentile, name)
                seeds = [[*values.values()] for values in curve.values()]
                means, lowest, highest = ([*map(of, seeds)] for of in (fmean, min, max))
                panel.plot([*curve], means, color=COLOURS[percentile], marker=".", label=NAMES[percentile])
                panel.fill_between([*curve], lowest, highest, color=COLOURS[percentile], alpha=0.2, linewidth=0)
        place = list(LOSSES).index(loss)
        ends = f"{PAPER[AUTOCLIP][place]:g} against {PAPER[NEVER][place]:g} dB"
        panels[0][column].set_title(f"{LOSSES[loss].label}\nthe paper's large networks: {ends}", fontsize="medium")
        panels[1][column].set(xlabel="training step", ylabel="training loss, dB" if loss == "snr" else "training loss")
        panels[1][column].locator_params(axis="x", nbins=5)
        panels[1][column].xaxis.set_major_formatter("{x:,.0f}")
    panels[0][0].set_ylabel("SI-SDR on the test set, dB")
    panels[0][0].legend(frameon=False, loc="lower right")
    for panel in panels.flat:
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_dynamics(runs: Sequence[Run], path: Path) -> None:
    """Step size and loss over time above, gradient norm against smoothness below."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for run in sorted(runs, key=lambda run: -run.percentile):
        steps = [record.step for record in run.records]
        look = {"color": COLOURS[run.percentile]}
        panels[0][0].plot(steps, [record.step_size for record in run.records], **look, label=NAMES[run.percentile])
        losses = [record.loss_value for record in run.records]
        means = [fmean(losses[max(0, end - SMOOTHED) : end]) for end in range(1, len(losses) + 1)]
        panels[0][1].plot(steps, losses, **look, alpha=0.3, linewidth=0.8)
        panels[0][1].plot(steps, means, **look, label=f"{NAMES[run.percentile]}, mean of {SMOOTHED} records")
    for panel, title in zip(panels[0], ("step size", "training loss"), strict=True):
        panel.set(title=title, xlabel="training step")
        panel.legend(frameon=False)
    for panel, run in zip(panels[1], sorted(runs, key=lambda run: -run.percentile), strict=True):
        norms, smoothness = ([getattr(record, name) for record in run.records] for name in ("grad_norm", "smoothness"))
        panel.scatter(norms, smoothness, 8, COLOURS[run.percentile], linewidths=0)
        panel.set(
            title=f"{NAMES[run.percentile]}: r = {run.r():.2f}", xlabel="gradient norm", ylabel="local smoothness"
        )
        panel.set(xscale="log", yscale="log")
        panel.sharex(panels[1][0])
        panel.sharey(panels[1][0])
        if run.percentile != NEVER:
            threshold = run.records[-1].clip_threshold
            panel.axvline(threshold, color="black", linestyle="--", label=f"threshold at the end: {threshold:.2g}")
            panel.legend(frameon=False, loc="lower right")
    for panel in panels.flat:
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
