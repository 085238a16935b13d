"""The STFT, and the network of the paper: stacked BLSTM layers, and above them embeddings, masks, or both.

Spectrograms have the shape (..., frames, bins). They are divided by the sum of the window, so that a magnitude is that
of a sinusoid whatever the window: the size of the mask inference loss depends on it, and no other.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

WINDOW, HOP = 256, 64  # 32 ms and 8 ms at 8 kHz
BINS = WINDOW // 2 + 1
SOURCES, EMBEDDING = 2, 20
# (layers, hidden units in each direction): the paper's networks, one that learns on a CPU in hours, and a tiny one
SIZES = {"paper": (4, 600), "figure": (2, 300), "medium": (2, 128), "small": (2, 64)}


def samples_of(frames: int) -> int:
    """How many samples have so many frames: 25,536 have 400."""
    return (frames - 1) * HOP


def _window(like: Tensor) -> Tensor:
    return torch.hann_window(WINDOW, device=like.device).sqrt()


def stft(waves: Tensor) -> Tensor:
    """Spectrograms of waves, shape (..., samples)."""
    window = _window(waves)
    flat = waves.reshape(-1, waves.shape[-1])
    spectrum = torch.stft(flat, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True) / window.sum()
    return spectrum.transpose(-1, -2).reshape(*waves.shape[:-1], -1, BINS)


def istft(spectrum: Tensor, samples: int) -> Tensor:
    """Waves of spectrograms, shape (..., samples)."""
    window = _window(spectrum)
    flat = spectrum.reshape(-1, *spectrum.shape[-2:]).transpose(-1, -2) * window.sum()
    waves = torch.istft(flat, WINDOW, HOP, window=window, length=samples)
    return waves.reshape(*spectrum.shape[:-2], samples)


class Outputs(NamedTuple):
    """What a network says of a mixture; what it does not say is None."""

    embeddings: Tensor | None  # (batch, frames * bins, EMBEDDING), of unit norm
    masks: Tensor | None  # (batch, SOURCES, frames, bins), between 0 and 1


class Network(nn.Module):
    """Mixture spectrogram in, embeddings and masks out."""

    def __init__(self, layers: int, hidden: int, *, embeddings: bool, masks: bool) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm1d(BINS)
        self.blstm = nn.LSTM(BINS, hidden, layers, batch_first=True, bidirectional=True)
        self.embeddings = nn.Linear(2 * hidden, BINS * EMBEDDING) if embeddings else None
        self.masks = nn.Linear(2 * hidden, BINS * SOURCES) if masks else None

    def forward(self, mixture: Tensor) -> Outputs:
        """Take a complex spectrogram, shape (batch, frames, bins)."""
        batch, frames, _ = mixture.shape
        log_magnitude = torch.log(mixture.abs() + 1e-5)
        hidden, _ = self.blstm(self.normalize(log_magnitude.transpose(1, 2)).transpose(1, 2))
        embeddings = masks = None
        if self.embeddings is not None:
            points = torch.sigmoid(self.embeddings(hidden)).view(batch, frames * BINS, EMBEDDING)
            embeddings = nn.functional.normalize(points, dim=-1)
        if self.masks is not None:
            masks = torch.sigmoid(self.masks(hidden)).view(batch, frames, SOURCES, BINS).transpose(1, 2)
        return Outputs(embeddings, masks)
