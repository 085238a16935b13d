"""AutoClip for the agents of Stable-Baselines3.

A loaded model has new optimizers, without hooks, and callbacks are not saved: so this one attaches whenever a training
begins, and keeps the histories as an attribute of the model, which `save` takes along with all others.
"""

from __future__ import annotations

from math import isinf
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback

from autoclip_core import AutoClipError, AutoClipValueError, StateError
from autoclip_torch.attach import attach

if TYPE_CHECKING:
    from typing import Unpack

    import autoclip_torch
    from autoclip_torch.clip import AttachOptions, AutoClip

__all__ = ["AutoClipCallback"]


class AutoClipCallback(BaseCallback):
    """Clip the gradients of every optimizer of a model, each by a history of its own.

    Construct the model with `max_grad_norm=float("inf")` if it takes one: AutoClip replaces it. The histories are in
    what `model.save` writes, CheckpointCallback's files included, and every `learn` with this callback continues those
    of its model. Logged as `train/grad_norm` (before clipping), `train/clip_threshold`, `train/clip_scale`,
    `train/clipped` and `train/clipped_share`; of several optimizers (SAC, TD3) as `train/grad_norm/actor` and so on.

    Args: as `attach`.

    Raises:
        AutoClipValueError: the model clips as well (when training begins).
        StateError: the model was saved with other options, or with other optimizers.
    """

    def __init__(self, percentile: float = 10.0, **options: Unpack[AttachOptions]) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"percentile": percentile, **options}
        self.clips: dict[str, AutoClip[Any]] = {}  # by the name of the optimizer, which is "policy", "actor", ...

    @property
    def clip(self) -> autoclip_torch.AutoClip[Any]:
        """The only AutoClip.

        Raises:
            AutoClipError: there are several, or none yet (see `clips`).
        """
        if len(self.clips) != 1:
            raise AutoClipError(f"There are {len(self.clips)} AutoClips, and not one; see `clips`.")
        return next(iter(self.clips.values()))

    def _on_training_start(self) -> None:
        model: Any = self.model
        limit = getattr(model, "max_grad_norm", None)
        if limit is not None and not isinf(limit):
            raise AutoClipValueError(
                f"The model has max_grad_norm={limit}, and AutoClip would record norms that are clipped already; "
                "construct or load it with max_grad_norm=float('inf'). To cap AutoClip's threshold use max_threshold."
            )
        self._detach()  # a training may have ended with an error
        optimizers = {
            name.removesuffix("optimizer").rstrip("._"): attrgetter(name)(model)
            for name in model.get_parameters()
            if name.endswith("optimizer")
        }
        kept: _Kept | None = vars(model).get("autoclip")
        states = {} if kept is None else kept.states()
        if states and states.keys() != optimizers.keys():
            raise StateError(
                f"The model was saved with histories of {', '.join(states)}, and its optimizers are "
                f"{', '.join(optimizers)}."
            )
        self.clips = {}
        for name, optimizer in optimizers.items():
            self.clips[name] = attach(optimizer, **{"names": model.policy, **self._options})
            if states:
                self.clips[name].load_state_dict(states[name])
        model.autoclip = _Kept(self.clips)

    def _on_rollout_start(self) -> None:
        for name, clip in self.clips.items():
            clip._look(at_start=True)
            ending = f"/{name}" if len(self.clips) > 1 else ""
            # Before the first update there is nothing to log, and that is no reason to warn: agents collect first.
            for key, number in clip.log().items() if clip.steps else ():
                self.logger.record(f"train/{key}{ending}", number)

    def _on_training_end(self) -> None:
        self._on_rollout_start()  # the updates after the last rollout
        self._detach()

    def _on_step(self) -> bool:
        return True

    def _detach(self) -> None:
        for clip in self.clips.values():
            clip.detach()


class _Kept:
    """The AutoClips of a model, as an attribute of it; of a loaded one, what they were."""

    def __init__(self, clips: dict[str, AutoClip[Any]]) -> None:
        self._clips = clips
        self._states: dict[str, dict[str, Any]] = {}

    def states(self) -> dict[str, dict[str, Any]]:
        return {name: clip._checkpoint() for name, clip in self._clips.items()} or self._states

    def __getstate__(self) -> dict[str, Any]:
        return {"_clips": {}, "_states": self.states()}
