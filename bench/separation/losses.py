"""The five losses of the paper, equations (4) to (8), each the mean over a batch.

The two losses of embeddings weigh every time-frequency point by its share of the mixture's magnitude, as those do whom
the paper follows (its [9]): silence has no source. Segments with a silent source, or silent altogether, give a finite
loss, because padding makes such segments.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from bench.separation.networks import EMBEDDING, SOURCES, Outputs, istft, stft

ALPHA = 0.75
TINY = 1e-8


class Targets(NamedTuple):
    """The sources of a batch, and all that losses compare with."""

    waves: Tensor  # (batch, SOURCES, samples)
    sources: Tensor  # their complex spectrograms (batch, SOURCES, frames, bins)
    mixture: Tensor  # (batch, frames, bins)

    @classmethod
    def of(cls, waves: Tensor) -> "Targets":
        sources = stft(waves)
        return cls(waves, sources, sources.sum(1))

    def assignments(self) -> Tensor:
        """Which source is the louder one: Y, shape (batch, frames * bins, SOURCES), one 1 per point."""
        first, second = self.sources.abs().flatten(2).unbind(1)
        return torch.stack([first >= second, first < second], dim=-1).to(self.waves.dtype)

    def weights(self) -> Tensor:
        """The magnitude of the mixture, as shares: W, shape (batch, frames * bins)."""
        magnitude = self.mixture.abs().flatten(1)
        return magnitude / (magnitude.sum(1, keepdim=True) + TINY)


def _grams(outputs: Outputs, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """V'WV, V'WY and Y'WY, from one product of W^1/2 [V Y] with itself: three products take longer."""
    assert outputs.embeddings is not None
    root = targets.weights().sqrt().unsqueeze(-1)
    both = torch.cat([root * outputs.embeddings, root * targets.assignments()], -1)
    gram = both.transpose(1, 2) @ both
    return gram[:, :EMBEDDING, :EMBEDDING], gram[:, :EMBEDDING, EMBEDDING:], gram[:, EMBEDDING:, EMBEDDING:]


def _reordered(sources: Tensor, order: list[int]) -> Tensor:
    """The same as `sources[:, order]`, for which the host would have to wait for a GPU."""
    return torch.stack([sources[:, source] for source in order], 1)


def _best_permutation(compare: Callable[[list[int]], Tensor]) -> Tensor:
    """The mean over the batch of each example's smallest loss; `compare` gives those of one order of the sources."""
    losses = [compare(list(order)) for order in permutations(range(SOURCES))]
    return torch.stack(losses).amin(0).mean()


def deep_clustering(outputs: Outputs, targets: Targets) -> Tensor:
    """Equation (5): || W^1/2 (V V' - Y Y') W^1/2 ||_F^2, between 0 and 1.

    In its low-rank form || V'WV ||^2 - 2 || V'WY ||^2 + || Y'WY ||^2, which needs no matrix of points by points.
    """
    vv, vy, yy = (gram.square().sum((1, 2)) for gram in _grams(outputs, targets))
    return (vv - 2.0 * vy + yy).mean()


def whitened_k_means(outputs: Outputs, targets: Targets) -> Tensor:
    """Equation (6): D - tr((V'V)^-1 V'Y (Y'Y)^-1 Y'V), between 0 and D = 20, with W as in equation (5).

    The ridge keeps V'V invertible: at the start all embeddings are nearly the same, and its trace is 1.
    """
    vv, vy, yy = _grams(outputs, targets)
    ridge = 1e-6 * torch.eye(EMBEDDING, device=vv.device)
    explained = torch.linalg.solve(vv + ridge, vy @ (vy / (yy.sum(2).unsqueeze(1) + TINY)).transpose(1, 2))
    return EMBEDDING - explained.diagonal(dim1=1, dim2=2).sum(1).mean()


def mask_inference(outputs: Outputs, targets: Targets) -> Tensor:
    """Equation (4): 1/N || |S^| - T(|S| cos(theta_S^ - theta_S)) ||_1, T a truncation to [0, |X|]; best permutation.

    The estimate |S^| is the mask times |X|, with the mixture's phase; N counts the points of all sources.
    """
    assert outputs.masks is not None
    magnitude = targets.mixture.abs().unsqueeze(1)
    phase = targets.mixture.unsqueeze(1) / (magnitude + TINY)
    aligned = (targets.sources * phase.conj()).real  # |S| cos(theta_X - theta_S)
    wanted = torch.minimum(aligned.clamp(min=0.0), magnitude)
    estimate = outputs.masks * magnitude
    return _best_permutation(lambda order: (estimate - _reordered(wanted, order)).abs().mean((1, 2, 3)))


def chimera(outputs: Outputs, targets: Targets) -> Tensor:
    """Equation (7): 0.75 times (4) plus 0.25 times (6)."""
    return ALPHA * mask_inference(outputs, targets) + (1.0 - ALPHA) * whitened_k_means(outputs, targets)


def negative_snr(outputs: Outputs, targets: Targets) -> Tensor:
    """Equation (8): -10 log10(||s||^2 / ||s - s^||^2) in dB, of the inverse STFT of the masked mixture.

    Mean over the sources, best permutation.
    """
    assert outputs.masks is not None
    waves = targets.waves
    estimate = istft(outputs.masks * targets.mixture.unsqueeze(1), waves.shape[-1])
    power = waves.square().sum(2) + TINY

    def compare(order: list[int]) -> Tensor:
        error = (_reordered(waves, order) - estimate).square().sum(2) + TINY
        return -10.0 * torch.log10(_reordered(power, order) / error).mean(1)

    return _best_permutation(compare)


class Loss(NamedTuple):
    """A loss, what the network must put out for it, and what it is called in tables."""

    function: Callable[[Outputs, Targets], Tensor]
    embeddings: bool
    masks: bool
    label: str


LOSSES = {
    "dc": Loss(deep_clustering, True, False, "DC"),
    "wkm": Loss(whitened_k_means, True, False, "WKM"),
    "mi": Loss(mask_inference, False, True, "MI"),
    "chimera": Loss(chimera, True, True, "MI+WKM"),
    "snr": Loss(negative_snr, False, True, "SNR"),
}
