"""The rule of AutoClip over arrays: what a compiled program or a device computes by itself.

`clip.AutoClip` states the rule for a norm on the host. Here it stands once more, in the operations that array libraries
share, for programs that cannot ask the host. What shaped this module:

- It imports nothing. `xp` is the array library: the names of the array API standard, taken from what `jax.numpy` has.
- Shapes are fixed and nothing branches on a value, so that every function can be compiled.
- A norm that is not to be remembered goes through the same operations as infinity, and changes nothing. So no NaN ever
  enters an array of norms, where one would spread to all.
- Ranks are exact integers of 32 bits: a float32 has too few digits for the rank of a norm in a long history.

A window of the last N norms is two arrays of shape (N,): the norms ascending, and the same in order of age in a ring.
Places without a norm hold infinity.
"""

from __future__ import annotations

from math import inf
from typing import Any

# The largest window: the rank times a digit of the percentile has to fit into 31 bits.
MAX_WINDOW = 2**24

_BASE = 128
_DIGITS = 8


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
        percentile: from 0 to 100, a Python float or a scalar array.

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
    oldest = xp.where(enters, ring[place], inf)
    edge = xp.full((1,), inf, dtype=ascending.dtype)
    # Without the oldest all that follow it move down by one; then all above the norm move up by one.
    ascending = xp.where(ascending < oldest, ascending, xp.concat([ascending[1:], edge]))
    ascending = xp.maximum(xp.concat([-edge, ascending[:-1]]), xp.minimum(ascending, norm))
    return ascending, xp.where((xp.arange(window) == place) & enters, norm, ring)


def percentile_of(xp: Any, ascending: Any, size: Any, percentile: Any) -> Any:
    """Return the percentile of the first `size` of the ascending norms, infinity if there are none.

    The two norms that it lies between are exact; the result is within 1 unit in the last place of `numpy.percentile` in
    float64, rounded to float32, whatever these norms are, for a percentile of 0 or at least 1e-6.

    Args:
        xp: the array library.
        ascending: norms, shape (N,), N at most `MAX_WINDOW`.
        size: how many of them count, an int32 scalar.
        percentile: from 0 to 100, a Python number or a scalar array.
    """
    rank, fraction, rest = _position(xp, xp.maximum(size - 1, 0), percentile)
    low = ascending[rank]
    high = ascending[xp.minimum(rank + 1, xp.maximum(size - 1, 0))]
    # The difference and the fraction have more digits than one float: each is a sum of two.
    difference = high - low
    lost = (high - difference) - low
    between = low + (difference * fraction + (lost * fraction + difference * rest))
    return xp.where(size > 0, xp.minimum(between, high), inf)


def _position(xp: Any, last: Any, percentile: Any) -> tuple[Any, Any, Any]:
    """Return last * percentile / 100 as an integer and a fraction, which is the sum of two floats.

    As on paper, in base 128: first the product with the digits of the percentile, from the last one on, then its
    division by 100, from the first one on.
    """
    digits = []
    for _ in range(1 + _DIGITS):
        digit = int(percentile) if isinstance(percentile, float) else xp.astype(percentile, xp.int32)
        digits.append(digit)
        percentile = (percentile - digit) * _BASE
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


def decide(
    xp: Any,
    norm: Any,
    percentile: Any,
    recorded_steps: Any,
    *,
    warmup: Any,
    nonfinite: str,
    max_threshold: Any,
) -> tuple[Any, Any, Any]:
    """Return the threshold, the scale and whether it clips, as `AutoClip.observe` does.

    Args:
        xp: the array library.
        norm: the gradient's norm, as it is, a scalar.
        percentile: the percentile of the history, which includes the norm if it is remembered.
        recorded_steps: how many norms have ever been remembered, this one included.
        warmup: do not clip before this many.
        nonfinite: what a NaN or infinite norm does. "skip": the scale is 0. "pass": it is 1.
        max_threshold: an upper cap on the threshold.
    """
    threshold = xp.minimum(percentile, max_threshold)
    limit = xp.where(recorded_steps > warmup, threshold, max_threshold)
    clipped = xp.isfinite(norm) & (norm > limit)
    scale = xp.where(clipped, limit / norm, 1.0)
    if nonfinite == "skip":
        scale = xp.where(xp.isfinite(norm), scale, 0.0)
    return threshold, scale, clipped
