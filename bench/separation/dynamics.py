"""Fig. 1 of the paper: how training moves, with AutoClip (p = 10) and without (p = 100), under the mask inference loss.

Every 20 steps: the step size ||theta_t - theta_t-1||, the loss and the gradient norm before the step, and the local
smoothness ||g(theta_t) - g(theta_t-1)|| / ||theta_t - theta_t-1||, the gradient's Lipschitz constant between the two,
g being the gradient on one and the same batch, never clipped. Measuring does not change the training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from bench.common import facts_table, machine_facts, say, shown, table
from bench.separation.evaluate import evaluate
from bench.separation.table import AUTOCLIP, NEVER, settings_table
from bench.separation.train import Settings, Training, run_all

EVERY = 20


class Record(NamedTuple):
    """One recorded step."""

    percentile: float
    step: int
    step_size: float
    loss_value: float
    grad_norm: float
    smoothness: float
    clip_threshold: float


class Run(NamedTuple):
    """One training."""

    percentile: float
    records: list[Record]
    si_sdr: float

    def r(self, of: Callable[[list[float]], Any] = np.log) -> float:
        """The correlation of gradient norm and smoothness: of their logarithms, as in the figure, or as `of` has it."""
        norms, smoothness = ([getattr(record, name) for record in self.records] for name in ("grad_norm", "smoothness"))
        return float(np.corrcoef(of(norms), of(smoothness))[0, 1])


def record_run(settings: Settings, loss: str, percentile: float, seed: int) -> Run:
    """Train one network and look at it every 20 steps."""
    training = Training(settings, loss, percentile, seed)
    records = []
    for number, waves in enumerate(training.batches()):
        if number % EVERY:
            training.step(waves)
            continue
        with torch.no_grad():
            before = parameters_to_vector(training.network.parameters())
        gradient = training.gradient(waves)
        step = training.step(waves)
        with torch.no_grad():
            step_size = (parameters_to_vector(training.network.parameters()) - before).norm().item()
        change = (training.gradient(waves) - gradient).norm().item()
        records.append(
            Record(
                percentile, number, step_size, step.loss_value, step.grad_norm, change / step_size, step.clip_threshold
            )
        )
        say(f"p = {percentile:g}, step {number}: loss {step.loss_value:.4g}, step size {step_size:.3g}")
    return Run(percentile, records, evaluate(training.network, settings.mixtures()["test"], settings.device))


def make_dynamics(settings: Settings, loss: str, seed: int, jobs: int, output: Path) -> list[Run]:
    """Train with and without, and write CSV and Markdown."""
    facts = machine_facts(["torch", "scikit-learn"])
    runs = list(run_all(record_run, [(settings, loss, p, seed) for p in (AUTOCLIP, NEVER)], jobs))
    runs.sort(key=lambda run: run.percentile)
    lines = [",".join(Record._fields)]
    lines += [",".join(f"{value:.6g}" for value in record) for run in runs for record in run.records]
    (output / "separation_dynamics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = report(runs, settings, loss, facts)
    (output / "separation_dynamics.md").write_text(page, encoding="utf-8")
    return runs


def restlessness(sizes: Sequence[float]) -> float:
    """How much the step size jumps: the median change between records, as a share of the size."""
    return float(np.median(np.abs(np.diff(sizes)) / np.asarray(sizes)[:-1]))


def report(runs: Sequence[Run], settings: Settings, loss: str, facts: dict[str, str]) -> str:
    """The Markdown page."""

    def column(run: Run) -> list[str]:
        tail = run.records[-max(1, len(run.records) // 10) :]
        return [
            f"{run.r():.2f}",
            f"{run.r(np.asarray):.2f}",
            f"{restlessness([record.step_size for record in run.records]):.1%}",
            shown(fmean(record.loss_value for record in tail)),
            shown(run.records[-1].clip_threshold),
            f"{run.si_sdr:.2f}",
        ]

    questions = [
        "r of gradient norm and smoothness, of their logarithms",
        "r of the values themselves",
        "change of the step size between records, median",
        "loss, mean of the last tenth",
        "threshold at the end",
        "SI-SDR on the test set, dB",
    ]
    parts = [
        "# Training dynamics with and without AutoClip",
        table(["", *(f"p = {run.percentile:g}" for run in runs)], zip(questions, *map(column, runs), strict=True)),
        "## Settings",
        settings_table(settings, loss=loss),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"
