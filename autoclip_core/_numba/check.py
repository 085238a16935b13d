"""Every invariant of a history, one sentence each."""

from __future__ import annotations

import numpy as np

from autoclip_core import _bits
from autoclip_core._numba.tree import (
    CHILD,
    COUNT,
    ENTRIES,
    FANOUT,
    FREE,
    FREE_COUNT,
    FRESH,
    HEIGHT,
    LEAF,
    LEAST_INNER,
    LEAST_LEAF,
    NEAR,
    NEAR_FIRST,
    NEAR_SIZE,
    OLDEST,
    ROOT,
    SIZE,
    Floats,
    Ints,
    by_age,
)


def broken(facts: Ints, pool: Floats, ring: Floats, window: int | None) -> str | None:
    """The first invariant that does not hold, level by level from the root."""
    links = pool.view(np.int64)
    size, fresh = int(facts[SIZE]), int(facts[FRESH])
    if not 0 <= facts[FREE_COUNT] <= fresh <= len(pool):
        return "the pool holds as many rows as it counts"
    free = [int(facts[FREE])]
    while 0 <= free[-1] < fresh and len(free) <= facts[FREE_COUNT]:
        free.append(int(links[free[-1], 0]))
    if free.pop() != -1 or len(free) != facts[FREE_COUNT]:
        return "the free list is as long as the pool counts"
    nodes = np.array([facts[ROOT]] if size > 0 else [], np.int64)  # of this level, from left to right
    sizes = np.array([size] if size > 0 else [], np.int64)  # keys below each
    rows, separators = [nodes], []
    for level in range(int(facts[HEIGHT]) if size > 0 else 0, -1, -1):
        if (nodes < 0).any() or (nodes >= fresh).any():
            return "every entry has a child"
        filled = sizes if level == 0 else links[nodes, ENTRIES]
        capacity, least = (LEAF, LEAST_LEAF) if level == 0 else (FANOUT, LEAST_INNER)
        if (filled > capacity).any():
            return "no node holds more than fits"
        if (filled < 1).any() or (filled[:-1] < least).any() or (level == facts[HEIGHT] > 0 and filled[0] < 2):
            return "every node but the last of its level is about half full, and the root has two entries"
        used = np.arange(capacity) < filled[:, None]
        if level == 0:
            keys = pool[nodes, :LEAF][used]
            break
        counts = links[nodes, COUNT:CHILD]
        if (np.where(used, counts, 0).sum(1) != sizes).any():
            return "every entry names the number of keys below it"
        separators.append((pool[nodes, :FANOUT][used], counts[used]))
        nodes, sizes = links[nodes, CHILD:ENTRIES][used], counts[used]
        rows.append(nodes)
    taken = np.sort(np.concatenate((*rows, np.array(free, np.int64))))
    if not np.array_equal(taken, np.arange(fresh)):
        return "every row is in the tree, free or fresh"
    if not np.isfinite(keys).all():
        return "every norm is finite"
    if _bits.have_negative_zero(keys):
        return "no norm is -0.0"
    if not _bits.are_ascending(keys[:-1], keys[1:]):
        return "norms stand in ascending order"
    for separator, counts in separators:
        first = np.cumsum(counts) - counts
        if not (
            _bits.are_ascending(separator, keys[first]) and _bits.are_ascending(keys[first[1:] - 1], separator[1:])
        ):
            return "every separator stands between the keys on its two sides"
    near = nodes == facts[NEAR]
    first = np.cumsum(sizes) - sizes
    if facts[NEAR_SIZE] != 0 and [*first[near], *sizes[near]] != [facts[NEAR_FIRST], facts[NEAR_SIZE]]:
        return "the leaf that was asked last is where it was"
    if window is not None:
        if not size <= min(window, len(ring)):
            return "there are no more norms than the window admits"
        if not 0 <= facts[OLDEST] < (size if size == window else 1):
            return "the ring begins with the oldest norm until it is full"
        if not np.array_equal(_bits.ascending(by_age(facts, ring)).view(np.int64), keys.view(np.int64)):
            return "the tree holds the norms of the window"
    return None
