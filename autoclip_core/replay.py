"""What AutoClip would have done in a run of which only the gradient norms are known.

This answers the question that users have before they switch it on: which percentile, which window? `read_norms` finds
the norms in what loggers leave behind (logs/); `replay` gives them to the rule, all percentiles at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from autoclip_core import arrays
from autoclip_core.errors import AutoClipValueError
from autoclip_core.history import NormHistory
from autoclip_core.logs import Log, read_log, read_norms

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["PERCENTILES", "Log", "Replay", "each_replay", "read_log", "read_norms", "replay"]

#: What is tried where no percentiles are given.
PERCENTILES = (1.0, 10.0, 25.0, 50.0, 90.0)


class Replay(NamedTuple):
    """One setting, over the whole run.

    Attributes:
        percentile: None for a fixed threshold.
        window: None for the whole history.
        thresholds: the threshold at each step, shape (steps,).
        scales: the factor for each gradient, shape (steps,); 0.0 where a norm was not finite.
        clipped: which steps it would have clipped, shape (steps,).
    """

    percentile: float | None
    window: int | None
    thresholds: NDArray[np.float64]
    scales: NDArray[np.float64]
    clipped: NDArray[np.bool_]

    def summary(self) -> dict[str, float | int | None]:
        """Return the numbers by which settings are compared; None where nothing was clipped.

        `clipped_share` is of all steps; the scales are those of the clipped ones: their median, and the one that a
        twentieth of them fall below.
        """
        import numpy as np

        hard, median = (
            np.percentile(self.scales[self.clipped], [5, 50]).tolist() if self.clipped.any() else (None, None)
        )
        finite = self.thresholds[np.isfinite(self.thresholds)]
        return {
            "percentile": self.percentile,
            "window": self.window,
            "final_threshold": self.thresholds[-1].item(),
            "median_threshold": float(np.percentile(finite, 50)) if len(finite) else None,
            "clipped_share": float(self.clipped.mean()),
            "median_scale": median,
            "hard_scale": hard,
        }


def replay(
    norms: ArrayLike,
    percentiles: Sequence[float] = PERCENTILES,
    windows: Iterable[int | None] = (None,),
    *,
    fixed: Iterable[float] = (),
) -> list[Replay]:
    """Run the rule over norms, shape (steps,), of which zeros and non-finite ones are not remembered.

    Args:
        norms: in the order in which they came, unclipped.
        percentiles: each from 0 to 100.
        windows: each a number of norms, or None for the whole history.
        fixed: thresholds that do not move, each above 0, for comparison.

    Returns:
        One result per window and percentile, in this order, then one per fixed threshold.

    Raises:
        AutoClipTypeError, AutoClipValueError: there are no norms, or an argument cannot be used.

    O(steps * windows * percentiles * log(steps)).

    >>> [result] = replay([1.0, 3.0, 2.0, 4.0], percentiles=[50.0])
    >>> result.thresholds
    array([1. , 2. , 2. , 2.5])
    >>> result.clipped
    array([False,  True, False,  True])
    """
    return list(each_replay(norms, percentiles, windows, fixed=fixed))


def each_replay(
    norms: ArrayLike,
    percentiles: Sequence[float] = PERCENTILES,
    windows: Iterable[int | None] = (None,),
    *,
    fixed: Iterable[float] = (),
) -> Iterator[Replay]:
    """Yield the results of `replay` one after another, for runs of which not all fit into memory together."""
    import numpy as np

    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 1 or not len(norms):
        raise AutoClipValueError(f"norms must be one-dimensional and not empty, but their shape is {norms.shape}.")
    if (norms < 0.0).any():
        at = int((norms < 0.0).argmax())
        raise AutoClipValueError(f"A norm cannot be negative, but norms[{at}] is {norms[at]}.")
    recorded = arrays.norm_to_remember(np, norms) < np.inf
    recorded_steps = np.cumsum(recorded)

    def one(percentile: float | None, window: int | None, thresholds: NDArray[np.float64]) -> Replay:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return Replay(percentile, window, *arrays.decide(np, norms, thresholds, recorded_steps))

    for window in windows:
        found = NormHistory(window).observe_many(norms[recorded], percentiles)
        for at, percentile in enumerate(percentiles):
            # What is not remembered leaves the threshold where it was: at infinity before the first norm.
            yield one(float(percentile), window, np.append(found[:, at], np.inf)[recorded_steps - 1])
    for threshold in fixed:
        if not threshold > 0.0:
            raise AutoClipValueError(f"A fixed threshold must be above 0, but {threshold!r} was given.")
        yield one(None, None, np.full(len(norms), float(threshold)))
