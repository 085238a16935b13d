"""AutoClip over PyTorch gradients: what a user holds, whoever calls its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypedDict, cast, overload

import torch
from typing_extensions import TypeVar  # torch needs it too; typing's has no default before Python 3.13

import autoclip_core
from autoclip_core import AutoClipError, AutoClipTypeError, ClipStep, NormHistory, StateError
from autoclip_torch.decision import DeviceStep
from autoclip_torch.engines import deepspeed_in
from autoclip_torch.groups import Groups, Parameters, Scope
from autoclip_torch.pipeline import Mode, Pipeline

if TYPE_CHECKING:
    from typing import Unpack

    from torch.distributed import ProcessGroup

_STATE_FORMAT = 1

# What a step returns: one ClipStep of the global scope, a dict of them of any other.
Steps = TypeVar("Steps", default=ClipStep)


class Options(TypedDict, total=False):
    """The options of an AutoClip but for the scope, on which the type depends; for type checkers."""

    mode: Mode
    process_group: ProcessGroup | None
    check_ranks: ProcessGroup | bool
    window: int | None
    warmup: int
    nonfinite: Literal["skip", "raise", "pass"]
    max_threshold: float | None


class AttachOptions(Options, total=False):
    """The options of `attach`; for type checkers."""

    scope: Scope | Callable[[str], str]
    names: Parameters | None


class Attachment(Protocol):
    """What clips inside the steps of an optimizer."""

    def detach(self) -> None:
        """Leave the optimizer as it was."""

    def is_on(self) -> bool:
        """Return whether the optimizer is there, and is clipped."""

    def look(self, *, at_start: bool) -> None:
        """Warn, once, if it does not clip any more; `at_start`, only if it never did."""

    def describe(self) -> str:
        """Return a few words about the optimizer."""


class AutoClip(Generic[Steps]):
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
        check_ranks: the processes that train one model, True for all: they compare norms and thresholds in the steps
            1, 2, 4, ... and then rarely, and raise AutoClipError if they differ.
        window: remember only the last `window` norms; None, the paper's choice, remembers all.
        warmup: do not clip before this many norms have been remembered.
        nonfinite: what a NaN or infinite norm does. "skip": all gradients become zeros; warns once. "raise":
            NonFiniteNormError, gradients left as they are; deferred, they become zeros, and a later step raises.
            "pass": nothing.
        max_threshold: an upper cap on the threshold, in the unit of the norm.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used, or there are no parameters.
        AutoClipError: the parameters belong to an engine that keeps their gradients, or the norms of their parts, to
            itself (also later: in the step after it has taken them).

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

    _attachment: Attachment | None = None  # set by `attach`: clips inside optimizer.step()
    _is_copy = False  # of an attached one, and never told so

    @overload
    def __init__(
        self: AutoClip[ClipStep],
        params: Parameters | Groups,
        percentile: float = ...,
        *,
        scope: Literal["global"] = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self: AutoClip[dict[str, ClipStep]],
        params: Parameters | Groups,
        percentile: float = ...,
        *,
        scope: Literal["group", "parameter"] | Callable[[str], str],
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(
        self,
        params: Parameters | Groups,
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
    ) -> None:
        if deepspeed_in(params) is not None:
            raise AutoClipTypeError(
                "DeepSpeed keeps the gradients of an engine to itself, so there is nothing to clip before its step(); "
                "use autoclip_torch.deepspeed.attach(engine) instead."
            )
        options = {"window": window, "warmup": warmup, "nonfinite": nonfinite, "max_threshold": max_threshold}
        groups = params if isinstance(params, Groups) else Groups(params, scope)  # `attach` makes its own
        self._pipeline = Pipeline(groups, percentile, options, mode, process_group, check_ranks)
        self._step_untraced = _step_untraced()

    @property
    def percentile(self) -> float:
        """The percentile, from 0 to 100. Assign to change it from the next step on."""
        return self._pipeline.percentile

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        self._pipeline.percentile = percentile

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
        return {name: clip.threshold for name, clip in self._pipeline.clips.items()}

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
        return {name: clip.history for name, clip in self._pipeline.clips.items()}

    @property
    def steps(self) -> int:
        """How many steps were seen."""
        return max((clip.steps for clip in self._pipeline.clips.values()), default=0)

    @property
    def clipped_steps(self) -> int:
        """How many steps were clipped, added up over the groups."""
        return sum(clip.clipped_steps for clip in self._pipeline.clips.values())

    @property
    def nonfinite_steps(self) -> int:
        """How many steps had a NaN or infinite norm, added up over the groups."""
        return sum(clip.nonfinite_steps for clip in self._pipeline.clips.values())

    @property
    def waits(self) -> int:
        """How often a deferred step had to wait for the device, because too many norms were on their way already."""
        return self._pipeline.waits

    def step(self) -> Steps:
        """Clip the gradients in place, and return what was decided.

        One pass over the gradients for the norms and one to scale them; deferred, one more that keeps or drops them.

        After a non-finite norm under "skip" the gradients are zeros and the scale is 0.0: an `optimizer.step()` would
        still apply momentum and weight decay, so leave it out to keep the parameters as they are. Where no parameter
        has a gradient, nothing is remembered, and a warning says so once. Gradients that were clipped already are not
        clipped, remembered or counted again: those that nobody has written to since, as far as torch knows, and that
        have the norms and, as far as some are compared, the elements with which they were left.

        Returns:
            A ClipStep; with another scope than "global", a dict of them by the names of the groups that have gradients.
            Deferred, their fields are tensors, shape (), on the device, and reading one is waiting for it.

        Raises:
            AutoClipError: this AutoClip is attached to an optimizer, which clips already.
            NonFiniteNormError: a norm is NaN or infinite under `nonfinite="raise"`.
        """
        if torch.compiler.is_dynamo_compiling():
            return cast("Steps", self._step_untraced(self))
        if self._attachment is not None:
            raise AutoClipError(
                "This AutoClip is attached to an optimizer and clips inside optimizer.step(); leave out the call of "
                "AutoClip.step(), or call detach() first."
            )
        self._is_copy = False
        pipeline = self._pipeline
        gradients, norms = pipeline.measure()
        steps = pipeline.decide(gradients, norms)
        pipeline.apply(gradients, steps)
        pipeline.leave(gradients, steps)
        if isinstance(steps, DeviceStep):
            present = gradients.present
            steps = {index: step for index, step in enumerate(steps.of_groups()) if index in present}
        if pipeline.groups.scope == "global":
            return steps[0]  # type: ignore[return-value]
        names = list(pipeline.groups.by_name)
        return {names[index]: steps[index] for index in sorted(steps)}  # type: ignore[return-value]

    def log(self) -> dict[str, float]:
        """Return the latest step for a logger: plain numbers by name, none before the first step.

        `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` (0 or 1), each followed by a slash and
        the group's name if the scope is not "global"; and `clipped_share`, over the last 100 steps. Never waits: a
        deferred step is the latest when its norms have reached the host. Warns, once, if nothing is clipped any more:
        if the optimizer is gone, if this is a copy, or if updates are made that an attached AutoClip does not see.
        """
        self._look()
        pipeline = self._pipeline
        pipeline.receive()
        numbers: dict[str, float] = {}
        for name, step in pipeline.latest.items():
            ending = "" if pipeline.groups.scope == "global" else f"/{name}"
            numbers[f"grad_norm{ending}"] = step.norm
            numbers[f"clip_threshold{ending}"] = step.threshold
            numbers[f"clip_scale{ending}"] = step.scale
            numbers[f"clipped{ending}"] = float(step.clipped)
        if pipeline.clipped_shares:
            numbers["clipped_share"] = sum(pipeline.clipped_shares) / len(pipeline.clipped_shares)
        return numbers

    def detach(self) -> None:
        """Undo `attach`: optimizer.step() no longer clips. The history stays. Does nothing if not attached."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: plain scalars, and bytes, which torch.load takes by default.

        >>> clip = AutoClip(torch.nn.Linear(2, 1))
        >>> sorted(clip.state_dict())
        ['format', 'groups', 'scope']
        """
        # Bytes and not tensors, which torch.distributed.checkpoint can only load into tensors of their final size.
        self._pipeline.refresh()
        groups = {name: clip.state_dict() for name, clip in self._pipeline.clips.items()}
        return {"format": _STATE_FORMAT, "scope": self._pipeline.groups.scope, "groups": groups}

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
        shares = state.get("clipped_shares", [])
        if not isinstance(shares, list) or not all(isinstance(share, float) for share in shares):
            raise StateError(f"The state has clipped_shares={shares!r}, which is not a list of numbers.")
        scope = self._pipeline.groups.scope
        if state.get("scope") != scope:
            raise StateError(
                f"The state has scope={state.get('scope')!r}, but this AutoClip has scope={scope!r}; "
                "construct it with the scope of the run that is resumed."
            )
        self._pipeline.refresh()
        groups = self._pipeline.groups.renamed(groups)
        clips = self._pipeline.clips
        for lacking, what in ((clips.keys() - groups.keys(), "lacks"), (groups.keys() - clips.keys(), "has besides")):
            if lacking:
                raise StateError(
                    f"The state {what} {len(lacking)} of the groups, among them {min(lacking)!r}; construct this "
                    "AutoClip with the parameters and the scope of the run that is resumed."
                )
        loaded = {name: self._pipeline.make_clip() for name in clips}
        for name, clip in loaded.items():
            clip.load_state_dict(groups[name])
        self._pipeline.replace(loaded, shares)

    def __repr__(self) -> str:
        clips = self._pipeline.clips
        what = repr(clips["global"]) if self._pipeline.groups.scope == "global" else f"{len(clips)} groups"
        to = f", {self._attachment.describe()}" if self._attachment is not None else ""
        return f"<autoclip_torch.AutoClip of {len(self._pipeline.groups)} parameters{to}: {what}>"

    def __copy__(self) -> AutoClip[Steps]:
        """Return another one of the same parameters, with a history of its own."""
        groups = self._pipeline.groups
        return deepcopy(self, {id(kept): kept for kept in (*groups.params, groups.optimizer)})

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline, "_is_copy": self._is_copy or self._attachment is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_pipeline" not in state:
            raise StateError(
                "This AutoClip was pickled whole by another release, and only that one can read it; load it there and "
                "save its state_dict(), which load_state_dict() of every later release reads."
            )
        self.__dict__.update(state)
        self._step_untraced = _step_untraced()

    def _look(self, *, at_start: bool = False) -> None:
        """Warn, once, if nothing is clipped though somebody thinks so; `at_start`, before any step was seen."""
        if self._attachment is not None:
            self._attachment.look(at_start=at_start)
        elif self._is_copy:
            self._is_copy = False
            warnings.warn(
                "This is a copy of an AutoClip that was attached, and copies are not attached: nothing is clipped. "
                "Attach to the copy of the optimizer, and load_state_dict() this state.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _checkpoint(self) -> dict[str, Any]:
        """Return the state with what `log` needs, for trainers that save whole files."""
        # Not in every state: torch.distributed.checkpoint loads no state of before that lacks an entry.
        return {**self.state_dict(), "clipped_shares": list(self._pipeline.clipped_shares)}

    def _only(self, what: str) -> autoclip_core.AutoClip:
        scope = self._pipeline.groups.scope
        if scope != "global":
            raise AutoClipError(f"With scope={scope!r} each group has its own {what}; see `histories`.")
        return self._pipeline.clips["global"]


@cache
def _step_untraced() -> Callable[[AutoClip[Any]], Any]:
    """Return `AutoClip.step` for a program that is traced: torch.compile is not to follow what reads values."""
    untraced: Callable[[AutoClip[Any]], Any] = torch.compiler.disable(AutoClip.step)  # type: ignore[no-untyped-call]
    return untraced
