"""AutoClip over PyTorch gradients.

Every rule is the core's: gradients become norms (gradients.py), the norms of each group (groups.py) go to the core, and
the core's scales become scaled gradients. On a CPU the host decides; on an accelerator it must not wait for a norm, so
the device decides (deferred.py). How an optimizer does all this by itself is in attach.py.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from math import copysign, isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import ref

import torch
from torch import Tensor

import autoclip_core
from autoclip_core import (
    AutoClipError,
    AutoClipTypeError,
    AutoClipValueError,
    ClipStep,
    NonFiniteNormError,
    NormHistory,
    StateError,
)
from autoclip_torch.deferred import Deferred, DeviceStep
from autoclip_torch.gradients import NOT_SEEN, Gradients, has_float64, moved, widest
from autoclip_torch.groups import Groups, Parameters, Scope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Mode = Literal["auto", "immediate", "deferred"]

_STATE_FORMAT = 1
_SHARE_OVER = 100  # steps
_DEFERRED_BY_ITSELF = {"cuda", "xpu"}


class AutoClip:
    """Clip gradients to a percentile of all gradient norms seen so far.

    Call `step()` between `loss.backward()` and `optimizer.step()`, on accumulated and unscaled gradients (with a
    GradScaler: after `scaler.unscale_(optimizer)`). To have it called by the optimizer itself, use `attach`.

    Args:
        params: whose gradients are clipped: tensors, (name, tensor) pairs, a module, or an optimizer. A module's
            parameters are read once, now; an optimizer's at every step, so groups added later count.
        percentile: from 0 (clip to the smallest norm seen) to 100 (never clip). May be assigned at any step.
        scope: what has a norm, a history and a threshold of its own. "global", as in the paper: all gradients together.
            "group": each parameter group of an optimizer. "parameter": each tensor. A function from a parameter's name
            to the name of its group: each group.
        mode: "immediate": the host reads the norm and decides, which waits for the device. "deferred": the device
            decides, from the same history and to the same bits, and nobody waits. "auto": deferred on CUDA and XPU.
        process_group: where parameters are spread over processes without being DTensors (the stages of a pipeline,
            FSDP1), the processes over which to add up their norms. Needs the global scope.
        window: remember only the last `window` norms; None, the paper's choice, remembers all.
        warmup: do not clip before this many norms have been remembered.
        nonfinite: what a NaN or infinite norm does. "skip": all gradients become zeros; warns once. "raise":
            NonFiniteNormError, gradients left as they are; deferred, they become zeros, and a later step raises.
            "pass": nothing.
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

    _step_untraced: Callable[[], Any]
    _detach: Callable[[], None] | None  # set by `attach`: ends the clipping inside optimizer.step()

    def __init__(
        self,
        params: Parameters,
        percentile: float = 10.0,
        *,
        scope: Scope | Callable[[str], str] = "global",
        mode: Mode = "auto",
        process_group: ProcessGroup | None = None,
        window: int | None = None,
        warmup: int = 0,
        nonfinite: Literal["skip", "raise", "pass"] = "skip",
        max_threshold: float | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise AutoClipValueError(f'mode must be "auto", "immediate" or "deferred", but {mode!r} was given.')
        if process_group is not None and scope != "global":
            raise AutoClipValueError('process_group adds up one norm of all parameters, so it needs scope="global".')
        self._percentile = percentile
        self._options: dict[str, Any] = {
            "window": window,
            "warmup": warmup,
            "nonfinite": nonfinite,
            "max_threshold": max_threshold,
        }
        self._percentile = self._make_clip().percentile  # checked, with all other options
        self._groups = Groups(params, scope)
        self._clips = {name: self._make_clip() for name in self._groups.by_name}
        self._mode = mode
        self._process_group = process_group
        self._deferred: Deferred | None = None
        self._left: _Left | None = None
        self._latest: dict[str, ClipStep] = {}
        self._clipped_shares: deque[float] = deque(maxlen=_SHARE_OVER)
        self._warned = False
        self._start_unattached()

    @property
    def percentile(self) -> float:
        """The percentile, from 0 to 100. Assign to change it from the next step on."""
        return self._percentile

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        for clip in self._clips.values():
            clip.percentile = percentile
            self._percentile = clip.percentile

    @property
    def threshold(self) -> float:
        """The threshold as the history stands, in the unit of the norm; `inf` while nothing is remembered.

        Raises:
            AutoClipError: each group has its own (see `thresholds`).
        """
        return self._only("threshold").threshold

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold of each group by its name; the only one is called "global"."""
        return {name: clip.threshold for name, clip in self._settled().items()}

    @property
    def history(self) -> NormHistory:
        """The norms remembered so far, unclipped.

        Raises:
            AutoClipError: each group has its own (see `histories`).
        """
        return self._only("history").history

    @property
    def histories(self) -> dict[str, NormHistory]:
        """The history of each group by its name; the only one is called "global"."""
        return {name: clip.history for name, clip in self._settled().items()}

    @property
    def steps(self) -> int:
        """How many steps were seen."""
        return max(clip.steps for clip in self._settled().values())

    @property
    def clipped_steps(self) -> int:
        """How many steps were clipped, added up over the groups."""
        return sum(clip.clipped_steps for clip in self._settled().values())

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had a NaN or infinite norm, added up over the groups."""
        return sum(clip.nonfinite_steps for clip in self._settled().values())

    @property
    def waits(self) -> int:
        """How often a deferred step had to wait for the device, because too many norms were on their way already."""
        return self._deferred.waits if self._deferred is not None else 0

    def step(self) -> Any:
        """Clip the gradients in place, and return what was decided. One pass for the norms and one to scale.

        After a non-finite norm under "skip" the gradients are zeros and the scale is 0.0: an `optimizer.step()` would
        still apply momentum and weight decay, so leave it out to keep the parameters as they are. Where no parameter
        has a gradient, nothing is remembered, and a warning says so once. Gradients that were clipped already are not
        clipped, remembered or counted again: those whose first tensor nobody has touched since, and whose norm is the
        one they were left with.

        Returns:
            A ClipStep; with another scope than "global", a dict of them by the names of the groups that have gradients.
            Deferred, their fields are tensors, shape (), on the device, and reading one is waiting for it.

        Raises:
            AutoClipError: this AutoClip is attached to an optimizer, which clips already.
            NonFiniteNormError: a norm is NaN or infinite under `nonfinite="raise"`.
        """
        if torch.compiler.is_compiling():
            return self._step_untraced()
        if self._detach is not None:
            raise AutoClipError(
                "This AutoClip is attached to an optimizer and clips inside optimizer.step(); leave out the call of "
                "AutoClip.step(), or call detach() first."
            )
        with torch.no_grad():
            gradients = self._gradients()
            steps = self._decide(gradients)
            self._apply(gradients, steps)
            self._leave(gradients, steps)
        if isinstance(steps, DeviceStep):
            present = gradients.present
            every = enumerate(zip(*steps, strict=True))
            steps = {index: ClipStep(*fields) for index, fields in every if index in present}
        if self._groups.scope == "global":
            return steps[0]
        names = list(self._groups.by_name)
        return {names[index]: steps[index] for index in sorted(steps)}

    def log(self) -> dict[str, float]:
        """Return the latest step for a logger: plain numbers by name, none before the first step.

        `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` (0 or 1), each followed by a slash and
        the group's name if the scope is not "global"; and `clipped_share`, over the last 100 steps. Never waits: a
        deferred step is the latest when its norms have reached the host.
        """
        if self._deferred is not None:
            self._deferred.receive()
        numbers: dict[str, float] = {}
        for name, step in self._latest.items():
            ending = "" if self._groups.scope == "global" else f"/{name}"
            numbers[f"grad_norm{ending}"] = step.norm
            numbers[f"clip_threshold{ending}"] = step.threshold
            numbers[f"clip_scale{ending}"] = step.scale
            numbers[f"clipped{ending}"] = float(step.clipped)
        if self._clipped_shares:
            numbers["clipped_share"] = sum(self._clipped_shares) / len(self._clipped_shares)
        return numbers

    def detach(self) -> None:
        """Undo `attach`: optimizer.step() no longer clips. The history stays. Does nothing if not attached."""
        if self._detach is not None:
            self._detach()
            self._detach = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: plain scalars, and bytes, which torch.load takes by default.

        >>> clip = AutoClip(torch.nn.Linear(2, 1))
        >>> sorted(clip.state_dict())
        ['format', 'groups', 'scope']
        """
        # Bytes and not tensors, which torch.distributed.checkpoint can only load into tensors of their final size.
        self._refresh()
        groups = {name: clip.state_dict() for name, clip in self._settled().items()}
        return {"format": _STATE_FORMAT, "scope": self._groups.scope, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state made by `state_dict`, on any device and with any number of ranks.

        On failure nothing changes. The state brings its percentile, as an optimizer's state brings its learning rate;
        assign `percentile` afterwards to change it.

        Raises:
            AutoClipTypeError, StateError: the state is not one of `state_dict`, or has another format, window or scope,
                or other groups.
            SnapshotError: its history is damaged.
        """
        if not isinstance(state, Mapping):
            raise AutoClipTypeError(f"A state is the dict made by state_dict(), but {type(state).__name__} was given.")
        groups = state.get("groups")
        if state.get("format") != _STATE_FORMAT or not isinstance(groups, Mapping):
            raise StateError(
                f"The state has format {state.get('format')!r}, and this release reads format {_STATE_FORMAT}; was it "
                "made by autoclip_torch.AutoClip.state_dict(), and by a release not later than this one?"
            )
        if state.get("scope") != self._groups.scope:
            raise StateError(
                f"The state has scope={state.get('scope')!r}, but this AutoClip has scope={self._groups.scope!r}; "
                "construct it with the scope of the run that is resumed."
            )
        self._refresh()
        clips = self._settled()
        for lacking, what in ((clips.keys() - groups.keys(), "lacks"), (groups.keys() - clips.keys(), "has besides")):
            if lacking:
                raise StateError(
                    f"The state {what} {len(lacking)} of the groups, among them {min(lacking)!r}; construct this "
                    "AutoClip with the parameters and the scope of the run that is resumed."
                )
        loaded = {name: self._make_clip() for name in clips}
        for name, clip in loaded.items():
            clip.load_state_dict(groups[name])
        self._clips = loaded
        self._percentile = next(iter(loaded.values())).percentile
        self._deferred = None
        self._left = None
        self._latest = {}
        self._clipped_shares.clear()

    def __repr__(self) -> str:
        clips = self._settled()
        what = repr(clips["global"]) if self._groups.scope == "global" else f"{len(clips)} groups"
        return f"<autoclip_torch.AutoClip of {len(self._groups)} parameters: {what}>"

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not attached, and waits for nothing.
        self._settled()
        own = {name: value for name, value in self.__dict__.items() if name not in {"_step_untraced", "_detach"}}
        return {**own, "_deferred": None, "_left": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_unattached()

    def _start_unattached(self) -> None:
        # What reads values on the host is not for torch.compile to trace.
        self._step_untraced = torch.compiler.disable(self.step)  # type: ignore[no-untyped-call]
        self._detach = None

    def _make_clip(self) -> autoclip_core.AutoClip:
        return autoclip_core.AutoClip(self._percentile, **self._options)

    def _settled(self) -> dict[str, autoclip_core.AutoClip]:
        """Return the clips of all groups, which then know every norm that was on its way."""
        if self._deferred is not None:
            self._deferred.receive(wait=True)
        return self._clips

    def _only(self, what: str) -> autoclip_core.AutoClip:
        if self._groups.scope != "global":
            raise AutoClipError(f"With scope={self._groups.scope!r} each group has its own {what}; see `histories`.")
        return self._settled()["global"]

    def _refresh(self) -> None:
        """See which parameters an optimizer has now, and give new groups a history."""
        if self._groups.refresh():
            clips = self._settled()
            self._clips = {name: clips.get(name) or self._make_clip() for name in self._groups.by_name}
            self._deferred = None

    # One step: gradients, decide, apply, leave. An attached optimizer may apply the decision by itself (attach.py).

    def _gradients(self) -> Gradients:
        """Return the gradients as they are now."""
        self._refresh()
        device = self._deferred.device if self._deferred is not None else None
        gradients = Gradients(list(self._groups.by_name.values()), self._process_group, device)
        if gradients.first is None and not gradients.is_shared and not self._warned:
            self._warned = True
            warnings.warn(
                "No parameter has a gradient, so AutoClip had nothing to clip or to remember; it belongs between "
                "loss.backward() and zero_grad(), on the parameters that are trained.",
                RuntimeWarning,
                stacklevel=3,
            )
        return gradients

    def _decide(
        self, gradients: Gradients, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> dict[int, ClipStep] | DeviceStep:
        """Decide for each group that has gradients.

        Args:
            gradients: `grad_scale` times too large (None: not too large).
            grad_scale: what a GradScaler hands to fused optimizers, and
            found_inf: its verdict; after an overflow the step is not seen.

        Returns:
            A step per group, none if the step is not seen; or, deferred, one step of tensors, shape (groups,).
        """
        deferred = self._mode == "deferred" or (self._mode == "auto" and _is_deferred_on(gradients))
        # Before anything that may differ between ranks. A norm that is not unscaled yet may be beyond float32.
        norms = gradients.norms() if grad_scale is None else gradients.norms(widest(gradients.device))
        if not deferred and found_inf is not None and found_inf.item():
            return {}
        if grad_scale is not None:
            norms = norms / moved(grad_scale, norms.device)
        left = self._left if self._left is not None and self._left.is_untouched(gradients) else None
        if deferred:
            return self._decide_on_device(gradients, norms, left, found_inf)
        self._settled()  # a model may have left its device
        found = _found(norms.tolist())
        if left is not None and left.has_norms(found):
            clips = list(self._clips.values())
            return {index: ClipStep(norm, clips[index].threshold, 1.0, False, False) for index, norm in found.items()}
        return self._observe(found)

    def _decide_on_device(
        self, gradients: Gradients, norms: Tensor, left: _Left | None, found_inf: Tensor | None
    ) -> DeviceStep:
        if self._deferred is None or self._deferred.device != gradients.device:
            self._settled()
            self._deferred = Deferred(list(self._clips.values()), gradients.device, self._options, self._receive)
        measured = norms
        if left is not None:
            norms = torch.where(left.has_norms_on_device(norms), NOT_SEEN, norms)
        if found_inf is not None:
            norms = torch.where(moved(found_inf, norms.device) > 0, NOT_SEEN, norms)
        return self._deferred.observe(norms, self._percentile)._replace(norm=measured)

    def _observe(self, norms: dict[int, float]) -> dict[int, ClipStep]:
        """Hand the norms of the groups that have one to the core."""
        items = list(self._clips.items())
        # A non-finite norm first: where it is an error, nothing else has been recorded yet.
        order: Iterable[int] = norms
        if not all(map(isfinite, norms.values())):
            order = sorted(norms, key=lambda index: isfinite(norms[index]))
        steps = {}
        for index in order:
            name, clip = items[index]
            try:
                steps[index] = clip.observe(norms[index])
            except NonFiniteNormError as error:
                if self._groups.scope != "global":
                    error.add_note(f"It is the norm of the group {name!r}.")
                raise
        if steps:
            self._latest = {items[index][0]: steps[index] for index in norms}
            self._clipped_shares.append(sum(step.clipped for step in steps.values()) / len(steps))
        return steps

    def _receive(self, norms: list[float], percentile: float) -> None:
        """Take in the norms of a deferred step, and the percentile that it had."""
        now = self._percentile
        if percentile == now:
            self._observe(_found(norms))
            return
        self.percentile = percentile
        try:
            self._observe(_found(norms))
        finally:
            self.percentile = now

    def _apply(self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep) -> None:
        """Change the gradients as decided."""
        if isinstance(steps, DeviceStep):
            gradients.scale_on_device_(steps.scale, drops=self._options["nonfinite"] != "pass")
        elif is_dropped(steps):
            gradients.zero_()
        else:
            gradients.scale_({index: step.scale for index, step in steps.items()})

    def _leave(self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep) -> None:
        """Remember the gradients as they were left."""
        # Where nobody has a gradient there is nothing to be left.
        self._left = _Left(gradients, steps) if gradients.first is not None or gradients.is_shared else None


def is_dropped(steps: dict[int, ClipStep]) -> bool:
    """Return whether the update must not be made: one group without a finite norm spoils it."""
    return any(step.scale == 0.0 for step in steps.values())


def _found(norms: list[float]) -> dict[int, float]:
    """Return the norms by their groups, without those that are `NOT_SEEN`."""
    return {index: norm for index, norm in enumerate(norms) if norm != 0.0 or copysign(1.0, norm) > 0.0}


def _is_deferred_on(gradients: Gradients) -> bool:
    """Return whether nobody need wait: not the host for gradients of its own, nor for want of float64."""
    devices = gradients.devices or {gradients.device}
    return all(device.type in _DEFERRED_BY_ITSELF and has_float64(device) for device in devices)


class _Left:
    """Gradients as a step left them, so that the same ones are not taken for new ones.

    The version of a tensor alone cannot tell: a CUDA graph writes without changing it. Nor can the norm: that of a
    linear loss is the same at every step.
    """

    def __init__(self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep) -> None:
        self._first = ref(gradients.first) if gradients.first is not None else None
        self._version = gradients.first._version if gradients.first is not None else 0
        self._norms: Any
        if isinstance(steps, DeviceStep):
            self._norms = steps.norm * steps.scale  # NaN if dropped, and then all gradients are zeros
        elif is_dropped(steps):
            self._norms = dict.fromkeys(steps, 0.0)
        else:
            self._norms = {index: step.norm * step.scale for index, step in steps.items()}
        # The scale rounds each element by half a unit.
        dtype = gradients.first.dtype if gradients.first is not None else torch.float32
        self._tolerance = max(1e-5, torch.finfo(dtype).eps / 2)

    def touch(self) -> None:
        """Take the optimizer's own writes for ours: fused ones write the gradients they have scaled."""
        first = self._first() if self._first is not None else None
        if first is not None:
            self._version = first._version

    def is_untouched(self, gradients: Gradients) -> bool:
        """Return whether nobody has written to the first gradient of this rank, be it none."""
        first = gradients.first
        if first is None or self._first is None:
            return first is None and self._first is None
        return first is self._first() and first._version == self._version

    def has_norms(self, norms: dict[int, float]) -> bool:
        """Return whether the norms are those that were left."""
        return norms.keys() == self._norms.keys() and all(
            abs(norm - self._norms[index]) <= self._tolerance * norm for index, norm in norms.items()
        )

    def has_norms_on_device(self, norms: Tensor) -> Tensor:
        """Return the same as a tensor, shape ()."""
        left = moved(self._norms, norms.device)
        left = torch.where(left.isnan().any(), 0.0, left)
        same: Tensor = ((norms - left).abs() <= self._tolerance * norms.abs()).all()
        return same
