"""One history: its arrays, and what Python does for them: memory, locking, errors.

There is one lock for all histories. Compiled functions hold the GIL anyway, so a lock for each would gain nothing, and
would leave merge and fork to be thought about; without the GIL (free-threaded Python) it keeps this backend right, one
thread at a time. It is held over a fork, so that a child finds it free and every history whole. And it is reentrant: a
signal handler may read a history (to save it, say) wherever it interrupts; it must not write to one.
"""

from __future__ import annotations

import os
import threading
from math import isfinite
from typing import ClassVar, Self

import numba
import numpy as np

from autoclip_core import _bits, errors
from autoclip_core._numba import snapshot
from autoclip_core._numba.check import broken
from autoclip_core._numba.tree import (
    FANOUT,
    FREE,
    FRESH,
    HEIGHT,
    LEAF,
    LEAST_INNER,
    LEAST_LEAF,
    ROW,
    SHORT,
    SIZE,
    WINDOW,
    Floats,
    Ints,
    by_age,
    history_observe,
    history_observe_many,
    history_percentile,
    history_rank,
    history_read,
    rows_left,
    rows_needed,
    tree_build,
)

_SHARE = 8  # the pool grows by one row for so many

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _rows(keys: int, leaf: int, fanout: int) -> int:
    """The rows of a tree whose nodes hold this many keys and entries, all but the last of each level."""
    rows = width = -(-keys // leaf)
    while width > 1:
        width = -(-width // fanout)
        rows += width
    return rows


class History:
    """One history: its arrays, replaced together and only by whole ones."""

    __slots__ = ("__weakref__", "_state", "_window")

    name: ClassVar[str] = "numba"
    library: ClassVar[str | None] = None
    build: ClassVar[str] = f"numba {numba.__version__}"
    shared_id: ClassVar[int | None] = None
    _state: tuple[Ints, Floats, Floats]  # facts, pool, ring
    _window: int | None

    def __init__(self, window: int | None) -> None:
        self._window = window
        self.clear()

    def clear(self) -> None:
        with _lock:
            self._build(np.empty(0), np.empty(0))

    def _build(self, ascending: Floats, ring: Floats) -> None:
        """Hold these norms and no others; `ring` has them in order of age if there is a window."""
        facts = np.zeros(SHORT + 1, np.int64)
        facts[FREE] = -1
        facts[WINDOW] = min(self._window or 0, 2**63 - 1)
        pool = np.empty((_rows(len(ascending), LEAF, FANOUT), ROW))
        tree_build(facts, pool, ascending)
        self._state = facts, pool, ring

    def _reserve(self, more: int) -> None:
        """Let the ring grow for `more` norms, and the pool, which grows by shares, for at least one."""
        facts, pool, ring = self._state
        if self._window is not None:
            size = min(len(self) + more, self._window)
            if size > len(ring):
                grown = np.empty(min(max(size, 2 * len(ring), 8), self._window))
                grown[: len(ring)] = ring
                self._state = facts, pool, grown
        lacking = rows_needed(facts) - rows_left(facts, pool)
        if lacking > 0:
            self._move_to(np.empty((len(pool) + max(lacking, len(pool) // _SHARE), ROW)))

    def _move_to(self, grown: Floats) -> None:
        facts, pool, ring = self._state
        grown[: facts[FRESH]] = pool[: facts[FRESH]]
        self._state = facts, grown, ring

    def _pool_for(self, more: int) -> Floats:
        """A pool that is large enough for `more` norms, whatever they are. Memory is promised, and not yet touched."""
        facts, pool, _ = self._state
        size = min(len(self) + more, self._window or 2**63)
        # Each norm may split a node on every level; but no tree has more nodes than if all of them held the least.
        most = _rows(size, LEAST_LEAF, LEAST_INNER) + size.bit_length() + 2
        left = rows_left(facts, pool)
        needed = min(more * int(facts[HEIGHT] + 3), most - (len(pool) - left))
        return np.empty((len(pool) + max(needed - left, 0), ROW))

    def _remember(self, norms: Floats, percentiles: Floats, thresholds: Floats) -> None:
        """Remember all the norms or, if memory runs short, none: whatever may happen later has been promised before."""
        self._reserve(len(norms))
        promised = self._pool_for(len(norms))
        done = history_observe_many(*self._state, norms, percentiles, thresholds, 0)
        while done < len(norms):
            try:
                self._reserve(1)
            except MemoryError:
                self._move_to(promised)
            done = history_observe_many(*self._state, norms, percentiles, thresholds, done)

    def push(self, norm: float) -> None:
        self.observe(norm, 0.0)

    def extend(self, norms: Floats) -> None:
        norms = _bits.plain(norms)
        with _lock:
            if len(norms) <= len(self) // 4:
                self._remember(norms, np.empty(0), np.empty((len(norms), 0)))
            elif self._window is not None:
                norms = np.concatenate((self._aged(), norms))[-self._window :].copy()
                self._build(_bits.ascending(norms), norms)
            else:
                norms = np.concatenate((self.values(), norms))
                # Two runs, for NormHistory has sorted its own: they are only merged.
                self._build(_bits.ascending(norms, kind="stable"), np.empty(0))

    def observe(self, norm: float, percentile: float) -> float:
        with _lock:
            while True:
                facts, pool, ring = self._state
                threshold = history_observe(facts, pool, ring, norm, percentile)
                if threshold == threshold:  # noqa: PLR0124 (not NaN, and no call to find out)
                    return threshold
                if not 0.0 <= percentile <= 100.0:
                    raise errors.bad_percentile(percentile)
                if not isfinite(norm):
                    raise errors.bad_norm(norm)
                if not facts[SHORT]:
                    return threshold  # an infinite difference of two norms makes NaN, here as in numpy
                self._reserve(1)

    def observe_many(self, norms: Floats, percentiles: Floats) -> Floats:
        thresholds = np.empty((len(norms), len(percentiles)))
        with _lock:
            self._remember(_bits.plain(norms), percentiles.copy(), thresholds)
        return thresholds

    def merge(self, other: Self) -> None:
        with _lock:
            self.extend(other.values())

    def clone(self) -> Self:
        made = type(self).__new__(type(self))
        made._window = self._window
        with _lock:
            facts, pool, ring = self._state
            made._state = facts.copy(), pool.copy(), ring.copy()
        return made

    def percentile(self, percentile: float) -> float:
        if not 0.0 <= percentile <= 100.0:
            raise errors.bad_percentile(percentile)
        with _lock:
            facts, pool, _ = self._state
            if not facts[SIZE]:
                raise errors.empty_history()
            return history_percentile(facts, pool, percentile)

    def select(self, rank: int) -> float:
        return float(self.order_statistics(rank, 1)[0])

    def rank(self, norm: float) -> int:
        with _lock:
            facts, pool, _ = self._state
            return history_rank(facts, pool, norm)

    def order_statistics(self, first: int, count: int) -> Floats:
        with _lock:
            facts, pool, _ = self._state
            if first + count > len(self):
                raise errors.bad_rank(first + count - 1, len(self))
            norms = np.empty(count)
            history_read(facts, pool, first, norms)
        return norms

    def oldest(self, count: int) -> Floats:
        with _lock:
            if count > len(self):
                raise errors.bad_rank(count - 1, len(self))
            return self._aged()[:count]

    def values(self) -> Floats:
        with _lock:
            return self.order_statistics(0, len(self))

    def _aged(self) -> Floats:
        facts, _, ring = self._state
        return by_age(facts, ring)

    def to_bytes(self) -> bytes:
        with _lock:
            draft = snapshot.Draft(len(self), self._window)
            facts, pool, ring = self._state
            if self._window is None:
                history_read(facts, pool, 0, draft.norms)
            else:
                by_age(facts, ring, draft.norms)
        return draft.finished()

    @classmethod
    def from_bytes(cls, made: bytes | memoryview) -> Self:
        norms, window = snapshot.load(made)
        history = cls(window)
        history._build(norms if window is None else _bits.ascending(norms), np.empty(0) if window is None else norms)
        return history

    def check(self) -> None:
        with _lock:
            reason = broken(*self._state, self._window)
        if reason is not None:
            raise errors.broken_history(f"broken: {reason}")

    def __len__(self) -> int:
        with _lock:  # a long observe_many stops for room now and then, and its norms count all at once
            return int(self._state[0][SIZE])

    @property
    def window(self) -> int | None:
        return self._window

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._state)
