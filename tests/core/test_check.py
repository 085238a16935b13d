"""Every invariant of the Numba backend, broken on purpose, as tests/c/test_check.c does it: the check must name it."""

import numpy as np
import pytest

from autoclip_core import BackendError, BrokenHistoryError, NormHistory

NORMS = 30_000  # inner nodes on two levels


@pytest.fixture(params=[None, NORMS, 2 * NORMS], ids=["whole", "full window", "window"])
def history(request, absent):
    try:
        history = NormHistory(request.param, backend="numba")
    except BackendError as error:
        absent(f"needs Numba: {error}")
    norms = 1.0 + np.random.default_rng(1).random(2 * NORMS)
    history.observe_many(norms[: 2 * NORMS if request.param == NORMS else NORMS], [])
    history.percentile(50.0)
    return history


def check_after(history, *changes):
    """What the check says once numbers are replaced: (array, place, number); and nothing when they are as they were."""
    before = [(array, place, array[place].item()) for array, place, _ in changes]
    said = ""
    for array, place, number in changes:
        array[place] = number
    try:
        history.check()
    except BrokenHistoryError as error:
        said = str(error)
    for array, place, number in before:
        array[place] = number
    history.check()
    return said


def test_check_names_every_broken_invariant(history):
    from autoclip_core._numba import tree as n

    backend = history._backend
    facts, pool, ring = backend._state
    links = pool.view(np.int64)
    assert facts[n.HEIGHT] == 2
    root = facts[n.ROOT]
    first, second = links[root, n.CHILD : n.CHILD + 2]
    last = links[root, n.CHILD + links[root, n.ENTRIES] - 1]
    leaf, next_leaf = links[first, n.CHILD : n.CHILD + 2]
    fresh = facts[n.FRESH]
    assert fresh < len(pool)
    excess = links[first, n.COUNT] - (n.LEAST_LEAF - 1)  # keys of the first leaf, if it is to hold too few
    overflow = n.LEAF + 1 - links[first, n.COUNT]

    def keys_less(count):
        changed = ((links, (first, n.COUNT)), (links, (root, n.COUNT)), (facts, n.SIZE))
        return [(array, place, array[place] - count) for array, place in changed]

    breaks = {
        "the pool holds as many rows as it counts": [
            [(facts, n.FREE_COUNT, -1)],
            [(facts, n.FREE_COUNT, fresh + 1)],
            [(facts, n.FRESH, len(pool) + 1)],
        ],
        "the free list is as long as the pool counts": [
            [(facts, n.FREE_COUNT, facts[n.FREE_COUNT] + 1)],
            [(facts, n.FREE, leaf)],
            [(facts, n.FREE, leaf), (links, (leaf, 0), leaf), (facts, n.FREE_COUNT, 5)],  # without an end
            [(facts, n.FREE, -2)],
            [(facts, n.FREE, fresh)],
        ],
        "every entry has a child": [
            [(facts, n.ROOT, -1)],
            [(facts, n.ROOT, fresh)],
            [(links, (root, n.CHILD + 1), -1)],
            [(links, (first, n.CHILD + 1), fresh)],
        ],
        "no node holds more than fits": [
            [(links, (root, n.ENTRIES), n.FANOUT + 1)],
            [(links, (first, n.ENTRIES), n.FANOUT + 1)],
            keys_less(-overflow),
        ],
        "every node but the last of its level is about half full, and the root has two entries": [
            [(links, (root, n.ENTRIES), 1)],
            [(links, (first, n.ENTRIES), n.LEAST_INNER - 1)],
            [(links, (last, n.ENTRIES), 0)],
            keys_less(excess),
        ],
        "every entry names the number of keys below it": [
            [(links, (root, n.COUNT + 1), links[root, n.COUNT + 1] + 1)],
            [(links, (first, n.COUNT + 1), links[first, n.COUNT + 1] - 1)],
            [(facts, n.SIZE, facts[n.SIZE] - 1)],
        ],
        "every row is in the tree, free or fresh": [
            [(facts, n.FRESH, fresh + 1)],
            [(links, (first, n.CHILD + 1), leaf)],
        ],
        "every norm is finite": [[(pool, (leaf, 1), number)] for number in (np.inf, np.nan)],
        "no norm is -0.0": [[(pool, (leaf, 0), -0.0)]],
        "norms stand in ascending order": [
            [(pool, (leaf, 1), pool[leaf, 0] - 0.5)],
            [(pool, (next_leaf, 0), pool[leaf, 0] - 0.5)],
        ],
        "every separator stands between the keys on its two sides": [
            [(pool, (root, 0), 9.0)],
            [(pool, (root, 1), 0.5)],
            [(pool, (root, 1), 9.0)],
            [(pool, (first, 1), 0.5)],
            [(pool, (second, 0), 9.0)],
        ],
        "the leaf that was asked last is where it was": [
            [(facts, n.NEAR, root)],
            [(facts, n.NEAR_FIRST, facts[n.NEAR_FIRST] + 1)],
            [(facts, n.NEAR_SIZE, facts[n.NEAR_SIZE] + 1)],
        ],
    }
    if history.window:
        breaks["the tree holds the norms of the window"] = [[(ring, 7, 0.5)]]
        breaks["the ring begins with the oldest norm until it is full"] = [
            [(facts, n.OLDEST, -1)],
            [(facts, n.OLDEST, len(history) if history.window == NORMS else 1)],
        ]
    for sentence, ways in breaks.items():
        for changes in ways:
            assert f"(broken: {sentence})" in check_after(history, *changes), changes

    # What is allowed, though no call makes it so at once.
    size = links[first, n.COUNT]
    assert not check_after(history, (pool, (first, 1), pool[leaf, size - 1]))
    assert not check_after(history, (facts, n.NEAR_SIZE, 0), (facts, n.NEAR_FIRST, -7))


@pytest.mark.parametrize("lacking", ["places", "window"])
def test_check_names_a_window_that_is_too_small(history, lacking):
    if history.window is None:
        return
    backend = history._backend
    if lacking == "places":
        facts, pool, ring = backend._state
        backend._state = facts, pool, ring[: len(history) - 1]
    else:
        backend._window = len(history) - 1
    with pytest.raises(BrokenHistoryError, match="no more norms than the window admits"):
        history.check()
