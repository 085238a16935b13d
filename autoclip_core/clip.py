"""The rule of AutoClip, in one place.

Seetharaman, Wichern, Pardo, Le Roux: "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", MLSP 2020,
arXiv:2007.14469. Adapters feed norms to `AutoClip.observe` and apply the scale they get back; none of them restates
anything written here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple, get_args

from autoclip_core.errors import AutoClipTypeError, AutoClipValueError, NonFiniteNormError, StateError
from autoclip_core.history import NormHistory, as_count, as_number, as_percentile

NonFinitePolicy = Literal["skip", "raise", "pass"]

_STATE_FORMAT = 1


class ClipStep(NamedTuple):
    """What AutoClip decided for one gradient.

    Attributes:
        norm: the gradient's global L2 norm before clipping, as it was given.
        threshold: the percentile of the history (at most `max_threshold`), in the unit of the norm; `inf` while the
            history is empty.
        scale: the factor for the gradient, in [0, 1]. 0.0 after a non-finite norm means "drop this update":
            multiplying would turn infinities into NaN.
        clipped: whether the scale shortens a finite gradient.
        recorded: whether the norm entered the history.
    """

    norm: float
    threshold: float
    scale: float
    clipped: bool
    recorded: bool


# In half the time of ClipStep's own __new__, which is a Python function.
_step: Callable[[tuple[float, float, float, bool, bool]], ClipStep] = partial(tuple.__new__, ClipStep)


class AutoClip:
    """Choose the clipping threshold from the norms seen so far.

    At step t the norm n(t) of the gradient joins the history, the threshold is the p-th percentile of that history, and
    the gradient is to be multiplied by

        scale = min(threshold / n(t), 1)                                                          (equations 2 and 3)

    The history includes the current norm (Algorithm 1), so the first step is never clipped. A norm of exactly 0 carries
    no scale: it is not remembered, and nothing is clipped. A non-finite norm is not remembered either.

    Args:
        percentile: p, from 0 (clip to the smallest norm seen) to 100 (never clip). May be assigned at any step.
        window: remember only the last `window` norms; None, the paper's choice, remembers all.
        warmup: do not clip before this many norms have been recorded.
        nonfinite: what a NaN or infinite norm does. "skip": scale 0.0, the update is to be dropped; warns once.
            "raise": NonFiniteNormError. "pass": scale 1.
        max_threshold: an upper cap on the threshold, in the unit of the norm; it acts during the warm-up too.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        BackendError: no backend can be loaded.

    >>> clip = AutoClip(percentile=50.0)
    >>> clip.observe(2.0)
    ClipStep(norm=2.0, threshold=2.0, scale=1.0, clipped=False, recorded=True)
    >>> clip.observe(6.0)
    ClipStep(norm=6.0, threshold=4.0, scale=0.6666666666666666, clipped=True, recorded=True)
    """

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int | None = None,
        warmup: int = 0,
        nonfinite: NonFinitePolicy = "skip",
        max_threshold: float | None = None,
    ) -> None:
        if nonfinite not in get_args(NonFinitePolicy):
            raise AutoClipValueError(f'nonfinite must be "skip", "raise" or "pass", but {nonfinite!r} was given.')
        self._percentile = as_percentile(percentile)
        self._warmup = as_count(warmup, "warmup", minimum=0)
        self._nonfinite = nonfinite
        self._max_threshold = inf if max_threshold is None else as_number(max_threshold, "max_threshold")
        if not self._max_threshold > 0.0:
            raise AutoClipValueError(f"max_threshold must be above 0 or None, but {max_threshold!r} was given.")
        self._history = NormHistory(window)
        self._steps = 0
        self._recorded_steps = 0
        self._clipped_steps = 0
        self._nonfinite_steps = 0

    @property
    def percentile(self) -> float:
        """The percentile p, from 0 to 100. Assign to change it from the next step on."""
        return self._percentile

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        self._percentile = as_percentile(percentile)

    @property
    def threshold(self) -> float:
        """The percentile of the history as it stands, at most `max_threshold`; `inf` while it is empty. O(log n)."""
        percentile = self._history.percentile(self._percentile) if len(self._history) else inf
        return min(percentile, self._max_threshold)

    @property
    def steps(self) -> int:
        """How many norms were observed, remembered or not."""
        return self._steps

    @property
    def recorded_steps(self) -> int:
        """How many norms entered the history, those that have left its window again included."""
        return self._recorded_steps

    @property
    def clipped_steps(self) -> int:
        """How many steps were clipped."""
        return self._clipped_steps

    @property
    def nonfinite_steps(self) -> int:
        """How many norms were NaN or infinite."""
        return self._nonfinite_steps

    @property
    def history(self) -> NormHistory:
        """The norms remembered so far."""
        return self._history

    def observe(self, norm: float) -> ClipStep:
        """Take one step: remember the norm, find the threshold, decide the scale. O(log n).

        Args:
            norm: the global L2 norm of the unscaled, accumulated and reduced gradient, in float32 or wider.

        Raises:
            AutoClipTypeError, AutoClipValueError: the norm is not a number, or is negative; nothing is counted.
            NonFiniteNormError: the norm is NaN or infinite under `nonfinite="raise"`; it is counted.
            MemoryError: the history cannot grow; nothing is counted.
        """
        if norm.__class__ is not float:
            norm = as_number(norm, "norm")
        if not 0.0 < norm < inf:
            return self._observe_unrecorded(norm)
        threshold = self._history._observe(norm, self._percentile)  # both are floats that it need not check
        if threshold > self._max_threshold:
            threshold = self._max_threshold
        self._steps += 1
        self._recorded_steps += 1
        limit = threshold if self._recorded_steps > self._warmup else self._max_threshold
        if norm <= limit:
            return _step((norm, threshold, 1.0, False, True))
        self._clipped_steps += 1
        return _step((norm, threshold, limit / norm, True, True))

    def _observe_unrecorded(self, norm: float) -> ClipStep:
        if norm < 0.0:
            raise AutoClipValueError(f"A norm cannot be negative, but {norm!r} was given.")
        threshold = self.threshold
        self._steps += 1
        if norm == 0.0:
            return ClipStep(norm, threshold, 1.0, False, False)
        self._nonfinite_steps += 1
        if self._nonfinite == "raise":
            raise NonFiniteNormError(
                f"The gradient norm is {norm!r} at step {self._steps}. Find its cause (loss, data, learning rate), or "
                'construct AutoClip with nonfinite="skip" to drop such updates.'
            )
        if self._nonfinite == "skip" and self._nonfinite_steps == 1:
            warnings.warn(
                f"The gradient norm is {norm!r} at step {self._steps}; this update is dropped, and so are later ones "
                "like it, without another warning (nonfinite_steps counts them).",
                RuntimeWarning,
                stacklevel=3,
            )
        return ClipStep(norm, threshold, 0.0 if self._nonfinite == "skip" else 1.0, False, False)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: plain scalars, and the history as bytes under "history". O(n)."""
        return {
            "format": _STATE_FORMAT,
            "percentile": self._percentile,
            "window": self._history.window,
            "steps": self._steps,
            "recorded_steps": self._recorded_steps,
            "clipped_steps": self._clipped_steps,
            "nonfinite_steps": self._nonfinite_steps,
            "history": self._history.to_bytes(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state made by `state_dict`; on failure nothing changes. O(n).

        The state brings its percentile, as an optimizer's state brings its learning rate; assign `percentile`
        afterwards to change it. `warmup`, `nonfinite` and `max_threshold` stay as they were constructed.

        Raises:
            AutoClipTypeError, StateError: the state is not one of `state_dict`, or has another format or window.
            SnapshotError: its history is damaged.
        """
        if not isinstance(state, Mapping):
            raise AutoClipTypeError(f"A state is the dict made by state_dict(), but {type(state).__name__} was given.")
        if state.get("format") != _STATE_FORMAT:
            raise StateError(
                f"The state has format {state.get('format')!r}, and this release reads format {_STATE_FORMAT}; was it "
                "made by AutoClip.state_dict(), and by a release not later than this one?"
            )
        expected = ("percentile", "window", "steps", "recorded_steps", "clipped_steps", "nonfinite_steps", "history")
        missing = [key for key in expected if key not in state]
        if missing:
            raise StateError(f"The state lacks {', '.join(missing)}; was it made by AutoClip.state_dict()?")
        history = NormHistory.from_bytes(state["history"], backend=self._history.backend)
        if not state["window"] == history.window == self._history.window:
            raise StateError(
                f"The state has window={history.window}, but this AutoClip has window={self._history.window}; "
                "construct it with the window of the run that is resumed."
            )
        percentile = as_percentile(state["percentile"])
        counts = [as_count(state[key], key, minimum=0) for key in expected[2:6]]
        self._percentile = percentile
        self._steps, self._recorded_steps, self._clipped_steps, self._nonfinite_steps = counts
        self._history = history

    def __repr__(self) -> str:
        return (
            f"<AutoClip percentile={self._percentile:g} threshold={self.threshold:g} steps={self._steps} "
            f"clipped_steps={self._clipped_steps} nonfinite_steps={self._nonfinite_steps}>"
        )
