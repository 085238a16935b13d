"""Other clippers: `attach` in place of theirs; their thresholds beside ours, on the same gradients."""

import sys
from importlib.metadata import version

import autoclip.torch
import numpy as np
import smartclip
import torch
from autoclip_torch import attach
from checks import result
from harness import backward, make_model, norm_of, quieten
from torch.nn.utils import clip_grad_norm_
from zclip import ZClip

PERCENTILE = 10.0  # the paper's
STEPS, SHOWN = 60, (0, 1, 2, 9, 29, 59)


def gradients(clip):
    """Return the thresholds of a clipper on gradients that are the same for all: the weights stay where they are."""
    model = make_model()
    prepared = clip(model)
    thresholds = []
    for step in range(STEPS):
        model.zero_grad()
        backward(model, step)
        thresholds.append(prepared(norm_of(model.parameters())))
    return thresholds


def ours(percentile=PERCENTILE, **options):
    def clip(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        # page
        clip = attach(optimizer, percentile, **options)
        # end of page

        def step(norm):
            optimizer.step()
            return clip.threshold

        return step

    return clip


def paper(model):
    """The authors' procedure, as their repository describes it: a list, a percentile, torch's clipping."""
    norms = []

    def step(norm):
        norms.append(norm)
        threshold = float(np.percentile(norms, PERCENTILE))
        clip_grad_norm_(model.parameters(), threshold)
        return threshold

    return step


def quantile_clip(model):
    clipper = autoclip.torch.QuantileClip(
        model.parameters(), quantile=PERCENTILE / 100, history_length=1000, global_threshold=True
    )

    def step(norm):
        before = clipper.state["global_history"]
        threshold = float(torch.quantile(before, PERCENTILE / 100)) if len(before) else np.inf
        clipper.step()
        return threshold

    return step


def smart_clip(model):
    clipper = smartclip.AutoClip(
        mode="percentile", percentile=PERCENTILE, history="window", window_size=1000, warmup_steps=0, min_history=0
    )

    def step(norm):
        smartclip.apply(model, clipper)
        return clipper.threshold()

    return step


def z_clip(model):
    clipper = ZClip(max_grad_norm=None)

    def step(norm):
        is_warm = clipper.initialized
        limit = clipper._compute_clip_val(norm) if is_warm else None
        clipper.step(model)
        return np.inf if limit is None else limit

    return step


def largest_error(theirs, expected):
    finite = [(mine, other) for mine, other in zip(expected, theirs, strict=True) if np.isfinite([mine, other]).all()]
    return max(abs(mine - other) / mine for mine, other in finite)


def main():
    mine, norms = gradients(ours()), gradients(lambda model: lambda norm: norm)
    before = [np.inf, *(float(np.percentile(norms[:step], PERCENTILE)) for step in range(1, STEPS))]
    expected = {
        "the paper's procedure": (gradients(paper), mine),
        "smartclip": (gradients(smart_clip), mine),
        "autoclip of PyPI": (gradients(quantile_clip), before),  # the norms before the current one
    }
    for name, (theirs, same) in expected.items():
        assert largest_error(theirs, same) < 1e-6, f"{name}: {theirs} and not {same}"
    theirs = {name: thresholds for name, (thresholds, _) in expected.items()} | {"ZClip": gradients(z_clip)}
    rows = {"norm": norms, "autoclip-core": mine, **theirs}
    shown = {"step": [step + 1 for step in SHOWN]} | {
        name: [numbers[step] if np.isfinite(numbers[step]) else None for step in SHOWN]
        for name, numbers in rows.items()
    }
    for package in ("autoclip", "smartclip", "zclip"):
        result(package, f"{package} {version(package)}", updates=STEPS)
    result("autoclip-core", "the paper's procedure", updates=STEPS, shown=shown)


if __name__ == "__main__":
    quieten()
    if sys.argv[1] == "train":
        main()
