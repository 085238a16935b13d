"""AutoClip for the Learner of fastai.

fastai's optimizers are not torch's, so nothing can be attached: the callback clips before each step, where fastai's own
GradientClip does, behind the unscaling of MixedPrecision.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientClip

from autoclip_core import AutoClipError, AutoClipValueError
from autoclip_torch.clip import AutoClip

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal, Unpack

    from autoclip_torch.clip import Options

__all__ = ["AutoClipCallback"]


class AutoClipCallback(Callback):
    """Clip the gradients of a Learner's model before each step of its optimizer.

    Every `fit` of the Learner continues the history; `lr_find` clips too, by a copy of it, and leaves nothing behind,
    as it leaves the model as it was. An update whose norm is not finite is left out. `Learner.save` has no place for
    the history: save `callback.state_dict()` beside. A fit with a `start_epoch` that comes without it begins a new
    history with a warning.

    `numbers` has a list of each number of `AutoClip.log`, with an entry for each step of the latest fit.

    Args:
        percentile: as of `AutoClip`.
        scope: "global", "parameter", or a function from a parameter's name to that of its group.
        options: as of `AutoClip`.

    Raises:
        AutoClipValueError: the Learner has fastai's GradientClip as well, or an option cannot be used (when a fit
            begins).
    """

    order = GradientClip.order
    run_valid = False

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        scope: Literal["global", "parameter"] | Callable[[str], str] = "global",
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"percentile": percentile, "scope": scope, **options}
        self._loaded: dict[str, Any] | None = None
        self._tries: AutoClip[Any] | None = None  # while lr_find looks for a rate
        self.clip: AutoClip[Any] | None = None
        self._is_new = False  # without norms of updates before this epoch
        self.numbers: dict[str, list[float]] = {}

    def before_fit(self) -> None:
        """Make the AutoClip, unless the model has it."""
        if any(isinstance(callback, GradientClip) for callback in self.learn.cbs):
            raise AutoClipValueError(
                "The Learner has GradientClip among its callbacks, and AutoClip would record norms that are clipped "
                "already; leave it out. To cap AutoClip's threshold use max_threshold."
            )
        self.numbers = {}
        self._tries = None  # of an lr_find that ended with an error
        if hasattr(self.learn, "lr_finder"):
            self._tries = self._make()
        elif self.clip is None:
            self._is_new = not self.state_dict()
            self.clip, self._loaded = self._make(), None

    def before_train(self) -> None:
        """Warn if the epochs before were trained elsewhere, and their norms are not here."""
        if self._is_new and self._tries is None and self.learn.epoch > 0:
            warnings.warn(
                f"This fit starts with epoch {self.learn.epoch}, but AutoClip has no norms of the epochs before, so "
                "its history begins anew; to continue it, give callback.load_state_dict() what callback.state_dict() "
                "returned when the Learner was saved.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._is_new = False

    def before_step(self) -> None:
        """Clip; leave out an update whose norm is not finite."""
        clip = self._tries or self.clip
        if clip is None:
            raise AutoClipError(
                "This callback has come into a fit that had begun; give it to the Learner, or to fit()."
            )
        found = clip.step()
        if clip is self.clip:
            for name, number in clip.log().items():
                self.numbers.setdefault(name, []).append(number)
        steps = found.values() if isinstance(found, dict) else [found]
        if any(isinstance(step.scale, float) and step.scale == 0.0 for step in steps):
            raise CancelStepException  # deferred, nobody knows yet: the gradients are zeros, and the update is made

    def after_fit(self) -> None:
        """End what lr_find has tried."""
        self._tries = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the AutoClip, empty before the first fit."""
        return self._loaded or {} if self.clip is None else self.clip._checkpoint()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`: at once, or when the first fit begins."""
        if self.clip is None:
            self._loaded = state
        else:
            self.clip.load_state_dict(state)
            self._is_new = False

    def _make(self) -> AutoClip[Any]:
        clip: AutoClip[Any] = AutoClip(self.learn.model, **self._options)
        if state := self.state_dict():
            clip.load_state_dict(state)
        return clip
