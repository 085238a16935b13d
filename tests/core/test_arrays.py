"""The rule over arrays, with numpy as the namespace, against the core and against numpy.percentile."""

from fractions import Fraction
from math import floor, inf, nan
from types import SimpleNamespace

import numpy as np
import pytest

from autoclip_core import AutoClip, arrays

from .reference import PERCENTILES, ReferenceHistory, assert_same_bits, make_norms

LIKELY = [inf, nan, -inf, 0.0, -0.0, -1.0, 5e-324, 1e-3, 1.0, 1.0, 2.5, 1e300]
# As the array API has it, numpy's own astype takes no scalars.
xp = SimpleNamespace(**vars(np) | {"astype": lambda values, dtype: np.asarray(values).astype(dtype)})


def clip_with(norms, window=None):
    clip = AutoClip(window=window)
    for norm in norms:
        clip.observe(norm)
    return clip


def threshold_of(clip, pending, percentile):
    table = np.array([arrays.deferred_table(clip, len(pending), percentile)])
    threshold, limit, recorded = arrays.deferred_threshold(np, table, arrays.norm_to_remember(np, np.array([pending])))
    assert threshold.shape == limit.shape == (1,)
    assert recorded.shape == (1, len(pending))
    assert threshold == limit
    return threshold[0], recorded[0].tolist()


def expected_threshold(norms, pending, percentile, window):
    truth = ReferenceHistory(window, [norm for norm in [*norms, *pending] if 0.0 < norm < inf])
    return (truth.percentile(percentile), True) if truth.norms else (inf, False)


@pytest.mark.filterwarnings("ignore:The gradient norm", "ignore:invalid value")
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 17])
def test_deferred_threshold_is_that_of_the_union(window):
    random = np.random.default_rng(window or 0)
    tried = 0
    for _ in range(1000):
        count = int(random.choice([0, 1, 2, 3, 4, 5, 7, 20, 60]))
        norms = [float(norm) for norm in random.choice([*LIKELY[6:], *random.lognormal(size=count + 1)], count)]
        pending = random.choice([*LIKELY, *random.lognormal(size=4)], random.integers(1, min(4, window or 4) + 1))
        percentile = float(random.choice([*PERCENTILES, 100.0 * random.random()]))
        threshold, recorded = threshold_of(clip_with(norms, window), pending.tolist(), percentile)
        expected, any_recorded = expected_threshold(norms, pending.tolist(), percentile, window)
        assert_same_bits(threshold, expected)
        assert recorded == [0.0 < norm < inf for norm in pending]
        tried += any_recorded
    assert tried > 600


@pytest.mark.parametrize("shape", ["drifting", "equal", "two values", "denormal", "every magnitude"])
def test_deferred_threshold_of_a_long_history(shape):
    norms = [norm for norm in np.abs(make_norms(shape, 3000)).tolist() if norm > 0.0]
    clip = clip_with(norms)
    for percentile in PERCENTILES:
        for pending in ([norms[0]], [1e-320, 1e-320, 1e-320, 1e-320], [1e308] * 4, norms[:4]):
            threshold, _ = threshold_of(clip, pending, percentile)
            assert_same_bits(threshold, expected_threshold(norms, pending, percentile, None)[0])


def test_rows_of_several_histories_make_one_array():
    clips = [clip_with([]), clip_with([1.0]), clip_with([3.0, 1.0, 2.0] * 50)]
    pending = np.array([[1.5, inf], [0.5, 4.0], [inf, 2.5]])
    table = np.array([arrays.deferred_table(clip, 2, 30.0) for clip in clips])
    thresholds, _, _ = arrays.deferred_threshold(np, table, pending)
    for clip, row, threshold in zip(clips, pending.tolist(), thresholds, strict=True):
        assert_same_bits(threshold, threshold_of(clip, row, 30.0)[0])


@pytest.mark.parametrize("window", [None, 3])
def test_tables_stand_alone_or_in_arrays_of_any_shape(window):
    clip, pending = clip_with([3.0, 1.0, 2.0, 5.0], window), [4.0, 2.5]
    alone = np.array(arrays.deferred_table(clip, 2, 30.0))
    expected, recorded = threshold_of(clip, pending, 30.0)
    for shape in [(), (1, 1), (2, 3, 1)]:
        table, norms = (np.broadcast_to(values, (*shape, *values.shape)) for values in (alone, np.array(pending)))
        threshold, limit, entered = arrays.deferred_threshold(np, table, norms)
        assert threshold.shape == limit.shape == shape
        assert (threshold == expected).all()
        assert (entered == recorded).all()


@pytest.mark.parametrize("window", [None, 4, 5, 200])
def test_rows_are_of_one_length_whatever_the_history_and_the_percentile(window):
    clips = [clip_with(make_norms("log-normal", count).tolist(), window) for count in (0, 1, 2, 5, 150, 300)]
    for pending in range(1, 5):
        tables = [arrays.deferred_table(clip, pending, p) for clip in clips for p in (*PERCENTILES, 90.0, 98.5)]
        assert {len(table) for table in tables} == {pending + 1}
        assert len({len(row) for table in tables for row in table}) == 1


@pytest.mark.filterwarnings(
    "ignore:The gradient norm", "ignore:invalid value", "ignore:divide by zero", "ignore:overflow"
)
@pytest.mark.parametrize(
    "options",
    [{}, {"warmup": 3}, {"max_threshold": 0.7}, {"warmup": 3, "max_threshold": 0.7}, {"nonfinite": "pass"}],
)
def test_decide_does_what_the_core_does(options):
    clip, clipped = AutoClip(40.0, **options), 0
    for norm in [1.0, 0.0, nan, 0.5, 2.0, inf, 0.25, 4.0, 1.0, 5e-324, 1e308, 0.5]:
        step = clip.observe(norm)
        decided = arrays.decide(
            np,
            np.float64(norm),
            np.float64(clip.history.percentile(40.0)),
            clip.recorded_steps,
            **options,
        )
        assert_same_bits(decided[:2], (step.threshold, step.scale))
        assert decided[2] == step.clipped
        clipped += step.clipped
    assert clipped


@pytest.mark.filterwarnings(
    "ignore:The gradient norm", "ignore:invalid value", "ignore:divide by zero", "ignore:overflow"
)
@pytest.mark.parametrize("window", [None, 4, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"warmup": 7}, {"max_threshold": 0.7}, {"warmup": 7, "max_threshold": 0.7}, {"nonfinite": "pass"}],
)
def test_deferred_steps_are_those_of_the_core(options, window):
    random = np.random.default_rng(window or 0)
    limits = {"warmup": options.get("warmup", 0), "max_threshold": options.get("max_threshold", inf)}
    clip, behind, waiting, clipped = AutoClip(window=window, **options), AutoClip(window=window, **options), [], 0
    for norm in np.abs(random.choice([*LIKELY[:5], *LIKELY[6:], *random.lognormal(size=40)], 2000)).tolist():
        clip.percentile = float(random.choice([*PERCENTILES, 10.0, 10.0, 10.0]))
        for _ in range(int(random.choice([0, 1, 2, len(waiting)])) if len(waiting) < 4 else 1):
            if waiting:
                behind.observe(waiting.pop(0))
        waiting.append(norm)
        table = np.array(arrays.deferred_table(behind, len(waiting), clip.percentile, **limits))
        pending = arrays.norm_to_remember(np, np.array(waiting))
        threshold, limit, recorded = arrays.deferred_threshold(np, table, pending, warmup=limits["warmup"])
        scale = arrays.deferred_scale(np, np.float64(norm), limit, nonfinite=options.get("nonfinite", "skip"))
        step = clip.observe(norm)
        assert_same_bits([threshold, scale], [step.threshold, step.scale])
        assert recorded[-1] == step.recorded
        assert (scale < recorded[-1]) == step.clipped
        clipped += step.clipped
    assert clipped


def test_deferred_scale_of_a_norm_that_was_not_seen_is_1():
    with np.errstate(divide="ignore"):
        for limit in (5e-324, 1.0, inf):
            for nonfinite in ("skip", "raise", "pass"):
                assert arrays.deferred_scale(np, np.float64(-0.0), np.float64(limit), nonfinite=nonfinite) == 1.0


def assert_within_an_ulp(found, expected):
    assert found.dtype == np.float32
    expected = np.float32(expected)
    assert np.nextafter(expected, -np.float32(inf)) <= found <= np.nextafter(expected, np.float32(inf))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("percentile", [0.0, 1e-6, 10.0, 33.3, 50.0, 99.99, 100.0])
def test_window_in_arrays_is_that_of_the_core(window, percentile):
    random = np.random.default_rng(window)
    largest = np.finfo(np.float32).max
    ascending = ring = np.full(window, inf, np.float32)  # of earlier releases: it becomes the largest number
    truth = ReferenceHistory(window)
    recorded = 0
    likely = np.array([inf, nan, 0.0, -1.0, 1e-45, 1.0, 1.0, 3e38, *random.lognormal(size=20)], np.float32)
    for norm in random.choice(likely, 200):
        entering = norm if 0.0 < norm < inf else np.float32(0.0)
        ascending, ring, found = arrays.observe(xp, ascending, ring, np.int32(recorded), entering, percentile)
        if 0.0 < norm < inf:
            truth.extend([norm])
            recorded += 1
        size = len(truth.norms)
        assert ascending.dtype == ring.dtype == np.float32
        assert_same_bits(ascending, [*truth.values(), *[largest] * (window - size)])
        assert_same_bits(np.roll(ring, -(recorded % window))[window - size :], truth.norms)
        if size:
            assert_within_an_ulp(found, truth.percentile(percentile))
        else:
            assert found == largest
    assert recorded > 3 * window


def test_percentile_over_arrays_is_within_an_ulp_where_neighbours_are_far_apart():
    random = np.random.default_rng(0)
    for low, high in np.sort(np.exp2(random.uniform(-20, 20, (3000, 2))).astype(np.float32)):
        percentile = random.uniform(0, 100)
        found = arrays.percentile_of(xp, np.array([low, high, inf], np.float32), np.int32(2), percentile)
        assert_within_an_ulp(found, np.percentile([float(low), float(high)], percentile))


@pytest.mark.parametrize("last", [0, 1, 99, 100, 12_345, arrays.MAX_WINDOW - 1])
def test_place_of_a_percentile_is_exact_however_long_the_window(last):
    for percentile in (0.0, 1e-6, 1e-5, 0.1, 10.0, 100 / 3, 50.0, 99.99999, np.nextafter(100.0, 0.0).item(), 100.0):
        rank, fraction, rest = arrays._position(xp, np.int32(last), percentile)
        exact = Fraction(percentile) * last / 100
        assert rank == floor(exact)
        # What a float32 holds of the fraction, and then the rest.
        assert fraction * 2**21 == floor((exact - floor(exact)) * 2**21)
        assert abs(exact - int(rank) - Fraction(float(fraction)) - Fraction(float(rest))) < Fraction(1, 2**45)


@pytest.mark.parametrize(
    "percentile", [0.0, 1e-6, 0.1, 10.0, 100 / 3, 99.99999, np.nextafter(100.0, 0.0).item(), 100.0]
)
def test_digits_of_a_percentile_are_all_of_it(percentile):
    digits = arrays.percentile_digits(xp, percentile)
    assert all(isinstance(digit, int) and 0 <= digit < 128 for digit in digits)
    assert arrays.percentile_of_digits(digits) == percentile
    of_an_array = arrays.percentile_digits(xp, np.float64(percentile)[None])
    assert [digit.item() for digit in of_an_array] == digits
