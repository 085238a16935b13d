"""Bytes in, bytes out: the format is drawn in csrc/include/autoclip.h; here it is an array of 64-bit words."""

from __future__ import annotations

import sys
from ctypes import c_char_p, c_uint64, c_void_p, cast
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from autoclip_core import _bits, errors
from autoclip_core._numba.compiler import compiled

if TYPE_CHECKING:
    from autoclip_core._numba.tree import Floats

Words = NDArray[np.uint64]

_MAGIC = int.from_bytes(b"\x89ACH\r\n\x1a\n", "little")
_MAJOR, _MINOR = 1, 0
_HEADER = 8  # words
_HAS_WINDOW = 1
_ESSENTIAL = 2**32 - 1  # flags that no reader may ignore

# XXH64 with seed 0, for whole 64-bit words, after its published specification.

PRIME_1 = np.uint64(0x9E3779B185EBCA87)
PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
PRIME_3 = np.uint64(0x165667B19E3779F9)
PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
PRIME_5 = np.uint64(0x27D4EB2F165667C5)


@compiled
def rotate(word: np.uint64, bits: np.uint64) -> np.uint64:
    return (word << bits) | (word >> (np.uint64(64) - bits))


@compiled
def mix(lane: np.uint64, word: np.uint64) -> np.uint64:
    return rotate(lane + word * PRIME_2, np.uint64(31)) * PRIME_1


@compiled
def checksum(words: Words) -> np.uint64:
    zero = np.uint64(0)
    code = PRIME_5
    at = 0
    if len(words) >= 4:
        a, b, c, d = PRIME_1 + PRIME_2, PRIME_2, zero, zero - PRIME_1
        while at + 4 <= len(words):
            a = mix(a, words[at])
            b = mix(b, words[at + 1])
            c = mix(c, words[at + 2])
            d = mix(d, words[at + 3])
            at += 4
        code = rotate(a, np.uint64(1)) + rotate(b, np.uint64(7)) + rotate(c, np.uint64(12)) + rotate(d, np.uint64(18))
        for lane in (a, b, c, d):
            code = (code ^ mix(zero, lane)) * PRIME_1 + PRIME_4
    code += np.uint64(8 * len(words))
    for i in range(at, len(words)):
        code = rotate(code ^ mix(zero, words[i]), np.uint64(27)) * PRIME_1 + PRIME_4
    code = (code ^ (code >> np.uint64(33))) * PRIME_2
    code = (code ^ (code >> np.uint64(29))) * PRIME_3
    return code ^ (code >> np.uint64(32))


class Draft:
    """A snapshot that is being written.

    Args:
        count: how many norms there are.
        window: of the history, if it has one.
    """

    norms: Floats  # to be filled: in order of age if there is a window, else ascending

    def __init__(self, count: int, window: int | None) -> None:
        self._made = bytes(8 * (_HEADER + count + 1))  # filled in place: nobody else has seen it yet
        address = cast(c_char_p(self._made), c_void_p).value or 0
        self._words: Words = np.ctypeslib.as_array((c_uint64 * (_HEADER + count + 1)).from_address(address))
        self.norms = self._words[_HEADER:-1].view(np.float64)
        flags = 0 if window is None else _HAS_WINDOW
        self._words[: _HEADER - 1] = [_MAGIC, 64 << 32 | _MINOR << 16 | _MAJOR, flags, count, window or 0, 0, 0]

    def finished(self) -> bytes:
        """Return the snapshot, once its norms are there."""
        words = self._words
        words[_HEADER - 1] = checksum(words[: _HEADER - 1])
        words[-1] = checksum(words[_HEADER:-1])
        if sys.byteorder == "big":
            words.byteswap(inplace=True)
        return self._made


def load(made: bytes | memoryview) -> tuple[Floats, int | None]:
    """The norms of a snapshot and its window; the opposite of `Draft`. What a later minor version adds is left out."""

    def refuse() -> NoReturn:
        raise errors.bad_snapshot(len(made))

    if len(made) < 8 * (_HEADER + 1):
        refuse()
    header = np.frombuffer(made, "<u8", _HEADER).astype(np.uint64)
    magic, version, flags, count, window, *zeros, code = header.tolist()
    if magic != _MAGIC or code != checksum(header[:-1]):
        refuse()
    major, minor, length = version & 0xFFFF, version >> 16 & 0xFFFF, version >> 32
    if major > _MAJOR:
        raise errors.new_snapshot()
    is_plain = length == 8 * _HEADER and flags <= _HAS_WINDOW and not any(zeros)
    if major != _MAJOR or not (is_plain or minor > _MINOR) or length % 8 or len(made) % 8:
        refuse()
    if not 8 * _HEADER <= length <= len(made) - 8:
        refuse()
    words = np.frombuffer(made, "<u8", offset=8 * _HEADER).astype(np.uint64)
    if words[-1] != checksum(words[:-1]):
        refuse()
    if flags & _ESSENTIAL > _HAS_WINDOW:
        raise errors.new_snapshot()
    norms = _bits.plain(words[length // 8 - _HEADER : -1].view(np.float64))
    if bool(flags & _HAS_WINDOW) != (window > 0) or count != len(norms) or (window and count > window):
        refuse()
    if not np.isfinite(norms).all() or not (window or _bits.are_ascending(norms[:-1], norms[1:])):
        refuse()
    return norms, window or None
