"""The rule over arrays, for devices and compiled graphs: no value is read by the host, and no shape depends on one.

`xp` is the namespace of array functions: torch, jax.numpy, or another that has the few used here under the same names.
The bits are those of the core where the arrays are float64. Leading dimensions (...) are independent histories.

The deferred threshold. Norms reach the host late, and the threshold of a step is wanted at once. Let the host's history
hold n norms, and let m more, that of the current step included, still be on the device. Each of them moves a rank by at
most one, so the percentile of all n + m lies among those m and the few norms of the history around the rank asked for.
The host sends these few (`deferred_table`), and the device finds the percentile (`deferred_threshold`), whatever the m
turn out to be: which of them count, and which old norms they push out of a window. It is the percentile of the rule to
the last bit, and not an estimate of it.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoclip_core.clip import AutoClip

_SIZE, _FIRST, _RECORDED, _NORMS = range(4)  # the columns of a table: three numbers, then norms


def deferred_table(clip: AutoClip, pending: int, percentile: float) -> list[float]:
    """Return what a device must know of the history for a threshold with `pending` further norms, as one row.

    The length of the row depends on `pending` and the window alone, so rows of several histories make one array.
    With a window, `pending` may not exceed it. O(log n + pending).
    """
    history, quantile = clip.history, percentile / 100
    size, has_window = len(history), history.window is not None
    # From the lowest rank if nothing enters below it, to the highest, a window losing what is below it.
    first = max(0, int((size - 1) * quantile) - pending)
    last = min(size - 1, int((size + pending - 1) * quantile) + 1 + pending * has_window)
    width = (3 if has_window else 2) * pending + 4
    known = history.order_statistics(first, last + 1 - first).tolist()
    oldest = history.oldest(min(pending, size)).tolist() if has_window else []
    return [
        *(size, first, clip.recorded_steps),
        *known + [inf] * (width - len(known)),
        *oldest + [inf] * (pending * has_window - len(oldest)),
    ]


def deferred_threshold(xp: Any, table: Any, pending: Any, percentile: float, window: int | None) -> tuple[Any, Any]:
    """Find the percentile of a history and of the norms that have not reached it.

    Args:
        xp: the namespace.
        table: shape (..., columns), rows made by `deferred_table` for as many pending norms, float64.
        pending: shape (..., m), the norms in order, the current one last, float64. Those that are not finite and
            positive do not count.
        percentile: from 0 to 100.
        window: that of the histories.

    Returns:
        The threshold, shape (...): `inf` if nothing was ever recorded; and the number of norms recorded until and with
        the current one, shape (...).
    """
    count = pending.shape[-1]
    entering = xp.where(is_recorded(xp, pending), pending, inf)
    entered = xp.sum(entering < inf, -1)
    known = table[..., _NORMS : -count if window else None]
    candidates = xp.concat([known, entering], -1)
    # How many norms are at most as large as each candidate; too many only for those below the ranks in question.
    at_most = table[..., _FIRST, None] + xp.sum(candidates[..., None, :] <= candidates[..., :, None], -1)
    size = table[..., _SIZE] + entered
    if window:
        oldest = table[..., -count:]
        leaves = xp.cumsum(xp.ones_like(oldest), -1) <= (size - window)[..., None]
        oldest = xp.where(leaves, oldest, inf)
        at_most = at_most - xp.sum(oldest[..., None, :] <= candidates[..., :, None], -1)
        size = xp.where(size > window, window, size)
    position = (size - 1) * (percentile / 100)
    rank = xp.floor(position)
    below = xp.amin(xp.where(at_most > rank[..., None], candidates, inf), -1)
    above = xp.amin(xp.where(at_most > rank[..., None] + 1, candidates, inf), -1)
    above = xp.where(above < inf, above, below)
    threshold = interpolate(xp, below, above, position - rank)
    return xp.where(size > 0, threshold, inf), table[..., _RECORDED] + entered


def interpolate(xp: Any, below: Any, above: Any, fraction: Any) -> Any:
    """Return the number a `fraction` of the way from `below` to `above`, as numpy.percentile rounds it."""
    difference = above - below
    return xp.where(fraction < 0.5, below + difference * fraction, above - difference * (1 - fraction))


def is_recorded(xp: Any, norm: Any) -> Any:
    """Return where a norm enters the history: where it is finite and above 0."""
    return xp.isfinite(norm) & (norm > 0)


def decide(
    xp: Any,
    norm: Any,
    threshold: Any,
    recorded_steps: Any,
    *,
    warmup: int = 0,
    drop_nonfinite: bool = True,
    max_threshold: float = inf,
) -> tuple[Any, Any, Any, Any]:
    """Decide a step as `AutoClip.observe` does.

    Args:
        xp: the namespace.
        norm: the norm of the step.
        threshold: the percentile of the history with that norm.
        recorded_steps: how many norms were recorded until and with it.
        warmup: as for `AutoClip`.
        drop_nonfinite: whether the scale of a non-finite norm is 0 instead of 1.
        max_threshold: as for `AutoClip`.

    Returns:
        The fields of a ClipStep behind the norm: threshold, scale, clipped, recorded. A scale of 0 means "drop this
        update", as in ClipStep.
    """
    recorded = is_recorded(xp, norm)
    threshold = xp.where(threshold > max_threshold, max_threshold, threshold)
    limit = xp.where(recorded_steps > warmup, threshold, max_threshold)
    clipped = recorded & (norm > limit)
    scale = xp.where(clipped, limit / norm, 1.0)
    if drop_nonfinite:
        scale = xp.where(xp.isfinite(norm), scale, 0.0)
    return threshold, scale, clipped, recorded
