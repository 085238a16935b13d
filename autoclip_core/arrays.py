"""The rule of AutoClip over arrays: what a compiled program or a device computes by itself.

`clip.AutoClip` states the rule for a norm on the host. Here it stands once more, in the operations that array libraries
share, for programs that cannot ask the host. What shaped this module:

- It imports nothing. `xp` is the array library: torch, jax.numpy, or another with the few names used here.
- Shapes are fixed and nothing branches on a value, so that every function can be compiled.
- A norm that is not to be remembered goes through the same operations as infinity, and changes nothing. So no NaN ever
  enters an array of norms, where one would spread to all.

There are two ways to have a threshold without asking the host. Either the program keeps a window of the last N norms,
in two arrays of shape (N,): the norms ascending, and the same in order of age in a ring, places without a norm holding
infinity (`observe`). Or the host keeps the history, and the program is told the few norms around the percentile in
advance (`deferred_threshold`). After either, `decide` makes the threshold a step.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autoclip_core.clip import AutoClip

# The largest window: ranks are exact integers of 32 bits (a float32 has too few digits for the rank of a norm in a long
# history), and a rank times a digit of the percentile has to fit.
MAX_WINDOW = 2**24

_BASE = 128
_DIGITS = 11


# The columns of a deferred table: three numbers, then norms.
_SIZE, _FIRST, _RECORDED, _NORMS = range(4)


def norm_to_remember(xp: Any, norm: Any) -> Any:
    """Return the norm if the rule remembers it, else infinity: a zero carries no scale, NaN and infinity no size."""
    return xp.where(xp.isfinite(norm) & (norm > 0.0), norm, inf)


def observe(
    xp: Any, ascending: Any, ring: Any, recorded_steps: Any, norm: Any, percentile: Any
) -> tuple[Any, Any, Any]:
    """Let a norm enter a window, the oldest leaving if it is full, then find the percentile. O(N).

    Args:
        xp: the array library.
        ascending: the norms of the window, shape (N,), N at most `MAX_WINDOW`.
        ring: the same norms in order of age, shape (N,).
        recorded_steps: how many norms have entered before, an int32 scalar.
        norm: what `norm_to_remember` returned.
        percentile: from 0 to 100: a Python float, a scalar array, or a list of its digits.

    Returns:
        The two arrays with the norm in them, and the percentile: infinity if they are empty.
    """
    ascending, ring = remember(xp, ascending, ring, recorded_steps, norm)
    size = xp.minimum(recorded_steps + xp.astype(norm < inf, xp.int32), ascending.shape[0])
    return ascending, ring, percentile_of(xp, ascending, size, percentile)


def remember(xp: Any, ascending: Any, ring: Any, recorded_steps: Any, norm: Any) -> tuple[Any, Any]:
    """Do the first half of `observe`: return the two arrays with the norm in them. One pass over each."""
    window = ascending.shape[0]
    place = recorded_steps % window
    enters = norm < inf
    oldest = xp.where(enters, xp.take(ring, place), inf)
    edge = xp.full((1,), inf, dtype=ascending.dtype)
    # Without the oldest all that follow it move down by one; then all above the norm move up by one.
    ascending = xp.where(ascending < oldest, ascending, xp.concat([ascending[1:], edge]))
    ascending = xp.maximum(xp.concat([-edge, ascending[:-1]]), xp.minimum(ascending, norm))
    return ascending, xp.where(xp.arange(window) == xp.where(enters, place, window), norm, ring)


def percentile_of(xp: Any, ascending: Any, size: Any, percentile: Any) -> Any:
    """Return the percentile of the first `size` of the ascending norms, infinity if there are none.

    The two norms that it lies between are exact; the result is within 1 unit in the last place of `numpy.percentile` in
    float64, rounded to float32, whatever these norms are, for a percentile of 0 or at least 1e-6.

    Args:
        xp: the array library.
        ascending: norms, shape (N,), N at most `MAX_WINDOW`.
        size: how many of them count, an int32 scalar.
        percentile: as for `observe`.
    """
    rank, fraction, rest = _position(xp, xp.maximum(size - 1, 0), percentile)
    # Not indexed with brackets: TensorFlow would compile a slice anew for each place.
    low = xp.take(ascending, rank)
    high = xp.take(ascending, xp.minimum(rank + 1, xp.maximum(size - 1, 0)))
    # The difference and the fraction have more digits than one float: each is a sum of two.
    difference = high - low
    lost = (high - difference) - low
    between = low + (difference * fraction + (lost * fraction + difference * rest))
    return xp.where(size > 0, xp.minimum(between, high), inf)


def percentile_digits(xp: Any, percentile: Any) -> list[Any]:
    """Return the digits of a percentile in base 128, the whole part first: integers, which any program holds exactly.

    Those of a Python float are Python integers, and are all there are if the percentile is 0 or at least 1e-6.
    """
    digits = []
    for _ in range(1 + _DIGITS):
        digit = int(percentile) if isinstance(percentile, float) else xp.astype(percentile, xp.int32)
        digits.append(digit)
        percentile = (percentile - digit) * _BASE
    return digits


def percentile_of_digits(digits: Iterable[int]) -> float:
    """Return the percentile that `percentile_digits` took apart."""
    return sum((digit / float(_BASE) ** place for place, digit in enumerate(digits)), 0.0)


def _position(xp: Any, last: Any, percentile: Any) -> tuple[Any, Any, Any]:
    """Return last * percentile / 100 as an integer and a fraction, which is the sum of two floats.

    As on paper: first the product with the digits of the percentile, from the last one on, then its division by 100,
    from the first one on.
    """
    digits = percentile if isinstance(percentile, list) else percentile_digits(xp, percentile)
    carry: Any = 0
    product = []
    for digit in reversed(digits[1:]):
        carry = last * digit + carry
        product.append(carry % _BASE)
        carry = carry // _BASE
    whole = last * digits[0] + carry
    rank, rest = whole // 100, whole % 100
    quotient = []
    for digit in reversed(product):
        rest = rest * _BASE + digit
        quotient.append(xp.astype(rest // 100, xp.float32))
        rest = rest % 100
    # Three digits are exact in a float32.
    return rank, _fraction(quotient[:3]), _fraction(quotient[3:]) / _BASE**3


def _fraction(digits: list[Any]) -> Any:
    value: Any = 0.0
    for digit in reversed(digits):
        value = (digit + value) / _BASE
    return value


# The deferred threshold. Let the host's history hold n norms, and let m more, that of the current step included, still
# be on the device. Each of them moves a rank by at most one, so the percentile of all n + m lies among those m and the
# few norms of the history around the rank asked for. The host sends these few, and the device finds the percentile,
# whatever the m turn out to be: which of them count, and which old norms they push out of a window. In float64 it has
# the bits of the core; it is no estimate.


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
        xp: the array library.
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
    entering = norm_to_remember(xp, pending)
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


def decide(
    xp: Any,
    norm: Any,
    threshold: Any,
    recorded_steps: Any,
    *,
    warmup: Any = 0,
    nonfinite: str = "skip",
    max_threshold: Any = inf,
) -> tuple[Any, Any, Any]:
    """Decide a step as `AutoClip.observe` does.

    Args:
        xp: the array library.
        norm: the norm of the step.
        threshold: the percentile of the history with that norm.
        recorded_steps: how many norms were recorded until and with it.
        warmup: as for `AutoClip`.
        nonfinite: what a NaN or infinite norm does. "pass": the scale is 1. Otherwise it is 0.
        max_threshold: as for `AutoClip`.

    Returns:
        The threshold, the scale and whether it clips, as in ClipStep: a scale of 0 means "drop this update".
    """
    threshold = xp.where(threshold > max_threshold, max_threshold, threshold)
    limit = xp.where(recorded_steps > warmup, threshold, max_threshold)
    clipped = xp.isfinite(norm) & (norm > limit)
    scale = xp.where(clipped, limit / norm, 1.0)
    if nonfinite != "pass":
        scale = xp.where(xp.isfinite(norm), scale, 0.0)
    return threshold, scale, clipped
