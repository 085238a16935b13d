"""The pictures of autoclip_core.plot, of a small network that learns scikit-learn's digits."""

import numpy as np
import torch
from autoclip_torch import attach
from sklearn.datasets import load_digits
from torch import nn

from autoclip_core.plot import plot_distribution, plot_norms, plot_thresholds
from autoclip_core.replay import replay
from bench.common import parse, parser, say

PERCENTILE = 10.0


def norms_of_a_training(steps: int) -> list[float]:
    """The gradient norms of a run with AutoClip, before clipping."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    clip = attach(optimizer, PERCENTILE)
    norms = []
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        norms.append(clip.log()["grad_norm"])
    return norms


def main() -> None:
    options = parse(parser(__doc__, rounds=1))
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    say("python -m bench pictures")
    norms = np.array(norms_of_a_training(200 if options.quick else 3000))
    figure, axes = plt.subplot_mosaic([["run", "run"], ["sizes", "choice"]], figsize=(9, 7), layout="constrained")
    [result] = replay(norms, [PERCENTILE])
    label = f"threshold, p = {PERCENTILE:g}"
    plot_norms(norms, result.thresholds, result.clipped, label=label, axes=axes["run"])
    plot_distribution(norms, PERCENTILE, axes=axes["sizes"])
    plot_thresholds(norms, PERCENTILE, axes=axes["choice"])
    figure.savefig(options.output / "pictures.png", dpi=150)
    say(f"written: pictures.png in {options.output}")


if __name__ == "__main__":
    main()
