"""What is learned: small networks on data that scikit-learn and Python bring along, and how their batches are spoiled.

The networks are tiny, so that thousands of trainings take an hour on two cores. They are ordinary modules, and the
study trains many of them at once by `torch.func`; so a loss draws no random numbers: the noise of the autoencoder is a
part of its batch. The seed chooses initial weights, batches and spoiled batches. The split of the data is always the
same: one part to learn from, one to choose learning rates by, and one for the figures of the report.
"""

import functools
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional

from bench.regret.clippers import DRIFTING, NONE

BATCH = 32
LETTERS, LENGTH, LINES = 64, 16, 8  # of the text: its alphabet, and the shape of a batch
LATENT = 6


class Batch(NamedTuple):
    inputs: tuple[Tensor, ...]
    targets: Tensor | tuple[Tensor, Tensor]  # with a factor for the loss


class Problem(NamedTuple):
    """A task for one seed; `trivial` is the test loss of the best prediction that ignores the inputs."""

    network: nn.Module
    loss: Callable[..., Tensor]  # of what the network says, and the targets
    batches: Iterator[Batch]
    validation: Batch
    test: Batch
    trivial: float


@dataclass(frozen=True)
class Task:
    """A row of the table below; a quick run takes a twentieth of the steps."""

    name: str
    about: str
    optimizer: str
    steps: int
    make: Callable[[int, float], Problem]
    spoiled: float = 0.0  # the share of the batches
    twin_of: str = ""  # for the clean twin of a task with spoiled batches: it chooses their rate, and has no column
    only: tuple[str, ...] = ()  # the clippers that are tried, where not all of them are


# --- Tables -----------------------------------------------------------------------------------------------------------


def perceptron(*widths: int) -> nn.Sequential:
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def chosen(seed: int, spoiled: float, rows: int, size: int = BATCH) -> Iterator[tuple[Tensor, bool]]:
    """The rows of each batch, and whether it is a spoiled one."""
    generator = torch.Generator().manual_seed(seed)
    lot = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield torch.randint(rows, (size,), generator=generator), torch.rand((), generator=lot).item() < spoiled


def squares(said: Tensor, targets: Tensor) -> Tensor:
    return (said[:, 0] - targets).square().mean()


def likelihood(said: Tensor, targets: Tensor) -> Tensor:
    """Of a normal distribution whose mean and logarithm of the variance the network says."""
    mean, log_variance = said[:, 0], said[:, 1]
    return 0.5 * (log_variance + (targets - mean).square() * torch.exp(-log_variance)).mean()


@functools.cache
def friedman(noise: str) -> tuple[Tensor, Tensor]:
    """4,000 rows of Friedman's first function, the first 2,000 with noise: the others are to judge what was learned."""
    inputs, targets = make_friedman1(4000, noise=0.0, random_state=7)
    random = np.random.default_rng(8)
    if noise == "heavy":
        targets[:2000] += 2.0 * random.standard_t(1.5, 2000)
    elif noise == "factor":  # of mean 1, so that the long tail is signal
        targets[:2000] *= np.exp(1.2 * random.standard_normal(2000) - 0.72)
    else:
        targets[:2000] += random.normal(size=2000)
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)


@functools.cache
def diabetes(_: str) -> tuple[Tensor, Tensor]:
    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(7).permutation(len(targets))
    scaled = inputs[order] * math.sqrt(len(targets))
    return torch.tensor(scaled, dtype=torch.float32), torch.tensor(targets[order], dtype=torch.float32)


def table(
    data: Callable[[str], tuple[Tensor, Tensor]], noise: str, parts: tuple[int, int], outputs: int = 1
) -> Callable[[int, float], Problem]:
    """Regression; in a spoiled batch the targets are in another unit, a thousand times as large."""

    def make(seed: int, spoiled: float) -> Problem:
        inputs, targets = data(noise)
        learned, chooses = parts
        torch.manual_seed(seed)
        network = perceptron(inputs.shape[1], 32, 32, outputs)

        def batches() -> Iterator[Batch]:
            for rows, bad in chosen(seed, spoiled, learned):
                yield Batch((inputs[rows],), targets[rows] * (1000.0 if bad else 1.0))

        error = targets[chooses:].var(correction=0).item()
        return Problem(
            network,
            squares if outputs == 1 else likelihood,
            batches(),
            Batch((inputs[learned:chooses],), targets[learned:chooses]),
            Batch((inputs[chooses:],), targets[chooses:]),
            error if outputs == 1 else 0.5 * (1.0 + math.log(error)),
        )

    return make


# --- Digits -----------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images from 0 to 1, and what they show: 1,200 to learn, 300 to choose, 297 to judge."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def labelled(wrong: float) -> Callable[[int, float], Problem]:
    """Classification with a share of wrong labels; in a spoiled batch the pixels were not divided by 255."""

    def make(seed: int, spoiled: float) -> Problem:
        images, labels = digits()
        learned = labels.clone()
        generator = torch.Generator().manual_seed(2000 + seed)
        flipped = torch.rand(1200, generator=generator) < wrong
        learned[:1200][flipped] = torch.randint(10, (int(flipped.sum()),), generator=generator)
        torch.manual_seed(seed)
        network = perceptron(64, 32, 32, 10)

        def batches() -> Iterator[Batch]:
            for rows, bad in chosen(seed, spoiled, 1200):
                yield Batch((images[rows] * (255.0 if bad else 1.0),), learned[rows])

        validation, test = Batch((images[1200:1500],), labels[1200:1500]), Batch((images[1500:],), labels[1500:])
        return Problem(network, functional.cross_entropy, batches(), validation, test, math.log(10))

    return make


class Autoencoder(nn.Module):
    """A variational one: images and noise in, logits of the images, means and logarithms of variances out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(64, 32, 2 * LATENT), perceptron(LATENT, 32, 64)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return self.decoder(mean + noise * torch.exp(0.5 * log_variance)), mean, log_variance


def evidence(said: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """The negative lower bound, per image."""
    logits, mean, log_variance = said
    unlike = functional.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1)
    return (unlike + 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)).mean()


def autoencoded(seed: int, spoiled: float) -> Problem:
    """Images by an autoencoder; in a spoiled batch they were not divided by 16."""
    images, _ = digits()
    torch.manual_seed(seed)
    network = Autoencoder()
    generator = torch.Generator().manual_seed(3000 + seed)

    def batch(chosen_images: Tensor, generator: torch.Generator) -> Batch:
        noise = torch.randn(len(chosen_images), LATENT, generator=generator)
        return Batch((chosen_images, noise), chosen_images)

    def batches() -> Iterator[Batch]:
        for rows, bad in chosen(seed, spoiled, 1200):
            yield batch(images[rows] * (16.0 if bad else 1.0), generator)

    judge = torch.Generator().manual_seed(5)
    validation, test = batch(images[1200:1500], judge), batch(images[1500:], judge)
    mean = images[:1200].mean(0).clamp(1e-3, 1.0 - 1e-3).expand(297, 64)
    trivial = functional.binary_cross_entropy(mean, images[1500:], reduction="none").sum(1).mean().item()
    return Problem(network, evidence, batches(), validation, test, trivial)


# --- Text -------------------------------------------------------------------------------------------------------------


@functools.cache
def text() -> Tensor:
    """300,000 letters of Python's own standard library, as numbers; rare letters share the last one."""
    folder = Path(sysconfig.get_path("stdlib"))
    written = "".join(path.read_text("utf-8") for path in sorted(folder.glob("[a-d]*.py")))[:300_000]
    common = sorted(set(written), key=written.count, reverse=True)[: LETTERS - 1]
    number = {letter: place for place, letter in enumerate(common)}
    return torch.tensor([number.get(letter, LETTERS - 1) for letter in written])


class Recurrent(nn.Module):
    """Elman's network, or an LSTM; written out, for `torch.func.vmap` does not know those of PyTorch."""

    def __init__(self, *, lstm: bool, width: int = 24) -> None:
        super().__init__()
        self.lstm = lstm
        gates = 4 if lstm else 1
        self.letters = nn.Embedding(LETTERS, gates * width)
        self.memory = nn.Linear(width, gates * width)
        self.output = nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        seen = self.letters(letters)
        cell = said = torch.zeros_like(seen[:, 0, : self.memory.in_features])
        all_said = []
        for place in seen.unbind(1):
            current = place + self.memory(said)
            if self.lstm:
                new, keep, take, show = current.chunk(4, dim=1)
                cell = torch.sigmoid(keep) * cell + torch.sigmoid(take) * torch.tanh(new)
                said = torch.sigmoid(show) * torch.tanh(cell)
            else:
                said = torch.tanh(current)
            all_said.append(said)
        return self.output(torch.stack(all_said, dim=1))


class Block(nn.Module):
    """Attention and a perceptron, each normalised after it has been added, as in the first transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.questions, self.answers = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = perceptron(width, 2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        lines, length, width = x.shape
        split = self.questions(x).view(lines, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        seen = scores.masked_fill(later, -math.inf).softmax(-1) @ value
        x = self.first(x + self.answers(seen.transpose(1, 2).reshape(lines, length, width)))
        return self.second(x + self.perceptron(x))


class Transformer(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.output = nn.Linear(width, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        return self.output(self.blocks(self.letters(letters) + self.places(torch.arange(letters.shape[1]))))


def next_letter(said: Tensor, letters: Tensor) -> Tensor:
    return functional.cross_entropy(said.flatten(0, 1), letters.flatten())


def written(network: Callable[[], nn.Module]) -> Callable[[int, float], Problem]:
    """The next letter of a text."""

    def make(seed: int, spoiled: float) -> Problem:
        letters = text()
        learned = len(letters) * 8 // 10
        torch.manual_seed(seed)

        def lines(starts: Tensor) -> Batch:
            cut = letters[starts[:, None] + torch.arange(LENGTH + 1)]
            return Batch((cut[:, :-1],), cut[:, 1:])

        def batches() -> Iterator[Batch]:
            for starts, _ in chosen(seed, spoiled, learned - LENGTH - 1, LINES):
                yield lines(starts)

        held_out = torch.arange(learned, len(letters) - LENGTH - 1, 293)
        half = len(held_out) // 2
        validation, test = lines(held_out[:half]), lines(held_out[half:])
        shares = torch.bincount(letters[:learned], minlength=LETTERS) / learned
        trivial = -shares.clamp_min(1e-6).log()[test.targets].mean().item()
        return Problem(network(), next_letter, batches(), validation, test, trivial)

    return make


# --- Drift ------------------------------------------------------------------------------------------------------------


def drifting(make: Callable[[int, float], Problem], times: float, steps: int) -> Callable[[int, float], Problem]:
    """The same task with a loss that is multiplied by a factor, from 1 at the first step to `times` at the last."""

    def made(seed: int, spoiled: float) -> Problem:
        problem = make(seed, spoiled)

        def weighed(batch: Batch, factor: float) -> Batch:
            return batch._replace(targets=(batch.targets, torch.tensor(factor)))

        def loss(said: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
            own, factor = targets
            return factor * problem.loss(said, own)

        batches = (weighed(batch, times ** (step / steps)) for step, batch in enumerate(problem.batches))
        return problem._replace(
            loss=loss,
            batches=batches,
            validation=weighed(problem.validation, 1.0),
            test=weighed(problem.test, 1.0),
        )

    return made


# --- All of them ------------------------------------------------------------------------------------------------------

_rows = (2000, 3000)

TABLES = (
    Task("tails, SGD", "regression, Student's t noise of 1.5 degrees", "SGD", 1000, table(friedman, "heavy", _rows)),
    Task("tails, Adam", "the same", "Adam", 1000, table(friedman, "heavy", _rows)),
    Task("factors, SGD", "regression, log-normal factors as noise", "SGD", 1000, table(friedman, "factor", _rows)),
    Task(
        "diabetes, SGD", "regression, 442 patients, targets as they are", "SGD", 1000, table(diabetes, "", (262, 352))
    ),
    Task("variance, Adam", "mean and variance by likelihood", "Adam", 1000, table(friedman, "normal", _rows, 2)),
    Task("labels, SGD", "digits, 40 % of the labels random", "SGD", 1000, labelled(0.4)),
    Task("VAE, Adam", "variational autoencoder of digits", "Adam", 600, autoencoded),
)
TEXTS = (
    Task("RNN, SGD", "the next letter, Elman's network", "SGD", 300, written(lambda: Recurrent(lstm=False))),
    Task("LSTM, Adam", "the same by an LSTM", "Adam", 300, written(lambda: Recurrent(lstm=True))),
    Task("transformer, Adam", "the same by attention, normalised after", "Adam", 300, written(Transformer)),
)
SPOILED = (
    Task(
        "units, SGD",
        "regression; 1 batch in 200: targets x 1,000",
        "SGD",
        1000,
        table(friedman, "normal", _rows),
        0.005,
    ),
    Task("units, Adam", "the same", "Adam", 1000, table(friedman, "normal", _rows), 0.005),
    Task("pixels, SGD", "digits; 1 batch in 100: pixels x 255", "SGD", 1000, labelled(0.0), 0.01),
    Task("pixels, VAE, Adam", "autoencoder; 1 batch in 200: pixels x 16", "Adam", 600, autoencoded, 0.005),
)
TWINS = tuple(
    Task(f"{task.name}, clean", task.about, task.optimizer, task.steps, task.make, 0.0, task.name, (NONE,))
    for task in SPOILED
)
_tails, _long = table(friedman, "heavy", _rows), 6000
DRIFTS = (
    Task(
        "falling, Adam",
        "regression, Student's t noise, the loss times 1 to 0.01",
        "Adam",
        _long,
        drifting(_tails, 0.01, _long),
        only=DRIFTING,
    ),
    Task("rising, Adam", "the same, times 1 to 100", "Adam", _long, drifting(_tails, 100.0, _long), only=DRIFTING),
    Task("falling, SGD", "digits, until all are learned", "SGD", _long, labelled(0.0), only=DRIFTING),
)
CLEAN = TABLES + TEXTS
TASKS = TABLES + SPOILED + TWINS + TEXTS + DRIFTS  # the longest last
