"""Algorithm 1 over a long run: 100,000 norms like those of a real training, against the naive rule."""

import warnings
from math import inf, isfinite

import numpy as np
import pytest

from autoclip_core import AutoClip, ClipStep, NormHistory

from .reference import assert_same_bits, naive_thresholds


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
    assert 0.99 * len(trace) < len(recorded) < len(trace)
    assert_same_bits(clip.history.values(), sorted(recorded[-(window or len(trace)) :]))
    assert clip.steps == len(trace)
    assert clip.clipped_steps == sum(step.clipped for step in steps) > len(trace) // 10
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
