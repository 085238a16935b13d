"""Table 1 of the paper: SI-SDR by loss and percentile, over seeds.

Every finished cell is in the CSV at once, and a cell that is there is not trained again: an interrupted table goes on
where it was, and a smaller one can be made larger. Cells of other settings are refused, never mixed in. The cells come
in an order that makes an unfinished table useful: seed by seed, p = 10 and p = 100 before the others.
"""

import csv
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bench.common import commit, facts_table, machine_facts, replace, say, shown, table
from bench.separation.evaluate import evaluate
from bench.separation.losses import LOSSES
from bench.separation.train import Settings, Step, Training, run_all

PERCENTILES = (0.0, 1.0, 10.0, 25.0, 50.0, 90.0, 100.0)
AUTOCLIP, NEVER = 10.0, 100.0  # what the paper recommends, and no clipping
PAPER = {  # Table 1, losses in the order of LOSSES
    0.0: (10.7, 11.1, 10.0, 11.2, 9.9),
    1.0: (10.7, 11.2, 10.3, 11.3, 10.2),
    10.0: (10.8, 11.0, 10.2, 11.3, 10.4),
    25.0: (10.7, 11.0, 9.9, 11.3, 10.3),
    50.0: (10.7, 11.0, 9.2, 11.2, 9.9),
    90.0: (10.5, 11.0, 8.7, 11.1, 9.5),
    100.0: (10.2, 10.8, 8.5, 10.9, 8.3),
}

Row = TypeVar("Row", bound=NamedTuple)


class TableError(ValueError):
    """The table that is there is another one; the message says how they differ."""


class Cell(NamedTuple):
    """One trained network. `si_sdr` is the mean over the test set; losses and norms are those of its loss function."""

    loss: str
    percentile: float
    seed: int
    si_sdr: float
    train_loss: float  # the mean over the last epoch
    validation_loss: float
    steps: int
    clipped_share: float
    median_norm: float
    final_threshold: float
    step_seconds: float  # the median
    clip_share: float  # of the time of a step, AutoClip's: the median
    seconds: float  # of the whole training
    commit: str


def measure(training: Training, steps: Sequence[Step], seconds: float, version: str) -> Cell:
    """Evaluate a trained network."""
    settings = training.settings
    return Cell(
        training.loss,
        training.percentile,
        training.seed,
        evaluate(training.network, settings.mixtures()["test"], settings.device),
        statistics.fmean(step.loss_value for step in steps[-training.steps_per_epoch :]),
        training.validate(),
        len(steps),
        statistics.fmean(step.clipped for step in steps),
        statistics.median(step.grad_norm for step in steps),
        steps[-1].clip_threshold,
        statistics.median(step.seconds for step in steps),
        statistics.median(step.clip_seconds / step.seconds for step in steps),
        seconds,
        version,
    )


def train_cell(settings: Settings, loss: str, percentile: float, seed: int, version: str) -> Cell:
    """Train one network, and evaluate it."""
    begin = time.perf_counter()
    training = Training(settings, loss, percentile, seed)
    steps = [training.step(waves) for waves in training.batches()]
    return measure(training, steps, time.perf_counter() - begin, version)


# --- Files ------------------------------------------------------------------------------------------------------------


def write_cells(path: Path, cells: Iterable[Cell]) -> None:
    """The cells as CSV, sorted: in the order of LOSSES, by percentile, by seed."""
    order = {loss: number for number, loss in enumerate(LOSSES)}
    rows = sorted(cells, key=lambda cell: (order[cell.loss], cell.percentile, cell.seed))
    replace(path, csv_of(Cell, rows))


def read_cells(path: Path) -> list[Cell]:
    """The cells of a CSV, none if there is no such file."""
    return read_rows(Cell, path)


def csv_of(kind: type[NamedTuple], rows: Iterable[NamedTuple]) -> str:
    """Rows as CSV, a header first."""
    return ",".join(kind._fields) + "\n" + "".join(map(csv_line, rows))


def csv_line(row: NamedTuple) -> str:
    return ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row) + "\n"


def read_rows(kind: type[Row], path: Path) -> list[Row]:
    """The rows of a CSV, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        types = kind.__annotations__
        return [kind(**{name: of(row[name]) for name, of in types.items()}) for row in csv.DictReader(file)]


def keep_settings(path: Path, settings: Settings) -> dict[str, str]:
    """Compare the settings with those of a table that was begun, or note them down; the facts of its machine.

    Raises:
        TableError: the table was begun with other settings.
    """
    if not path.exists():
        facts = machine_facts(["torch", "scikit-learn"])
        if settings.device == "cuda":
            facts["GPU"] = torch.cuda.get_device_name()
        replace(path, json.dumps({"settings": asdict(settings), "machine": facts}, indent=2) + "\n")
    begun = json.loads(path.read_text("utf-8"))
    if other := {name for name, value in asdict(settings).items() if begun["settings"].get(name) != value}:
        differ = "; ".join(f"{name} was {begun['settings'].get(name)!r}" for name in sorted(other))
        raise TableError(f"The table in {path.parent} has other settings ({differ}); give another --output.")
    return begun["machine"]


# --- Progress ---------------------------------------------------------------------------------------------------------


def plan(losses: Sequence[str], percentiles: Sequence[float], seeds: int) -> list[tuple[str, float, int]]:
    """The cells to train, the most useful ones first."""
    useful_first = sorted(percentiles, key=lambda percentile: percentile not in (AUTOCLIP, NEVER))
    return [(loss, percentile, seed) for seed in range(seeds) for percentile in useful_first for loss in losses]


def make_table(
    settings: Settings, losses: Sequence[str], percentiles: Sequence[float], seeds: int, jobs: int, output: Path
) -> list[Cell]:
    """Train every cell that is not in the CSV yet; the Markdown page is made at the end, or when interrupted."""
    facts = keep_settings(output / "separation.json", settings)
    cells = read_cells(output / "separation.csv")
    done = {cell[:3] for cell in cells}
    wanted = [cell for cell in plan(losses, percentiles, seeds) if cell not in done]
    say(f"{len(done)} cells are there, {len(wanted)} to train, {jobs} at a time")
    version, begin = commit(), time.monotonic()
    calls = ((settings, *cell, version) for cell in wanted)
    try:
        for number, cell in enumerate(run_all(train_cell, calls, jobs), 1):
            cells.append(cell)
            write_cells(output / "separation.csv", cells)
            left = (time.monotonic() - begin) / number * (len(wanted) - number)
            say(
                f"{number} of {len(wanted)}: {LOSSES[cell.loss].label}, p = {cell.percentile:g}, seed {cell.seed}: "
                f"{cell.si_sdr:.2f} dB in {cell.seconds:.0f} s; {left / 60:.0f} minutes left"
            )
    finally:
        replace(output / "separation.md", report(cells, settings, facts))
    return cells


# --- Report -----------------------------------------------------------------------------------------------------------

OPENING = """\
The mean SI-SDR in dB over the test set, as in the paper's Table 1, whose numbers stand beside ours; higher is better,
and the mixtures themselves have about 0 dB. One percentile is one setting of AutoClip for all five losses; p = 100
never clips. Where there are several seeds (other weights, another order of the data), the number is their mean ± their
standard deviation. Within a seed all percentiles share weights, data and order."""

GAINS = """\
In dB of SI-SDR; and in how many of the seeds its loss is lower, over the last epoch of training and over the validation
set."""

SCALES = """\
Medians over the seeds: the loss over the last epoch and over the validation set, the gradient norm over all steps; at
p = 10 the threshold at the end, and the share of the steps that were clipped."""

COSTS = """\
How much of a step (forward, backward, clipping, Adam) is AutoClip's own; medians over steps and cells. With p = 100 it
measures and remembers norms as well."""


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; one value alone has none."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values) or "-"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def median(values: Sequence[float], factor: float = 1.0) -> str:
    return shown(factor * statistics.median(values)) if values else "-"


def report(cells: Sequence[Cell], settings: Settings, facts: dict[str, str]) -> str:
    """The Markdown page."""

    def of(loss: str, name: str, percentile: float | None = None) -> list[float]:
        return [getattr(cell, name) for cell in cells if cell.loss == loss and percentile in (None, cell.percentile)]

    def compare(percentile: float) -> Iterator[str]:
        for loss, paper in zip(LOSSES, PAPER[percentile], strict=True):
            yield spread(of(loss, "si_sdr", percentile))
            yield f"{paper}"

    def gain(loss: str, name: str = "si_sdr") -> list[float]:
        seeds = dict(zip(of(loss, "seed", NEVER), of(loss, name, NEVER), strict=True))
        clipped = zip(of(loss, "seed", AUTOCLIP), of(loss, name, AUTOCLIP), strict=True)
        return [value - seeds[seed] for seed, value in clipped if seed in seeds]

    def lower(loss: str, name: str) -> str:
        """In how many of the seeds a loss is lower with AutoClip."""
        changes = gain(loss, name)
        return f"{sum(change < 0.0 for change in changes)} of {len(changes)}" if changes else "-"

    labels = {loss: LOSSES[loss].label for loss in LOSSES}
    gains = [
        [
            label,
            spread(gain(loss)),
            f"{auto - never:.1f}",
            ", ".join(f"{value:+.2f}" for value in gain(loss)) or "-",
            lower(loss, "train_loss"),
            lower(loss, "validation_loss"),
        ]
        for (loss, label), auto, never in zip(labels.items(), PAPER[AUTOCLIP], PAPER[NEVER], strict=True)
    ]
    measures = {"train": "train_loss", "validation": "validation_loss", "norm": "median_norm"}
    scales = [
        [
            label,
            *(median(of(loss, name, p)) for name in measures.values() for p in (AUTOCLIP, NEVER)),
            median(of(loss, "final_threshold", AUTOCLIP)),
            median(of(loss, "clipped_share", AUTOCLIP), 1e2),
        ]
        for loss, label in labels.items()
    ]
    costs = [
        [label, median(of(loss, "step_seconds"), 1e3), median(of(loss, "clip_share"), 1e2)]
        for loss, label in labels.items()
    ]
    hours = sum(cell.seconds for cell in cells) / 3600
    commits = ", ".join(sorted({cell.commit for cell in cells}))
    parts = [
        "# Separating speech: five losses, one percentile",
        OPENING,
        table(
            ["p", *(text for label in labels.values() for text in (label, "paper"))],
            ([f"{percentile:g}", *compare(percentile)] for percentile in PERCENTILES),
        ),
        "## What p = 10 has over p = 100",
        GAINS,
        table(["loss", "dB, over seeds", "paper", "seed by seed", "lower in training", "in validation"], gains),
        "## The scales of the losses",
        SCALES,
        table(
            [
                "loss",
                *(f"{measure}, p = {p:g}" for measure in measures for p in (AUTOCLIP, NEVER)),
                "threshold, p = 10",
                "% clipped",
            ],
            scales,
        ),
        "## The cost of AutoClip",
        COSTS,
        table(["loss", "ms per step", "AutoClip, % of it"], costs),
        "## Settings",
        settings_table(settings),
        f"{len(cells)} cells, {hours:.1f} hours of training, at commit {commits}.",
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


def settings_table(settings: Settings, **more: str) -> str:
    rows = [[name.replace("_", " "), f"{value}"] for name, value in (more | asdict(settings)).items()]
    return table(["setting", "value"], rows).replace("---:", "---")
