"""Optimizers: which one makes the update, whether its steps can be seen, and what a step of it is like.

- Wrappers hold the optimizer that makes the update, under any name, and may have ways around their own step().
- torch runs hooks where it has wrapped `type(optimizer).step`: in `Optimizer.__init__`, which some leave out. Where a
  class and its parent are both wrapped, `super().step()` runs the hooks once more.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import AutoClipError, AutoClipTypeError
from autoclip_torch.groups import name_of

if TYPE_CHECKING:
    from types import FrameType

# What torch wraps a step in: the function that runs the hooks.
_WRAPPER = Optimizer.profile_hook_step(lambda: None).__code__


def innermost(subject: Any, caller: str) -> Optimizer:
    """Return the optimizer that makes the updates: a wrapper holds it, and has no parameter that it lacks."""
    if not isinstance(subject, Optimizer):
        raise AutoClipTypeError(
            f"{caller} takes a torch.optim.Optimizer, and {name_of(subject)} is none; {_advice(subject)}."
        )
    optimizer: Optimizer = subject
    passed: set[int] = set()  # two may know each other
    while True:
        passed.add(id(optimizer))
        params = params_of(optimizer)
        held = {id(inner): inner for inner in _held(optimizer).values() if params <= params_of(inner)}
        if len(held) != 1 or passed & held.keys():
            return optimizer
        optimizer = next(iter(held.values()))


def _held(subject: Any) -> dict[str, Optimizer]:
    """Return the optimizers that an object holds, by their names there."""
    attributes = getattr(subject, "__dict__", {})
    return {name: held for name, held in attributes.items() if isinstance(held, Optimizer) and held is not subject}


def params_of(optimizer: Optimizer) -> set[int]:
    """Return the parameters of all groups, by id."""
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _advice(subject: Any) -> str:
    """Return what to do with that which is no optimizer."""
    held = _held(subject)
    if held:
        return f"attach to its {' or '.join(f'.{name} (a {name_of(inner)})' for name, inner in held.items())}"
    if isinstance(subject, type):
        return f"{subject.__name__} is a class: attach to the optimizer that {subject.__name__}(...) makes"
    if isinstance(subject, list | tuple | dict):
        return "attach to each optimizer by itself"
    if isinstance(subject, torch.nn.Module | Tensor):
        return "attach to its optimizer, or call AutoClip(...).step() before each step of that"
    return "attach to the torch optimizer inside it, or call AutoClip(parameters).step() before each of its steps"


def refuse_hidden_updates(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose updates are not made behind hooks, or are made before all gradients are there."""
    name = name_of(optimizer)
    by_hand = "call AutoClip(parameters).step() by hand, when all gradients are there and before the update"
    if getattr(optimizer, "_overlap_with_ddp", False):  # a ZeroRedundancyOptimizer
        raise AutoClipError(
            "With overlap_with_ddp=True parameters change during backward(), before the norm of all gradients is "
            "known; construct the ZeroRedundancyOptimizer without it."
        )
    if callable(getattr(optimizer, "fused_backward", None)):
        raise AutoClipError(
            f"{name}.fused_backward() changes each parameter during backward(), before the norm of all gradients is "
            "known; use an optimizer whose update is made by step()."
        )
    if (attribute := _by_parameter(optimizer)) is not None:
        raise AutoClipError(
            f"{name} leaves the updates to the optimizers in its .{attribute}, one for each parameter, as a rule "
            "during backward(), before the norm of all gradients is known; use an optimizer whose update is made by "
            "step() (with the Trainer's optim= a kind without _layerwise)."
        )
    if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
        raise AutoClipError(
            f"{name} makes updates in first_step() and second_step(), which run no hooks, and holds no optimizer for "
            f"them; {by_hand} in second_step()."
        )
    if not all(f"_optimizer_step_{when}_hooks" in vars(optimizer) for when in ("pre", "post")):
        raise AutoClipError(
            f"This {name} was made without torch.optim.Optimizer.__init__, and cannot run hooks at its steps; "
            f"{by_hand}, or attach to the optimizer inside it."
        )
    kind = type(optimizer)
    if not getattr(kind.step, "hooked", False):
        # As Optimizer.__init__ does it.
        kind.step = Optimizer.profile_hook_step(kind.step)  # type: ignore[method-assign,assignment]
        kind.step.hooked = True  # type: ignore[attr-defined]
        if not getattr(optimizer.step, "hooked", False):
            raise AutoClipError(
                f"The step() of this {name} has been replaced on the object (by a learning rate scheduler?), by one "
                "that runs no hooks; attach before that, or restore it first (del optimizer.step)."
            )


def _by_parameter(optimizer: Optimizer) -> str | None:
    """Return the name of a dict from parameters, which are not this optimizer's, to what updates each of them."""
    params = params_of(optimizer)
    for name, held in vars(optimizer).items():
        if isinstance(held, dict) and any(
            isinstance(key, Tensor) and id(key) not in params and isinstance(each, Optimizer)
            for key, each in held.items()
        ):
            return name
    return None


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether a step has to be given a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def gradient_arguments(optimizer: Optimizer) -> list[tuple[int, str]]:
    """Return the arguments of a step, by place and name, in which gradients come that nobody can see beforehand."""
    names = list(inspect.signature(type(optimizer).step).parameters)
    return [(at, name) for at, name in enumerate(names) if name in {"grads", "grad", "gradients"}]


def lacks_momentum(optimizer: Optimizer) -> bool:
    """Return whether a fused SGD must not leave this step out: torch allocates its momentum first, without values."""
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    )


def is_nested(optimizer: Optimizer) -> bool:
    """Return whether this is a step inside a step of the same optimizer: super().step().

    The stack tells, also after a step that has failed. A traced wrapper goes on under a name that has its own in it.
    """
    frame: FrameType | None = sys._getframe(1)
    steps = 0
    while frame is not None and steps < 2:
        code = frame.f_code
        if code.co_filename == _WRAPPER.co_filename and _WRAPPER.co_name in code.co_name:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps == 2
