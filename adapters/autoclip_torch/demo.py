"""AutoClip at work: train one small network nine times, and look.

A character-level LSTM learns real text three ways: with AutoClip at its default percentile, with a fixed threshold of 1
and without clipping, each with the loss multiplied by 1e-4, 1 and 1e4. The optimizer is Adam with an epsilon so small
that it does not care about the scale of the gradients, so the unit of the loss is all that differs within an arm.

What may not change, or the comparison is no longer fair: all nine runs share the initial weights, the batches and the
learning rate with its decay. The rate is not the best for any arm: from about twice of it on, rounding alone makes runs
of different scales drift apart (the arm without clipping shows how far), and the rows would tell less about clipping.

Run it with `python -m autoclip_torch.demo`. Needs the extra: pip install "autoclip-core[demo]".
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from autoclip_core import AutoClipError, AutoClipValueError
from autoclip_torch import AutoClip

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tqdm import tqdm

MAX_CHARACTERS = 3_000_000
MIN_CHARACTERS = 50_000
STREAMS, SEQUENCE = 32, 64
LEARNING_RATE = 1e-2
FIXED_THRESHOLD = 1.0
LOSS_SCALES = {"1e-4": 1e-4, "1": 1.0, "1e4": 1e4}

Clipping = Callable[[], tuple[float, float, bool]]


class Data(NamedTuple):
    """A text as numbers, in streams read side by side, shape (streams, n), and how many different numbers there are."""

    training: Tensor
    validation: Tensor
    characters: int


class Step(NamedTuple):
    """One training step: the norm before clipping, the threshold, whether it clipped, and bits per character."""

    norm: float
    threshold: float
    clipped: bool
    loss: float


class Run(NamedTuple):
    """One training run; `loss` is in bits per character, over the validation text."""

    arm: str
    loss_scale: str
    steps: list[Step]
    loss: float

    @property
    def clipped_share(self) -> float:
        """The share of the steps that were clipped, from 0 to 1."""
        return sum(step.clipped for step in self.steps) / len(self.steps)


def clip_auto(model: nn.Module) -> Clipping:
    """Return a clipping step by AutoClip."""
    clip = AutoClip(model)

    def step() -> tuple[float, float, bool]:
        decided = clip.step()
        return decided.norm, decided.threshold, decided.clipped

    return step


def clip_fixed(model: nn.Module) -> Clipping:
    """Return a clipping step by PyTorch's own function and a threshold set by hand."""

    def step() -> tuple[float, float, bool]:
        norm = nn.utils.clip_grad_norm_(model.parameters(), FIXED_THRESHOLD).item()
        return norm, FIXED_THRESHOLD, norm > FIXED_THRESHOLD

    return step


def clip_never(model: nn.Module) -> Clipping:
    """Return a step that only measures."""

    def step() -> tuple[float, float, bool]:
        gradients = [param.grad for param in model.parameters() if param.grad is not None]
        return nn.utils.get_total_norm(gradients).item(), math.inf, False

    return step


ARMS = {"AutoClip p=10": clip_auto, "fixed threshold 1": clip_fixed, "no clipping": clip_never}


class Network(nn.Module):
    """Characters in, the scores of each next character out."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.output = nn.Linear(128, characters)

    def forward(self, batch: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take character numbers, shape (streams, n), to scores, shape (streams, n, characters), and a new state."""
        hidden, state = self.lstm(self.embedding(batch), state)
        return self.output(hidden), (state[0].detach(), state[1].detach())


def read_text(path: Path | None) -> str:
    """Return the first 3 million characters of a file, of a folder's text files, or of Python's standard library.

    Files follow one another in the order of their names, so that the same files always give the same text.

    Raises:
        AutoClipValueError: there is no such file or folder, or its text is too short to train on.
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        source, files = f"the standard library in {folder}", sorted(folder.glob("*.py"))
    elif path.is_dir():
        source, files = str(path), sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        source, files = str(path), [path]
    else:
        raise AutoClipValueError(f"There is no text at {path}; give a text file or a folder of text files.")
    text = ""
    for file in files:
        if len(text) >= MAX_CHARACTERS:
            break
        try:
            text += file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    text = text[:MAX_CHARACTERS]
    if len(text) < MIN_CHARACTERS:
        raise AutoClipValueError(
            f"There are {len(text):,} characters of UTF-8 text in {source}, and training needs {MIN_CHARACTERS:,}; "
            "give the path of a longer text file, or of a folder of text files."
        )
    print(f"Text: {len(text):,} characters from {source}.")
    return text


def encode(text: str) -> Data:
    """Return the text as numbers; the last twentieth is for validation."""
    split = len(text) - len(text) // 20
    # Number 0 stands for any character that the training text does not have, or too rarely.
    numbers = {character: 1 + rank for rank, (character, _) in enumerate(Counter(text[:split]).most_common(500))}

    def streams(part: str) -> Tensor:
        encoded = torch.tensor([numbers.get(character, 0) for character in part])
        return encoded[: len(encoded) // STREAMS * STREAMS].view(STREAMS, -1)

    return Data(streams(text[:split]), streams(text[split:]), 1 + len(numbers))


def batches(streams: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and the characters to predict, each stream from left to right, once."""
    last = streams.shape[1] - 1
    for start in range(0, last, SEQUENCE):
        end = min(start + SEQUENCE, last)
        yield streams[:, start:end], streams[:, start + 1 : end + 1]


def train(network: Network, arm: str, loss_scale: str, data: Data, steps: int, progress: tqdm[NoReturn]) -> Run:
    """Train a copy of the network, and measure it."""
    model = deepcopy(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=1e-14)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    clip = ARMS[arm](model)
    loss_of = nn.CrossEntropyLoss()
    taken: list[Step] = []
    state = None
    for inputs, targets in islice(cycle(batches(data.training)), steps):
        scores, state = model(inputs, state)
        loss = loss_of(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss * LOSS_SCALES[loss_scale]).backward()
        norm, threshold, clipped = clip()
        optimizer.step()
        schedule.step()
        taken.append(Step(norm, threshold, clipped, loss.item() / math.log(2)))
        with progress.get_lock():
            progress.update()
    nats, count, state = 0.0, 0, None
    with torch.no_grad():
        for inputs, targets in batches(data.validation):
            scores, state = model(inputs, state)
            nats += loss_of(scores.flatten(0, 1), targets.flatten()).item() * targets.numel()
            count += targets.numel()
    run = Run(arm, loss_scale, taken, nats / count / math.log(2))
    progress.write(f"  {arm}, loss scale {loss_scale}: {run.loss:.3f}")
    return run


def train_all(data: Data, steps: int, progress: tqdm[NoReturn]) -> list[Run]:
    """Train every arm at every loss scale, from one start, as many runs at a time as there are processors."""
    torch.manual_seed(0)
    network = Network(data.characters)
    # One processor per run: the matrices are small, and threads that share one would mostly wait for each other.
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(train, network, arm, loss_scale, data, steps, progress)
            for arm in ARMS
            for loss_scale in LOSS_SCALES
        ]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupted demo does not train to the end


def tabulate(runs: Sequence[Run]) -> list[list[str]]:
    """Return the results as text: a header, and one row per run."""
    header = ["clipping", "loss scale", "validation bits/char", "steps clipped", "median norm", "final threshold"]
    rows = [
        [
            run.arm,
            run.loss_scale,
            f"{run.loss:.3f}",
            f"{run.clipped_share:.1%}",
            f"{statistics.median(step.norm for step in run.steps):.3g}",
            f"{run.steps[-1].threshold:.3g}",
        ]
        for run in runs
    ]
    return [header, *rows]


def interpret(runs: Sequence[Run]) -> list[str]:
    """Return what the figures say, whatever they are, in sentences."""
    sentences, spreads = [], []
    for arm in ARMS:
        rows = [run for run in runs if run.arm == arm]
        losses = [run.loss for run in rows]
        spreads.append(max(losses) - min(losses))
        shares = " / ".join(f"{run.clipped_share:.1%}" for run in rows)
        sentences.append(
            f"{arm}: {shares} of the steps clipped, validation from {min(losses):.3f} to {max(losses):.3f}."
        )
    auto, fixed, never = spreads
    sentences.append(
        f"Across loss scales AutoClip's rows are {auto:.3f} bits apart, those of the fixed threshold {fixed:.3f}, and "
        f"those without clipping {never:.3f}, which is what rounding alone does."
    )
    sentences.append(
        "So one setting of AutoClip serves all three scales; the fixed threshold is another setting at each."
        if 2 * auto < fixed
        else "So this run does not tell the two apart."
    )
    best = min(runs, key=lambda run: run.loss)
    sentences.append(f"The lowest row of this run: {best.arm} at loss scale {best.loss_scale}.")
    return sentences


def smooth(values: Sequence[float], width: int = 25) -> list[float]:
    """Return the mean of each value and the `width - 1` before it, or as many as there are."""
    return [statistics.fmean(values[max(0, index + 1 - width) : index + 1]) for index in range(len(values))]


def draw(runs: Sequence[Run], figure: Figure) -> None:
    """Draw norms and thresholds above, the training loss below, one column per arm."""
    colours = dict(zip(LOSS_SCALES, ("#0072B2", "#009E73", "#D55E00"), strict=True))  # safe for colour-blind readers
    panels = figure.subplots(2, len(ARMS), sharex=True, sharey="row")
    for (upper, lower), arm in zip(panels.T, ARMS, strict=True):
        upper.set_title(arm, fontweight="bold")
        for line, run in enumerate(run for run in runs if run.arm == arm):
            colour, last = colours[run.loss_scale], len(run.steps)
            steps = range(1, last + 1)
            norms = [step.norm for step in run.steps]
            upper.semilogy(steps, norms, color=colour, linewidth=0.8)
            upper.semilogy(steps, [step.threshold for step in run.steps], color="black", linewidth=1.3)
            share = f"loss scale {run.loss_scale}: {run.clipped_share:.1%} of steps clipped"
            upper.text(last, min(norms) / 1.6, share, color=colour, ha="right", va="top")
            # Each line thinner than the one below it: where they agree, all are seen.
            width = 4.8 - 1.8 * line
            lower.plot(steps, smooth([step.loss for step in run.steps]), color=colour, linewidth=width)
            result = f"loss scale {run.loss_scale}: validation {run.loss:.3f}"
            lower.text(0.98, 0.81 + 0.075 * line, result, color=colour, ha="right", va="top", transform=lower.transAxes)
        lower.set_xlabel("training step")
        for panel in (upper, lower):
            panel.grid(color="0.9", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(bottom=min(step.norm for run in runs for step in run.steps) / 12)  # room for a label
    losses = [smooth([step.loss for step in run.steps]) for run in runs]
    # Without the first tenth, where the loss falls from the start and the rest would be a flat line.
    panels[1][0].set_ylim(min(map(min, losses)) - 0.1, max(loss[len(loss) // 10] for loss in losses) + 0.1)
    panels[0][0].set_ylabel("gradient norm (colour)\nand threshold (black)")
    panels[1][0].set_ylabel("training loss, bits per character\n(mean of 25 steps)")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows, the header first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def save(runs: Sequence[Run], figure: Figure, out: Path) -> list[Path]:
    """Write the figure, the data behind it and the table; return their paths."""
    picture, steps, results = out / "demo.png", out / "steps.csv", out / "results.csv"
    draw(runs, figure)
    figure.savefig(picture, dpi=140)
    header = ("clipping", "loss scale", "step", "norm", "threshold", "clipped", "bits per character")
    rows = [
        (run.arm, run.loss_scale, number, step.norm, step.threshold, int(step.clipped), step.loss)
        for run in runs
        for number, step in enumerate(run.steps, start=1)
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
        description="Train a small language model with AutoClip, with a fixed threshold and without clipping, each at "
        "three scales of the loss.",
    )
    parser.add_argument("text", nargs="?", type=Path, help="a text file or a folder (default: Python's own library)")
    parser.add_argument("--out", type=Path, default=Path("autoclip-demo"), help="the folder for figure and data")
    parser.add_argument("--steps", type=positive, default=400, help="training steps per run (default: %(default)s)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        from matplotlib.figure import Figure
        from tqdm import tqdm

        options.out.mkdir(parents=True, exist_ok=True)
        data = encode(read_text(options.text))
    except ImportError as error:
        parser.exit(1, f'error: {error.name} is missing: pip install "autoclip-core[demo]"\n')
    except (OSError, AutoClipError) as error:
        parser.exit(1, f"error: {error}\n")
    runs_wanted = len(ARMS) * len(LOSS_SCALES)
    print(f"Training {runs_wanted} times {options.steps} steps; bits per character on unseen text:")
    with tqdm(total=runs_wanted * options.steps, unit=" steps", ncols=100, mininterval=0.5) as progress:
        runs = train_all(data, options.steps, progress)
    rows = tabulate(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for first, *others in rows:
        print(
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            sep="  ",
        )
    print()
    for sentence in interpret(runs):
        print(textwrap.fill(sentence, 100))
    print(f"\n{time.perf_counter() - begin:.0f} seconds. Figure, its data and the table:")
    for path in save(runs, Figure(figsize=(13, 7.5), layout="constrained"), options.out):
        print(f"  {path}")


if __name__ == "__main__":
    main()
