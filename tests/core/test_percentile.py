"""Every percentile, bit for bit the one that numpy.percentile finds."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from autoclip_core import NormHistory

from .reference import (
    PERCENTILES,
    SHAPES,
    ReferenceHistory,
    assert_same_bits,
    make_norms,
    naive_thresholds,
)

LEAF, FANOUT, BUFFER = 128, 42, 256

# Around every size at which something fills up: the buffer, a leaf, two, three, the root, and the buffer above them.
EDGES = (LEAF, BUFFER, LEAF * 3, LEAF * 4, BUFFER * 3, LEAF * FANOUT, LEAF * FANOUT + BUFFER, 2 * LEAF * FANOUT)
SIZES = sorted({1, 2, 3} | {edge + near for edge in EDGES for near in (-1, 0, 1)})

shapes = pytest.mark.parametrize("shape", SHAPES)


def expected(norms):
    return ReferenceHistory(norms=norms).percentile(PERCENTILES)


def push_each(history, norms):
    for norm in norms.tolist():
        history.push(norm)


def extend_at_once(history, norms):
    history.extend(norms)


def extend_in_parts(history, norms):
    for part in np.array_split(norms, 7):
        history.extend(part)


def merge_halves(history, norms):
    for part in np.array_split(norms, 2):
        other = NormHistory()
        other.extend(part)
        history.merge(other)


@shapes
@pytest.mark.parametrize("fill", [push_each, extend_at_once, extend_in_parts, merge_halves])
def test_percentile_equals_numpy_around_every_edge(fill, shape):
    for size in SIZES:
        norms = make_norms(shape, size)
        history = NormHistory()
        fill(history, norms)
        assert_same_bits([history.percentile(p) for p in PERCENTILES], expected(norms))
        assert_same_bits([history.percentile(p) for p in PERCENTILES[::-1]], expected(norms)[::-1])
        history.check()


@shapes
def test_percentile_equals_numpy_after_every_norm(shape):
    norms = make_norms(shape, BUFFER * 4)
    thresholds = NormHistory().observe_many(norms, PERCENTILES)
    for i, row in enumerate(thresholds):
        assert_same_bits(row, expected(norms[: i + 1]))


@shapes
@pytest.mark.parametrize("window", [1, 2, 100, LEAF, BUFFER, BUFFER + 1, LEAF * 3])
def test_percentile_of_a_window_equals_numpy_after_every_norm(window, shape):
    norms = make_norms(shape, 3 * window // 2 + 50)
    thresholds = NormHistory(window).observe_many(norms, PERCENTILES)
    for i, row in enumerate(thresholds):
        assert_same_bits(row, expected(norms[max(0, i + 1 - window) : i + 1]))


@pytest.mark.parametrize("shape", ["log-normal", "drifting", "saw-tooth", "ascending"])
def test_percentile_of_a_large_window_equals_numpy(shape):
    window = 2 * LEAF * FANOUT + 1
    norms = make_norms(shape, 3 * window)
    history = NormHistory(window)
    thresholds = history.observe_many(norms, PERCENTILES)
    for i in range(0, len(norms), 257):
        assert_same_bits(thresholds[i], expected(norms[max(0, i + 1 - window) : i + 1]))
    assert_same_bits(history.values(), np.sort(norms[-window:]))
    history.check()


@pytest.mark.parametrize("shape", ["log-normal", "drifting", "descending", "saw-tooth"])
def test_percentile_equals_numpy_at_a_million_norms(shape):
    norms = make_norms(shape, 1_000_000)
    known, new = np.split(norms, [400_000])
    history = NormHistory()
    history.extend(known)
    thresholds = history.observe_many(new, [10.0, 99.999])
    for i in (0, 99_999, 345_678, len(new) - 1):
        assert_same_bits(thresholds[i], np.percentile(norms[: len(known) + i + 1], [10.0, 99.999]))
    assert_same_bits([history.percentile(p) for p in PERCENTILES], np.percentile(norms, PERCENTILES))
    history.check()


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.lists(st.floats(0.0, 100.0), min_size=1),
)
def test_percentile_equals_numpy_for_any_norms_and_any_percentile(norms, percentiles):
    history = NormHistory()
    history.extend(norms)
    reference = ReferenceHistory(norms=norms)
    assert_same_bits([history.percentile(p) for p in percentiles], [reference.percentile(p) for p in percentiles])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_percentile_between_norms_too_far_apart_for_a_double_is_that_of_numpy():
    norms = [-1.7e308, 1.7e308]
    for percentile in (0.0, 30.0, 60.0):
        history = NormHistory()
        history.push(norms[0])
        assert_same_bits(history.observe(norms[1], percentile), np.percentile(norms, percentile))
        assert_same_bits(history.percentile(percentile), np.percentile(norms, percentile))
        assert len(history) == 2


@shapes
def test_observe_is_push_then_percentile(shape):
    observed, pushed, many = NormHistory(), NormHistory(), NormHistory()
    norms = make_norms(shape, BUFFER * 3).tolist()
    thresholds = []
    for norm in norms:
        thresholds.append(observed.observe(norm, 10.0))
        pushed.push(norm)
        assert_same_bits(thresholds[-1], pushed.percentile(10.0))
    assert_same_bits(many.observe_many(norms, [10.0])[:, 0], thresholds)
    assert observed.to_bytes() == pushed.to_bytes() == many.to_bytes()


@shapes
@pytest.mark.parametrize("window", [None, 300])
def test_naive_thresholds_are_those_of_numpy(window, shape):
    # The second judge, itself judged.
    norms = [norm + 0.0 for norm in make_norms(shape, 400).tolist()]
    reference = ReferenceHistory(window)
    for p in (0.0, 10.0, 99.999, 100.0):
        reference.norms.clear()
        assert_same_bits(list(naive_thresholds(norms, p, window)), reference.observe_many(norms, [p])[:, 0])
