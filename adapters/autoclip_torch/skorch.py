"""AutoClip for the nets of skorch.

skorch makes a net's optimizer anew in every `fit`, and pickles whole nets, while an optimizer's hooks are not pickled:
so a callback attaches when training begins. It follows skorch's rules for callbacks: what does not end in an underscore
is a parameter, which `clone` and `set_params` know.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import ref

from skorch.callbacks import Callback, GradientNormClipping

from autoclip_core import AutoClipError, AutoClipValueError
from autoclip_torch.attach import attach, attached

if TYPE_CHECKING:
    from typing import Unpack

    import autoclip_torch
    from autoclip_torch.clip import AttachOptions, AutoClip

__all__ = ["AutoClipCallback"]


class AutoClipCallback(Callback):
    """Clip the gradients of a net's optimizer.

    `fit` begins a new history, as it begins a new net; `partial_fit` continues the one there is, that of a pickled or
    copied net too, and also after `set_params` has made another optimizer. With a net of other parameters a new one
    begins. Files of `net.save_params` have no place for the history: save `callback.state_dict()` beside. Where a
    net has trained before and comes without it, there is a warning.

    Each training batch of the net's history has `grad_norm` (before clipping), `clip_threshold`, `clip_scale`,
    `clipped` and `clipped_share`.

    Args: as `attach`.

    Raises:
        AutoClipValueError: the net has skorch's own GradientNormClipping as well (when training begins).
        AutoClipError: the net has several optimizers, of which only the first would be clipped.
    """

    def __init__(self, percentile: float = 10.0, **options: Unpack[AttachOptions]) -> None:
        self.__dict__ |= {"percentile": percentile, **options}
        self.initialize()

    @property
    def clip(self) -> autoclip_torch.AutoClip[Any] | None:
        """The AutoClip of the latest training; None before the first."""
        clip: AutoClip[Any] | None = self.clip_
        return clip

    def initialize(self) -> AutoClipCallback:
        """Forget all, for a net that is made anew."""
        self.clip_: AutoClip[Any] | None = None
        self.loaded_: dict[str, Any] | None = None
        self.module_: ref[Any] | None = None  # of whose gradients the history is
        return self

    def on_train_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """Attach, unless the optimizer is the one that is attached."""
        others = [callback for _, callback in net.callbacks_ if isinstance(callback, GradientNormClipping)]
        if any(callback.gradient_clip_value is not None for callback in others):
            raise AutoClipValueError(
                "The net has GradientNormClipping among its callbacks, and AutoClip would record norms that are "
                "clipped already; leave it out. To cap AutoClip's threshold use max_threshold."
            )
        if len(net._optimizers) > 1:
            raise AutoClipError(
                f"The net has the optimizers {', '.join(net._optimizers)}, and this callback clips one; attach() to "
                "each of them in the net's initialize_optimizer()."
            )
        if self.clip_ is not None and attached(net.optimizer_) is self.clip_:
            return
        has_others = self.module_ is not None and self.module_() is not net.module_  # parameters
        if has_others:
            self.initialize()
        state = self.state_dict()
        if net.history and not state and not has_others:
            warnings.warn(
                f"The net has trained before (epochs in its history: {len(net.history)}), but AutoClip has no norms of "
                "that, so its history begins anew; to continue it, give callback.load_state_dict() what "
                "callback.state_dict() returned when the net was saved.",
                RuntimeWarning,
                stacklevel=2,
            )
        clip = attach(net.optimizer_, **{"names": net.module_, **self.get_params(deep=False)})
        if state:
            clip.load_state_dict(state)
        self.clip_, self.loaded_, self.module_ = clip, None, ref(net.module_)

    def on_batch_end(self, net: Any, *args: Any, training: bool = False, **kwargs: Any) -> None:
        """Write the step into the net's history."""
        if training and self.clip_ is not None:
            for name, number in self.clip_.log().items():
                net.history.record_batch(name, number)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the AutoClip, empty before the first training."""
        return self.loaded_ or {} if self.clip_ is None else self.clip_._checkpoint()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`: at once, or when the next `partial_fit` begins."""
        if self.clip_ is None:
            self.loaded_ = state
        else:
            self.clip_.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        # The net pickles its module and its optimizer, and this AutoClip would bring its own copy of both.
        return {**vars(self), "clip_": None, "loaded_": self.state_dict(), "module_": None}
