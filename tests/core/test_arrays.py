"""The rule over arrays, with numpy as the namespace, against the core and against numpy.percentile."""

from math import inf, nan

import numpy as np
import pytest

from autoclip_core import AutoClip, arrays

from .reference import PERCENTILES, ReferenceHistory, assert_same_bits, make_norms

LIKELY = [inf, nan, -inf, 0.0, -0.0, -1.0, 5e-324, 1e-3, 1.0, 1.0, 2.5, 1e300]


def clip_with(norms, window=None):
    clip = AutoClip(window=window)
    for norm in norms:
        clip.observe(norm)
    return clip


def threshold_of(clip, pending, percentile):
    table = np.array([arrays.deferred_table(clip, len(pending), percentile)])
    threshold, recorded = arrays.deferred_threshold(np, table, np.array([pending]), percentile, clip.history.window)
    assert threshold.shape == recorded.shape == (1,)
    return threshold[0], recorded[0]


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
        assert recorded == len(norms) + sum(0.0 < norm < inf for norm in pending)
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
    pending = np.array([[1.5, nan], [0.5, 4.0], [0.0, 2.5]])
    table = np.array([arrays.deferred_table(clip, 2, 30.0) for clip in clips])
    thresholds, _ = arrays.deferred_threshold(np, table, pending, 30.0, None)
    for clip, row, threshold in zip(clips, pending.tolist(), thresholds, strict=True):
        assert_same_bits(threshold, threshold_of(clip, row, 30.0)[0])


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
