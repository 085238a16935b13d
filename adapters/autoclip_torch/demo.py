"""AutoClip at work: bad batches, three units of the loss, and one setting that works in all of them.

A small network learns scikit-learn's handwritten digits with SGD. One batch in a hundred is spoiled as happens in
practice: its pixels were not divided by 255. The loss is multiplied by 1e-4, 1 and 1e4, the learning rate divided by
the same factor, so that without clipping all three are one and the same training. Each runs without clipping, with a
fixed threshold of 1, and with AutoClip at two percentiles.

What may not change, or the comparison is no longer fair: the learning rate is the best one of NO CLIPPING on clean
batches, searched here and not tuned for any other row; all rows share initial weights, batches and spoiled batches by
the seed; the digits that choose the rate are not those that judge the result.

Run it with `python -m autoclip_torch.demo`. Needs the extra: pip install "autoclip-core[demo]".
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoclip_torch import attach

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

BATCH = 32
MOMENTUM = 0.9
SPOILED_SHARE, SPOILED_FACTOR = 0.01, 255.0
FIXED_THRESHOLD = 1.0
LOSS_SCALES = {"1e-4": 1e-4, "1": 1.0, "1e4": 1e4}
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
GUESSING = math.log(10)  # the loss of a network that has learned nothing
JUDGEMENTS = 40  # how often a run is judged on the validation digits along the way

Stepper = Callable[[], tuple[float, float]]


class Digits(NamedTuple):
    """Images, shape (n, 64), from 0 to 1, and the digits that they show, shape (n,)."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The digits to learn, those that choose the learning rate and draw the curves, and those that judge."""

    training: Digits
    validation: Digits
    test: Digits


class Run(NamedTuple):
    """One training: a norm (before clipping) and a threshold per step, and losses of digits not learned from."""

    arm: str
    loss_scale: str
    seed: int
    norms: list[float]
    thresholds: list[float]
    spoiled: list[bool]
    validation: list[float]
    test: float

    @property
    def clipped_share(self) -> float:
        """The share of the steps with a finite norm above the threshold, from 0 to 1."""
        pairs = zip(self.norms, self.thresholds, strict=True)
        return sum(threshold < norm < math.inf for norm, threshold in pairs) / len(self.norms)


# Each arm takes an optimizer and returns a function that makes one step with it: clip, update, tell norm and threshold.


def without_clipping(optimizer: torch.optim.Optimizer) -> Stepper:
    """Steps that only measure."""
    return clipped_at(math.inf)(optimizer)


def clipped_at(threshold: float) -> Callable[[torch.optim.Optimizer], Stepper]:
    """Steps with PyTorch's own function and a threshold set by hand."""

    def make(optimizer: torch.optim.Optimizer) -> Stepper:
        params = [param for group in optimizer.param_groups for param in group["params"]]

        def step() -> tuple[float, float]:
            norm = nn.utils.clip_grad_norm_(params, threshold).item()
            optimizer.step()
            return norm, threshold

        return step

    return make


def autoclipped_at(percentile: float) -> Callable[[torch.optim.Optimizer], Stepper]:
    """Steps with AutoClip: it is attached once, and optimizer.step() clips."""

    def make(optimizer: torch.optim.Optimizer) -> Stepper:
        clip = attach(optimizer, percentile)

        def step() -> tuple[float, float]:
            optimizer.step()
            latest = clip.log()
            return latest["grad_norm"], latest["clip_threshold"]

        return step

    return make


ARMS = {
    "no clipping": without_clipping,
    "fixed threshold 1": clipped_at(FIXED_THRESHOLD),
    "AutoClip p=10": autoclipped_at(10.0),
    "AutoClip p=90": autoclipped_at(90.0),
}


def read_digits() -> Data:
    """Return scikit-learn's 1,797 digits in an order of their own: 1,200 to learn, 300 to choose, 297 to judge."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))
    images, labels = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    parts = (slice(0, 1200), slice(1200, 1500), slice(1500, None))
    return Data(*(Digits(images[part], labels[part]) for part in parts))


def loss_of(network: nn.Module, digits: Digits) -> float:
    """Return the mean cross-entropy of digits, in nats."""
    with torch.no_grad():
        return functional.cross_entropy(network(digits.images), digits.labels).item()


def train(
    arm: str, loss_scale: str, seed: int, data: Data, *, learning_rate: float, spoiled_share: float, steps: int
) -> Run:
    """Train once and measure."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    scale = LOSS_SCALES[loss_scale]
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate / scale, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    step = ARMS[arm](optimizer)
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(data.training.labels), (steps, BATCH), generator=generator)
    spoiled = (torch.rand(steps, generator=generator) < spoiled_share).tolist()
    norms, thresholds, validation = [], [], []
    for number, (batch, is_spoiled) in enumerate(zip(batches, spoiled, strict=True), start=1):
        images = data.training.images[batch]
        if is_spoiled:
            images = images * SPOILED_FACTOR
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), data.training.labels[batch])
        torch.autograd.backward(scale * loss)
        norm, threshold = step()
        schedule.step()
        norms.append(norm)
        thresholds.append(threshold)
        if number % max(1, steps // JUDGEMENTS) == 0:
            validation.append(loss_of(network, data.validation))
    return Run(arm, loss_scale, seed, norms, thresholds, spoiled, validation, loss_of(network, data.test))


def choose_learning_rate(data: Data, seeds: Sequence[int], steps: int, progress: tqdm[None]) -> float:
    """Return the rate with the lowest mean validation loss without clipping, on batches of which none is spoiled."""

    def mean_loss(rate: float) -> float:
        losses = []
        for seed in seeds:
            run = train("no clipping", "1", seed, data, learning_rate=rate, spoiled_share=0.0, steps=steps)
            losses.append(run.validation[-1])
            progress.update()
        mean = statistics.fmean(losses)
        progress.write(f"  learning rate {rate:g}: {mean:.3f}")
        return mean if math.isfinite(mean) else math.inf

    return min(LEARNING_RATES, key=mean_loss)


def train_all(data: Data, seeds: Sequence[int], learning_rate: float, steps: int, progress: tqdm[None]) -> list[Run]:
    """Train every arm at every loss scale from every seed."""
    runs = []
    for arm in ARMS:
        for loss_scale in LOSS_SCALES:
            for seed in seeds:
                runs.append(
                    train(
                        arm,
                        loss_scale,
                        seed,
                        data,
                        learning_rate=learning_rate,
                        spoiled_share=SPOILED_SHARE,
                        steps=steps,
                    )
                )
                progress.update()
    return runs


def of(runs: Sequence[Run], arm: str, loss_scale: str) -> list[Run]:
    """Return the runs of one arm at one loss scale, one per seed."""
    return [run for run in runs if (run.arm, run.loss_scale) == (arm, loss_scale)]


def tabulate(runs: Sequence[Run]) -> list[list[str]]:
    """Return the results as text: a header, and a row per arm and loss scale."""
    rows = [["clipping", "loss scale", "test loss, mean", "lowest", "highest", "steps clipped", "median norm"]]
    for arm in ARMS:
        for loss_scale in LOSS_SCALES:
            seeds = of(runs, arm, loss_scale)
            losses = [run.test for run in seeds]
            rows.append(
                [
                    *(arm, loss_scale),
                    *(f"{value:.3f}" for value in (statistics.fmean(losses), min(losses), max(losses))),
                    f"{statistics.fmean(run.clipped_share for run in seeds):.1%}",
                    f"{statistics.median(norm for run in seeds for norm in run.norms):.3g}",
                ]
            )
    return rows


def interpret(runs: Sequence[Run], learning_rate: float) -> list[str]:
    """Return what the figures say, whatever they are, in sentences."""
    seeds = sorted({run.seed for run in runs})
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    sentences = [
        f"The learning rate {learning_rate:g} is the best one of no clipping on clean batches, of {rates}.",
        f"Nothing was tuned for any other row. {len(seeds)} seeds.",
        f"A network that has learned nothing has a loss of {GUESSING:.3f}.",
    ]
    for arm in ARMS:
        learned = [scale for scale in LOSS_SCALES if all(run.test < GUESSING / 2 for run in of(runs, arm, scale))]
        losses = [run.test for run in runs if run.arm == arm]
        where = "at every loss scale" if len(learned) == len(LOSS_SCALES) else f"at loss scale {' and '.join(learned)}"
        sentences.append(
            f"{arm}: "
            + (f"learns {where}" if learned else "learns at no loss scale")
            + f"; test losses from {min(losses):.3f} to {max(losses):.3f}."
        )
    best = min(runs, key=lambda run: run.test if math.isfinite(run.test) else math.inf)
    sentences.append(f"The lowest test loss: {best.arm} at loss scale {best.loss_scale}, {best.test:.3f}.")
    return sentences


# Safe for colour-blind readers.
COLOURS = {
    "no clipping": "#000000",
    "fixed threshold 1": "#D55E00",
    "AutoClip p=10": "#0072B2",
    "AutoClip p=90": "#56B4E9",
}


def draw_norms(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the norms of one run, its spoiled batches, and the thresholds of every arm."""
    run = next(run for run in runs if run.arm == "AutoClip p=10")
    steps = range(1, len(run.norms) + 1)
    axes.semilogy(steps, run.norms, color="0.7", linewidth=0.6)
    bad = [(step, norm) for step, norm, spoiled in zip(steps, run.norms, run.spoiled, strict=True) if spoiled]
    axes.semilogy(*zip(*bad, strict=True) if bad else ((), ()), "x", color="black", markersize=5)
    for arm in ("fixed threshold 1", "AutoClip p=10", "AutoClip p=90"):
        thresholds = next(other for other in runs if other.arm == arm and other.seed == run.seed).thresholds
        axes.semilogy(steps, thresholds, color=COLOURS[arm], linewidth=1.6)


def draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw the validation loss of every arm: the mean over the seeds, and all between the lowest and the highest."""
    for arm in ARMS:
        curves = list(zip(*(run.validation for run in runs if run.arm == arm), strict=True))
        every = len(runs[0].norms) / len(curves)
        steps = [every * (1 + place) for place in range(len(curves))]
        means = [statistics.fmean(losses) for losses in curves]
        # Where a fixed threshold clips nothing its line is that of no clipping, and both are to be seen.
        width = 4.0 if arm == "no clipping" else 1.5
        axes.semilogy(steps, means, color=COLOURS[arm], linewidth=width, label=arm)
        lowest, highest = [min(losses) for losses in curves], [max(losses) for losses in curves]
        axes.fill_between(steps, lowest, highest, color=COLOURS[arm], alpha=0.2, linewidth=0)
    axes.set_ylim(0.05, 5)
    axes.axhline(GUESSING, color="0.6", linestyle=":", linewidth=1)


def draw(runs: Sequence[Run], figure: Figure) -> None:
    """Draw norms and thresholds above, validation losses below, one column per loss scale."""
    panels = figure.subplots(2, len(LOSS_SCALES), sharex=True, sharey="row")
    for (upper, lower), loss_scale in zip(panels.T, LOSS_SCALES, strict=True):
        upper.set_title(f"loss times {loss_scale}", fontweight="bold")
        here = [run for run in runs if run.loss_scale == loss_scale]
        draw_norms(upper, here)
        draw_losses(lower, here)
        lower.set_xlabel("training step")
        for panel in (upper, lower):
            panel.grid(color="0.9", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    # A batch on which the network is sure and right has next to no gradient; it would stretch the axis downwards.
    typical = [statistics.quantiles(run.norms, n=50)[0] for run in runs if run.arm.startswith("AutoClip")]
    panels[0][0].set_ylim(bottom=min(typical) / 10)
    panels[0][0].set_ylabel("gradient norms (grey), spoiled batches (x),\nand thresholds (colour)")
    panels[1][0].set_ylabel("validation loss\n(dotted: nothing learned)")
    figure.legend(*panels[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows, the header first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def save(runs: Sequence[Run], figure: Figure, out: Path) -> list[Path]:
    """Write the figure, the data behind it and the table; return their paths."""
    picture, steps, results = out / "demo.png", out / "steps.csv", out / "results.csv"
    draw(runs, figure)
    figure.savefig(picture, dpi=140)
    header = ("clipping", "loss scale", "seed", "step", "norm", "threshold", "spoiled")
    rows = [
        (run.arm, run.loss_scale, run.seed, number, norm, threshold, int(spoiled))
        for run in runs
        for number, (norm, threshold, spoiled) in enumerate(
            zip(run.norms, run.thresholds, run.spoiled, strict=True), start=1
        )
    ]
    write_csv(steps, [header, *rows])
    write_csv(results, tabulate(runs))
    return [picture, steps, results]


def positive(text: str) -> int:
    """Return a whole number above 0, as argparse wants it."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(
        "python -m autoclip_torch.demo",
        description="Teach a small network handwritten digits, one batch in a hundred being spoiled: without clipping, "
        "with a fixed threshold and with AutoClip, each at three scales of the loss.",
    )
    parser.add_argument("--out", type=Path, default=Path("autoclip-demo"), help="the folder for figure and data")
    parser.add_argument("--steps", type=positive, default=600, help="training steps per run (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each row (default: %(default)s)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        from matplotlib.figure import Figure
        from tqdm import tqdm

        data = read_digits()
        options.out.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        parser.exit(1, f'error: {error.name} is missing: pip install "autoclip-core[demo]"\n')
    except OSError as error:
        parser.exit(1, f"error: {error}\n")
    torch.set_num_threads(1)  # the matrices are small, and threads would mostly wait for each other
    seeds = range(options.seeds)
    total = (len(LEARNING_RATES) + len(ARMS) * len(LOSS_SCALES)) * len(seeds)
    with tqdm(total=total, unit=" runs", ncols=100) as progress:
        progress.write("Validation loss without clipping, on clean batches:")
        learning_rate = choose_learning_rate(data, seeds, options.steps, progress)
        progress.write(f"Training with learning rate {learning_rate:g}, one batch in a hundred spoiled ...")
        runs = train_all(data, seeds, learning_rate, options.steps, progress)
    rows = tabulate(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print(first.ljust(widths[0]), *cells, sep="  ")
    print()
    for sentence in interpret(runs, learning_rate):
        print(textwrap.fill(sentence, 100))
    print(f"\n{time.perf_counter() - begin:.0f} seconds. Figure, its data and the table:")
    for path in save(runs, Figure(figsize=(13, 7.5), layout="constrained"), options.out):
        print(f"  {path}")


if __name__ == "__main__":
    main()
