"""Arrays of norms by their bits, without arithmetic and without comparing floats.

A thread may flush subnormal numbers to zero (torch.set_flush_denormal, and what -ffast-math links in): numpy then finds
two different ones equal, and a sum loses them. Their bits, as integers, stand in the same order; those of negative
numbers do once all but the sign is inverted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ALL_BUT_SIGN = np.int64(2**63 - 1)
_NEGATIVE_ZERO = np.int64(-(2**63))


def _turned(bits: Ints) -> Ints:
    """Integers in the order of the floats from their bits, and back."""
    return bits ^ ((bits >> 63) & _ALL_BUT_SIGN)


def plain(norms: Floats) -> Floats:
    """Return a copy with 0.0 for -0.0."""
    made = norms.copy()
    bits = made.view(np.int64)
    bits[bits == _NEGATIVE_ZERO] = 0
    return made


def ascending(norms: Floats, kind: Literal["quicksort", "stable"] = "quicksort") -> Floats:
    """Return a sorted copy with 0.0 for -0.0. NaN stands at the two ends."""
    bits = norms.view(np.int64)
    if bits.min(initial=0) >= 0:  # no sign is set
        return np.sort(bits, kind=kind).view(np.float64)
    bits = _turned(plain(norms).view(np.int64))
    bits.sort(kind=kind)
    return _turned(bits).view(np.float64)


def are_ascending(first: Floats, second: Floats) -> bool:
    """Tell whether no number is above that of the same place in the second array."""
    return bool((_turned(first.view(np.int64)) <= _turned(second.view(np.int64))).all())


def have_negative_zero(norms: Floats) -> bool:
    """Tell whether one of the numbers is -0.0."""
    return bool((norms.view(np.int64) == _NEGATIVE_ZERO).any())
