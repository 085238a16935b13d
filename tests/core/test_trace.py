"""Algorithm 1 over a long run: 100,000 norms like those of a real training, against the naive rule."""

import warnings
from math import inf, isfinite

import numpy as np
import pytest

from autoclip_core import AutoClip, ClipStep, NormHistory

from .reference import assert_same_bits, naive_thresholds

STEPS = 100_000


@pytest.fixture(scope="module")
def trace():
    """Norms in float32 that drift over eight decades, with spikes, zeros, NaN and infinities."""
    random = np.random.default_rng(20200914)
    decades = np.interp(np.arange(STEPS), np.array([0, 0.05, 0.4, 0.7, 1]) * STEPS, [2, -1, -3, -6, -4])
    norms = 10.0**decades * random.lognormal(0.0, 0.6, STEPS)
    norms[random.random(STEPS) < 0.005] *= 10.0 ** random.uniform(1, 5)
    norms[10_000:10_100] = norms[10_000]  # a stalled run: the same norm again and again
    for value, share in ((0.0, 0.002), (np.nan, 0.001), (inf, 0.001), (-0.0, 0.0005)):
        norms[1:][random.random(STEPS - 1) < share] = value
    return norms.astype(np.float32).tolist()


def is_recorded(norm):
    return isfinite(norm) and norm > 0.0


def naive_steps(trace, percentile, window):
    thresholds = naive_thresholds([norm for norm in trace if is_recorded(norm)], percentile, window)
    threshold = inf
    for norm in trace:
        if is_recorded(norm):
            threshold = next(thresholds)
            yield ClipStep(norm, threshold, min(threshold / norm, 1.0), threshold < norm, True)
        else:
            yield ClipStep(norm, threshold, 1.0 if norm == 0.0 else 0.0, False, False)


@pytest.mark.parametrize(("percentile", "window"), [(10.0, None), (75.0, 5000)])
def test_autoclip_takes_every_step_of_a_long_run_as_the_naive_rule_does(percentile, window, trace):
    clip = AutoClip(percentile, window=window)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        steps = [clip.observe(norm) for norm in trace]
    for step, expected in zip(steps, naive_steps(trace, percentile, window), strict=True):
        assert step[1:] == expected[1:]
        assert step.norm == expected.norm or expected.norm != expected.norm

    recorded = [norm for norm in trace if is_recorded(norm)]
    assert 0.99 * STEPS < len(recorded) < STEPS
    assert_same_bits(clip.history.values(), sorted(recorded[-(window or STEPS) :]))
    assert clip.steps == STEPS
    assert clip.clipped_steps == sum(step.clipped for step in steps) > STEPS // 10
    assert clip.nonfinite_steps == sum(not isfinite(norm) for norm in trace) > 0
    clip.history.check()


def test_autoclip_thresholds_of_a_long_run_are_those_of_the_authors_code(trace):
    # Their code: append to a list, numpy.percentile of the list.
    clip = AutoClip(10.0, nonfinite="pass")
    grad_history = []
    for i, norm in enumerate(trace):
        step = clip.observe(norm)
        if is_recorded(norm):
            grad_history.append(norm)
        if i % 499 == 0 or i < 300:
            assert_same_bits(step.threshold, np.percentile(grad_history, 10))


def test_observe_many_replays_a_long_run(trace):
    recorded = [norm for norm in trace if is_recorded(norm)]
    thresholds = NormHistory().observe_many(recorded, [10.0, 50.0])
    assert_same_bits(thresholds[:, 0], list(naive_thresholds(recorded, 10.0)))
    assert_same_bits(thresholds[:, 1], list(naive_thresholds(recorded, 50.0)))
