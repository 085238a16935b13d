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

__all__ = ["PERCENTILES", "Log", "Replay", "advise", "each_replay", "read_log", "read_norms", "replay"]

#: What is tried where no percentiles are given.
PERCENTILES = (1.0, 10.0, 25.0, 50.0, 90.0)

# What `advise` calls an outlier and a drift, where it speaks of shorter steps, and how many steps are early ones.
_OUTLIER, _DRIFT, _SHORTER, _EARLY = 10.0, 3.0, 0.9, 100


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


def advise(norms: ArrayLike, result: Replay) -> list[str]:
    """Say in a line each what the norms of a run suggest, and what a percentile would have done with them.

    Outliers, early steps that no threshold limits, drift, and steps that clipping shortens; what does not apply is left
    out. Fewer than a hundred norms suggest nothing.

    Args:
        norms: those that were replayed, shape (steps,).
        result: of `replay`, with a percentile.

    >>> norms = [1.0] * 198 + [50.0, 1.0]
    >>> advise(norms, replay(norms, [50.0])[0])
    ['heavy tail: 0.5% of the norms are over 10 times the median around them, up to 50 times; p = 75 to 90 cuts them.']
    """
    import numpy as np

    norms = np.asarray(norms, dtype=np.float64)
    counted = arrays.norm_to_remember(np, norms) < np.inf
    kept, scales = norms[counted], result.scales[counted]
    if len(kept) < _EARLY:
        return []
    parts = np.array_split(kept, 10)
    medians = [float(np.percentile(part, 50)) for part in parts]
    with np.errstate(over="ignore"):
        above = np.concatenate([part / median for part, median in zip(parts, medians, strict=True)])
        early = (kept * scales)[:_EARLY] / np.percentile(kept[:_EARLY], 50)
    share, mean = float((above > _OUTLIER).mean()), float(scales.mean())
    rise = medians[-1] / medians[0]
    name, lines = f"p = {result.percentile:g}", []
    if share > 0.0:
        lines.append(
            f"heavy tail: {share:.1%} of the norms are over {_OUTLIER:g} times the median around them, up to "
            f"{above.max():.3g} times; {'p = 75 to 90' if share < 0.1 else 'only a low p'} cuts them."
        )
    if early.max() > _OUTLIER:
        lines.append(
            f"early steps: with {name} step {early.argmax() + 1} keeps {early.max():.3g} times the median of the first "
            f"{_EARLY} norms; max_threshold limits it, a warm-up of the learning rate softens it."
        )
    if not 1.0 / _DRIFT < rise < _DRIFT:
        way, times = ("rise", rise) if rise > 1.0 else ("fall", 1.0 / rise)
        at_the_end = float((scales[-len(parts[-1]) :] < 1.0).mean())
        lines.append(
            f"drift: norms {way} {times:.3g} times from the first tenth to the last, of which {name} clips "
            f"{at_the_end:.1%}; compare windows."
        )
    if mean < _SHORTER:
        lines.append(
            f"shorter steps: {name} clips {(scales < 1.0).mean():.1%}, to {mean:.2g} of a gradient on average; Adam "
            f"makes up for it, with SGD take {1.0 / mean:.2g} times the learning rate, or p = 75 to 90."
        )
    return lines
