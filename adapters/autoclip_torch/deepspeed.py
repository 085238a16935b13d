"""AutoClip inside a DeepSpeed engine: exact under ZeRO 1, 2 and 3, and no gradient is gathered.

What shaped this module: DeepSpeed keeps the gradients to itself. Each of its optimizers measures the norm of the whole
gradient in its step(), leaves it unscaled in `_global_grad_norm`, and only then reads `clip_grad`, some times for each
group of parameters, to divide by max((norm + 1e-6) / clip_grad, 1). So `clip_grad` becomes a property: its first
reading in a step hands the norm to the core, and each returns that by which DeepSpeed comes to the core's scale.

These names are private. The optimizers known to use them so are listed here; a step in which they are not read, or too
early, is an error.
"""

from __future__ import annotations

import sys
from math import inf, nan
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch.optim import Optimizer

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError
from autoclip_torch.attach import attach as attach_to_optimizer
from autoclip_torch.attach import attached as attached_to_optimizer
from autoclip_torch.clip import AutoClip
from autoclip_torch.engines import deepspeed_in
from autoclip_torch.groups import Groups
from autoclip_torch.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.distributed import ProcessGroup


__all__ = ["attach", "attached"]

_EPSILON = 1e-6  # DeepSpeed's, which would break that thresholds scale with the loss
# Where each optimizer that is known to work keeps the parameters of the model.
_GROUPS_OF = {
    "BF16_Optimizer": "bf16_groups",
    "DeepSpeedZeroOptimizer": "bit16_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp16_groups",
    "FP16_UnfusedOptimizer": "fp16_groups",
}


def attach(
    engine: Any,
    percentile: float = 10.0,
    *,
    check_ranks: ProcessGroup | bool = False,
    window: int | None = None,
    warmup: int = 0,
    nonfinite: Literal["skip", "raise"] = "skip",
    max_threshold: float | None = None,
) -> AutoClip:
    """Clip inside every `engine.step()` at a boundary of accumulation, with nothing else to change.

    DeepSpeed measures the norm of the whole gradient, all ranks and groups together, and scales it in the pass that it
    makes anyway. It leaves out an update whose norm is not finite: AutoClip counts it, and warns once, or raises after
    it was left out. In float16 that is how DeepSpeed finds its loss scale, and no step of AutoClip.

    Needs `"gradient_clipping": 0` in DeepSpeed's configuration; its default is 1.

    Args:
        engine: what `deepspeed.initialize` returns, or its optimizer.
        percentile: as for `AutoClip`, like all others.
        check_ranks: DeepSpeed's norms agree; thresholds do unless a rank has lost its state.
        window: in norms.
        warmup: in norms.
        nonfinite: "skip" or "raise".
        max_threshold: in the unit of the norm.

    Returns:
        The AutoClip; its `detach()` ends the clipping. Save its `state_dict()` in the `client_state` of a checkpoint.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument or a setting of DeepSpeed cannot be used.
        AutoClipError: the engine has an AutoClip already, or is of a kind or version that is not known to work.
    """
    found = deepspeed_in(engine)
    if found is None:
        raise AutoClipTypeError(
            "autoclip_torch.deepspeed.attach takes the engine that deepspeed.initialize returns, but a "
            f"{type(engine).__name__} was given."
        )
    options: dict[str, Any] = {
        "window": window,
        "warmup": warmup,
        "nonfinite": nonfinite,
        "max_threshold": max_threshold,
    }
    optimizer = _optimizer_of(found)
    if attached(found) is not None:
        raise AutoClipError(
            f"This {type(optimizer).__name__} has an AutoClip attached already; use that one, or detach() it."
        )
    _refuse_settings(found, optimizer)
    if isinstance(optimizer, Optimizer):  # ZeRO 0 in float32: the gradients are whole, and where torch keeps them
        return attach_to_optimizer(optimizer, percentile, check_ranks=check_ranks, **options)
    if options["nonfinite"] == "pass":
        raise AutoClipValueError(
            'DeepSpeed leaves out updates that are not finite itself: nonfinite may be "skip" or "raise".'
        )
    params = [param for group in getattr(optimizer, _GROUPS_OF[type(optimizer).__name__]) for param in group]
    pipeline = _Pipeline(Groups(params, "global"), percentile, options, "immediate", None, check_ranks)
    clip = AutoClip.__new__(AutoClip)
    clip.__setstate__({"_pipeline": pipeline})
    clip._attachment = steps = _Steps(pipeline, optimizer)
    steps.attach(clip)
    return clip


def attached(engine: Any) -> AutoClip | None:
    """Return the AutoClip that clips inside the steps of an engine, or None."""
    optimizer = _optimizer_of(deepspeed_in(engine))
    if isinstance(optimizer, Optimizer):
        return attached_to_optimizer(optimizer)
    clip: AutoClip | None = getattr(type(optimizer), "_autoclip", None)
    return clip


def _optimizer_of(engine: Any) -> Any:
    return engine.optimizer if hasattr(engine, "gradient_clipping") else engine


def _refuse_settings(engine: Any, optimizer: Any) -> None:
    """Raise where DeepSpeed clips as well, or does not measure the gradient of the whole model as expected."""
    clipping = (
        engine.gradient_clipping() if hasattr(engine, "gradient_clipping") else getattr(optimizer, "clip_grad", 0.0)
    )
    if clipping:
        raise AutoClipValueError(
            f'DeepSpeed clips by itself, at {clipping}, and AutoClip replaces that: set "gradient_clipping": 0.0 in '
            "its configuration, where it is 1.0 unless set, and give a Trainer max_grad_norm=0.0 as well. To cap "
            "AutoClip's threshold use max_threshold."
        )
    name = type(optimizer).__name__
    is_plain = isinstance(optimizer, Optimizer)
    is_bfloat16 = getattr(optimizer, "dtype", None) is torch.bfloat16
    for is_refused, what in (
        (any(base.__name__ == "PipelineEngine" for base in type(engine).__mro__), "a pipeline engine"),
        (getattr(engine, "has_moe_layers", False), "mixtures of experts"),
        (getattr(optimizer, "has_moe_layers", False), "mixtures of experts"),
        (getattr(engine, "torch_autocast_z0_gradscaler", None) is not None, '"torch_autocast" in float16'),
        (getattr(optimizer, "torch_autocast_gradscaler", None) is not None, '"torch_autocast" in float16'),
        (getattr(optimizer, "zenflow", False), "ZenFlow"),
        (not getattr(optimizer, "compute_grad_norm", True), '"compute_grad_norm": false'),
        (is_bfloat16 and not getattr(optimizer, "check_grad_overflow", True), '"check_grad_overflow": false'),
        (name == "FP16_UnfusedOptimizer" and optimizer.loss_scale != 1.0, "float16 without ZeRO"),
        (not is_plain and name not in _GROUPS_OF, f"its {name}"),
        (not is_plain and "clip_grad" not in vars(optimizer), f"its {name} without a clip_grad"),
    ):
        if is_refused:
            raise AutoClipError(
                f"AutoClip is not known to clip by the right threshold in DeepSpeed {_version()} with {what}. It is in "
                "ZeRO stage 1, 2 and 3, and without ZeRO in float32 and bfloat16; the page of autoclip_torch says more."
            )


def _version() -> str:
    return getattr(sys.modules.get("deepspeed"), "__version__", "(unknown version)")


class _Pipeline(Pipeline):
    """A pipeline of which DeepSpeed measures the gradients and applies what is decided."""

    def refuse_parts(self, params: Iterable[Tensor]) -> None:
        """Take parameters of which this rank has a part: DeepSpeed adds up the norms."""

    def measure(self, grad_scale: Tensor | None = None) -> NoReturn:
        """Raise, for it could only be called by hand."""
        raise AutoClipError(
            "DeepSpeed keeps the gradients to itself, so this AutoClip has no step() of its own; attach another one by "
            "autoclip_torch.deepspeed.attach(engine), and give it this one's state_dict()."
        )


class _Steps:
    """The steps of an optimizer of DeepSpeed."""

    def __init__(self, pipeline: Pipeline, optimizer: Any) -> None:
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._kind = type(optimizer)
        self._is_stepping = False
        self._limit: float | None = None  # what DeepSpeed reads in this step; None before it has

    def attach(self, clip: AutoClip) -> None:
        """Take part in every step from now on."""
        own = {
            "_autoclip": clip,
            "__module__": self._kind.__module__,
            "clip_grad": property(lambda _: self.limit(), lambda *_: None),  # a checkpoint brings its own
            "step": lambda _, *args, **kwargs: self.step(*args, **kwargs),
        }
        del self._optimizer.clip_grad
        self._optimizer.__class__ = type(self._kind.__name__, (self._kind,), own)

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        self._optimizer.__class__ = self._kind
        self._optimizer.clip_grad = 0.0

    def is_on(self) -> bool:
        """Return whether the optimizer reads its limit from here."""
        return type(self._optimizer) is not self._kind

    def look(self, *, at_start: bool) -> None:
        """Do nothing: a step that is not clipped raises."""

    def describe(self) -> str:
        """Return a few words about the optimizer."""
        return f"attached to {self._kind.__module__}.{self._kind.__qualname__}"

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Make DeepSpeed's step, which reads the limit unless it leaves the update out."""
        optimizer = self._optimizer
        is_scaled = getattr(optimizer, "loss_scale", 1.0) != 1.0
        optimizer._global_grad_norm = None
        self._limit, self._is_stepping = None, True
        try:
            result = self._kind.step(optimizer, *args, **kwargs)
        finally:
            self._is_stepping = False
        if self._limit is None:
            if not optimizer.overflow:
                raise AutoClipError(
                    f"The {self._kind.__name__} of DeepSpeed {_version()} has made a step without reading clip_grad, "
                    "so this step was not clipped. AutoClip does not know this version."
                )
            if not is_scaled:
                self._pipeline.observe({0: nan})
        return result

    def limit(self) -> float:
        """Return the clip_grad by which DeepSpeed comes to the core's scale; 0, which does not clip, between steps."""
        if self._is_stepping and self._limit is None:
            measured = self._optimizer._global_grad_norm
            norm = nan if measured is None else float(measured)
            if not 0.0 <= norm < inf:
                raise AutoClipError(
                    f"The {self._kind.__name__} of DeepSpeed {_version()} reads clip_grad where its norm is "
                    f"{measured}, so AutoClip cannot decide. It does not know this version."
                )
            self._pipeline.agree(torch.as_tensor(measured).reshape(1))
            (step,) = self._pipeline.observe({0: norm}).values()
            self._limit = step.scale * (norm + _EPSILON) if step.clipped else 0.0
        return self._limit if self._is_stepping and self._limit is not None else 0.0
