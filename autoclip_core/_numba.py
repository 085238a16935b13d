"""The Numba backend: the same tree, the same answers and the same snapshots where the compiled kernel is not built.

The only file that imports numba. What shaped it:
  - The structure is that of csrc/src/ostree.h, a counted B+ tree, over numpy arrays that compiled functions change in
    place. The kernel's buffer before the tree is left out: it gains by prefetching, which Numba cannot ask for.
  - A call from Python pays for every array that is passed, so a history has three: `facts` (scalars), `pool` (nodes)
    and `ring` (the window). Compiled functions see the pool twice: as `keys`, float64, and as `links`, int64.
  - Compiled functions never allocate. What may fail, the growth of an array, happens in Python before anything changes;
    nodes are split or refilled on the way down, so that no insert or erase turns back.
  - No fastmath: the linear rule gives the bits of numpy.percentile only if each operation is rounded by itself.
  - One lock serves all histories. Compiled functions hold the GIL anyway, so a lock for each would gain nothing, and
    would leave merge and fork to be thought about; without the GIL (free-threaded Python) it keeps this backend right,
    one thread at a time. It is held over a fork, so that a child finds it free and every history whole, and reentrant,
    so that a signal handler may read a history (to save it, say) wherever it interrupts; it must not write to one.
  - Compiled code is kept on disk (numba's `cache=True`): in `__pycache__` beside this file, or, where that cannot be
    written, in the user's cache directory, or in NUMBA_CACHE_DIR if that is set. Constants below are compiled in.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from math import isfinite
from typing import Any, ClassVar, NoReturn, Self, TypeVar, cast

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from autoclip_core import errors

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

LEAF = 128  # keys in a leaf; at least 4
FANOUT = 42  # entries of an inner node, as many as fit into the bytes of a leaf; at least 5

# All nodes but the last of each level hold at least this much: one below a half, so that a node with the least and a
# neighbour that is too full to be merged with it can share evenly and both have one to lose.
LEAST_LEAF = (LEAF - 1) // 2
LEAST_INNER = (FANOUT - 1) // 2

# A row of the pool is a leaf, its keys from column 0 on, or an inner node: for each child a separator (from column 0
# on; not above any key below the child, not below any key before it), the number of keys below, and the child's row.
COUNT, CHILD, ENTRIES = FANOUT, 2 * FANOUT, 3 * FANOUT  # ENTRIES: how many children there are
ROW = max(LEAF, 3 * FANOUT + 1)

# The scalars in `facts`. NEAR: the leaf that was asked last, with the rank of its first key and its number of keys (0
# if it may have changed). FREE: the first of the rows that were given back, each naming the next in column 0. FRESH:
# the first of the rows that were never used. OLDEST: where in the ring. SHORT: whether the last observe lacked room.
SIZE, ROOT, HEIGHT, NEAR, NEAR_FIRST, NEAR_SIZE, FREE, FREE_COUNT, FRESH, WINDOW, OLDEST, SHORT = range(12)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiler() -> Callable[[_Function], _Function]:
    try:
        numba.njit(cache=True)(_compiler)  # any function: this only looks for a directory to keep the code in
    except RuntimeError as error:
        warnings.warn(
            f"The Numba backend will be compiled anew in every process ({error}); set NUMBA_CACHE_DIR to a directory "
            "that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
        return cast("Callable[[_Function], _Function]", numba.njit)
    return cast("Callable[[_Function], _Function]", numba.njit(cache=True))


_compiled = _compiler()


def _uncounted(_: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        view = context.make_array(array)(context, builder, arguments[0])
        view.meminfo = view.meminfo.type(None)
        return view._getvalue()

    return array(array), generate


# The same array without its reference count, which every inner call would move up and down by atomic instructions: they
# took half the time of an observe. The caller in Python holds the array until the compiled function returns. Where
# NUMBA_DISABLE_JIT leaves these functions to Python, an intrinsic could not be called.
_has_compiler = not numba.config.DISABLE_JIT  # type: ignore[attr-defined] # set when numba is imported
uncounted: Any = intrinsic(_uncounted) if _has_compiler else lambda array: array


# Nodes.


@_compiled
def upper_bound(keys: Floats, row: int, size: int, key: float) -> int:
    """The number of keys at most `key` among the first `size` of a row."""
    found = 0
    for i in range(size):  # all of them, without a branch: this is done many at a time
        found += keys[row, i] <= key
    return found


@_compiled
def lower_bound(keys: Floats, row: int, size: int, key: float) -> int:
    """The number of keys below `key` among the first `size` of a row."""
    found = 0
    for i in range(size):  # all of them, without a branch: this is done many at a time
        found += keys[row, i] < key
    return found


@_compiled
def take_row(facts: Ints, links: Ints) -> int:
    row: int = facts[FREE]
    if row >= 0:
        facts[FREE] = links[row, 0]
        facts[FREE_COUNT] -= 1
    else:
        row = facts[FRESH]
        facts[FRESH] += 1
    return row


@_compiled
def give_row(facts: Ints, links: Ints, row: int) -> None:
    links[row, 0] = facts[FREE]
    facts[FREE] = row
    facts[FREE_COUNT] += 1


@_compiled
def child_size(links: Ints, parent: int, at: int, level: int) -> int:
    """The size of child `at`, which stands on `level`; leaves stand on 0."""
    size: int = links[parent, COUNT + at] if level == 0 else links[links[parent, CHILD + at], ENTRIES]
    return size


@_compiled
def insert_child(links: Ints, parent: int, at: int, row: int) -> None:
    """Make an empty node the child `at`; `slide` will fill it."""
    for strip in (0, COUNT, CHILD):
        for i in range(strip + links[parent, ENTRIES], strip + at, -1):
            links[parent, i] = links[parent, i - 1]
    links[parent, ENTRIES] += 1
    links[parent, COUNT + at] = 0
    links[parent, CHILD + at] = row
    links[row, ENTRIES] = 0


@_compiled
def remove_child(links: Ints, parent: int, at: int) -> None:
    links[parent, ENTRIES] -= 1
    for strip in (0, COUNT, CHILD):
        for i in range(strip + at, strip + links[parent, ENTRIES]):
            links[parent, i] = links[parent, i + 1]


@_compiled
def slide(links: Ints, parent: int, at: int, level: int, amount: int) -> None:
    """Move entries from the end of child `at` to the front of the child after it, or back if `amount` is negative."""
    left = links[parent, CHILD + at]
    right = links[parent, CHILD + at + 1]
    left_size = child_size(links, parent, at, level)
    right_size = child_size(links, parent, at + 1, level)
    for strip in range(0, 1 if level == 0 else ENTRIES, FANOUT):
        if amount >= 0:
            for i in range(strip + right_size - 1, strip - 1, -1):
                links[right, i + amount] = links[right, i]
            for i in range(amount):
                links[right, strip + i] = links[left, strip + left_size - amount + i]
        else:
            for i in range(-amount):
                links[left, strip + left_size + i] = links[right, strip + i]
            for i in range(strip, strip + right_size + amount):
                links[right, i] = links[right, i - amount]
    moved = amount
    if level > 0:
        links[left, ENTRIES] -= amount
        links[right, ENTRIES] += amount
        moved = 0
        for i in range(COUNT, COUNT + amount):
            moved += links[right, i]
        for i in range(COUNT + left_size, COUNT + left_size - amount):
            moved -= links[left, i]
    links[parent, COUNT + at] -= moved
    links[parent, COUNT + at + 1] += moved
    links[parent, at + 1] = links[right, 0]


@_compiled
def balance(links: Ints, parent: int, at: int, level: int) -> None:
    """Share evenly between child `at` and the one after it."""
    difference = child_size(links, parent, at, level) - child_size(links, parent, at + 1, level)
    slide(links, parent, at, level, difference // 2)


# The tree.


@_compiled
def make_room(facts: Ints, links: Ints, parent: int, at: int, level: int, on_right_edge: np.bool_) -> None:
    """Child `at` is full: let a neighbour take a share, or put a new node beside it. The parent is not full."""
    facts[NEAR_SIZE] = 0
    capacity = LEAF if level == 0 else FANOUT
    enough = capacity - 2 - capacity // 16  # a neighbour fuller than this would be full again too soon
    has_left = at > 0
    has_right = at + 1 < links[parent, ENTRIES]
    if has_left and child_size(links, parent, at - 1, level) <= enough:
        balance(links, parent, at - 1, level)
        return
    if has_right and child_size(links, parent, at + 1, level) <= enough:
        balance(links, parent, at, level)
        return
    insert_child(links, parent, at + 1, take_row(facts, links))
    share = capacity // 2  # descending keys: the neighbour stays full
    if on_right_edge and not has_right:
        share = 1  # ascending keys: so does the node itself
    elif has_left:
        share = (capacity + child_size(links, parent, at - 1, level)) // 3  # two become three
    slide(links, parent, at, level, share)
    if has_left and share > 1:
        balance(links, parent, at - 1, level)


@_compiled
def tree_insert(facts: Ints, keys: Floats, links: Ints, key: float) -> None:
    """Insert one key. As many rows must be left as `has_room` asks for. O(log n)."""
    size = facts[SIZE]
    level = facts[HEIGHT]
    if size == 0:
        facts[ROOT] = take_row(facts, links)
    node = facts[ROOT]
    if (size == LEAF) if level == 0 else (links[node, ENTRIES] == FANOUT):
        root = take_row(facts, links)
        links[root, ENTRIES] = 1
        links[root, 0] = links[node, 0]
        links[root, COUNT] = size
        links[root, CHILD] = node
        facts[ROOT] = node = root
        level += 1
        facts[HEIGHT] = level
    facts[SIZE] = size + 1
    on_right_edge = level == facts[HEIGHT]  # the root is
    while level > 0:
        level -= 1
        at = max(upper_bound(keys, node, links[node, ENTRIES], key) - 1, 0)
        if child_size(links, node, at, level) == (LEAF if level == 0 else FANOUT):
            make_room(facts, links, node, at, level, on_right_edge)
            at = max(upper_bound(keys, node, links[node, ENTRIES], key) - 1, 0)
        on_right_edge &= at + 1 == links[node, ENTRIES]
        size = links[node, COUNT + at]
        links[node, COUNT + at] = size + 1
        if key < keys[node, at]:
            keys[node, at] = key
        node = links[node, CHILD + at]
    place = upper_bound(keys, node, size, key)
    for i in range(size, place, -1):
        keys[node, i] = keys[node, i - 1]
    keys[node, place] = key
    if facts[NEAR_SIZE] > 0:
        if node == facts[NEAR]:
            facts[NEAR_SIZE] += 1
        elif key < keys[facts[NEAR], 0]:
            facts[NEAR_FIRST] += 1


@_compiled
def tree_erase(facts: Ints, links: Ints, rank: int) -> None:
    """Remove the key of this rank, which must be below the size. O(log n)."""
    if rank < facts[NEAR_FIRST]:
        facts[NEAR_FIRST] -= 1
    elif rank < facts[NEAR_FIRST] + facts[NEAR_SIZE]:
        facts[NEAR_SIZE] -= 1
    node = facts[ROOT]
    level = facts[HEIGHT]
    size = facts[SIZE]
    facts[SIZE] = size - 1
    while level > 0:
        level -= 1
        at, first = child_at_rank(links, node, rank)
        if child_size(links, node, at, level) <= (LEAST_LEAF if level == 0 else LEAST_INNER):
            facts[NEAR_SIZE] = 0
            left = max(at - 1, 0)
            right_size = child_size(links, node, left + 1, level)
            if child_size(links, node, left, level) + right_size <= (LEAF if level == 0 else FANOUT):
                slide(links, node, left, level, -right_size)
                give_row(facts, links, links[node, CHILD + left + 1])
                remove_child(links, node, left + 1)
                if node == facts[ROOT] and links[node, ENTRIES] == 1:
                    facts[ROOT] = links[node, CHILD]
                    facts[HEIGHT] = level
                    give_row(facts, links, node)
                    node = facts[ROOT]
                    continue
            else:
                balance(links, node, left, level)
            at, first = child_at_rank(links, node, rank)
        rank -= first
        size = links[node, COUNT + at]
        links[node, COUNT + at] = size - 1
        node = links[node, CHILD + at]
    for i in range(rank, size - 1):
        links[node, i] = links[node, i + 1]
    if facts[SIZE] == 0:
        give_row(facts, links, node)


@_compiled
def child_at_rank(links: Ints, node: int, rank: int) -> tuple[int, int]:
    """The child below which the key of this rank is, and the number of keys before that child."""
    at = 0
    first = 0
    while rank - first >= links[node, COUNT + at]:
        first += links[node, COUNT + at]
        at += 1
    return at, first


@_compiled
def tree_rank(facts: Ints, keys: Floats, links: Ints, key: float) -> int:
    """The number of keys below `key`. O(log n)."""
    if facts[SIZE] == 0:
        return 0
    node = facts[ROOT]
    size = facts[SIZE]
    rank = 0
    for _ in range(facts[HEIGHT]):
        at = max(lower_bound(keys, node, links[node, ENTRIES], key) - 1, 0)
        for i in range(COUNT, COUNT + at):
            rank += links[node, i]
        size = links[node, COUNT + at]
        node = links[node, CHILD + at]
    return rank + lower_bound(keys, node, size, key)


@_compiled
def tree_locate(facts: Ints, links: Ints, rank: int) -> None:
    """Make NEAR the leaf that holds the key of this rank, which must be below the size. O(log n), O(1) in NEAR."""
    if 0 <= rank - facts[NEAR_FIRST] < facts[NEAR_SIZE]:
        return
    node = facts[ROOT]
    size = facts[SIZE]
    offset = rank
    for _ in range(facts[HEIGHT]):
        at, first = child_at_rank(links, node, offset)
        offset -= first
        size = links[node, COUNT + at]
        node = links[node, CHILD + at]
    facts[NEAR] = node
    facts[NEAR_FIRST] = rank - offset
    facts[NEAR_SIZE] = size


@_compiled
def tree_select(facts: Ints, keys: Floats, links: Ints, rank: int) -> float:
    tree_locate(facts, links, rank)
    key: float = keys[facts[NEAR], rank - facts[NEAR_FIRST]]
    return key


@_compiled
def tree_build(facts: Ints, keys: Floats, norms: Floats) -> None:
    """Fill an empty tree with ascending norms, every node to the brim. The pool must have `_rows(...)` rows. O(n)."""
    if len(norms) == 0:
        return
    links = keys.view(np.int64)
    for i in range(len(norms)):
        keys[i // LEAF, i % LEAF] = norms[i]
    first = 0  # row of the first node of this level
    width = (len(norms) - 1) // LEAF + 1  # nodes on this level
    below = LEAF  # keys below each of them but the last
    height = 0
    while width > 1:
        for i in range(width):
            parent = first + width + i // FANOUT
            at = i % FANOUT
            links[parent, at] = links[first + i, 0]
            links[parent, COUNT + at] = min(below, len(norms) - i * below)
            links[parent, CHILD + at] = first + i
            links[parent, ENTRIES] = at + 1
        first += width
        width = (width - 1) // FANOUT + 1
        below *= FANOUT
        height += 1
    facts[SIZE] = len(norms)
    facts[ROOT] = first
    facts[HEIGHT] = height
    facts[FRESH] = first + 1


# The history.


@_compiled
def rows_left(facts: Ints, keys: Floats) -> int:
    left: int = facts[FREE_COUNT] + len(keys) - facts[FRESH]
    return left


@_compiled
def rows_needed(facts: Ints) -> int:
    """How many rows one more norm may take: one for a split on each level, and one for a new root."""
    size = facts[SIZE] if facts[SIZE] == facts[WINDOW] else facts[SIZE] + 1
    needed: int = facts[HEIGHT] + 2 if size > LEAF else int(facts[SIZE] == 0)
    return needed


@_compiled
def has_room(facts: Ints, keys: Floats, ring: Floats) -> bool:
    """Whether one more norm can be remembered."""
    has_place = facts[WINDOW] == 0 or facts[SIZE] == facts[WINDOW] or facts[SIZE] < len(ring)
    return has_place and rows_left(facts, keys) >= rows_needed(facts)


@_compiled
def remember(facts: Ints, keys: Floats, links: Ints, ring: Floats, norm: float) -> None:
    """Remember a finite norm for which there is room; in a full window the oldest leaves."""
    if facts[WINDOW] > 0:
        at = facts[SIZE]
        if at == facts[WINDOW]:
            at = facts[OLDEST]
            tree_erase(facts, links, tree_rank(facts, keys, links, ring[at]))
            facts[OLDEST] = at + 1 if at + 1 < facts[WINDOW] else 0
        ring[at] = norm
    tree_insert(facts, keys, links, norm)


@_compiled
def percentile_of(facts: Ints, keys: Floats, links: Ints, percentile: float) -> float:
    """The "linear" rule of numpy, operation by operation: the same bits come out."""
    position = (facts[SIZE] - 1) * (percentile / 100.0)
    rank = int(position)
    fraction = position - rank
    low = tree_select(facts, keys, links, rank)
    high = tree_select(facts, keys, links, rank + 1) if rank + 1 < facts[SIZE] else low
    difference = high - low
    return low + difference * fraction if fraction < 0.5 else high - difference * (1.0 - fraction)


@_compiled
def history_observe(facts: Ints, keys: Floats, ring: Floats, norm: float, percentile: float) -> float:
    """Remember the norm, then find the percentile; without room or sense for them change nothing and return NaN."""
    facts, keys, ring = uncounted(facts), uncounted(keys), uncounted(ring)
    facts[SHORT] = not has_room(facts, keys, ring)
    if facts[SHORT] or not (0.0 <= percentile <= 100.0 and abs(norm) < np.inf):
        return np.nan
    links = keys.view(np.int64)
    remember(facts, keys, links, ring, norm + 0.0)  # -0.0 becomes 0.0
    return percentile_of(facts, keys, links, percentile)


@_compiled
def history_observe_many(
    facts: Ints, keys: Floats, ring: Floats, norms: Floats, percentiles: Floats, thresholds: Floats, first: int
) -> int:
    """Observe the norms from `first` on while there is room; return the index of the one that found none."""
    facts, keys, ring = uncounted(facts), uncounted(keys), uncounted(ring)
    links = keys.view(np.int64)
    for i in range(first, len(norms)):
        if not has_room(facts, keys, ring):
            return i
        remember(facts, keys, links, ring, norms[i])
        for j in range(len(percentiles)):
            thresholds[i, j] = percentile_of(facts, keys, links, percentiles[j])
    return len(norms)


@_compiled
def history_percentile(facts: Ints, keys: Floats, percentile: float) -> float:
    return percentile_of(facts, keys, keys.view(np.int64), percentile)


@_compiled
def history_rank(facts: Ints, keys: Floats, norm: float) -> int:
    return tree_rank(facts, keys, keys.view(np.int64), norm)


@_compiled
def history_read(facts: Ints, keys: Floats, first: int, norms: Floats) -> None:
    """Write the norms of ranks first, first + 1, ... in ascending order."""
    links = keys.view(np.int64)
    done = 0
    while done < len(norms):
        tree_locate(facts, links, first + done)
        offset = first + done - facts[NEAR_FIRST]
        part = min(facts[NEAR_SIZE] - offset, len(norms) - done)
        norms[done : done + part] = keys[facts[NEAR], offset : offset + part]
        done += part


# XXH64 with seed 0, for whole 64-bit words, after its published specification.

PRIME_1 = np.uint64(0x9E3779B185EBCA87)
PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
PRIME_3 = np.uint64(0x165667B19E3779F9)
PRIME_4 = np.uint64(0x85EBCA77C2B2AE63)
PRIME_5 = np.uint64(0x27D4EB2F165667C5)


@_compiled
def rotate(word: np.uint64, bits: np.uint64) -> np.uint64:
    return (word << bits) | (word >> (np.uint64(64) - bits))


@_compiled
def mix(lane: np.uint64, word: np.uint64) -> np.uint64:
    return rotate(lane + word * PRIME_2, np.uint64(31)) * PRIME_1


@_compiled
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


# A snapshot is drawn in csrc/include/autoclip.h; here it is an array of 64-bit words.
_MAGIC = int.from_bytes(b"\x89ACH\r\n\x1a\n", "little")
_VERSION_1_0 = 64 << 32 | 0 << 16 | 1  # header length, minor, major
_HEADER = 8  # words
_HAS_WINDOW = 1

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
        norms = norms + 0.0  # a copy without -0.0
        with _lock:
            if len(norms) <= len(self) // 4:
                self._remember(norms, np.empty(0), np.empty((len(norms), 0)))
            elif self._window is not None:
                norms = np.concatenate((self._by_age(), norms))[-self._window :].copy()
                self._build(np.sort(norms), norms)
            else:
                norms = np.concatenate((self.values(), norms))
                norms.sort(kind="stable")  # two runs, for NormHistory has sorted its own: they are only merged
                self._build(norms, np.empty(0))

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
            self._remember(norms + 0.0, percentiles + 0.0, thresholds)
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
            return self._by_age()[:count]

    def values(self) -> Floats:
        with _lock:
            return self.order_statistics(0, len(self))

    def _by_age(self) -> Floats:
        facts, _, ring = self._state
        return np.concatenate((ring[facts[OLDEST] : facts[SIZE]], ring[: facts[OLDEST]]))

    def to_bytes(self) -> bytes:
        with _lock:
            norms = self.values() if self._window is None else self._by_age()
        flags = 0 if self._window is None else _HAS_WINDOW
        words = norms.view(np.uint64)
        header = np.array([_MAGIC, _VERSION_1_0, flags, len(norms), self._window or 0, 0, 0], np.uint64)
        codes = np.array([checksum(header), checksum(words)], np.uint64)
        return b"".join(part.astype("<u8", copy=False).data for part in (header, codes[:1], words, codes[1:]))

    @classmethod
    def from_bytes(cls, snapshot: bytes | memoryview) -> Self:
        def refuse() -> NoReturn:
            raise errors.bad_snapshot(len(snapshot))

        if len(snapshot) < 8 * (_HEADER + 1):
            refuse()
        header = np.frombuffer(snapshot, "<u8", _HEADER).astype(np.uint64)
        magic, version, flags, count, window, *zeros, code = header.tolist()
        if magic != _MAGIC or code != checksum(header[:-1]):
            refuse()
        if version & 0xFFFF > _VERSION_1_0 & 0xFFFF:
            raise errors.new_snapshot()
        has_known_form = version & ~0xFFFF0000 == _VERSION_1_0 and not any(zeros)  # whatever the minor version
        has_sound_window = flags == (_HAS_WINDOW if window else 0) and (not window or count <= window)
        if not has_known_form or not has_sound_window or len(snapshot) != 8 * (_HEADER + count + 1):
            refuse()
        words = np.frombuffer(snapshot, "<u8", offset=8 * _HEADER).astype(np.uint64)
        if words[-1] != checksum(words[:-1]):
            refuse()
        norms = words[:-1].view(np.float64)
        if not np.isfinite(norms).all() or not (window or (norms[:-1] <= norms[1:]).all()):
            refuse()
        norms += 0.0  # without -0.0
        history = cls(window or None)
        history._build(np.sort(norms) if window else norms, norms if window else np.empty(0))
        return history

    def check(self) -> None:
        with _lock:
            reason = self._broken()
        if reason is not None:
            raise errors.broken_history(f"broken: {reason}")

    def _broken(self) -> str | None:
        """The first invariant that does not hold, level by level from the root."""
        facts, pool, ring = self._state
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
        if (np.signbit(keys) & (keys == 0.0)).any():
            return "no norm is -0.0"
        if (keys[:-1] > keys[1:]).any():
            return "norms stand in ascending order"
        for separator, counts in separators:
            first = np.cumsum(counts) - counts
            if (separator > keys[first]).any() or (separator[1:] < keys[first[1:] - 1]).any():
                return "every separator stands between the keys on its two sides"
        near = nodes == facts[NEAR]
        first = np.cumsum(sizes) - sizes
        if facts[NEAR_SIZE] != 0 and [*first[near], *sizes[near]] != [facts[NEAR_FIRST], facts[NEAR_SIZE]]:
            return "the leaf that was asked last is where it was"
        if self._window is not None:
            if not size <= min(self._window, len(ring)):
                return "there are no more norms than the window admits"
            if not 0 <= facts[OLDEST] < (size if size == self._window else 1):
                return "the ring begins with the oldest norm until it is full"
            if not np.array_equal(np.sort(self._by_age()), keys):
                return "the tree holds the norms of the window"
        return None

    def __len__(self) -> int:
        with _lock:  # a long observe_many stops for room now and then, and its norms count all at once
            return int(self._state[0][SIZE])

    @property
    def window(self) -> int | None:
        return self._window

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._state)
