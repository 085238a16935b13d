"""AutoClip over PyTorch gradients.

What shaped this module, and must stay true:

- Every rule is the core's: here gradients become one norm, and the core's scale becomes scaled gradients.
- One norm pass and at most one scaling pass over all gradients, one wait for the device, no value per tensor.
- Norms accumulate in float32 at least: a bfloat16 norm has three digits, and a float16 norm overflows.
- A non-finite gradient is never multiplied: 0 times infinity is NaN.
- Parameters are known by their order or their optimizer, never by `id`, so that a state survives a restart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

import autoclip_core
from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError, ClipStep, NormHistory

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_attached: WeakSet[Optimizer] = WeakSet()


class AutoClip:
    """Clip gradients to a percentile of all gradient norms seen so far.

    Call `step()` between `loss.backward()` and `optimizer.step()`, on accumulated and unscaled gradients (with a
    GradScaler: after `scaler.unscale_(optimizer)`). To have it called by the optimizer itself, use `attach`.

    Args:
        params: whose gradients are clipped, together, by one global L2 norm: tensors, a module, or an optimizer. A
            module's parameters are read once, now; an optimizer's at every step, so groups added later count.
        percentile: from 0 (clip to the smallest norm seen) to 100 (never clip). May be assigned at any step.
        window: remember only the last `window` norms; None, the paper's choice, remembers all.
        warmup: do not clip before this many norms have been remembered.
        nonfinite: what a NaN or infinite norm does. "skip": the gradients become zeros; warns once. "raise":
            NonFiniteNormError, gradients left as they are. "pass": nothing.
        max_threshold: an upper cap on the threshold, in the unit of the norm.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used, or there are no parameters.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clip = AutoClip([weight], percentile=50.0)
    >>> weight.grad = torch.tensor([0.0, 2.0])
    >>> clip.step()
    ClipStep(norm=2.0, threshold=2.0, scale=1.0, clipped=False, recorded=True)
    >>> weight.grad = torch.tensor([0.0, 8.0])
    >>> clip.step()
    ClipStep(norm=8.0, threshold=5.0, scale=0.625, clipped=True, recorded=True)
    >>> weight.grad
    tensor([0., 5.])

    Source: Seetharaman, Wichern, Pardo, Le Roux, MLSP 2020, arXiv:2007.14469, Algorithm 1.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor] | torch.nn.Module | Optimizer,
        percentile: float = 10.0,
        *,
        window: int | None = None,
        warmup: int = 0,
        nonfinite: Literal["skip", "raise", "pass"] = "skip",
        max_threshold: float | None = None,
    ) -> None:
        self._source = params if isinstance(params, Optimizer) else _as_tensors(params)
        if not self._parameters():
            raise AutoClipValueError(
                f"There are no parameters to clip in the {type(params).__name__} given; if it is a generator, it may "
                "have been used up before."
            )
        self._core = autoclip_core.AutoClip(
            percentile, window=window, warmup=warmup, nonfinite=nonfinite, max_threshold=max_threshold
        )
        self._handles: list[RemovableHandle] = []
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._warned = False

    @property
    def percentile(self) -> float:
        """The percentile, from 0 to 100. Assign to change it from the next step on."""
        return self._core.percentile

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        self._core.percentile = percentile

    @property
    def threshold(self) -> float:
        """The threshold as the history stands, in the unit of the norm; `inf` while nothing is remembered."""
        return self._core.threshold

    @property
    def steps(self) -> int:
        """How many gradients were seen."""
        return self._core.steps

    @property
    def clipped_steps(self) -> int:
        """How many gradients were clipped."""
        return self._core.clipped_steps

    @property
    def nonfinite_steps(self) -> int:
        """How many gradients had a NaN or infinite norm."""
        return self._core.nonfinite_steps

    @property
    def history(self) -> NormHistory:
        """The norms remembered so far, unclipped."""
        return self._core.history

    def step(self) -> ClipStep:
        """Clip the gradients in place, and return what was decided. One pass for the norm, one to scale, one wait.

        After a non-finite norm under "skip" the gradients are zeros and the scale is 0.0: an `optimizer.step()` would
        still apply momentum and weight decay, so leave it out to keep the parameters as they are. Where no parameter
        has a gradient, the norm is 0: nothing is remembered, and a warning says so once.

        Raises:
            AutoClipError: this AutoClip is attached to an optimizer, which clips already.
            NonFiniteNormError: the norm is NaN or infinite under `nonfinite="raise"`.
        """
        if self._handles:
            raise AutoClipError(
                "This AutoClip is attached to an optimizer and clips inside optimizer.step(); leave out the call of "
                "AutoClip.step(), or call detach() first."
            )
        return self._clip()

    def detach(self) -> None:
        """Undo `attach`: optimizer.step() no longer clips. The history stays. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if isinstance(self._source, Optimizer):
            _attached.discard(self._source)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain scalars and one uint8 tensor: what torch.load takes by default.

        >>> clip = AutoClip(torch.nn.Linear(2, 1))
        >>> clip.state_dict()["history"].dtype
        torch.uint8
        """
        state = self._core.state_dict()
        return {**state, "history": torch.frombuffer(bytearray(state["history"]), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state made by `state_dict`, on any device; on failure nothing changes.

        The state brings its percentile, as an optimizer's state brings its learning rate; assign `percentile`
        afterwards to change it.

        Raises:
            AutoClipTypeError, StateError: the state is not one of `state_dict`, or has another format or window.
            SnapshotError: its history is damaged.
        """
        match state:
            case {"history": Tensor() as history}:
                state = {**state, "history": history.cpu().numpy().tobytes()}
        self._core.load_state_dict(state)

    def __repr__(self) -> str:
        return f"<autoclip_torch.AutoClip of {len(self._parameters())} parameters: {self._core!r}>"

    def _parameters(self) -> list[Tensor]:
        if isinstance(self._source, Optimizer):
            return [param for group in self._source.param_groups for param in group["params"]]
        return self._source

    def _clip(self, grad_scale: Tensor | None = None) -> ClipStep:
        """Clip gradients that are `grad_scale` times too large (None: 1)."""
        with torch.no_grad():
            groups = _gradients(self._parameters())
            norm = _total_norm(groups) if groups else torch.zeros(())
            if grad_scale is not None:
                norm = norm / grad_scale.to(norm.device)
            step = self._core.observe(norm.item())
            for grads in groups:
                if step.scale == 0.0:
                    torch._foreach_zero_(grads)
                elif step.scale != 1.0:
                    torch._foreach_mul_(grads, step.scale)
        if not groups and not self._warned:
            self._warned = True
            warnings.warn(
                "No parameter has a gradient, so AutoClip had nothing to clip or to remember; it belongs between "
                "loss.backward() and zero_grad(), on the parameters that are trained.",
                RuntimeWarning,
                stacklevel=3,
            )
        return step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The hook runs before the closure, and the gradients are made by the closure: clip behind it.
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._clip_inside(optimizer)
            return None

        def closure_then_clip() -> Any:
            loss = closure()
            self._clip_inside(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_clip, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_clip}

    def _clip_inside(self, optimizer: Optimizer) -> None:
        # A GradScaler hands its scale and its verdict to fused optimizers, which unscale and skip by themselves; other
        # optimizers get unscaled gradients, and no step at all after an overflow.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        step = self._clip(getattr(optimizer, "grad_scale", None))
        # Without gradients an optimizer leaves parameters, momentum and decay alone.
        dropped = self._parameters() if step.scale == 0.0 else []
        self._hidden = [(param, param.grad) for param in dropped if param.grad is not None]
        for param, _ in self._hidden:
            param.grad = None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden = []


def attach(
    optimizer: Optimizer,
    percentile: float = 10.0,
    *,
    window: int | None = None,
    warmup: int = 0,
    nonfinite: Literal["skip", "raise", "pass"] = "skip",
    max_threshold: float | None = None,
) -> AutoClip:
    """Clip the gradients of an optimizer inside every `optimizer.step()`, with nothing else to change.

    A closure is followed by clipping each time the optimizer calls it: LBFGS evaluates several gradients per step, and
    each one is a step of AutoClip. A GradScaler needs no explicit `unscale_`; steps that it skips are not seen. After a
    non-finite norm under "skip" the optimizer leaves the parameters and its own state as they were, and the gradients
    are zeros. `optimizer.state_dict()` stays as it was: save the AutoClip's own state beside it.

    Args: as `AutoClip`, for the parameters of all groups, those added later included.

    Returns:
        The AutoClip; its `detach()` ends the clipping.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        AutoClipError: the optimizer has an AutoClip already.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clip = attach(optimizer)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> clip.steps
    1
    """
    if not isinstance(optimizer, Optimizer):
        raise AutoClipTypeError(
            f"attach takes a torch.optim.Optimizer, but a {type(optimizer).__name__} was given; for parameters or a "
            "module use AutoClip(...) and its step()."
        )
    if optimizer in _attached:
        raise AutoClipError(
            f"This {type(optimizer).__name__} has an AutoClip attached already, and a second one would record norms "
            "that are clipped; use the first one, or detach() it."
        )
    clip = AutoClip(
        optimizer, percentile, window=window, warmup=warmup, nonfinite=nonfinite, max_threshold=max_threshold
    )
    clip._handles = [
        optimizer.register_step_pre_hook(clip._before_step),
        optimizer.register_step_post_hook(clip._after_step),
    ]
    _attached.add(optimizer)
    return clip


def _as_tensors(params: Tensor | Iterable[Tensor] | torch.nn.Module) -> list[Tensor]:
    if isinstance(params, torch.nn.Module):
        return list(params.parameters())
    if isinstance(params, Tensor):
        return [params]
    if not isinstance(params, Iterable):
        raise AutoClipTypeError(
            f"AutoClip takes tensors, a module or an optimizer, but a {type(params).__name__} was given."
        )
    tensors = list(params)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise AutoClipTypeError(
                f"AutoClip takes tensors, but item {index} is a {type(tensor).__name__}; give model.parameters(), the "
                "model itself, or its optimizer."
            )
    # A tensor given twice has one gradient, which must count once.
    return list(dict.fromkeys(tensors))


def _gradients(params: list[Tensor]) -> list[list[Tensor]]:
    """Return the gradients as real, dense tensors that share their memory, one list per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            if grad.layout is torch.sparse_coo and not grad.is_coalesced():
                param.grad = grad = grad.coalesce()
            grad = grad.values()
        if grad.is_complex():
            # Scaling and measuring commute with conjugation, of which a complex tensor may hold a pending one.
            grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(groups.values())


def _total_norm(groups: list[list[Tensor]]) -> Tensor:
    """Return the L2 norm over all gradients, in float32 or wider."""
    norms: list[Tensor] = [
        torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.promote_types(grads[0].dtype, torch.float32)))
        )
        for grads in groups
    ]
    if len(norms) == 1:
        return norms[0]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total
