"""Nodes, tree and window, in compiled functions over numpy arrays.

What shaped it:

- The structure is that of csrc/src/ostree.h, a counted B+ tree, over numpy arrays that compiled functions change in
  place. The kernel's buffer before the tree is left out: it gains by prefetching, which Numba cannot ask for.
- A call from Python pays for every array that is passed, so a history has three: `facts` (scalars), `pool` (nodes) and
  `ring` (the window). Compiled functions see the pool twice: as `keys`, float64, and as `links`, int64.
- Compiled functions never allocate. What may fail, the growth of an array, happens in Python before anything changes;
  nodes are split or refilled on the way down, so that no insert or erase turns back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoclip_core._numba.compiler import compiled, enter_standard_mode, leave_standard_mode, uncounted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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


# Nodes.


@compiled
def upper_bound(keys: Floats, row: int, size: int, key: float) -> int:
    """The number of keys at most `key` among the first `size` of a row."""
    found = 0
    for i in range(size):  # all of them, without a branch: this is done many at a time
        found += keys[row, i] <= key
    return found


@compiled
def lower_bound(keys: Floats, row: int, size: int, key: float) -> int:
    """The number of keys below `key` among the first `size` of a row."""
    found = 0
    for i in range(size):  # all of them, without a branch: this is done many at a time
        found += keys[row, i] < key
    return found


@compiled
def take_row(facts: Ints, links: Ints) -> int:
    row: int = facts[FREE]
    if row >= 0:
        facts[FREE] = links[row, 0]
        facts[FREE_COUNT] -= 1
    else:
        row = facts[FRESH]
        facts[FRESH] += 1
    return row


@compiled
def give_row(facts: Ints, links: Ints, row: int) -> None:
    links[row, 0] = facts[FREE]
    facts[FREE] = row
    facts[FREE_COUNT] += 1


@compiled
def child_size(links: Ints, parent: int, at: int, level: int) -> int:
    """The size of child `at`, which stands on `level`; leaves stand on 0."""
    size: int = links[parent, COUNT + at] if level == 0 else links[links[parent, CHILD + at], ENTRIES]
    return size


@compiled
def insert_child(links: Ints, parent: int, at: int, row: int) -> None:
    """Make an empty node the child `at`; `slide` will fill it."""
    for strip in (0, COUNT, CHILD):
        for i in range(strip + links[parent, ENTRIES], strip + at, -1):
            links[parent, i] = links[parent, i - 1]
    links[parent, ENTRIES] += 1
    links[parent, COUNT + at] = 0
    links[parent, CHILD + at] = row
    links[row, ENTRIES] = 0


@compiled
def remove_child(links: Ints, parent: int, at: int) -> None:
    links[parent, ENTRIES] -= 1
    for strip in (0, COUNT, CHILD):
        for i in range(strip + at, strip + links[parent, ENTRIES]):
            links[parent, i] = links[parent, i + 1]


@compiled
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


@compiled
def balance(links: Ints, parent: int, at: int, level: int) -> None:
    """Share evenly between child `at` and the one after it."""
    difference = child_size(links, parent, at, level) - child_size(links, parent, at + 1, level)
    slide(links, parent, at, level, difference // 2)


# The tree.


@compiled
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


@compiled
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


@compiled
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


@compiled
def child_at_rank(links: Ints, node: int, rank: int) -> tuple[int, int]:
    """The child below which the key of this rank is, and the number of keys before that child."""
    at = 0
    first = 0
    while rank - first >= links[node, COUNT + at]:
        first += links[node, COUNT + at]
        at += 1
    return at, first


@compiled
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


@compiled
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


@compiled
def tree_select(facts: Ints, keys: Floats, links: Ints, rank: int) -> float:
    tree_locate(facts, links, rank)
    key: float = keys[facts[NEAR], rank - facts[NEAR_FIRST]]
    return key


@compiled
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


@compiled
def rows_left(facts: Ints, keys: Floats) -> int:
    left: int = facts[FREE_COUNT] + len(keys) - facts[FRESH]
    return left


@compiled
def rows_needed(facts: Ints) -> int:
    """How many rows one more norm may take: one for a split on each level, and one for a new root."""
    size = facts[SIZE] if facts[SIZE] == facts[WINDOW] else facts[SIZE] + 1
    needed: int = facts[HEIGHT] + 2 if size > LEAF else int(facts[SIZE] == 0)
    return needed


@compiled
def has_room(facts: Ints, keys: Floats, ring: Floats) -> bool:
    """Whether one more norm can be remembered."""
    has_place = facts[WINDOW] == 0 or facts[SIZE] == facts[WINDOW] or facts[SIZE] < len(ring)
    return has_place and rows_left(facts, keys) >= rows_needed(facts)


@compiled
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


@compiled
def percentile_of(facts: Ints, keys: Floats, links: Ints, percentile: float) -> float:
    """The "linear" rule of numpy, operation by operation: the same bits come out."""
    position = (facts[SIZE] - 1) * (percentile / 100.0)
    rank = int(position)
    fraction = position - rank
    low = tree_select(facts, keys, links, rank)
    high = tree_select(facts, keys, links, rank + 1) if rank + 1 < facts[SIZE] else low
    difference = high - low
    return low + difference * fraction if fraction < 0.5 else high - difference * (1.0 - fraction)


@compiled
def history_observe(facts: Ints, keys: Floats, ring: Floats, norm: float, percentile: float) -> float:
    """Remember the norm, then find the percentile; without room or sense for them change nothing and return NaN."""
    facts, keys, ring = uncounted(facts), uncounted(keys), uncounted(ring)
    facts[SHORT] = not has_room(facts, keys, ring)
    if facts[SHORT] or not (0.0 <= percentile <= 100.0 and abs(norm) < np.inf):
        return np.nan
    mode = enter_standard_mode()
    links = keys.view(np.int64)
    remember(facts, keys, links, ring, norm + 0.0)  # -0.0 becomes 0.0
    threshold = percentile_of(facts, keys, links, percentile)
    leave_standard_mode(mode)
    return threshold


@compiled
def history_observe_many(
    facts: Ints, keys: Floats, ring: Floats, norms: Floats, percentiles: Floats, thresholds: Floats, first: int
) -> int:
    """Observe the norms from `first` on while there is room; return the index of the first that finds none."""
    facts, keys, ring = uncounted(facts), uncounted(keys), uncounted(ring)
    mode = enter_standard_mode()
    links = keys.view(np.int64)
    done = first
    while done < len(norms) and has_room(facts, keys, ring):
        remember(facts, keys, links, ring, norms[done])
        for i in range(len(percentiles)):
            thresholds[done, i] = percentile_of(facts, keys, links, percentiles[i])
        done += 1
    leave_standard_mode(mode)
    return done


@compiled
def history_percentile(facts: Ints, keys: Floats, percentile: float) -> float:
    mode = enter_standard_mode()
    threshold = percentile_of(facts, keys, keys.view(np.int64), percentile)
    leave_standard_mode(mode)
    return threshold


@compiled
def history_rank(facts: Ints, keys: Floats, norm: float) -> int:
    mode = enter_standard_mode()
    rank = tree_rank(facts, keys, keys.view(np.int64), norm)
    leave_standard_mode(mode)
    return rank


@compiled
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


def by_age(facts: Ints, ring: Floats, out: Floats | None = None) -> Floats:
    """The norms of a window, the oldest first; written to `out`, if it is given."""
    return np.concatenate((ring[facts[OLDEST] : facts[SIZE]], ring[: facts[OLDEST]]), out=out)
