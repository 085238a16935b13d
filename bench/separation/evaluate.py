"""From what a network says to separated speech, and how good that is: SI-SDR, as in the paper's Table 1."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from bench.common import say
from bench.separation.corpora import SILENCE, Waves, level
from bench.separation.networks import SOURCES, Network, Outputs, istft, stft


def si_sdr(estimate: NDArray[np.float64], source: NDArray[np.float64]) -> float:
    """The scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019), of waves of shape (samples,)."""
    target = (estimate @ source) / (source @ source) * source
    distortion = estimate - target
    return float(10.0 * np.log10((target @ target) / (distortion @ distortion)))


def binary_masks(embeddings: Tensor, mixture: Tensor) -> Tensor:
    """One mask per cluster of the embeddings, found by k-means; mixture of shape (frames, bins).

    Points weigh as much as in the losses that trained the embeddings.
    """
    points, weights = embeddings.cpu().numpy(), mixture.abs().flatten().cpu().numpy()
    clusters = KMeans(SOURCES, n_init=1, random_state=0).fit(points, sample_weight=weights).labels_
    return torch.stack([torch.from_numpy(clusters == source) for source in range(SOURCES)]).view(-1, *mixture.shape)


@torch.no_grad()
def separate(network: Network, mixture: Tensor) -> Tensor:
    """The sources of a mixture, shape (SOURCES, samples): by the masks if the network has them, else by k-means."""
    spectrum = stft(mixture)
    outputs: Outputs = network(spectrum.unsqueeze(0))
    if outputs.masks is not None:
        masks = outputs.masks[0]
    else:
        assert outputs.embeddings is not None
        masks = binary_masks(outputs.embeddings[0], spectrum).to(mixture.device)
    return istft(masks * spectrum, len(mixture))


def evaluate(network: Network, mixtures: Sequence[Waves], device: str) -> float:
    """The mean SI-SDR over all sources of all mixtures, each in the better order of the two estimates, in dB."""
    was_training = network.training
    network.eval()
    ratios = []
    for sources in (mixtures[index] for index in range(len(mixtures))):
        if min(map(level, sources)) < SILENCE:  # SI-SDR knows no silent source
            continue
        mixture = torch.from_numpy(sources.sum(axis=0)).to(device)
        estimates = separate(network, mixture).cpu().numpy().astype(np.float64)
        truth = sources.astype(np.float64)
        ratios.append(
            max(
                np.mean([si_sdr(estimates[a], truth[b]) for a, b in enumerate(order)])
                for order in permutations(range(SOURCES))
            )
        )
    network.train(was_training)
    if len(ratios) < len(mixtures):
        say(f"{len(mixtures) - len(ratios)} mixtures with a silent source are not evaluated")
    return float(np.mean(ratios))
