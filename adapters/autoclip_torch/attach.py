"""An optimizer that clips inside its own step().

Facts about optimizers that shaped this module:

- The hook before a step runs before the closure, and the closure makes the gradients: clipping belongs behind it.
- A copy of an optimizer, or a loaded one, has no hooks.
- A GradScaler unscales the gradients of plain optimizers and leaves their step out after an overflow. Fused ones get
  scaled gradients, `grad_scale` to divide them by, and `found_inf` to leave everything alone if it is 1. So a fused
  optimizer can clip at no cost, by a greater `grad_scale`, and drop an update of which the host does not know.
- An optimizer without gradients leaves parameters, momentum and decay alone.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError
from autoclip_torch.batches import version
from autoclip_torch.clip import AutoClip
from autoclip_torch.decision import DeviceStep
from autoclip_torch.devices import as_tensor, moved
from autoclip_torch.engines import deepspeed_in
from autoclip_torch.gradients import is_dropped
from autoclip_torch.groups import Groups, name_of
from autoclip_torch.optimizers import (
    gradient_arguments,
    innermost,
    is_nested,
    lacks_momentum,
    needs_closure,
    refuse_hidden_updates,
)
from autoclip_torch.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from autoclip_core import ClipStep
    from autoclip_torch.clip import Options
    from autoclip_torch.gradients import Gradients
    from autoclip_torch.groups import Parameters, Scope
    from autoclip_torch.pipeline import Mode, Pipeline

_ABSENT = object()
_LEAST_FOLDED = 1e-30  # scale, whose inverse a float32 holds with a GradScaler's factor in it
_clips: WeakKeyDictionary[Optimizer, AutoClip[Any]] = WeakKeyDictionary()


@overload
def attach(
    optimizer: Optimizer,
    percentile: float = ...,
    *,
    scope: Literal["global"] = ...,
    names: Parameters | None = ...,
    **options: Unpack[Options],
) -> AutoClip: ...


@overload
def attach(
    optimizer: Optimizer,
    percentile: float = ...,
    *,
    scope: Literal["group", "parameter"] | Callable[[str], str],
    names: Parameters | None = ...,
    **options: Unpack[Options],
) -> AutoClip[dict[str, ClipStep]]: ...


def attach(
    optimizer: Optimizer,
    percentile: float = 10.0,
    *,
    scope: Scope | Callable[[str], str] = "global",
    mode: Mode = "auto",
    process_group: ProcessGroup | None = None,
    check_ranks: ProcessGroup | bool = False,
    names: Parameters | None = None,
    window: int | None = None,
    warmup: int = 0,
    nonfinite: Literal["skip", "raise", "pass"] = "skip",
    max_threshold: float | None = None,
) -> AutoClip[Any]:
    """Clip the gradients of an optimizer inside every `optimizer.step()`, with nothing else to change.

    A closure is followed by clipping each time the optimizer calls it: LBFGS evaluates several gradients per step, and
    each one is a step of AutoClip. A GradScaler needs no explicit `unscale_`; steps that it skips are not seen. Fused
    optimizers (`fused=True`) scale the gradients themselves, in the pass that they make anyway.

    After a non-finite norm under "skip" the optimizer leaves the parameters and its own state as they were, and the
    gradients are zeros (a deferred step of a fused optimizer leaves them as well). One exception: a deferred step of an
    optimizer that is not fused cannot be left out; there the gradients are zeros, and momentum and weight decay act.

    `optimizer.state_dict()` stays as it was: save the AutoClip's own state beside it.

    Around a wrapper (Accelerate, Fabric, SAM, Lookahead, ...) it is the optimizer inside that clips, because it makes
    the update. A copy of the optimizer is not attached: see `attached`.

    A DeepSpeed engine, its optimizer, or what Accelerate or Fabric make of it, is attached to as by
    `autoclip_torch.deepspeed.attach`.

    Args: as `AutoClip`, for the parameters of all groups, those added later included; and
        names: a module, or (name, tensor) pairs, for a scope that needs names, which most optimizers do not know.

    Returns:
        The AutoClip; its `detach()` ends the clipping.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        AutoClipError: the optimizer has an AutoClip already, or makes updates that cannot be seen, or too early, or its
            parameters belong to an engine (see `AutoClip`).

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
    optimizer = innermost(optimizer, "attach")
    if attached(optimizer) is not None:
        raise AutoClipError(
            f"This {name_of(optimizer)} has an AutoClip attached already, and a second one would record norms that are "
            "clipped; use the first one, which attached(optimizer) returns, or detach() it."
        )
    refuse_hidden_updates(optimizer)
    groups = Groups(optimizer, scope, names=names)
    clip = AutoClip(groups, percentile, mode=mode, process_group=process_group, **options)
    clip._attachment = StepHooks(clip._pipeline, optimizer)
    _clips[optimizer] = clip
    return clip


def attached(optimizer: Optimizer) -> AutoClip[Any] | None:
    """Return the AutoClip that clips inside the steps of an optimizer, or of the one that it wraps; None if none does.

    A copy of an attached optimizer (copy.deepcopy, pickle, what a trainer saves whole and loads) is not attached.

    Raises:
        AutoClipTypeError: it is not an optimizer.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> clip = attach(optimizer)
    >>> attached(optimizer) is clip
    True
    >>> clip.detach()
    >>> attached(optimizer)
    """
    if (engine := deepspeed_in(optimizer)) is not None:
        from autoclip_torch import deepspeed

        return deepspeed.attached(engine)
    optimizer = innermost(optimizer, "attached")
    clip = _clips.get(optimizer)
    return clip if clip is not None and clip._attachment is not None and clip._attachment.is_on() else None


class _Clipped(NamedTuple):
    """What a step has clipped, before the optimizer uses it."""

    gradients: Gradients
    steps: dict[int, ClipStep] | DeviceStep
    folds: bool  # whether the optimizer scales them
    is_unscaled: bool  # whether they are as large as they were measured
    may_move: bool  # whether code of others runs in the step, and may move them
    version: int  # of the first one


class StepHooks:
    """What happens before and after the steps of one optimizer, and what is known of those that nobody saw."""

    def __init__(self, pipeline: Pipeline, optimizer: Optimizer) -> None:
        pipeline.advice = (
            "optimizer.step() belongs between loss.backward() and zero_grad(), and the optimizer has to have the "
            "parameters of the model that is trained"
        )
        pipeline.groups.hold(weakly=True)
        self._pipeline = pipeline
        self._optimizer = ref(optimizer)
        self._needs_closure = needs_closure(optimizer)
        self._gradient_arguments = gradient_arguments(optimizer)
        kind = type(optimizer)
        # A step that is not torch's need not know of grad_scale, whatever it has inherited.
        self._is_torch = kind.step.__module__.startswith("torch.optim.")
        # And nothing of torch's own optimizers moves a gradient, or gives back its memory.
        self._may_move = not (self._is_torch and kind.__module__.startswith("torch.optim."))
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._lent: list[tuple[str, Tensor, Any]] = []
        self._clipped: _Clipped | None = None  # in the step that is being made
        self._is_stepping = self._has_nested = False
        self._awaits_closure = False  # which this step has not called yet
        self._watch = Watch(optimizer)
        self._untraced = _untraced_hooks()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def is_on(self) -> bool:
        """Return whether the optimizer is there, and has the hooks."""
        optimizer = self._optimizer()
        hooks = (
            {} if optimizer is None else {**optimizer._optimizer_step_pre_hooks, **optimizer._optimizer_step_post_hooks}
        )
        return all(handle.id in hooks for handle in self._handles)

    def describe(self) -> str:
        """Return a few words about the optimizer."""
        return f"attached to {self._watch.name}" if self.is_on() else f"no longer attached to {self._watch.name}"

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._watch.end()
        self._take_back()
        self._pipeline.groups.hold(weakly=False)
        optimizer = self._optimizer()
        clip = None if optimizer is None else _clips.get(optimizer)
        if clip is not None and clip._attachment is self:
            del _clips[optimizer]  # type: ignore[arg-type]

    def look(self, *, at_start: bool) -> None:
        """Warn, once, if the optimizer is gone, or if updates are made that the hooks do not see."""
        self._watch.look(at_start=at_start)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_dynamo_compiling():
            before, _ = self._untraced
            changed: tuple[tuple[Any, ...], dict[str, Any]] | None = before(self, optimizer, args, kwargs)
            return changed
        if self._is_stepping:  # or did not get as far as the hook behind the step, because it failed
            if is_nested(optimizer):
                self._has_nested = True
                return None
            if all(param.grad is None for param, _ in self._hidden):
                self._take_back()
            else:  # somebody has made new gradients since
                self._hidden = []
                self._take_back()
        for place, name in self._gradient_arguments:
            if (args[place] if place < len(args) else kwargs.get(name)) is not None:
                raise AutoClipTypeError(
                    f"{self._watch.name}.step() was given gradients as {name}=, and AutoClip clips those in the .grad "
                    f"of the parameters, which this step would not use; put them there, and leave {name}= out."
                )
        self._is_stepping, self._has_nested = True, False
        self._watch.see_step()
        at = args[1] if len(args) > 1 else None
        closure: Callable[[], Any] | None = at if callable(at) else kwargs.get("closure")
        self._awaits_closure = closure is not None
        if closure is None:
            if self._needs_closure:
                raise AutoClipTypeError(
                    f"{type(optimizer).__name__}.step() needs a closure that zeroes the gradients, evaluates the loss, "
                    "calls backward() and returns the loss; AutoClip clips after each call of it."
                )
            self._clip_gradients(optimizer, kwargs.get("grad_scaler"))
            return None

        def closure_then_clip() -> Any:
            self._take_back()
            self._watch.see_step()
            loss = closure()
            self._clip_gradients(optimizer)
            self._awaits_closure = False
            return loss

        if closure is at:
            return (args[0], closure_then_clip, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_clip}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            _, after = self._untraced
            after(self, optimizer, args, kwargs)
            return
        if self._has_nested and is_nested(optimizer):
            return
        if (clipped := self._clipped) is not None:
            self._leave(clipped, anew=clipped.may_move)
        self._take_back()
        self._is_stepping = False
        if self._awaits_closure:
            self._watch.warn(
                f"{self._watch.name}.step() was given a closure and has not called it. AutoClip clips behind the "
                "closure, so this update was not clipped; make the gradients before step(), and leave the closure out."
            )

    def _clip_gradients(self, optimizer: Optimizer, grad_scaler: Any = None) -> None:
        grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # a GradScaler adds up what each device has found: of none, a number
            found_inf = None
        if grad_scaler is not None:
            grad_scale = _scale_of(grad_scaler, optimizer)
        gradients, norms = self._pipeline.measure(grad_scale)
        if grad_scaler is not None:
            # This optimizer unscales by itself, and looks for overflows by itself.
            found_inf = as_tensor(norms).isfinite().all().logical_not().float()
        steps = self._pipeline.decide(gradients, norms, found_inf)
        fused = _is_fused(optimizer) and gradients.plain
        if isinstance(steps, DeviceStep):
            # The first step of a fused SGD cannot be left out: torch allocates its momentum before, without values.
            fused = fused and not lacks_momentum(optimizer)
            if fused:
                self._let_leave_out(optimizer, steps, found_inf)
        folds = fused and self._is_torch and gradients.count == 1 and _is_foldable(gradients, steps)
        if isinstance(steps, dict) and is_dropped(steps):
            self._pipeline.apply(gradients, steps)
            self._hide_gradients(optimizer)
        elif steps and folds:
            self._let_scale(optimizer, steps, grad_scale)
        elif steps:
            self._pipeline.apply(gradients, steps)
        hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        may_move = self._may_move or hooks > len(self._handles)
        self._clipped = _Clipped(gradients, steps, folds, grad_scale is None, may_move, version(gradients.first))
        if gradients.is_shared:  # should the step fail on this rank alone, it must know as much as the others
            self._leave(self._clipped)

    def _leave(self, clipped: _Clipped, *, anew: bool = False) -> None:
        gradients, steps, folds, is_unscaled, _, written = clipped
        exactly = is_unscaled and version(gradients.first) == written
        self._pipeline.leave(gradients, steps, may_keep_nonfinite=folds, exactly=exactly, anew=anew)

    def _let_leave_out(self, optimizer: Optimizer, steps: DeviceStep, found_inf: Tensor | None) -> None:
        """Have the optimizer leave everything alone if the step is dropped."""
        dropped = steps.scale[0] == 0.0 if len(steps.scale) == 1 else (steps.scale == 0.0).any()
        if found_inf is not None:
            # Torch adds up what it finds on several devices, and then looks for a 1.
            dropped = dropped.logical_or(moved(found_inf, dropped.device))
        self._lend(optimizer, "found_inf", dropped.float())

    def _let_scale(
        self, optimizer: Optimizer, steps: dict[int, ClipStep] | DeviceStep, grad_scale: Tensor | None
    ) -> None:
        """Have the optimizer divide the gradients in its own pass."""
        if isinstance(steps, DeviceStep):
            scale = steps.scale[0].float()
        elif steps[0].scale == 1.0:
            return
        else:
            scale = torch.tensor(steps[0].scale, dtype=torch.float32, device="cpu")
        # Infinity if the step is dropped: then nothing is divided by it.
        divisor = scale.reciprocal() if grad_scale is None else moved(grad_scale, scale.device) / scale
        self._lend(optimizer, "grad_scale", divisor)

    def _lend(self, optimizer: Optimizer, name: str, value: Tensor) -> None:
        self._lent.append((name, value, getattr(optimizer, name, _ABSENT)))
        setattr(optimizer, name, value)

    def _hide_gradients(self, optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._hidden = [(param, param.grad) for param in params if param.grad is not None]
        for param, _ in self._hidden:
            param.grad = None

    def _take_back(self) -> None:
        """Undo what was done to the optimizer for the time of its step."""
        self._clipped = None
        if self._hidden:
            for param, grad in self._hidden:
                if param.grad is None:
                    param.grad = grad
            self._hidden = []
        if self._lent:
            optimizer = self._optimizer()
            for name, lent, before in self._lent:
                if getattr(optimizer, name, None) is not lent:
                    continue
                if before is _ABSENT:
                    delattr(optimizer, name)
                else:
                    setattr(optimizer, name, before)
            self._lent = []


@cache
def _untraced_hooks() -> tuple[Callable[..., Any], Callable[..., None]]:
    """Return the hooks for an optimizer that is traced: what reads values is not for torch.compile to follow."""
    disable: Any = torch.compiler.disable
    return disable(StepHooks._before_step), disable(StepHooks._after_step)


def _is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer takes a divisor, and a verdict on the step, from a GradScaler."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _scale_of(grad_scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """Return how many times too large the gradients are that a GradScaler hands to a step that takes `grad_scaler=`."""
    state = grad_scaler._per_optimizer_states[id(optimizer)]
    return None if state["stage"] is OptState.UNSCALED else grad_scaler._get_scale_async()


def _is_foldable(gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep) -> bool:
    """Return whether a divisor in float32, which fused optimizers take, says the scale well enough."""
    if gradients.first is None or gradients.first.dtype == torch.float64:
        return False
    return isinstance(steps, DeviceStep) or all(step.scale >= _LEAST_FOLDED for step in steps.values())
