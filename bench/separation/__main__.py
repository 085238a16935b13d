"""Separate speech with five losses and seven percentiles: Table 1 and Fig. 1 of the AutoClip paper."""

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from bench import ROOT
from bench.common import commit, say
from bench.separation.corpora import CorpusError
from bench.separation.curves import make_curves
from bench.separation.dynamics import make_dynamics
from bench.separation.losses import LOSSES
from bench.separation.networks import SIZES
from bench.separation.plots import draw_curves, draw_dynamics, draw_table
from bench.separation.table import AUTOCLIP, NEVER, PERCENTILES, TableError, make_table, measure
from bench.separation.train import Settings, Training

SHAPES = "layers x units: " + ", ".join(f"{name} {layers} x {units}" for name, (layers, units) in SIZES.items())
CHOICES = {"corpus": ("prompts", "folder", "synthetic"), "network": tuple(SIZES)}


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A number above 0, as argparse wants it."""

    def parse(text: str) -> float:
        if not (number := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    return parse


def percentile(text: str) -> float:
    if not 0.0 <= (number := float(text)) <= 100.0:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    for field in fields(Settings):
        kind = str if isinstance(field.default, str) else positive(type(field.default))
        name, choices = f"--{field.name.replace('_', '-')}", CHOICES.get(field.name)
        about = f"{SHAPES}; " if field.name == "network" else ""
        words = f"{about}default: %(default)s"
        common.add_argument(name, type=kind, default=field.default, choices=choices, help=words)
    output = {
        "type": Path,
        "default": ROOT / "build/separation",
        "help": "folder of the results (default: %(default)s)",
    }
    common.add_argument("--output", **output)
    jobs = argparse.ArgumentParser(add_help=False)
    jobs.add_argument("--jobs", type=positive(int), default=1, help="networks to train at a time, a process each")
    grid = argparse.ArgumentParser(add_help=False)
    grid.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    grid.add_argument("--seeds", type=positive(int), default=1, help="how many, from 0 on")
    one_loss = argparse.ArgumentParser(add_help=False)
    one_loss.add_argument("--loss", choices=LOSSES, default="mi")
    one_loss.add_argument("--seed", type=int, default=0)

    parser = argparse.ArgumentParser("python -m bench.separation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, function, parents, words in (
        (
            "table",
            run_table,
            [common, jobs, grid],
            "Table 1: losses x percentiles x seeds; goes on where it was interrupted",
        ),
        ("curves", run_curves, [common, jobs, grid], "with and without, along the way; goes on with missing networks"),
        ("dynamics", run_dynamics, [common, jobs, one_loss], "Fig. 1: step size, loss, norms and smoothness"),
        ("one", run_one, [common, one_loss], "one network, with its norms for `autoclip replay`"),
    ):
        made = commands.add_parser(command, parents=parents, help=words)
        made.set_defaults(function=function)
        if command in {"table", "curves"}:
            default = list(PERCENTILES) if command == "table" else [AUTOCLIP, NEVER]
            made.add_argument("--percentiles", nargs="+", type=percentile, default=default)
        if command == "curves":
            made.add_argument("--every", type=positive(int), default=1, help="epochs from point to point")
        if command == "one":
            made.add_argument("--percentile", type=percentile, default=AUTOCLIP)
    return parser.parse_args(arguments)


def run_table(options: argparse.Namespace, settings: Settings) -> list[Path]:
    cells = make_table(settings, options.losses, options.percentiles, options.seeds, options.jobs, options.output)
    draw_table(cells, options.output / "separation.png")
    return [options.output / f"separation.{ending}" for ending in ("csv", "md", "png")]


def run_curves(options: argparse.Namespace, settings: Settings) -> list[Path]:
    several = options.losses, options.percentiles, options.seeds
    points = make_curves(settings, *several, options.every, options.jobs, options.output)
    draw_curves(points, options.output / "separation_curves.png")
    return [options.output / f"separation_curves.{ending}" for ending in ("csv", "md", "png")]


def run_dynamics(options: argparse.Namespace, settings: Settings) -> list[Path]:
    runs = make_dynamics(settings, options.loss, options.seed, options.jobs, options.output)
    draw_dynamics(runs, options.output / "separation_dynamics.png")
    return [options.output / f"separation_dynamics.{ending}" for ending in ("csv", "md", "png")]


def run_one(options: argparse.Namespace, settings: Settings) -> list[Path]:
    training = Training(settings, options.loss, options.percentile, options.seed)
    begin, steps = time.perf_counter(), []
    path = options.output / f"{options.loss}-p{options.percentile:g}-seed{options.seed}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for waves in training.batches():
            steps.append(training.step(waves))
            if len(steps) == 1:
                writer.writerow(["step", *steps[0]._fields])
            writer.writerow([len(steps), *steps[-1]])
            if len(steps) % training.steps_per_epoch == 0:
                epoch = len(steps) // training.steps_per_epoch
                say(f"epoch {epoch} of {settings.epochs}: loss {steps[-1].loss_value:.4g}, {training.clip}")
    cell = measure(training, steps, time.perf_counter() - begin, commit())
    for name, value in cell._asdict().items():
        print(f"{name:16} {value:.6g}" if isinstance(value, float) else f"{name:16} {value}")
    return [path]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for path in options.function(options, settings):
            say(f"written: {path}")
    except (OSError, CorpusError, TableError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        resumes = options.command in {"table", "curves"}
        goes_on = "; the same command goes on with what is missing" if resumes else ""
        raise SystemExit(f"interrupted{goes_on}") from None


if __name__ == "__main__":
    main()
