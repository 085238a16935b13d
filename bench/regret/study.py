"""Train what is missing: every task with every clipper at every learning rate, many at once, and keeps each in a file.

What may not change, or the comparison is no longer fair: all cells of a task and seed share initial weights, batches,
spoiled batches and a learning rate that falls to 0 along a line; both grids of rates are the same for all tasks and
clippers; the rows that choose a rate are not those that judge.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from bench.common import replace, say
from bench.regret.clippers import EVERYWHERE, FIRST, MAKERS, Size
from bench.regret.tasks import Batch, Problem, Task

MOMENTUM = 0.9
BETAS, EPSILON = (0.9, 0.999), 1e-8
DECADES = {"SGD": range(-5, 2), "Adam": range(-4, 0)}
AT_ONCE = 100  # trainings in one call: more no longer fit into the caches


class Cell(NamedTuple):
    task: str
    clipper: str
    rate: float
    seed: int


class Result(NamedTuple):
    """Losses at the end, inf where training diverged; norms before clipping; the share of the steps clipped."""

    validation: float
    test: float
    trivial: float
    median_norm: float
    high_norm: float  # the 99th percentile
    largest_norm: float
    clipped: float


Results = dict[Cell, Result]


# --- Optimizers, for trainings with a rate each -----------------------------------------------------------------------


def beside(rates: Tensor, tensor: Tensor) -> Tensor:
    return rates.view(-1, *[1] * (tensor.ndim - 1))


class SGD:
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.moving = [torch.zeros_like(weight) for weight in weights]

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], rates: Tensor) -> None:
        for weight, gradient, moving in zip(weights, gradients, self.moving, strict=True):
            moving.mul_(MOMENTUM).add_(gradient)
            weight.sub_(beside(rates, weight) * moving)


class Adam:
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.steps = 0
        self.means = [torch.zeros_like(weight) for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in weights]

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], rates: Tensor) -> None:
        self.steps += 1
        first, second = (1.0 - beta**self.steps for beta in BETAS)
        for weight, gradient, mean, square in zip(weights, gradients, self.means, self.squares, strict=True):
            mean.lerp_(gradient, 1.0 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
            weight.sub_(beside(rates / first, weight) * mean / (square / second).sqrt_().add_(EPSILON))


OPTIMIZERS = {"SGD": SGD, "Adam": Adam}


# --- Training ---------------------------------------------------------------------------------------------------------


def losses(problem: Problem) -> Callable[[dict[str, Tensor], Batch], Tensor]:
    def of_one(weights: dict[str, Tensor], batch: Batch) -> Tensor:
        return problem.loss(functional_call(problem.network, weights, batch.inputs), batch.targets)

    return of_one


def train(task: Task, seed: int, cells: Sequence[Cell]) -> Results:
    """Train cells of one task and seed together; those of a clipper stand side by side."""
    problem = task.make(seed, task.spoiled)
    names = [name for name, _ in problem.network.named_parameters()]
    weights = [
        weight.detach().expand(len(cells), *weight.shape).clone() for _, weight in problem.network.named_parameters()
    ]
    gradients_of = vmap(grad(losses(problem)), in_dims=(0, None))
    rates = torch.tensor([cell.rate for cell in cells])
    optimizer = OPTIMIZERS[task.optimizer](weights)
    starts = [place for place, cell in enumerate(cells) if not place or cell.clipper != cells[place - 1].clipper]
    parts = [slice(begin, end) for begin, end in zip(starts, [*starts[1:], len(cells)], strict=True)]
    clippers = [MAKERS[cells[p.start].clipper](Size(p.stop - p.start, len(names), task.steps)) for p in parts]
    norms = np.empty((task.steps, len(cells)))
    clipped = np.zeros(len(cells))
    for step in range(task.steps):
        gradients = list(gradients_of(dict(zip(names, weights, strict=True)), next(problem.batches)).values())
        sizes = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients], 1)
        by_tensor = sizes.numpy().astype(np.float64)
        norms[step] = np.sqrt(np.square(by_tensor).sum(1))
        for part, clipper in zip(parts, clippers, strict=True):
            own = [[tensor[part] for tensor in tensors] for tensors in (gradients, weights)]
            clipped[part] += clipper.clip(*own, by_tensor[part])
        optimizer.step(weights, gradients, rates * (1.0 - step / task.steps))
    loss_of = vmap(losses(problem), in_dims=(0, None))
    with torch.no_grad():
        judged = [loss_of(dict(zip(names, weights, strict=True)), part) for part in (problem.validation, problem.test)]
    ends = torch.stack(judged, 1).numpy().astype(np.float64)
    ends[np.isnan(ends)] = norms[np.isnan(norms)] = np.inf
    sizes = np.stack([*np.percentile(norms, [50, 99], axis=0, method="lower"), norms.max(0)], 1)
    return {
        cell: Result(*end, problem.trivial, *size, share / task.steps)
        for cell, end, size, share in zip(cells, ends.tolist(), sizes.tolist(), clipped.tolist(), strict=True)
    }


# --- The file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Results:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return {Cell(row[0], row[1], float(row[2]), int(row[3])): Result(*map(float, row[4:])) for row in rows}


def write(path: Path, results: Results) -> None:
    """As a whole or not at all, so that a run that is stopped leaves the cells before it."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Cell._fields, *Result._fields])
    for cell, result in results.items():
        writer.writerow([*cell[:2], f"{cell.rate:g}", cell.seed, *(f"{value:.5g}" for value in result)])
    replace(path, text.getvalue())


# --- Which, and in which order ----------------------------------------------------------------------------------------


def cells_of(task: Task, clippers: Iterable[str], seed: int, mantissas: Sequence[int] = (1, 3)) -> list[Cell]:
    """At every learning rate of the task's optimizer: half decades, or whole ones by a single mantissa."""
    chosen = [clipper for clipper in clippers if clipper in (task.only or EVERYWHERE)]
    rates = [float(f"{mantissa}e{decade}") for decade in DECADES[task.optimizer] for mantissa in mantissas]
    return [Cell(task.name, clipper, rate, seed) for clipper in chosen for rate in rates]


def passes(tasks: Sequence[Task], clippers: Sequence[str], seeds: int) -> Iterator[tuple[Task, int, list[Cell]]]:
    """What the picture needs first, at decades and between them, then every other clipper, then every other seed."""
    first = [clipper for clipper in clippers if clipper in FIRST]
    for seed, chosen, mantissas in (
        (0, first, (1,)),
        (0, first, (1, 3)),
        *((seed, clippers, (1, 3)) for seed in range(seeds)),
    ):
        for task in tasks:
            yield task, seed, cells_of(task, chosen, seed, mantissas)


def complete(path: Path, tasks: Sequence[Task], clippers: Sequence[str], seeds: int) -> Results:
    """Train the cells that the file has not, and write it after every few."""
    results = read(path)
    for task, seed, wanted in passes(tasks, clippers, seeds):
        missing = [cell for cell in wanted if cell not in results]
        for begin in range(0, len(missing), AT_ONCE):
            results |= train(task, seed, missing[begin : begin + AT_ONCE])
            write(path, results)
        if missing:
            say(f"  {task.name}, seed {seed}: {len(missing)} trainings")
    return results
