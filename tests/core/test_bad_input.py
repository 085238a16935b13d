"""What cannot be used is refused: by an error of this package which also is the builtin one, whose message tells what
was given, and which leaves the history as it was."""

import re
from contextlib import contextmanager
from decimal import Decimal
from math import inf, nan, nextafter

import numpy as np
import pytest

from autoclip_core import (
    AutoClip,
    AutoClipError,
    AutoClipTypeError,
    AutoClipValueError,
    EmptyHistoryError,
    NormHistory,
    RankError,
    SnapshotError,
)

from .reference import make_norms

# What is given, and how the message shows it.
NOT_A_NUMBER = [
    ("1.0", "'1.0' (str)"),
    (b"1", "b'1' (bytes)"),
    (None, "None (NoneType)"),
    (1j, "1j (complex)"),
    (True, "True (bool)"),
    (np.True_, "True"),
    (Decimal(1), "Decimal('1')"),
    ([1.0], "[1.0] (list)"),
    (np.array([1.0]), "array([1.]) (ndarray)"),
    (np.array(1.0), "array(1.) (ndarray)"),
    ("9" * 1000, "99... (str)"),
    (np.timedelta64(3), "timedelta64"),
    (np.timedelta64(3, "D"), "timedelta64"),
]
NOT_FINITE = [
    (nan, "nan"),
    (inf, "inf"),
    (-inf, "-inf"),
    (np.float32("nan"), "nan"),
    (np.float64("inf"), "inf"),
]
BEYOND_FLOAT = [(10**400, "1000"), (-(10**400), "-1000")]
NOT_A_PERCENTILE = [
    (-1.0, "-1.0"),
    (-5e-324, "-5e-324"),
    (nextafter(100.0, inf), "100.00000000000001"),
    (101, "101"),
    (nan, "nan"),
    (inf, "inf"),
    (-inf, "-inf"),
]
NOT_A_COUNT = [
    ("3", "'3' (str)"),
    (None, "None (NoneType)"),
    (1.5, "1.5 (float)"),
    (2.0, "2.0 (float)"),
    (nan, "nan (float)"),
    (1j, "1j (complex)"),
    (True, "True (bool)"),
    ([3], "[3] (list)"),
    (np.timedelta64(3), "timedelta64"),
]
NOT_AN_ARRAY_OF_NUMBERS = [
    (["1.0"], "<U3"),
    ("1.0", "'1.0' (str)"),
    (b"1", "b'1' (bytes)"),
    (bytearray(b"1"), "(bytearray)"),
    ({1.0: 2.0}, "{1.0: 2.0} (dict)"),
    (None, "object"),
    ([1.0, None], "None (NoneType)"),
    ([1.0, 2j], "complex128"),
    ([True, False], "bool"),
    (np.array([1, 2], dtype="M8[s]"), "datetime64[s]"),
    ([Decimal(1)], "Decimal('1') (Decimal)"),
    (object(), "object"),
]
NOT_ONE_DIMENSION = [
    (1.0, "()"),
    ([[1.0]], "(1, 1)"),
    (np.ones((2, 3)), "(2, 3)"),
    (np.empty((0, 3)), "(0, 3)"),
    ([[1.0], [2.0, 3.0]], "different lengths"),
]


def given(name, *tables):
    """Parametrize by tables of what is given and how the message shows it."""
    cases = [pytest.param(value, shown, id=f"{shown}-{type(value).__name__}") for t in tables for value, shown in t]
    return pytest.mark.parametrize((name, "shown"), cases)


@pytest.fixture(params=[None, 40], ids=["full", "window"])
def history(request):
    history = NormHistory(request.param)
    history.extend(make_norms("log-normal", 1000))
    return history


@contextmanager
def refused(history, error, shown):
    before = history.to_bytes()
    with pytest.raises(error, match=re.escape(shown)) as caught:
        yield
    assert isinstance(caught.value, AutoClipError)
    assert history.to_bytes() == before
    history.check()


def test_every_error_is_the_builtin_one_too():
    pairs = {
        AutoClipValueError: ValueError,
        AutoClipTypeError: TypeError,
        EmptyHistoryError: ValueError,
        RankError: IndexError,
        SnapshotError: ValueError,
    }
    assert all(issubclass(ours, AutoClipError) and issubclass(ours, builtin) for ours, builtin in pairs.items())


one_norm = pytest.mark.parametrize(
    "call",
    [lambda history, norm: history.push(norm), lambda history, norm: history.observe(norm, 10.0)],
    ids=["push", "observe"],
)
many_norms = pytest.mark.parametrize(
    "call",
    [lambda history, norms: history.extend(norms), lambda history, norms: history.observe_many(norms, [10.0])],
    ids=["extend", "observe_many"],
)


@one_norm
@given("norm", NOT_A_NUMBER)
def test_norm_that_is_no_number_is_a_type_error(call, norm, shown, history):
    with refused(history, TypeError, shown):
        call(history, norm)


@one_norm
@given("norm", NOT_FINITE, BEYOND_FLOAT)
def test_norm_that_is_not_finite_is_a_value_error(call, norm, shown, history):
    with refused(history, ValueError, shown):
        call(history, norm)


@many_norms
@given("norms", NOT_AN_ARRAY_OF_NUMBERS)
def test_norms_that_are_no_numbers_are_a_type_error(call, norms, shown, history):
    with refused(history, TypeError, shown):
        call(history, norms)


@many_norms
@pytest.mark.parametrize("norms", [[1.0, True], (np.True_, 2.0)], ids=str)
def test_norms_with_a_bool_among_them_are_a_type_error(call, norms, history):
    with refused(history, TypeError, "bool"):
        call(history, norms)


@many_norms
@given("norms", NOT_ONE_DIMENSION)
def test_norms_of_another_shape_are_a_value_error(call, norms, shown, history):
    with refused(history, ValueError, shown):
        call(history, norms)


@many_norms
@pytest.mark.parametrize("position", [0, 1, 299])
@given("norm", NOT_FINITE)
def test_norms_with_one_that_is_not_finite_are_refused_as_a_whole(call, norm, shown, position, history):
    norms = make_norms("log-normal", 300)
    norms[position] = norm
    with refused(history, ValueError, f"norms[{position}] is {shown}"):
        call(history, norms)


@many_norms
def test_norms_beyond_float64_are_a_value_error_and_nothing_else(call, history):
    norms = np.array([1.0, "1e400"], dtype=np.longdouble)
    if np.isinf(norms[1]):
        pytest.skip("longdouble is no wider than float64 on this platform")
    with refused(history, ValueError, "norms[1]"):
        call(history, norms)


one_percentile = pytest.mark.parametrize(
    "call",
    [
        lambda history, percentile: history.percentile(percentile),
        lambda history, percentile: history.observe(1.0, percentile),
    ],
    ids=["percentile", "observe"],
)


@one_percentile
@given("percentile", NOT_A_NUMBER)
def test_percentile_that_is_no_number_is_a_type_error(call, percentile, shown, history):
    with refused(history, TypeError, shown):
        call(history, percentile)


@one_percentile
@given("percentile", NOT_A_PERCENTILE, BEYOND_FLOAT)
def test_percentile_out_of_range_is_a_value_error(call, percentile, shown, history):
    with refused(history, ValueError, shown):
        call(history, percentile)


@given("percentiles", NOT_AN_ARRAY_OF_NUMBERS)
def test_percentiles_that_are_no_numbers_are_a_type_error(percentiles, shown, history):
    with refused(history, TypeError, shown):
        history.observe_many([1.0, 2.0], percentiles)


@given("percentile", NOT_A_PERCENTILE)
def test_percentiles_out_of_range_are_a_value_error(percentile, shown, history):
    with refused(history, ValueError, shown):
        history.observe_many([1.0, 2.0], [10.0, percentile])


@given("percentiles", NOT_ONE_DIMENSION)
def test_percentiles_of_another_shape_are_a_value_error(percentiles, shown, history):
    with refused(history, ValueError, shown):
        history.observe_many([1.0, 2.0], percentiles)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 100.0])
def test_percentile_of_an_empty_history_is_a_value_error(percentile):
    for window in (None, 3):
        history = NormHistory(window)
        with pytest.raises(EmptyHistoryError, match="empty history"):
            history.percentile(percentile)
        history.push(1.0)
        history.clear()
        with pytest.raises(ValueError, match="empty history"):
            history.percentile(percentile)
        assert len(history) == 0


@given("window", NOT_A_COUNT[:1], NOT_A_COUNT[2:])
def test_window_that_is_no_whole_number_is_a_type_error(window, shown):
    for make in (NormHistory, lambda window: AutoClip(window=window)):
        with pytest.raises(AutoClipTypeError, match=re.escape(shown)):
            make(window)


@given("window", [(0, "0"), (-1, "-1"), (-(2**70), "-11805"), (2**63, "9223372036854775808")])
def test_window_out_of_range_is_a_value_error(window, shown):
    for make in (NormHistory, lambda window: AutoClip(window=window)):
        with pytest.raises(AutoClipValueError, match=rf"window must be at least 1.*{re.escape(shown)}"):
            make(window)


@given("rank", NOT_A_COUNT)
def test_rank_that_is_no_whole_number_is_a_type_error(rank, shown, history):
    for call in (history.select, lambda rank: history.order_statistics(rank, 1)):
        with refused(history, TypeError, shown):
            call(rank)
    with refused(history, TypeError, shown):
        history.order_statistics(0, rank)


@given("rank", [(-1, "-1"), (2**63, "9223372036854775808"), (2**64, "18446744073709551616")])
def test_rank_out_of_every_range_is_a_value_error(rank, shown, history):
    for call in (history.select, lambda rank: history.order_statistics(rank, 1)):
        with refused(history, ValueError, shown):
            call(rank)
    with refused(history, ValueError, shown):
        history.order_statistics(0, rank)


def test_rank_of_no_norm_is_an_index_error(history):
    size = len(history)
    for rank in (size, size + 1, 2**32, 2**63 - 1):
        with refused(history, IndexError, f"is {size}, but rank {rank}"):
            history.select(rank)
    for first, count in ((0, size + 1), (size, 1), (size - 1, 2), (2**63 - 1, 2**63 - 1), (0, 2**62), (1, 2**61)):
        with refused(history, IndexError, f"is {size}, but rank {first + count - 1}"):
            history.order_statistics(first, count)
    with pytest.raises(RankError, match="is 0, but rank 0"):
        NormHistory().select(0)


def test_oldest_beyond_the_size_is_an_index_error():
    history = NormHistory(window=5)
    history.extend([3.0, 1.0, 2.0])
    for count in (4, 5, 2**62):
        with refused(history, IndexError, f"is 3, but rank {count - 1}"):
            history.oldest(count)
    for count, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with refused(history, error, "count must be"):
            history.oldest(count)


@given("norm", NOT_A_NUMBER)
def test_rank_of_what_is_no_number_is_a_type_error(norm, shown, history):
    with refused(history, TypeError, shown):
        history.rank(norm)


def test_rank_of_nan_is_a_value_error(history):
    for norm in (nan, np.float32("nan")):
        with refused(history, ValueError, "NaN"):
            history.rank(norm)


@given("norm", BEYOND_FLOAT)
def test_rank_of_what_is_beyond_float_is_a_value_error(norm, shown, history):
    with refused(history, ValueError, shown):
        history.rank(norm)


@given("other", [(None, "None"), ([1.0], "[1.0]"), (AutoClip, "AutoClip"), (b"", "b''")])
def test_merge_of_what_is_no_history_is_a_type_error(other, shown, history):
    with refused(history, TypeError, shown):
        history.merge(other)


@pytest.mark.parametrize("window", [None, 5])
def test_merge_into_a_window_is_a_value_error(window):
    history, other = NormHistory(7), NormHistory(window)
    history.extend([1.0, 2.0])
    other.extend([3.0])
    for more in (other, history, NormHistory()):
        with refused(history, ValueError, "window (7)"):
            history.merge(more)
    assert other.values().tolist() == [3.0]


@given("snapshot", [("text", "'text' (str)"), (None, "None"), (3, "3 (int)"), ([1, 2], "[1, 2] (list)")])
def test_snapshot_that_is_not_bytes_is_a_type_error(snapshot, shown):
    with pytest.raises(AutoClipTypeError, match=re.escape(shown)):
        NormHistory.from_bytes(snapshot)


@given("backend", [("cuda", "'cuda'"), ("Native", "'Native'"), ("", "''")])
def test_backend_that_does_not_exist_is_a_value_error(backend, shown):
    for make in (lambda backend: NormHistory(backend=backend), lambda backend: NormHistory.from_bytes(b"", backend)):
        with pytest.raises(AutoClipValueError, match=f'"native".*"numba".*{shown}'):
            make(backend)


@given("backend", [(3, "3 (int)"), (b"native", "b'native' (bytes)"), (["native"], "['native'] (list)")])
def test_backend_that_is_no_name_is_a_type_error(backend, shown):
    with pytest.raises(AutoClipTypeError, match=re.escape(shown)):
        NormHistory(backend=backend)


@given("norm", NOT_A_NUMBER)
def test_autoclip_counts_nothing_when_the_norm_is_no_number(norm, shown):
    clip = AutoClip()
    clip.observe(2.0)
    before = clip.state_dict()
    with pytest.raises(AutoClipTypeError, match=re.escape(shown)):
        clip.observe(norm)
    assert clip.state_dict() == before


@given("norm", BEYOND_FLOAT)
def test_autoclip_counts_nothing_when_the_norm_is_beyond_float(norm, shown):
    clip = AutoClip()
    before = clip.state_dict()
    with pytest.raises(AutoClipValueError, match=re.escape(shown)):
        clip.observe(norm)
    assert clip.state_dict() == before


OPTIONS = [
    *[("percentile", value, ValueError, shown) for value, shown in NOT_A_PERCENTILE + BEYOND_FLOAT],
    *[("percentile", value, TypeError, shown) for value, shown in NOT_A_NUMBER],
    *[("warmup", value, TypeError, shown) for value, shown in NOT_A_COUNT],
    ("warmup", -1, ValueError, "warmup must be at least 0 and below 2**63, but -1"),
    ("warmup", 2**63, ValueError, "9223372036854775808"),
    ("nonfinite", "ignore", ValueError, '"skip", "raise" or "pass", but \'ignore\''),
    ("nonfinite", None, ValueError, "None"),
    ("nonfinite", ["skip"], ValueError, "['skip']"),
    ("max_threshold", 0.0, ValueError, "above 0 or None, but 0.0"),
    ("max_threshold", -1, ValueError, "-1"),
    ("max_threshold", nan, ValueError, "nan"),
    ("max_threshold", "1", TypeError, "'1' (str)"),
    ("max_threshold", True, TypeError, "True (bool)"),
    ("max_threshold", 10**400, ValueError, "1000"),
]


@pytest.mark.parametrize(
    ("option", "value", "error", "shown"),
    [pytest.param(*case, id=f"{case[0]}-{case[3][:40]}-{type(case[1]).__name__}") for case in OPTIONS],
)
def test_autoclip_option_that_cannot_be_used_is_refused(option, value, error, shown):
    with pytest.raises(error, match=re.escape(shown)) as caught:
        AutoClip(**{option: value})
    assert isinstance(caught.value, AutoClipError)


def test_integers_of_any_size_are_numbers(backend):
    whole = [2**53 + 1, 2**63, 2**64, 10**300, -(2**70), 3]
    pushed, extended, mixed = NormHistory(), NormHistory(), NormHistory()
    for norm in whole:
        pushed.push(norm)
    extended.extend(whole)
    mixed.extend([*whole[:-1], 3.0])
    assert pushed.values().tolist() == sorted(map(float, whole))
    assert pushed.to_bytes() == extended.to_bytes() == mixed.to_bytes()
    assert pushed.observe_many([2**64], [0]).tolist() == [[-(2.0**70)]]


@pytest.mark.parametrize("digits", [400, 5000])  # Python writes out some 4300 at most
def test_integers_beyond_floats_are_refused(digits):
    history, huge = NormHistory(), 10**digits
    for call in (
        lambda: history.push(huge),
        lambda: history.extend([huge]),
        lambda: history.extend([1.0, huge]),
        lambda: history.observe(huge, 10.0),
        lambda: history.observe_many([huge], [10.0]),
        lambda: history.percentile(huge),
        lambda: history.select(huge),
        lambda: NormHistory(huge),
        lambda: AutoClip(huge),
        lambda: AutoClip().observe(huge),
    ):
        with pytest.raises(AutoClipValueError, match=r"but .* \(int\) was given"):
            call()
    assert len(history) == 0


def test_masked_numbers_are_refused():
    history = NormHistory()
    with pytest.raises(AutoClipValueError, match="masked"):
        history.extend(np.ma.array([1.0, 2.0, 99.0], mask=[0, 0, 1]))
    assert len(history) == 0
    history.extend(np.ma.array([1.0, 2.0]))
    history.extend(np.ma.array([3.0, 9.0], mask=[0, 1]).compressed())
    assert history.values().tolist() == [1.0, 2.0, 3.0]


class Unreadable:
    """What a tensor does that needs a gradient, or has a type that numpy lacks."""

    def __init__(self, error):
        self.error = error

    def __array__(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("it requires grad"), TypeError("no such type: bfloat16")])
def test_what_numpy_cannot_read_is_refused(error):
    history = NormHistory()
    with pytest.raises(AutoClipTypeError, match=f"Unreadable \\({error}\\); of a tensor give"):
        history.extend(Unreadable(error))
    assert len(history) == 0


def test_number_that_cannot_be_written_out_is_still_refused_by_an_error_of_this_package():
    class Mute(float):
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(AutoClipValueError, match="nan was given"):
        NormHistory().push(Mute("nan"))
