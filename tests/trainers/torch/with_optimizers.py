"""Collections of optimizers: `attach`, to each of bitsandbytes, optimi, pytorch-optimizer, timm, torch-optimizer."""

import contextlib
import inspect
import sys
import warnings
from importlib.metadata import version

import torch
from autoclip_torch import attach
from checks import PERCENTILE, check, result
from harness import batch_of, quieten, watch

from autoclip_core import AutoClipError

STEPS = 8


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def try_kind(make):
    """Return whether AutoClip clips an optimizer's steps, or warns, or is refused, or nothing could be tried."""
    model = make_net()

    def evaluate(step):
        model.zero_grad()
        inputs, targets = batch_of(step)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward(create_graph=True)  # which optimizers of second order want
        return loss

    def steps(optimizer, clip=None):
        for step in range(STEPS):
            evaluate(step)
            optimizer.step()
            if clip is not None:
                clip.log()

    try:
        optimizer = make(model)
        steps(optimizer)
    except Exception:  # noqa: BLE001 - whatever it wants, it is not AutoClip that has failed
        return "not tried"
    model = make_net()
    optimizer = make(model)
    try:
        # page
        clip = attach(optimizer, PERCENTILE)
        # end of page
    except AutoClipError:
        return "refused"
    with warnings.catch_warnings(record=True, action="always") as said:
        steps(optimizer, clip)
    if clip.steps == 0:
        assert any("AutoClip" in str(warning.message) for warning in said), "no step was seen, and nothing was said"
        return "warns"
    (updates,) = watch.take()
    assert len(updates) == clip.steps == STEPS, f"{clip.steps} steps, {len(updates)} updates"
    check([update._replace(has_moved=True) for update in updates])  # some begin with a rate of 0
    return "clips"


def try_library(library, kinds, package=None):
    became = {}
    for name, make in kinds.items():
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(None):
            try:
                became[name] = try_kind(make)
            except Exception as error:
                raise AssertionError(f"{library}, {name}: {error}") from error
        watch.take()
    by = {
        what: sorted(name for name in became if became[name] == what)
        for what in ("clips", "warns", "refused", "not tried")
    }
    case = f"{len(by['clips'])} of {library} {version(package or library)}"
    result(library, case, package=package, updates=STEPS * len(by["clips"]), **by)
    assert by["clips"], f"nothing was tried: {became}"


def classes_of(module):
    """The optimizers of a module whose only argument without a default is the parameters."""
    found = inspect.getmembers(module, inspect.isclass)
    kinds = {name: kind for name, kind in found if issubclass(kind, torch.optim.Optimizer)}
    return {name: (lambda model, kind=kind: kind(model.parameters(), lr=1e-3)) for name, kind in kinds.items()}


def timm_kinds():
    from harness import stand_in

    stand_in("torchvision")
    stand_in("timm.data")  # which reads what torchvision has
    from timm.optim import create_optimizer_v2, list_optimizers

    return {
        name: (lambda model, name=name: create_optimizer_v2(model, opt=name, lr=1e-3)) for name in list_optimizers()
    }


def main():
    import bitsandbytes.optim
    import optimi
    import pytorch_optimizer
    import torch_optimizer

    try_library("torch-optimizer", classes_of(torch_optimizer))
    try_library("pytorch-optimizer", classes_of(pytorch_optimizer))
    try_library("torch-optimi", classes_of(optimi))
    try_library("bitsandbytes", classes_of(bitsandbytes.optim))
    try_library("timm", timm_kinds())


if __name__ == "__main__":
    quieten()
    if sys.argv[1] == "train":  # what resumes is the same for all of them: see with_torch_optim.py
        main()
