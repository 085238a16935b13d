"""The way of the gradients: measure, decide, apply.

Every rule is the core's: gradients become norms (gradients.py), the norms of each group (groups.py) go to the core, and
the core's scales become scaled gradients. On a CPU the host decides; on an accelerator it must not wait for a norm, so
the device decides (deferred.py). Both ways of clipping hold a pipeline: by hand (clip.py), and inside the step of an
optimizer (attach.py), which may apply a decision by itself.
"""

from __future__ import annotations

import warnings
from collections import deque
from math import copysign, hypot, inf, isfinite
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakMethod

import torch
from torch import Tensor

from autoclip_core import AutoClip, AutoClipError, AutoClipValueError, ClipStep, NonFiniteNormError
from autoclip_torch.agreement import Agreement
from autoclip_torch.decision import DeviceStep
from autoclip_torch.deferred import Deferred
from autoclip_torch.devices import CPU, as_tensor, has_float64, is_capturing, moved, widest
from autoclip_torch.engines import refuse_parts
from autoclip_torch.gradients import NOT_SEEN, Gradients, is_dropped
from autoclip_torch.plateau import Plateau
from autoclip_torch.repeats import Repeats
from autoclip_torch.sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup

    from autoclip_torch.groups import Groups
    from autoclip_torch.layout import Layout

Mode = Literal["auto", "immediate", "deferred"]

_SHARE_OVER = 100  # steps
_is_trained = attrgetter("requires_grad")
_DEFERRED_BY_ITSELF = {"cuda", "xpu"}


class Pipeline:
    """What a step of AutoClip goes through, and what it remembers.

    Args:
        groups: the parameters.
        percentile: as for autoclip_torch.AutoClip, like those below.
        options: the other arguments of the core.
        mode: "auto", "immediate" or "deferred".
        process_group: the processes over which to add up norms.
        check_ranks: the processes that must see the same norms and thresholds.
    """

    # Where the call belongs, for whoever finds no gradients.
    advice = (
        "it belongs between loss.backward() and zero_grad(), on the parameters that are trained (where the tensors of "
        "a module have been replaced, a new AutoClip)"
    )

    _is_on_host: bool  # whether all gradients of the latest layout are

    def __init__(
        self,
        groups: Groups,
        percentile: float,
        options: dict[str, Any],
        mode: Mode,
        process_group: ProcessGroup | None,
        check_ranks: ProcessGroup | bool,  # noqa: FBT001 - as the user gives it
    ) -> None:
        if mode not in get_args(Mode):
            raise AutoClipValueError(f'mode must be "auto", "immediate" or "deferred", but {mode!r} was given.')
        if process_group is not None and groups.scope != "global":
            raise AutoClipValueError('process_group adds up one norm of all parameters, so it needs scope="global".')
        self.groups = groups
        self.repeats = Repeats()
        self._sharing = Sharing(groups)
        self._percentile = percentile
        self._options = options
        self._mode = mode
        self._process_group = process_group
        self._agreement = Agreement(check_ranks) if check_ranks is not False else None
        self._warned = False
        self._may_be_copies = process_group is not None
        self._layout: Layout | None = None  # of the latest gradients
        self._is_deferred = mode == "deferred"  # whether the device decides about them
        self._plateau: Plateau | None = Plateau()  # None: it was found and said
        self.refuse_parts(groups.params)
        self.replace({name: self.make_clip() for name in groups.by_name})

    def __getstate__(self) -> dict[str, Any]:
        # A copy waits for nothing, and its gradients are other tensors.
        self.receive(wait=True)
        return {**self.__dict__, "_deferred": None, "_layout": None, "_sharing": None, "repeats": Repeats()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sharing = Sharing(self.groups)

    def make_clip(self) -> AutoClip:
        """Return a clip for one more group."""
        return AutoClip(self._percentile, **self._options)

    def replace(self, clips: dict[str, AutoClip], shares: Iterable[float] = ()) -> None:
        """Go on with other clips of the same groups, and forget all that was on its way."""
        self._hold(clips)
        self._percentile = next(iter(clips.values())).percentile
        self._error: NonFiniteNormError | None = None  # of a deferred step, to be raised by the next one
        self.repeats.forget()
        self._latest: tuple[list[str], dict[int, ClipStep]] = [], {}  # the names of the groups, and their latest steps
        self.clipped_shares: deque[float] = deque(shares, _SHARE_OVER)  # of the groups, at each step

    def _hold(self, clips: dict[str, AutoClip]) -> None:
        """Take the clips of the groups as they are now; what each step needs of both is made once."""
        self._clips = clips
        self._names, self._ordered = list(clips), list(clips.values())
        self._params = list(self.groups.by_name.values())
        self._deferred: Deferred | None = None

    @property
    def latest(self) -> dict[str, ClipStep]:
        """The latest step of each group, as far as the host knows."""
        names, steps = self._latest
        return {names[index]: steps[index] for index in sorted(steps)}

    @property
    def percentile(self) -> float:
        """The percentile of all groups."""
        return self._percentile

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        for clip in self._clips.values():
            clip.percentile = percentile
            self._percentile = clip.percentile

    @property
    def clips(self) -> dict[str, AutoClip]:
        """The clip of each group by its name; it knows every norm that was on its way."""
        self.receive(wait=True)
        return self._clips

    @property
    def waits(self) -> int:
        """How often a deferred step had to wait for the device."""
        return self._deferred.waits if self._deferred is not None else 0

    def receive(self, *, wait: bool = False) -> None:
        """Take in the norms that have arrived, or all of them."""
        if self._deferred is not None:
            self._deferred.receive(wait=wait)

    def refuse_parts(self, params: Iterable[Tensor]) -> None:
        """Raise if norms of these parameters would not be those of the whole gradient."""
        refuse_parts(params, self._process_group)

    def refresh(self) -> None:
        """See which parameters an optimizer has now, and give new groups a history."""
        # An engine may have taken them since: it takes all that are trained, so one of them tells, by an attribute.
        if (param := next(filter(_is_trained, self.groups.params), None)) is not None and param.__dict__:
            self.refuse_parts([param])
        if self.groups.refresh():
            clips = self.clips
            origins = self.groups.origins
            self._layout = None
            self._hold({name: clips.get(origins.get(name, "")) or self.make_clip() for name in self.groups.by_name})
            self.refuse_parts(self.groups.params)

    def measure(self, grad_scale: Tensor | None = None) -> tuple[Gradients, Tensor | list[float]]:
        """Return the gradients as they are now, and the norm of each group; as numbers if the host knows them.

        Args:
            grad_scale: how many times too large they are, as a GradScaler tells fused optimizers.

        Raises:
            AutoClipError: these are not all gradients yet.
            NonFiniteNormError: an earlier, deferred step had no finite norm; nothing is done yet.
        """
        if torch._C._current_graph_task_id() != -1 and len(self.groups) > 1:
            raise AutoClipError(
                f"A step inside backward() sees some of the {len(self.groups)} gradients only, and would take their "
                "norm for that of all; make the step after backward(), or give each tensor an optimizer of its own."
            )
        self.refresh()
        device = self._deferred.device if self._deferred is not None else None
        if self._sharing.shared:
            self._sharing.look()
        gradients = Gradients(self._params, self._process_group, device, self._layout)
        if gradients.layout is not self._layout:
            self._layout = gradients.layout if gradients.plain else None
            self._is_deferred = self._mode == "deferred" or (self._mode == "auto" and _is_deferred_for(gradients))
            self._is_on_host = gradients.layout.devices == {CPU}
        # Before anything is asked of the device: that would spoil the capture.
        if not self._is_on_host and is_capturing(gradients.device):
            raise AutoClipError(
                "AutoClip was called while a graph is captured, but the norms of its replays would not be remembered; "
                "capture the forward and backward pass only, and step after each replay."
            )
        if self._deferred is not None:
            self._deferred.receive()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if gradients.first is None and not gradients.is_shared and not self._warned:
            self._warned = True
            warnings.warn(
                f"No parameter has a gradient, so AutoClip had nothing to clip or to remember; {self.advice}.",
                RuntimeWarning,
                stacklevel=3,
            )
        if grad_scale is None:
            norms = gradients.norms()
        else:  # a norm that is not unscaled yet may be beyond float32
            norms = as_tensor(gradients.norms(widest(gradients.device)))
            norms = norms / moved(grad_scale, norms.device)
        if self._may_be_copies:
            self._suspect_copies(gradients)
        return gradients, norms

    def _suspect_copies(self, gradients: Gradients) -> None:
        """Warn if every rank of the process group has the same norm, in the first step in which there is one."""
        joint, own = (0.0, 0.0) if gradients.joint is None else gradients.joint.tolist()
        if not 0.0 < joint < inf:
            return
        self._may_be_copies = False
        ranks = torch.distributed.get_world_size(self._process_group)
        if ranks > 1 and abs(joint - ranks * own) <= 1e-12 * joint:
            warnings.warn(
                f"All {ranks} ranks of process_group have a gradient of the same norm, {own**0.5:g}. If each has the "
                "whole gradient, as under DDP, leave process_group out: AutoClip adds up the norms of parts, so norms "
                f"and thresholds are {ranks**0.5:.3g} times too large.",
                RuntimeWarning,
                stacklevel=4,
            )

    def decide(
        self, gradients: Gradients, norms: Tensor | list[float], found_inf: Tensor | None = None
    ) -> dict[int, ClipStep] | DeviceStep:
        """Decide for each group that has gradients.

        Args:
            gradients: measured; on every rank, whatever it decides, because norms are added up over ranks.
            norms: of the groups, shape (groups,).
            found_inf: a GradScaler's verdict; after an overflow the step is not seen.

        Returns:
            A step per group, none if the step is not seen; or, deferred, one step of tensors, shape (groups,).
        """
        if self._agreement is not None:
            self.agree(norms)
        if self._is_deferred:
            return self._decide_on_device(gradients, as_tensor(norms), found_inf)
        if found_inf is not None and found_inf.item():
            self.repeats.forget()
            return {}
        if self._deferred is not None:
            self._deferred.receive(wait=True)  # all norms are known: a model may have left its device
        found = _found(norms if isinstance(norms, list) else norms.tolist())
        if self.repeats.has(gradients, found):
            clips = self._ordered
            return {index: ClipStep(norm, clips[index].threshold, 1.0, False, False) for index, norm in found.items()}
        return self.observe(found)

    def agree(self, norms: Tensor | list[float]) -> None:
        """Compare norms, shape (groups,), and the thresholds before them with the other ranks, if that is due.

        Raises:
            AutoClipError: they differ.
        """
        if self._agreement is not None and self._agreement.is_due():
            thresholds = [clip.threshold for clip in self.clips.values()]
            norms = as_tensor(norms)
            self._agreement.check(norms.tolist(), thresholds, norms.device)

    def apply(self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep) -> None:
        """Change the gradients as decided."""
        if isinstance(steps, DeviceStep):
            gradients.scale_on_device_(steps.scale, None if self._options["nonfinite"] == "pass" else steps.kept)
            return
        if is_dropped(steps):
            gradients.zero_()
        else:
            gradients.scale_(steps)

    def leave(
        self,
        gradients: Gradients,
        steps: dict[int, ClipStep] | DeviceStep,
        *,
        may_keep_nonfinite: bool = False,
        exactly: bool = True,
        anew: bool = False,
    ) -> None:
        """Remember the gradients as a step leaves them, so as to know them again; nobody writes to them any more in it.

        Args:
            gradients: measured before.
            steps: what was decided.
            may_keep_nonfinite: whether those of a dropped step are as they were, and not zeros.
            exactly: whether those that are not clipped are as they were measured: fused optimizers write the gradients
                that they have scaled.
            anew: whether code of others has run since, and may have moved them, or given back their memory.
        """
        may_keep_nonfinite |= self._options["nonfinite"] == "pass"
        self.repeats.leave(gradients, steps, may_keep_nonfinite=may_keep_nonfinite, exactly=exactly, anew=anew)
        if self._sharing.shared:
            self._sharing.mark(self.latest)

    def _decide_on_device(self, gradients: Gradients, norms: Tensor, found_inf: Tensor | None) -> DeviceStep:
        if self._deferred is None or self._deferred.device != gradients.device:
            me = WeakMethod(self._receive)  # what holds itself is freed late: when Python looks for such things

            def report(norms: list[float], percentile: float) -> None:
                if (receive := me()) is not None:
                    receive(norms, percentile)

            self._deferred = Deferred(list(self.clips.values()), gradients.device, self._options, report)
        measured = norms
        is_repeat = self.repeats.has_on_device(gradients, norms)
        if is_repeat is not None:
            norms = torch.where(is_repeat, NOT_SEEN, norms)
        if found_inf is not None:
            norms = torch.where(moved(found_inf, norms.device) > 0, NOT_SEEN, norms)
        step = self._deferred.observe(norms, self._percentile)
        return step if norms is measured else step._replace(norm=measured.double())

    def _receive(self, norms: list[float], percentile: float) -> None:
        """Take in the norms of a deferred step, and the percentile that it had.

        An error waits for the next step: whoever reads a history, or loads an older one, did nothing wrong.
        """
        now = self._percentile
        if percentile != now:
            self.percentile = percentile
        try:
            self.observe(_found(norms))
        except NonFiniteNormError as error:
            self._error = self._error or error
        finally:
            if percentile != now:
                self.percentile = now

    def observe(self, norms: dict[int, float]) -> dict[int, ClipStep]:
        """Hand the norms of the groups that have one to the core."""
        joint = hypot(*norms.values())
        # A non-finite norm first: where it is an error, nothing else has been recorded yet.
        order = norms if isfinite(joint) else sorted(norms, key=lambda index: isfinite(norms[index]))
        steps, clipped = {}, 0
        for index in order:
            try:
                steps[index] = step = self._ordered[index].observe(norms[index])
                clipped += step.clipped
            except NonFiniteNormError as error:
                if self.groups.scope != "global":
                    error.add_note(f"It is the norm of the group {self._names[index]!r}.")
                raise
        if steps:
            self._latest = self._names, steps
            self.clipped_shares.append(clipped / len(steps))
            if self._plateau is not None and 0.0 < joint < inf and (odd := self._plateau.see(joint)) is not None:
                self._plateau = None  # another clipper has had the gradients before
                warnings.warn(odd, RuntimeWarning, stacklevel=4)
        return steps


def _found(norms: list[float]) -> dict[int, float]:
    """Return the norms by their groups, without those that are `NOT_SEEN`."""
    if NOT_SEEN not in norms:  # which is equal to any zero
        return dict(enumerate(norms))
    return {index: norm for index, norm in enumerate(norms) if norm != 0.0 or copysign(1.0, norm) > 0.0}


def _is_deferred_for(gradients: Gradients) -> bool:
    """Return whether nobody need wait: not the host for gradients of its own, nor for want of float64."""
    devices = gradients.layout.devices or {gradients.device}
    return all(device.type in _DEFERRED_BY_ITSELF and has_float64(device) for device in devices)
