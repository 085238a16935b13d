"""An optimizer that clips inside its own step().

Facts about optimizers that shaped this module:

- The hook before a step runs before the closure, and the closure makes the gradients: clipping belongs behind it.
- A GradScaler unscales the gradients of plain optimizers and leaves their step out after an overflow. Fused ones get
  scaled gradients, `grad_scale` to divide them by, and `found_inf` to leave everything alone if it is 1. So a fused
  optimizer can clip at no cost, by a greater `grad_scale`, and drop an update of which the host does not know.
- An optimizer without gradients leaves parameters, momentum and decay alone.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError
from autoclip_torch.clip import AutoClip
from autoclip_torch.deferred import DeviceStep
from autoclip_torch.engines import deepspeed_in
from autoclip_torch.gradients import moved
from autoclip_torch.pipeline import is_dropped

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from autoclip_core import ClipStep
    from autoclip_torch.gradients import Gradients
    from autoclip_torch.groups import Scope
    from autoclip_torch.pipeline import Mode, Pipeline

_ABSENT = object()
_attached: WeakSet[Optimizer] = WeakSet()


def attach(
    optimizer: Optimizer,
    percentile: float = 10.0,
    *,
    scope: Scope | Callable[[str], str] = "global",
    mode: Mode = "auto",
    process_group: ProcessGroup | None = None,
    check_ranks: ProcessGroup | bool = False,
    window: int | None = None,
    warmup: int = 0,
    nonfinite: Literal["skip", "raise", "pass"] = "skip",
    max_threshold: float | None = None,
) -> AutoClip:
    """Clip the gradients of an optimizer inside every `optimizer.step()`, with nothing else to change.

    A closure is followed by clipping each time the optimizer calls it: LBFGS evaluates several gradients per step, and
    each one is a step of AutoClip. A GradScaler needs no explicit `unscale_`; steps that it skips are not seen. Fused
    optimizers (`fused=True`) scale the gradients themselves, in the pass that they make anyway.

    After a non-finite norm under "skip" the optimizer leaves the parameters and its own state as they were, and the
    gradients are zeros (a deferred step of a fused optimizer leaves them as well). One exception: a deferred step of an
    optimizer that is not fused, or of several groups, cannot be left out; there the gradients are zeros, and momentum
    and weight decay act.

    `optimizer.state_dict()` stays as it was: save the AutoClip's own state beside it.

    A DeepSpeed engine, its optimizer, or what Accelerate or Fabric make of it, is attached to as by
    `autoclip_torch.deepspeed.attach`.

    Args: as `AutoClip`, for the parameters of all groups, those added later included.

    Returns:
        The AutoClip; its `detach()` ends the clipping.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        AutoClipError: the optimizer has an AutoClip already, or changes parameters during backward(), or its parameters
            belong to an engine (see `AutoClip`).

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clip = attach(optimizer)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> clip.steps
    1
    """
    options: dict[str, Any] = {
        "check_ranks": check_ranks,
        "window": window,
        "warmup": warmup,
        "nonfinite": nonfinite,
        "max_threshold": max_threshold,
    }
    if (engine := deepspeed_in(optimizer)) is not None:
        from autoclip_torch import deepspeed

        if scope != "global" or mode == "deferred" or process_group is not None:
            raise AutoClipValueError(
                "DeepSpeed measures one norm of all parameters on all ranks by itself; leave out scope, mode and "
                "process_group."
            )
        return deepspeed.attach(engine, percentile, **options)
    if not isinstance(optimizer, Optimizer):
        raise AutoClipTypeError(
            f"attach takes a torch.optim.Optimizer, but a {type(optimizer).__name__} was given; for parameters or a "
            "module use AutoClip(...) and its step()."
        )
    # Accelerate, Fabric and Lightning wrap the optimizer whose step() is called in the end.
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if getattr(optimizer, "_overlap_with_ddp", False):  # a ZeroRedundancyOptimizer
        raise AutoClipError(
            "With overlap_with_ddp=True parameters change during backward(), before the norm of all gradients is "
            "known; construct the ZeroRedundancyOptimizer without it."
        )
    if optimizer in _attached:
        raise AutoClipError(
            f"This {type(optimizer).__name__} has an AutoClip attached already, and a second one would record norms "
            "that are clipped; use the first one, or detach() it."
        )
    clip = AutoClip(optimizer, percentile, scope=scope, mode=mode, process_group=process_group, **options)
    hooks = _Hooks(clip._pipeline, optimizer)
    handles = [
        # What reads values on the host is not for torch.compile to trace.
        optimizer.register_step_pre_hook(torch.compiler.disable(hooks.before_step)),  # type: ignore[no-untyped-call]
        optimizer.register_step_post_hook(torch.compiler.disable(hooks.after_step)),  # type: ignore[no-untyped-call]
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()
        hooks.take_back()
        _attached.discard(optimizer)

    clip._detach = detach
    _attached.add(optimizer)
    return clip


class _Hooks:
    """What happens before and after the step of one optimizer."""

    def __init__(self, pipeline: Pipeline, optimizer: Optimizer) -> None:
        self._pipeline = pipeline
        self._needs_closure = _needs_closure(optimizer)
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._lent: list[tuple[str, Tensor, Any]] = []
        self._first: Tensor | None = None  # gradient of the step that is being made
        self._optimizer = optimizer

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.take_back()  # a step that failed did not get as far as the hook behind it
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            if self._needs_closure:
                raise AutoClipTypeError(
                    f"{type(optimizer).__name__}.step() needs a closure that zeroes the gradients, evaluates the loss, "
                    "calls backward() and returns the loss; AutoClip clips after each call of it."
                )
            self._clip_gradients()
            return None

        def closure_then_clip() -> Any:
            self.take_back()
            loss = closure()
            self._clip_gradients()
            return loss

        if len(args) > 1:
            return (args[0], closure_then_clip, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_clip}

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._first is not None:
            self._pipeline.repeats.touch(self._first)
        self.take_back()

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        grad_scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        measured = self._pipeline.measure(grad_scale)
        steps = self._pipeline.decide(measured, found_inf)
        gradients = measured.gradients
        if isinstance(steps, dict) and is_dropped(steps):
            self._pipeline.apply(gradients, steps)
            self._hide_gradients()
        elif steps and self._can_scale(gradients) and not (isinstance(steps, DeviceStep) and self._lacks_momentum()):
            self._let_scale(steps, grad_scale, found_inf)
        elif steps:
            self._pipeline.apply(gradients, steps)
        self._pipeline.repeats.leave(gradients, steps)
        self._first = gradients.first

    def _can_scale(self, gradients: Gradients) -> bool:
        """Return whether the optimizer takes one scale for all gradients."""
        return (
            getattr(self._optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in self._optimizer.param_groups)
            and gradients.count == 1
            and gradients.plain
        )

    def _lacks_momentum(self) -> bool:
        # In the first step of a fused SGD torch allocates the momentum before it leaves that step out: without values.
        return isinstance(self._optimizer, torch.optim.SGD) and any(
            group["momentum"] and self._optimizer.state.get(param, {}).get("momentum_buffer") is None
            for group in self._optimizer.param_groups
            for param in group["params"]
            if param.grad is not None
        )

    def _let_scale(
        self, steps: dict[int, ClipStep] | DeviceStep, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Have the optimizer divide the gradients in its own pass, or leave everything alone if the step is dropped."""
        if isinstance(steps, DeviceStep):
            scale = steps.scale[0].float()
            dropped = steps.scale[0] == 0.0
            if found_inf is not None:
                # Torch adds up what it finds on several devices, and then looks for a 1.
                dropped = dropped.logical_or(moved(found_inf, scale.device))
            self._lend("found_inf", dropped.float())
        elif steps[0].scale == 1.0:
            return
        else:
            scale = torch.tensor(steps[0].scale, dtype=torch.float32, device="cpu")
        # Infinity if the step is dropped: then nothing is divided by it.
        self._lend("grad_scale", 1.0 / scale if grad_scale is None else moved(grad_scale, scale.device) / scale)

    def _lend(self, name: str, value: Tensor) -> None:
        self._lent.append((name, value, getattr(self._optimizer, name, _ABSENT)))
        setattr(self._optimizer, name, value)

    def _hide_gradients(self) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self._hidden = [(param, param.grad) for param in params if param.grad is not None]
        for param, _ in self._hidden:
            param.grad = None

    def take_back(self) -> None:
        """Undo what was done to the optimizer for the time of its step."""
        for param, grad in self._hidden:
            if param.grad is None:
                param.grad = grad
        for name, lent, before in self._lent:
            if getattr(self._optimizer, name, None) is not lent:
                continue
            if before is _ABSENT:
                delattr(self._optimizer, name)
            else:
                setattr(self._optimizer, name, before)
        self._hidden, self._lent, self._first = [], [], None


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
