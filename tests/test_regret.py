"""bench.regret: trainings side by side are those that torch makes one at a time; clippers do what their authors say."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from autoclip_torch import attach

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind what is installed; importing bench takes it out again

from bench.regret import clippers, study  # noqa: E402
from bench.regret.clippers import MAKERS, Size  # noqa: E402
from bench.regret.study import Cell  # noqa: E402
from bench.regret.tasks import SPOILED, TASKS  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda weights, rate: torch.optim.SGD(weights, lr=rate, momentum=study.MOMENTUM),
    "Adam": lambda weights, rate: torch.optim.Adam(weights, lr=rate),
}


def train_alone(task, cell):
    """The test loss of one training as a user of torch writes it."""
    problem = task.make(cell.seed, task.spoiled)
    optimizer = OPTIMIZERS[task.optimizer](problem.network.parameters(), cell.rate)
    if cell.clipper.startswith("p ="):
        attach(optimizer, float(cell.clipper.removeprefix("p =")))
    for step in range(task.steps):
        batch = next(problem.batches)
        optimizer.param_groups[0]["lr"] = cell.rate * (1 - step / task.steps)
        optimizer.zero_grad()
        problem.loss(problem.network(*batch.inputs), batch.targets).backward()
        if cell.clipper.startswith("fixed"):
            threshold = float(cell.clipper.removeprefix("fixed"))
            torch.nn.utils.clip_grad_norm_(problem.network.parameters(), threshold)
        optimizer.step()
    with torch.no_grad():
        return problem.loss(problem.network(*problem.test.inputs), problem.test.targets).item()


@pytest.mark.parametrize("task", [task for task in TASKS if not task.twin_of], ids=lambda task: task.name)
def test_trainings_side_by_side_are_those_of_torch(task):
    task = replace(task, steps=6, spoiled=0.5 if task.spoiled else 0.0)
    rates = {"SGD": (1e-4, 1e-3), "Adam": (1e-3, 1e-2)}[task.optimizer]
    cells = [Cell(task.name, clipper, rate, 1) for clipper in ("none", "fixed 0.1", "p = 10") for rate in rates]
    results = study.train(task, 1, cells)
    assert [results[cell].test for cell in cells] == pytest.approx(
        [train_alone(task, cell) for cell in cells], rel=2e-3
    )
    assert len({results[cell].test for cell in cells}) == len(cells)
