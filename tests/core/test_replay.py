"""A replay is what AutoClip would have done."""

import warnings
from math import inf, nan

import numpy as np
import pytest

from autoclip_core import AutoClip, AutoClipValueError
from autoclip_core.replay import PERCENTILES, advise, each_replay, replay

from .reference import assert_same_bits


@pytest.fixture
def norms():
    random = np.random.default_rng(5)
    norms = random.lognormal(size=2000) * np.geomspace(1, 1e-4, 2000)
    norms[random.random(2000) < 0.01] = 0.0
    norms[random.random(2000) < 0.01] = nan
    norms[random.random(2000) < 0.01] = inf
    return norms


@pytest.mark.parametrize("first", [None, nan, 0.0])
def test_replay_is_what_the_clipper_would_have_done(norms, first):
    if first is not None:
        norms[:3] = first
    results = replay(norms, [0.0, 10.0, 62.5], [None, 100])
    assert [(result.percentile, result.window) for result in results] == [
        (percentile, window) for window in (None, 100) for percentile in (0.0, 10.0, 62.5)
    ]
    for result in results:
        clip = AutoClip(result.percentile, window=result.window)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            steps = [clip.observe(norm) for norm in norms.tolist()]
        assert_same_bits(result.thresholds, [step.threshold for step in steps])
        assert_same_bits(result.scales, [step.scale for step in steps])
        assert result.clipped.tolist() == [step.clipped for step in steps]
        assert result.clipped.any()


def test_fixed_thresholds_do_not_move(norms):
    *_, result = replay(norms, [50.0], fixed=[0.01, 0.1])
    finite = np.isfinite(norms)
    assert (result.percentile, result.window) == (None, None)
    assert set(result.thresholds) == {0.1}
    assert result.clipped.tolist() == (finite & (norms > 0.1)).tolist()
    assert_same_bits(result.scales[result.clipped], 0.1 / norms[result.clipped])


def test_summary_describes_the_clipped_steps():
    [result] = replay([1.0, 2.0, 4.0, 8.0], [0.0])
    assert result.summary() == {
        "percentile": 0.0,
        "window": None,
        "final_threshold": 1.0,
        "median_threshold": 1.0,
        "clipped_share": 0.75,
        "median_scale": 0.25,
        "hard_scale": np.percentile([0.125, 0.25, 0.5], 5),
    }
    [result] = replay([nan, nan], [50.0])
    assert result.summary()["median_threshold"] is result.summary()["median_scale"] is None


def test_summary_of_the_largest_norms_is_finite():
    [result] = replay([1.7e308, 1.75e308], [0.0])
    assert result.summary()["median_threshold"] == result.summary()["final_threshold"] == 1.7e308


def test_results_come_one_by_one(norms):
    one_by_one = each_replay(norms, [10.0, 50.0], fixed=[1.0])
    assert [next(one_by_one).percentile for _ in range(3)] == [10.0, 50.0, None]
    with pytest.raises(StopIteration):
        next(one_by_one)


@pytest.mark.parametrize(
    ("norms", "says"),
    [([], r"\(0,\)"), ([[1.0]], r"\(1, 1\)"), ([1.0, -2.0], r"norms\[1\] is -2\.0"), (1.0, r"\(\)")],
)
def test_norms_that_are_none_are_refused(norms, says):
    with pytest.raises(AutoClipValueError, match=says):
        replay(norms)


def test_percentile_that_is_none_is_refused(norms):
    with pytest.raises(AutoClipValueError, match="101"):
        replay(norms, [101.0])
    with pytest.raises(AutoClipValueError, match=r"above 0, but -1\.0"):
        replay(norms, fixed=[-1.0])
    with pytest.raises(AutoClipValueError, match="window"):
        replay(norms, windows=[0])


def test_default_percentiles_are_those_of_the_paper():
    assert PERCENTILES == (1.0, 10.0, 25.0, 50.0, 90.0)


EVEN = np.exp(0.1 * np.random.default_rng(1).standard_normal(1000))


def with_outliers(norms, *steps):
    norms = norms.copy()
    norms[list(steps)] = 40.0
    return norms


@pytest.mark.parametrize(
    ("norms", "percentile", "says"),
    [
        (EVEN, 100.0, []),
        (EVEN, 90.0, []),
        (EVEN[:99], 0.0, []),
        (np.append(EVEN[:99], [0.0, nan, inf]), 0.0, []),
        (EVEN**3, 0.0, ["shorter steps: p = 0 clips 99."]),
        (with_outliers(EVEN, 500, 501), 50.0, ["heavy tail: 0.2% of the norms are over 10 times"]),
        (with_outliers(EVEN, 500), 90.0, ["heavy tail: 0.1% of the norms are over 10 times"]),
        (with_outliers(EVEN, 4), 90.0, ["heavy tail", "early steps: with p = 90 step 5 keeps 24.4 times"]),
        (with_outliers(EVEN, 4), 50.0, ["heavy tail"]),
        (
            EVEN * np.geomspace(1, 8, 1000),
            90.0,
            ["drift: norms rise 6.55 times from the first tenth to the last, of which p = 90 clips 98"],
        ),
        (
            EVEN * np.geomspace(8, 1, 1000),
            90.0,
            ["drift: norms fall 6.46 times from the first tenth to the last, of which p = 90 clips 0.0%"],
        ),
        (np.repeat([1e-300, 1e308], 100), 100.0, ["drift: norms rise inf times"]),
    ],
)
def test_advice_names_what_applies(norms, percentile, says):
    advice = advise(norms, replay(norms, [percentile])[0])
    assert [line[: len(start)] for line, start in zip(advice, says, strict=True)] == says
