"""What goes into a history and what comes out of it."""

import numpy as np
import pytest

from autoclip_core import NormHistory

from .reference import assert_same_bits, make_norms


@pytest.mark.parametrize("norm", [3, np.float32(3), np.int64(3), np.float64(3)], ids=lambda norm: type(norm).__name__)
def test_history_takes_every_real_number(norm):
    history = NormHistory()
    history.push(norm)
    history.extend([norm])
    assert history.observe(norm, 50) == history.observe(norm, np.float32(50)) == history.percentile(np.int8(50)) == 3.0
    assert history.rank(norm) == 0
    assert len(history) == 4
    assert type(history.observe(norm, 50)) is float


@pytest.mark.parametrize(
    "norms",
    [
        [3.0, 1.0, 2.0],
        (3, 1, 2),
        iter([3.0, 1.0, 2.0]),
        {3.0, 1.0, 2.0},
        np.array([3, 1, 2], dtype=np.uint8),
        np.array([3, 1, 2], dtype=np.float16),
        np.array([3, 1, 2], dtype=">f8"),
        np.array([3.0, 0.0, 1.0, 0.0, 2.0])[::2],
        memoryview(np.array([3.0, 1.0, 2.0])),
    ],
    ids=lambda norms: f"{type(norms).__name__}-{getattr(norms, 'dtype', '')}",
)
def test_extend_takes_every_sequence_of_real_numbers(norms):
    history = NormHistory()
    history.extend(norms)
    assert history.values().tolist() == [1.0, 2.0, 3.0]


def test_extend_leaves_the_array_it_was_given_as_it_was():
    norms = np.array([3.0, 1.0, -0.0, 2.0])
    before = norms.copy()
    for window in (None, 2):
        history = NormHistory(window)
        history.extend(norms)
        history.observe_many(norms, [10.0])
        history.values()[:] = 7.0
        assert_same_bits(norms, before)
        assert 7.0 not in history.values()


def test_arrays_that_come_out_have_their_documented_shape():
    history = NormHistory()
    assert history.values().shape == history.order_statistics(0, 0).shape == (0,)
    assert history.observe_many([], [10.0, 20.0]).shape == (0, 2)
    assert history.observe_many([1.0, 2.0, 3.0], [10.0, 20.0]).shape == (3, 2)
    assert history.observe_many([4.0], []).shape == (1, 0)
    assert history.order_statistics(1, 2).tolist() == [2.0, 3.0]
    assert history.order_statistics(4, 0).shape == (0,)
    assert {array.dtype for array in (history.values(), history.order_statistics(0, 2))} == {np.dtype(np.float64)}


def test_merge_adds_the_norms_of_the_other_and_leaves_it_as_it_was():
    history, other, window = NormHistory(), NormHistory(), NormHistory(3)
    history.extend([1.0, 4.0])
    other.extend([3.0, 1.0])
    window.extend([9.0, 2.0, 5.0, 0.5])
    history.merge(other)
    history.merge(window)
    history.merge(history)
    assert history.values().tolist() == sorted(2 * [1.0, 4.0, 3.0, 1.0, 2.0, 5.0, 0.5])
    assert other.values().tolist() == [1.0, 3.0]
    assert window.values().tolist() == [0.5, 2.0, 5.0]


def test_history_keeps_a_million_random_norms_in_13_bytes_each():
    history = NormHistory()
    history.observe_many(make_norms("log-normal", 1_000_000), [10.0])
    assert 8.0 <= history.nbytes / len(history) <= 13.0


def test_clear_gives_the_memory_back_and_keeps_the_window():
    for window in (None, 1000):
        history = NormHistory(window)
        empty = history.nbytes
        history.extend(make_norms("log-normal", 10_000))
        assert history.nbytes > empty + 8 * len(history)
        history.clear()
        assert (len(history), history.window, history.nbytes) == (0, window, empty)
        history.push(1.0)
        assert history.values().tolist() == [1.0]


def test_history_shows_its_size_its_window_and_its_backend(backend):
    history = NormHistory(5)
    history.push(1.0)
    assert repr(history) == f"<NormHistory of 1 norms, window=5 backend='{backend}'>"
    assert (len(history), history.window, history.backend) == (1, 5, backend)


def test_history_takes_no_attribute_that_it_does_not_have():
    history = NormHistory()
    for part in (history, history._backend):
        with pytest.raises(AttributeError):
            part.windw = 5
