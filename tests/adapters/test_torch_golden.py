"""States of the first release that had them load today, and the run goes on as it did then, to the last digits.

Each file of golden/torch holds a state after half of a run, and what that release made of the other half. `python -m
tests.adapters.test_torch_golden` makes the files anew, with the release that is installed: that is for new ways of
clipping only, as the files that are there are the promise.
"""

import contextlib
import warnings
from math import inf, nan
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach
from autoclip_torch.lightning import AutoClipCallback
from torch import nn

from autoclip_core import NormHistory, StateError

FOLDER = Path(__file__).parent / "golden/torch"
HALF, WHOLE = 40, 80

# By name: attached or not, the optimizer's options, those of the clipper.
RUNS = {
    "global": (False, {}, {}),
    "window": (False, {}, {"window": 7, "warmup": 3, "max_threshold": 20.0, "percentile": 30.0}),
    "pass": (False, {}, {"nonfinite": "pass", "percentile": 75.0}),
    "group": (False, {}, {"scope": "group"}),
    "parameter": (False, {}, {"scope": "parameter", "window": 5}),
    "names": (False, {"named": True}, {"scope": "parameter"}),
    "function": (False, {"named": True}, {"scope": lambda name: name[:1]}),
    "deferred": (False, {}, {"mode": "deferred"}),
    "deferred-parameter": (False, {}, {"mode": "deferred", "scope": "parameter", "window": 5}),
    "attached": (True, {}, {}),
    "attached-group": (True, {"momentum": 0.5}, {"scope": "group", "percentile": 50.0}),
    "attached-fused": (True, {"fused": True}, {"percentile": 50.0}),
    "attached-deferred": (True, {"fused": True}, {"mode": "deferred"}),
}


def size_of(number):
    """The size of a gradient: small integers, so that every norm is the same number on every machine."""
    if number % 11 == 5:
        return [nan, inf, 0.0][number % 3]
    return float(1 + 7 * number % 23)


class Run:
    """Three parameters in two groups, whose gradients are (2, 3, 6), with norm 7, times a size."""

    def __init__(self, attached, optimizer, options):
        optimizer = dict(optimizer)
        self.params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
        pairs = list(zip(("a", "b.weight", "b.bias"), self.params, strict=True))
        items = pairs if optimizer.pop("named", False) else self.params
        self.optimizer = torch.optim.SGD([{"params": items[:1]}, {"params": items[1:]}], lr=0.5, **optimizer)
        self.attached = attached
        self.clip = (attach if attached else AutoClip)(self.optimizer, **options)

    def go(self, first, last):
        """Take steps; return the gradients after each."""
        grads = []
        for number in range(first, last):
            for param, value in zip(self.params, (2.0, 3.0, 6.0), strict=True):
                param.grad = torch.tensor([value * size_of(number)])
            if not self.attached:
                self.clip.step()
            else:
                self.optimizer.step()
            grads.append(torch.cat([param.grad for param in self.params]))
        return torch.stack(grads)


class Linear(lightning.pytorch.LightningModule):
    """Its gradients are its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, index):
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(epochs, resumed=None):
    """Fit so many epochs; return the trainer and the callback."""
    callback = AutoClipCallback(30.0)
    trainer = lightning.pytorch.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    data = [torch.tensor([2.0, 3.0, 6.0]) * float(1 + 7 * number % 23) for number in range(30)]
    trainer.fit(Linear(), torch.utils.data.DataLoader(data, batch_size=1), ckpt_path=resumed)
    return trainer, callback


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("name", RUNS)
def test_state_of_then_goes_on_as_it_did_then(name):
    golden = torch.load(FOLDER / f"{name}.pt")
    run = Run(*RUNS[name])
    run.clip.load_state_dict(golden["half"])
    assert run.clip.state_dict() == golden["half"]
    grads = run.go(HALF, WHOLE)
    # They were made when norms were rounded to float32.
    torch.testing.assert_close(grads, golden["grads"], rtol=1e-6, atol=0, equal_nan=True)
    now, then = run.clip.state_dict(), golden["whole"]
    assert now["groups"].keys() == then["groups"].keys()
    for group, state in then["groups"].items():
        norms, expected = (NormHistory.from_bytes(made["history"]) for made in (now["groups"][group], state))
        np.testing.assert_allclose(norms.values(), expected.values(), rtol=2e-7)
        # A norm that was equal to its threshold may be above it by as much.
        clipped = pytest.approx(state["clipped_steps"], abs=1)
        assert now["groups"][group] == {**state, "history": norms.to_bytes(), "clipped_steps": clipped}


@pytest.mark.parametrize("name", RUNS)
def test_golden_runs_meet_what_they_are_for(name):
    golden = torch.load(FOLDER / f"{name}.pt")
    half, whole = ({k: dict(group) for k, group in golden[key]["groups"].items()} for key in ("half", "whole"))
    for group, state in whole.items():
        assert half[group]["steps"] == HALF
        assert state["steps"] == WHOLE
        assert state["clipped_steps"] > half[group]["clipped_steps"] > 0
        assert state["nonfinite_steps"] > half[group]["nonfinite_steps"] > 0


def test_lightning_checkpoint_of_then_goes_on_as_it_did_then():
    trainer, callback = fit(2, FOLDER / "lightning.ckpt")
    assert trainer.global_step == 60
    golden = torch.load(FOLDER / "lightning.pt")
    state = callback.state_dict()
    assert {index: {key: state[index][key] for key in state_then} for index, state_then in golden.items()} == golden


def main():
    """Make the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, how in RUNS.items():
        run = Run(*how)
        run.go(0, HALF)
        half = run.clip.state_dict()
        # Not the same object for a while: what does not enter the state is not to matter.
        run = Run(*how)
        run.clip.load_state_dict(half)
        grads = run.go(HALF, WHOLE)
        torch.save({"half": half, "grads": grads, "whole": run.clip.state_dict()}, FOLDER / f"{name}.pt")
    fit(1)[0].save_checkpoint(FOLDER / "lightning.ckpt")
    torch.save(fit(2)[1].state_dict(), FOLDER / "lightning.pt")


def test_object_that_an_earlier_release_pickled_whole_is_refused():
    with pytest.raises(StateError, match=r"by another release.* save its state_dict\(\)"):
        AutoClip.__new__(AutoClip).__setstate__({"_clips": {}, "_groups": None})


if __name__ == "__main__":
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        main()
