"""Whether the norms look like those that another clipper has left.

A clipper that runs first cuts every larger gradient to its own threshold, so many norms of a run are equal to the
largest of them, but for rounding, which lets them rise as often as fall. AutoClip then remembers what was left, and its
percentile is that threshold. No training does this by itself: norms that are truly constant are equal to the last bit,
and those that hardly change any more rise or fall for many steps.
"""

from __future__ import annotations

_STEPS = 100  # looked at together
_SUSPICIOUS = 20  # of them
_TOLERANCE = 1e-5  # half precision, of which clippers round each element, errs less in a norm of many


class Plateau:
    """The largest norms of the last steps, counted."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._steps = self._equal = self._rises = self._falls = 0
        self._highest = self._previous = 0.0

    def see(self, norm: float) -> str | None:
        """Take in the norm of a step, finite and above 0. Return what is odd about the last hundred, at their end."""
        if norm * (1.0 - _TOLERANCE) > self._highest:
            self._equal = self._rises = self._falls = 0
        if norm >= self._highest * (1.0 - _TOLERANCE):
            self._equal += 1
            self._rises += norm > self._previous
            self._falls += norm < self._previous
            self._previous = norm
            self._highest = max(self._highest, norm)
        self._steps += 1
        if self._steps < _STEPS:
            return None
        odd = self._equal >= _SUSPICIOUS and min(self._rises, self._falls) >= self._equal // 8
        said = (
            f"{self._equal} of the last {_STEPS} gradient norms are equal to the largest of them, {self._highest:.6g}: "
            "another clipper seems to cut the gradients before AutoClip measures them, so AutoClip remembers its "
            "threshold and not the norms of the training. Switch that clipper off (max_grad_norm, gradient_clip_val, "
            "clip_grad_norm_, and the like)."
        )
        self._begin()
        return said if odd else None
