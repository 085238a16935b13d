"""The rule of AutoClip over arrays: what a compiled program or a device computes by itself.

`clip.AutoClip` states the rule for a norm on the host. Here it stands once more, in the operations that array libraries
share, for programs that cannot ask the host. What shaped this module:

- It imports no array library. `xp` is one: torch, jax.numpy, or another with the few names used here.
- Shapes are fixed and nothing branches on a value, so that every function can be compiled.
- A norm that is not to be recorded goes through the same operations, and changes nothing. So no NaN ever enters an
  array of norms, where one would spread to all.

There are two ways to have a threshold without asking the host. Either the program keeps a window of the last N norms,
in two arrays of shape (N,): the norms ascending, and the same in order of age in a ring, places without a norm holding
the largest float32 (`observe`). Or the host keeps the history, and the program is told few norms around the percentile
in advance (`deferred_threshold`). After either, `decide` makes the threshold a step.

A compiled program takes a whole step with `take_step`, which is given the way to observe a norm: over arrays, or in the
compiled kernel, which keeps the same arrays, or a tree on the host.
"""

from __future__ import annotations

from functools import cache
from math import inf
from struct import pack, unpack
from typing import TYPE_CHECKING, Any

from autoclip_core.clip import AutoClip
from autoclip_core.errors import AutoClipValueError
from autoclip_core.history import NormHistory, check_full_history

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "CLIPPED_STEPS",
    "CLIP_SCALE",
    "CLIP_THRESHOLD",
    "GRAD_NORM",
    "MAX_WINDOW",
    "NONFINITE_STEPS",
    "OUTCOME",
    "RECORDED_STEPS",
    "STEPS",
    "check_options",
    "decide",
    "deferred_scale",
    "deferred_table",
    "deferred_threshold",
    "initial_state",
    "metrics",
    "norm_to_remember",
    "number_of",
    "observe",
    "observe_window",
    "percentile_digits",
    "percentile_of",
    "percentile_of_digits",
    "remember",
    "root",
    "take_step",
]

#: The largest window: ranks are exact integers of 32 bits (a float32 has too few digits for the rank of a norm in a
#: long history), and a rank times a digit of the percentile has to fit.
MAX_WINDOW = 2**24

_BASE = 128
_DIGITS = 11

# The largest that a float32 and an int32 hold. In a state the former stands for infinity, and its opposite for NaN:
# optimizers that blend two states by products with 0 and 1, and programs that look for what is not finite, find finite
# numbers only.
_LARGEST = 2.0**128 - 2.0**104
_LAST_COUNT = 2**31 - 1

# The state of a compiled program is few arrays, because each costs a step about a microsecond:
#   norms   float32: a window, shape (2, window): the norms ascending, and in order of age in a ring, the largest number
#           where there is none yet; or, where a NormHistory holds the norms, the latest of them, shape (1,)
#   counts  int32, shape (4,)
#   last    float32, shape (4,): the norm, the threshold and the scale of the latest step, and what became of it: 1 if
#           it was clipped, -n if it was dropped as the n-th in a row, else 0
STEPS, RECORDED_STEPS, CLIPPED_STEPS, NONFINITE_STEPS = range(4)
GRAD_NORM, CLIP_THRESHOLD, CLIP_SCALE, OUTCOME = range(4)


def check_options(
    percentile: Any,
    window: Any,
    history: NormHistory | None,
    warmup: Any,
    nonfinite: Any,
    max_threshold: Any,
    default_window: int,
) -> None:
    """Check the options of an AutoClip inside a compiled program, whose arrays hold a window if no history does.

    Raises:
        AutoClipTypeError, AutoClipValueError: one cannot be used.
        BackendError: the history cannot be reached from compiled programs.
    """
    if nonfinite == "raise":
        raise AutoClipValueError(
            'nonfinite="raise" cannot be done inside a compiled program; use "skip" or "pass", and look at '
            '"nonfinite_steps" among the metrics outside of it.'
        )
    if window is None and history is None:
        raise AutoClipValueError(
            "window=None needs somewhere to keep every norm: give history=NormHistory(), or a window."
        )
    AutoClip(percentile, window=window, warmup=warmup, nonfinite=nonfinite, max_threshold=max_threshold)
    if history is not None:
        check_full_history(history, None if window == default_window else window)
        _ = history.shared_id  # not every backend has one
    elif window > MAX_WINDOW:
        raise AutoClipValueError(
            f"window must be at most {MAX_WINDOW:,} in arrays, but {window:,} was given; history=NormHistory() has no "
            "bound."
        )


def initial_state(xp: Any, window: int | None) -> dict[str, Any]:
    """Return the arrays `norms`, `counts` and `last` before the first step; the window is None with a history."""
    return {
        "norms": xp.full((1,) if window is None else (2, window), _LARGEST, dtype=xp.float32),
        "counts": xp.zeros((4,), dtype=xp.int32),
        "last": xp.asarray([0.0, _LARGEST, 1.0, 0.0], dtype=xp.float32),
    }


def take_step(
    xp: Any,
    observe: Callable[[Any, Any, Any], tuple[Any, Any]],
    norms: Any,
    counts: Any,
    last: Any,
    norm: Any,
    *,
    warmup: Any = 0,
    nonfinite: str = "skip",
    max_threshold: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Take a step with the norm of a gradient: let it enter the norms, find the threshold, decide.

    Args:
        xp: the array library.
        observe: given `norms`, how many norms have entered before, and the norm if it enters, else 0, it returns the
            norms after that and the percentile, the largest number if there is none.
        norms: those of the state.
        counts: those of the state.
        last: that of the state.
        norm: the global norm of the gradient, float32.
        warmup: as for `AutoClip`.
        nonfinite: as for `AutoClip`, but not "raise".
        max_threshold: as for `AutoClip`.

    Where a step is differentiated, the threshold is a constant in it: the derivative of a clipped gradient is that of
    threshold * gradient / norm.

    Returns:
        The new `norms`, `counts` and `last` of the state, and the scale.
    """
    # A count stays where it ends. That of the norms goes back by a window, which is the same place in the ring.
    window = norms.shape[-1] if len(norms.shape) > 1 else 0
    restart = [_LAST_COUNT - back for back in (1, window, 1, 1)]
    counts = xp.where(counts < _LAST_COUNT, counts, xp.asarray(restart, dtype=xp.int32))
    finite = xp.isfinite(norm)
    entering = xp.stop_gradient(xp.where(finite, norm, 0.0))
    enters = entering > 0.0
    recorded_steps = counts[RECORDED_STEPS]
    norms, percentile = map(xp.stop_gradient, observe(xp.stop_gradient(norms), recorded_steps, entering))
    threshold, scale, clipped = decide(
        xp,
        norm,
        percentile,
        recorded_steps + xp.astype(enters, xp.int32),
        warmup=min(warmup, _LAST_COUNT) if isinstance(warmup, int) else warmup,  # an array holds no larger one
        nonfinite=nonfinite,
        max_threshold=max_threshold,
    )
    counts = xp.where(xp.stack([True, enters, clipped, ~finite]), counts + 1, counts)
    outcome = xp.astype(clipped, xp.float32)
    if nonfinite != "pass":
        outcome = xp.where(finite, outcome, xp.minimum(last[OUTCOME], 0.0) - 1.0)
    known = xp.where(norm >= 0.0, xp.minimum(norm, _LARGEST), -_LARGEST)
    return norms, counts, xp.stack([known, threshold, scale, outcome]), scale


def metrics(xp: Any, counts: Any, last: Any) -> dict[str, Any]:
    """Return what users are told of a state, as scalars: the latest step, and counts."""
    return {
        "grad_norm": number_of(xp, last[..., GRAD_NORM]),
        "clip_threshold": number_of(xp, last[..., CLIP_THRESHOLD]),
        "clip_scale": last[..., CLIP_SCALE],
        "clipped": last[..., OUTCOME] > 0.0,
        "steps": counts[..., STEPS],
        "clipped_steps": counts[..., CLIPPED_STEPS],
        "nonfinite_steps": counts[..., NONFINITE_STEPS],
        "skipped_in_a_row": xp.astype(xp.maximum(-last[..., OUTCOME], 0.0), xp.int32),
    }


def number_of(xp: Any, known: Any) -> Any:
    """Return the number that a place of `last` stands for, NaN and infinity among them."""
    # Programs that look for what is not finite find it in the result alone, and only where it is.
    known = known * xp.where(known < _LARGEST, 1.0, 2.0)
    return xp.where(known < 0.0, xp.sqrt(known), known)


def root(xp: Any, total: Any) -> Any:
    """Return the square root of a sum of squares, a norm; where a step is differentiated, its derivative at 0 is 0."""
    positive = total > 0.0
    return xp.where(positive, xp.sqrt(xp.where(positive, total, 1.0)), total)


def norm_to_remember(xp: Any, norm: Any, infinity: Any = inf) -> Any:
    """Return the norm if the rule remembers it, else infinity: a zero carries no scale, NaN and infinity no size."""
    return xp.where(norm > 0.0, norm, infinity)


def observe(
    xp: Any, ascending: Any, ring: Any, recorded_steps: Any, norm: Any, percentile: Any
) -> tuple[Any, Any, Any]:
    """Let a norm enter a window, the oldest leaving if it is full, then find the percentile. O(N).

    Args:
        xp: the array library.
        ascending: the norms of the window, shape (N,), N at most `MAX_WINDOW`.
        ring: the same norms in order of age, shape (N,).
        recorded_steps: how many norms have entered before, an int32 scalar.
        norm: the norm, finite, or 0 if none enters.
        percentile: from 0 to 100: a Python float, a scalar array, or a list of its digits.

    Returns:
        The two arrays with the norm in them, and the percentile: the largest float32 if they are empty.
    """
    ascending, ring = remember(xp, ascending, ring, recorded_steps, norm)
    size = xp.minimum(recorded_steps + xp.astype(norm > 0.0, xp.int32), ascending.shape[0])
    return ascending, ring, percentile_of(xp, ascending, size, percentile)


def observe_window(xp: Any, norms: Any, recorded_steps: Any, norm: Any, percentile: Any) -> tuple[Any, Any]:
    """Do what `observe` does for the norms of a state, shape (2, N)."""
    ascending, ring, found = observe(xp, norms[0], norms[1], recorded_steps, norm, percentile)
    return xp.stack([ascending, ring]), found


def remember(xp: Any, ascending: Any, ring: Any, recorded_steps: Any, norm: Any) -> tuple[Any, Any]:
    """Do the first half of `observe`: return the two arrays with the norm in them. One pass over each."""
    window = ascending.shape[0]
    # Earlier releases had infinity where there is no norm.
    ascending, ring = xp.minimum(ascending, _LARGEST), xp.minimum(ring, _LARGEST)
    place = recorded_steps % window
    oldest = xp.take(ring, place)
    # Where none enters, the oldest takes its own place.
    norm = xp.where(norm > 0.0, norm, oldest)
    edge = xp.full((1,), _LARGEST, dtype=ascending.dtype)
    # Without the oldest all that follow it move down by one; then all above the norm move up by one.
    ascending = xp.where(ascending < oldest, ascending, xp.concat([ascending[1:], edge]))
    ascending = xp.maximum(xp.concat([-edge, ascending[:-1]]), xp.minimum(ascending, norm))
    return ascending, xp.where(xp.arange(window) == place, norm, ring)


def percentile_of(xp: Any, ascending: Any, size: Any, percentile: Any) -> Any:
    """Return the percentile of the first `size` of the ascending norms, the largest float32 if there are none.

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
    return xp.minimum(between, high)


def percentile_digits(xp: Any, percentile: Any) -> list[Any]:
    """Return the digits of a percentile in base 128, the whole part first: integers, which any program holds exactly.

    Those of a Python float are Python integers, and are all there are if the percentile is 0 or at least 1e-6.
    """
    digits = []
    for _ in range(1 + _DIGITS):
        digit = int(percentile) if isinstance(percentile, float) else xp.astype(percentile, xp.int32)
        digits.append(digit)
        whole = digit if isinstance(percentile, float) else xp.astype(digit, percentile.dtype)
        percentile = (percentile - whole) * _BASE
    return digits


def percentile_of_digits(digits: Iterable[int]) -> float:
    """Return the percentile that `percentile_digits` took apart."""
    return sum((digit / float(_BASE) ** place for place, digit in enumerate(digits)), 0.0)


def _position(xp: Any, highest: Any, percentile: Any) -> tuple[Any, Any, Any]:
    """Return highest * percentile / 100 as an integer and a fraction, which is the sum of two floats.

    As on paper: first the product with the digits of the percentile, from the last one on, then its division by 100,
    from the first one on.
    """
    digits = percentile if isinstance(percentile, list) else percentile_digits(xp, percentile)
    carry: Any = 0
    product = []
    for digit in reversed(digits[1:]):
        carry = highest * digit + carry
        product.append(carry % _BASE)
        carry = carry // _BASE
    whole = highest * digits[0] + carry
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
# few norms of the history around the rank asked for. The host cannot know how many of the m will be recorded, but it
# knows what each number of them, from 0 to m, would mean: which old norms have left a window, between which two places
# of the sorted norms the percentile lies, and whether the warm-up is over. It sends a row for each. The device counts,
# picks its row, sorts a few dozen numbers and reads two of them. It pays for each operation, however small, so there
# are as few as possible. In float64 the result has the bits of the core; it is no estimate.

# The columns of a row: five numbers, then norms.
_NEAR, _FAR, _SHARE, _CAP, _LEAST, _NORMS = range(6)


def deferred_table(
    clip: AutoClip, pending: int, percentile: float, *, warmup: int = 0, max_threshold: float = inf
) -> list[list[float]]:
    """Return what a device must know of the history for a threshold with `pending` further norms.

    A row for each number of them that may be recorded, from 0 to `pending`. Rows are of one length, which depends on
    `pending` and on whether there is a window, so tables of several histories make one array. With a window, `pending`
    may not exceed it. O(log n + pending^2).

    Args:
        clip: with the history.
        pending: how many norms have not reached it, that of the current step included.
        percentile: from 0 to 100.
        warmup: as the clip was given it.
        max_threshold: as the clip was given it; `inf` is None.
    """
    history, quantile = clip.history, percentile / 100
    size, window = len(history), history.window
    # From the lowest rank if nothing enters below it, to the highest, a window losing what is below it.
    first = max(0, int((size - 1) * quantile) - pending)
    last = min(size - 1, int((size + pending - 1) * quantile) + 1 + (pending if window else 0))
    known = history.order_statistics(first, last + 1 - first).tolist()
    oldest = history.oldest(min(pending, size)).tolist() if window else []
    width = (3 if window else 2) * pending + 4
    rows = []
    for recorded in range(pending + 1):
        if window and (leaving := size + recorded - window) > 0:
            gone = oldest[leaving - 1]
            if gone < known[0]:
                first -= 1
            elif gone <= known[-1]:
                known.remove(gone)
        count = size + recorded if window is None else min(size + recorded, window)
        highest = max(0, count - 1)
        rank, share = divmod(highest * quantile, 1)
        near, far = int(rank) - first, min(int(rank) + 1, highest) - first
        if share >= 0.5:  # as numpy.percentile rounds: from the nearer of the two norms
            near, far, share = far, near, 1 - share
        least = max_threshold if clip.recorded_steps + recorded <= warmup else -inf
        row = [_as_bits(near), _as_bits(far), share, max_threshold, least, *known]
        rows.append(row + [inf] * (_NORMS + width - len(row)))
    return rows


@cache
def _as_bits(integer: int) -> float:
    """Return the float64 that has the bits of an int64: a place among floats that need not be converted."""
    (bits,) = unpack("d", pack("q", integer))
    return float(bits)


def deferred_threshold(xp: Any, table: Any, pending: Any, *, warmup: int = 0) -> tuple[Any, Any, Any]:
    """Find the percentile of a history and of the norms that have not reached it.

    Args:
        xp: the array library.
        table: shape (..., m + 1, columns), made by `deferred_table` for m pending norms, float64.
        pending: shape (..., m), what `norm_to_remember` returned for them, float64.
        warmup: as the table was given it.

    Returns:
        Of shape (...): the threshold, `max_threshold` if nothing was ever recorded; and the limit that the norm may
        have in this step. Of shape (..., m): which of the pending norms are recorded.
    """
    recorded = pending < inf
    row = xp.take_along_axis(table, xp.sum(recorded, -1)[..., None, None], -2)[..., 0, :]
    norms = xp.sort(xp.concat([row[..., _NORMS:], pending], -1), -1)
    two = xp.take_along_axis(norms, row[..., _NEAR : _FAR + 1].view(xp.int64), -1)
    near, far = two[..., 0], two[..., 1]
    # Not a library's lerp, which a compiler may round otherwise. Without norms this is NaN, which fmin ignores.
    threshold = xp.fmin(near + (far - near) * row[..., _SHARE], row[..., _CAP])
    limit = xp.fmax(threshold, row[..., _LEAST]) if warmup else threshold
    return threshold, limit, recorded


def deferred_scale(xp: Any, norm: Any, limit: Any, *, nonfinite: str = "skip") -> Any:
    """Return the scale of a step, as `decide` does, in fewer operations. A norm of -0.0 was not seen: its scale is 1.

    Args:
        xp: the array library.
        norm: the norm of the step, float64.
        limit: as `deferred_threshold` returns it, above 0.
        nonfinite: as for `decide`.
    """
    if nonfinite == "pass":
        norm = xp.nan_to_num(norm, nan=0.0, posinf=0.0)
    # NaN is a NaN divided, or two infinities; an infinite quotient, that of a zero.
    return xp.clip(xp.nan_to_num(limit / norm, nan=0.0, posinf=1.0, neginf=1.0), None, 1.0)


def decide(
    xp: Any,
    norm: Any,
    threshold: Any,
    recorded_steps: Any,
    *,
    warmup: Any = 0,
    nonfinite: str = "skip",
    max_threshold: Any = None,
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
    finite = xp.isfinite(norm)
    limit = threshold
    # An option that was not given is no operation: each costs a graph of TensorFlow a microsecond.
    if max_threshold is not None:
        threshold = limit = xp.minimum(threshold, max_threshold)
    if not isinstance(warmup, int) or warmup > 0:
        limit = xp.where(recorded_steps > warmup, threshold, norm if max_threshold is None else max_threshold)
    norm = xp.where(finite, norm, 0.0)
    clipped = norm > limit
    scale = xp.where(clipped, limit / xp.where(clipped, norm, 1.0), 1.0)  # no division by 0, nor its derivative
    if nonfinite != "pass":
        scale = xp.where(finite, scale, 0.0)
    return threshold, scale, clipped
