"""What clips: AutoClip, fixed thresholds, and others as their authors publish them, for many trainings at once.

A clipper sees the norm of each gradient tensor before clipping, shape (trainings, tensors), and answers with the factor
of each tensor. What it knows of one training it does not use for another. AGC alone also looks at the weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoclip_core import AutoClip, NormHistory

Norms = NDArray[np.float64]


class Size(NamedTuple):
    trainings: int
    tensors: int
    steps: int


def whole(norms: Norms) -> Norms:
    """The norm of the whole gradient, shape (trainings, 1)."""
    return np.sqrt(np.square(norms).sum(1, keepdims=True))


def down_to(limits: Norms, norms: Norms) -> Norms:
    """The factors that bring norms down to limits; 1 where they are not above."""
    above = norms > limits
    return np.where(above, limits / np.where(above, norms, 1.0), 1.0)


class Clipper:
    def __init__(self, size: Size) -> None:
        self.size = size
        self.step = 0

    def factors(self, norms: Norms) -> Norms:
        """Of each tensor, or of the whole gradient; 0 drops the update."""
        return np.ones((len(norms), 1))

    def clip(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], norms: Norms) -> NDArray[np.bool_]:
        """Scale the gradients in place; tell in which of the trainings."""
        factors = np.broadcast_to(self.factors(norms), norms.shape)
        self.step += 1
        if (factors != 1.0).any():
            for gradient, column in zip(gradients, torch.from_numpy(factors.astype(np.float32)).T, strict=True):
                factor = column.view(-1, *[1] * (gradient.ndim - 1))
                gradient.copy_(torch.where(factor == 0.0, 0.0, gradient * factor))
        return (factors < 1.0).any(1)


class Fixed(Clipper):
    """A threshold for the norm of the whole gradient."""

    def __init__(self, size: Size, threshold: float) -> None:
        super().__init__(size)
        self.threshold = threshold

    def factors(self, norms: Norms) -> Norms:
        return down_to(np.full((len(norms), 1), self.threshold), whole(norms))


class Percentile(Clipper):
    """AutoClip. `until` lets the percentile go there along a line, over all the steps."""

    def __init__(
        self, size: Size, percentile: float, *, until: float | None = None, per_tensor: bool = False, **options: int
    ) -> None:
        super().__init__(size)
        self.per_tensor, self.ends = per_tensor, (percentile, until)
        columns = size.tensors if per_tensor else 1
        self.clips = [[AutoClip(percentile, **options) for _ in range(columns)] for _ in range(size.trainings)]

    def factors(self, norms: Norms) -> Norms:
        begin, end = self.ends
        if end is not None:
            for (clip,) in self.clips:
                clip.percentile = begin + (end - begin) * self.step / self.size.steps
        rows = (norms if self.per_tensor else whole(norms)).tolist()
        return np.array(
            [
                [clip.observe(norm).scale for clip, norm in zip(clips, row, strict=True)]
                for clips, row in zip(self.clips, rows, strict=True)
            ]
        )


class Before(Clipper):
    """A percentile of the norms before the current one, as in `autoclip` of PyPI: per tensor, of the last 1,000."""

    def __init__(self, size: Size, percentile: float, *, window: int | None = None, per_tensor: bool = False) -> None:
        super().__init__(size)
        self.percentile, self.per_tensor = percentile, per_tensor
        columns = size.tensors if per_tensor else 1
        self.histories = [[NormHistory(window) for _ in range(columns)] for _ in range(size.trainings)]

    def factors(self, norms: Norms) -> Norms:
        norms = norms if self.per_tensor else whole(norms)
        limits = np.full(norms.shape, np.inf)
        for place, norm in np.ndenumerate(norms):
            history = self.histories[place[0]][place[1]]
            if len(history):
                limits[place] = history.percentile(self.percentile)
            if np.isfinite(norm):
                history.push(norm)
        return down_to(limits, norms)


class ZClip(Clipper):
    """arXiv:2504.02507: outliers, more than 2.5 standard deviations above the running mean, are brought near to it."""

    WARMUP, DECAY, LIMIT, EPSILON = 25, 0.97, 2.5, 1e-6

    def __init__(self, size: Size, cap: float = np.inf) -> None:
        super().__init__(size)
        self.cap = cap
        self.first: list[Norms] = []
        self.mean = self.variance = np.empty(0)

    def factors(self, norms: Norms) -> Norms:
        norms = whole(norms)
        limits = norms
        if self.step < self.WARMUP:
            self.first.append(norms)
            self.mean, self.variance = np.mean(self.first, axis=0), np.var(self.first, axis=0)
        else:
            deviation = np.sqrt(self.variance)
            score = (norms - self.mean) / (deviation + self.EPSILON)
            outlier = score > self.LIMIT
            near = self.mean + self.LIMIT * deviation * self.LIMIT / np.where(outlier, score, 1.0)
            limits = np.where(outlier, near, norms)
            self.mean = self.DECAY * self.mean + (1.0 - self.DECAY) * limits
            self.variance = self.DECAY * self.variance + (1.0 - self.DECAY) * np.square(limits - self.mean)
        return down_to(np.minimum(limits, self.cap), norms)


class AdaGC(Clipper):
    """arXiv:2502.11034: each tensor to 1.05 times the running mean of its clipped norms; at first the whole to 1."""

    WARMUP, DECAY, RATIO, FIRST_LIMIT = 100, 0.98, 1.05, 1.0

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.mean = np.full((size.trainings, size.tensors), np.inf)

    def factors(self, norms: Norms) -> Norms:
        if self.step < self.WARMUP:
            factors = down_to(np.full((len(norms), 1), self.FIRST_LIMIT), whole(norms))
            self.mean = np.minimum(self.mean, norms * factors)
        else:
            factors = down_to(self.RATIO * self.mean, norms)
            self.mean = self.DECAY * self.mean + (1.0 - self.DECAY) * norms * factors
        return factors


class AGC(Clipper):
    """arXiv:2102.06171: the gradient of each unit to a hundredth of its weights; the last layer as it is."""

    RATIO, SMALLEST = 0.01, 1e-3

    def clip(self, gradients: Sequence[Tensor], weights: Sequence[Tensor], norms: Norms) -> NDArray[np.bool_]:
        clipped = torch.zeros(len(norms), dtype=torch.bool)
        for gradient, weight in list(zip(gradients, weights, strict=True))[:-2]:
            # Of a matrix its rows, which are the units; of a vector of biases the whole.
            size, own = (torch.linalg.vector_norm(tensor, dim=-1, keepdim=True) for tensor in (gradient, weight))
            factor = (self.RATIO * own.clamp_min(self.SMALLEST) / size.clamp_min(1e-6)).clamp_max(1.0)
            gradient.mul_(factor)
            clipped |= (factor < 1.0).flatten(1).any(1)
        return clipped.numpy()


def fixed_name(threshold: float) -> str:
    return f"fixed {threshold:g}"


def percentile_name(percentile: float) -> str:
    return f"p = {percentile:g}"


THRESHOLDS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
PERCENTILES = (1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 99.0)
NONE, OTHERS = "none", ("ZClip", "ZClip, no cap", "AdaGC", "AGC", "autoclip of PyPI")

MAKERS: dict[str, Callable[[Size], Clipper]] = {
    NONE: Clipper,
    **{fixed_name(threshold): partial(Fixed, threshold=threshold) for threshold in THRESHOLDS},
    **{percentile_name(percentile): partial(Percentile, percentile=percentile) for percentile in PERCENTILES},
    **dict(
        zip(
            OTHERS,
            (
                partial(ZClip, cap=1.0),
                ZClip,
                AdaGC,
                AGC,
                partial(Before, percentile=90.0, window=1000, per_tensor=True),
            ),
            strict=True,
        )
    ),
}
# Questions that the paper leaves open.
VARIANTS: dict[str, Callable[[Size], Clipper]] = {
    f"p = {percentile:g}, {words}": partial(kind, percentile=percentile, **options)
    for words, kind, options in (
        ("window 100", Percentile, {"window": 100}),
        ("window 300", Percentile, {"window": 300}),
        ("per tensor", Percentile, {"per_tensor": True}),
        ("current norm left out", Before, {}),
    )
    for percentile in (10.0, 90.0)
} | {
    "p from 90 to 10": partial(Percentile, percentile=90.0, until=10.0),
    "p from 10 to 90": partial(Percentile, percentile=10.0, until=90.0),
}
# For tasks of thousands of steps alone: elsewhere they are the whole history.
LONG: dict[str, Callable[[Size], Clipper]] = {
    f"p = {percentile:g}, window {window}": partial(Percentile, percentile=percentile, window=window)
    for percentile in (10.0, 90.0)
    for window in (1000, 3000)
}
EVERYWHERE = {*MAKERS, *VARIANTS}
MAKERS |= VARIANTS | LONG
_windows = ("", *(f", window {size}" for size in (300, 1000, 3000)))
DRIFTING = (NONE, *(f"p = {percentile}{window}" for percentile in (10, 90) for window in _windows))

# The first of all that is trained: the picture needs no more.
FIRST = (NONE, *map(fixed_name, THRESHOLDS), *map(percentile_name, (10.0, 50.0, 90.0)))
