"""The rule of AutoClip, clause by clause."""

import copy
import pickle
import warnings
from fractions import Fraction
from math import inf, isnan, nan, nextafter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import autoclip_core
from autoclip_core import AutoClip, AutoClipError, ClipStep, NonFiniteNormError

from .reference import make_norms

NOT_FINITE = (nan, inf, -inf)

positive = st.floats(1e-3, 1e3)


def observe_all(clip, norms):
    return [clip.observe(norm) for norm in norms]


def counters(clip):
    return clip.steps, clip.clipped_steps, clip.nonfinite_steps, len(clip.history)


def test_autoclip_defaults_are_those_of_the_paper():
    clip = AutoClip()
    assert (clip.percentile, clip.history.window, clip.threshold) == (10.0, None, inf)
    assert counters(clip) == (0, 0, 0, 0)


@given(st.floats(0.0, 100.0), st.floats(5e-324, 1.7e308))
def test_autoclip_never_clips_the_first_step(percentile, norm):
    assert AutoClip(percentile).observe(norm) == ClipStep(norm, norm, 1.0, False, True)


@given(st.lists(positive, min_size=1, max_size=60), st.floats(0.0, 100.0))
def test_autoclip_remembers_the_norm_and_then_takes_the_percentile(norms, percentile):
    clip = AutoClip(percentile)
    for i, norm in enumerate(norms):
        threshold = np.percentile(norms[: i + 1], percentile)
        assert clip.observe(norm) == (norm, threshold, min(threshold / norm, 1.0), threshold < norm, True)
        assert clip.threshold == threshold


@given(st.lists(positive, min_size=1, max_size=60))
def test_autoclip_remembers_the_unclipped_norm(norms):
    clip = AutoClip(0.0)
    observe_all(clip, norms)
    assert clip.history.values().tolist() == sorted(norms)


@given(st.lists(positive, min_size=1, max_size=60))
def test_autoclip_at_100_never_clips(norms):
    clip = AutoClip(100.0)
    assert [step.scale for step in observe_all(clip, norms)] == [1.0] * len(norms)
    assert (clip.clipped_steps, clip.threshold) == (0, max(norms))


@given(st.lists(positive, min_size=1, max_size=60))
def test_autoclip_at_0_clips_to_the_smallest_norm(norms):
    for i, step in enumerate(observe_all(AutoClip(0.0), norms)):
        smallest = min(norms[: i + 1])
        assert (step.threshold, step.scale, step.clipped) == (smallest, smallest / step.norm, smallest < step.norm)


@given(st.lists(positive, min_size=1, max_size=60), st.integers(-900, 900), st.floats(0.0, 100.0))
def test_autoclip_is_scale_free_to_the_last_bit(norms, exponent, percentile):
    # An epsilon in the denominator would break this, and more so the smaller the norms are.
    scale = 2.0**exponent
    plain = observe_all(AutoClip(percentile), norms)
    scaled = observe_all(AutoClip(percentile), [norm * scale for norm in norms])
    assert scaled == [step._replace(norm=step.norm * scale, threshold=step.threshold * scale) for step in plain]


def test_autoclip_scales_tiny_norms_without_an_epsilon():
    # The norms of the paper's mask-inference loss.
    clip = AutoClip(0.0)
    assert observe_all(clip, [1e-5, 4e-5])[1] == ClipStep(4e-5, 1e-5, 0.25, True, True)
    assert clip.observe(1e-300).scale == 1.0
    assert clip.observe(4e-300).scale == 1e-300 / 4e-300


def test_autoclip_never_scales_up():
    clip = AutoClip(50.0)
    observe_all(clip, [10.0, 20.0, 30.0])
    assert clip.observe(1.0) == ClipStep(1.0, 15.0, 1.0, False, True)


def test_autoclip_does_not_clip_a_norm_at_the_threshold():
    clip = AutoClip(50.0)
    observe_all(clip, [1.0, 3.0])
    assert clip.observe(2.0) == ClipStep(2.0, 2.0, 1.0, False, True)
    assert clip.observe(nextafter(2.0, 3.0)).clipped
    assert clip.clipped_steps == 2


@pytest.mark.parametrize("zero", [0.0, -0.0, 0, np.float32(0)])
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "pass"])
def test_zero_norm_is_not_remembered_and_not_clipped(nonfinite, zero):
    clip = AutoClip(0.0, nonfinite=nonfinite)
    assert clip.observe(zero) == ClipStep(0.0, inf, 1.0, False, False)
    observe_all(clip, [2.0, 4.0])
    assert clip.observe(zero) == ClipStep(0.0, 2.0, 1.0, False, False)
    assert counters(clip) == (4, 1, 0, 2)


@pytest.mark.parametrize("norm", NOT_FINITE[:2])
def test_nonfinite_norm_is_dropped_under_skip(norm):
    clip = AutoClip(50.0, max_threshold=100.0)
    with pytest.warns(RuntimeWarning, match=rf"norm is {norm} at step 1\b.*dropped"):
        step = clip.observe(norm)
    assert step[1:] == (100.0, 0.0, False, False)
    observe_all(clip, [2.0, 4.0])
    step = clip.observe(norm)
    assert step[1:] == (3.0, 0.0, False, False)
    assert step.norm == norm or isnan(norm)
    assert counters(clip) == (4, 1, 2, 2)


def test_nonfinite_norm_of_an_empty_history_has_an_infinite_threshold():
    assert AutoClip(nonfinite="pass").observe(nan)[1:] == (inf, 1.0, False, False)


@pytest.mark.parametrize("norm", NOT_FINITE[:2])
def test_nonfinite_norm_is_an_error_under_raise_and_is_counted(norm):
    clip = AutoClip(50.0, nonfinite="raise")
    observe_all(clip, [2.0, 4.0])
    with pytest.raises(NonFiniteNormError, match=f"norm is {norm} at step 3") as caught:
        clip.observe(norm)
    assert isinstance(caught.value, AutoClipError)
    assert isinstance(caught.value, FloatingPointError)
    assert counters(clip) == (3, 1, 1, 2)
    assert clip.observe(3.0) == ClipStep(3.0, 3.0, 1.0, False, True)


@pytest.mark.parametrize("norm", NOT_FINITE[:2])
def test_nonfinite_norm_is_let_through_under_pass(norm):
    clip = AutoClip(50.0, nonfinite="pass")
    observe_all(clip, [2.0, 4.0])
    assert clip.observe(norm)[1:] == (3.0, 1.0, False, False)
    assert counters(clip) == (3, 1, 1, 2)


def test_nonfinite_norm_warns_once_and_at_the_line_that_observed_it():
    clip = AutoClip()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observe_all(clip, [1.0, nan, inf, nan])
        clip.observe(nan)
    assert [(warning.category, warning.filename) for warning in caught] == [(RuntimeWarning, __file__)]
    assert "at step 2;" in str(caught[0].message)
    assert clip.nonfinite_steps == 4


def test_nonfinite_norm_that_becomes_an_error_by_its_warning_is_counted_once():
    clip = AutoClip()
    with pytest.raises(RuntimeWarning):  # what -W error makes of it, and this run
        clip.observe(nan)
    assert clip.observe(nan).scale == 0.0
    assert counters(clip) == (2, 0, 2, 0)


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "pass"])
@pytest.mark.parametrize("norm", [-1.0, -5e-324, -inf, -3, np.float32(-1)])
def test_negative_norm_is_an_error_and_is_not_counted(norm, nonfinite):
    clip = AutoClip(50.0, nonfinite=nonfinite)
    observe_all(clip, [2.0, 4.0])
    before = clip.state_dict()
    with pytest.raises(ValueError, match=f"cannot be negative, but {float(norm)!r}") as caught:
        clip.observe(norm)
    assert isinstance(caught.value, AutoClipError)
    assert clip.state_dict() == before


def test_warmup_counts_remembered_norms_and_shows_the_real_threshold():
    clip = AutoClip(0.0, warmup=3, nonfinite="pass")
    norms = [2.0, 0.0, 4.0, nan, inf, 8.0, 8.0]
    scales = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25]
    thresholds = [2.0] * 7
    steps = observe_all(clip, norms)
    assert [step.scale for step in steps] == scales
    assert [step.threshold for step in steps] == thresholds
    assert [step.clipped for step in steps] == [False] * 6 + [True]
    assert [step.recorded for step in steps] == [True, False, True, False, False, True, True]
    assert counters(clip) == (7, 1, 2, 4)


def test_warmup_is_not_prolonged_by_a_window():
    clip = AutoClip(0.0, window=2, warmup=4)
    assert [step.clipped for step in observe_all(clip, [1.0, 2.0, 3.0, 4.0, 5.0])] == [False] * 4 + [True]


def test_max_threshold_caps_the_threshold():
    clip = AutoClip(100.0, max_threshold=3.0)
    assert observe_all(clip, [1.0, 6.0, 2.0]) == [
        ClipStep(1.0, 1.0, 1.0, False, True),
        ClipStep(6.0, 3.0, 0.5, True, True),
        ClipStep(2.0, 3.0, 1.0, False, True),
    ]
    assert clip.threshold == 3.0
    assert clip.history.values().tolist() == [1.0, 2.0, 6.0]
    assert clip.observe(0.0).threshold == 3.0


def test_max_threshold_acts_on_the_first_step_and_before_it():
    assert AutoClip(max_threshold=3.0).threshold == 3.0
    assert AutoClip(max_threshold=3.0).observe(6.0) == ClipStep(6.0, 3.0, 0.5, True, True)
    assert AutoClip(max_threshold=3.0).observe(0.0) == ClipStep(0.0, 3.0, 1.0, False, False)


def test_max_threshold_acts_during_the_warmup():
    clip = AutoClip(0.0, warmup=10, max_threshold=3.0)
    assert observe_all(clip, [1.0, 2.0, 6.0]) == [
        ClipStep(1.0, 1.0, 1.0, False, True),
        ClipStep(2.0, 1.0, 1.0, False, True),
        ClipStep(6.0, 1.0, 0.5, True, True),
    ]
    assert clip.clipped_steps == 1


@given(st.lists(st.tuples(positive, st.floats(0.0, 100.0)), min_size=1, max_size=60))
def test_percentile_may_be_another_at_every_step(schedule):
    clip = AutoClip()
    norms = []
    for norm, percentile in schedule:
        clip.percentile = percentile
        norms.append(norm)
        assert clip.observe(norm).threshold == clip.threshold == np.percentile(norms, percentile)
        assert clip.percentile == percentile


@pytest.mark.parametrize("bad", [-1, 100.1, nan, "10", None, True])
def test_percentile_that_is_refused_leaves_the_old_one(bad):
    clip = AutoClip(25.0)
    with pytest.raises(AutoClipError, match="percentile must be"):
        clip.percentile = bad
    assert clip.percentile == 25.0


@given(st.lists(positive, min_size=1, max_size=60), st.integers(1, 20))
def test_window_takes_the_percentile_of_the_last_norms(norms, window):
    clip = AutoClip(30.0, window=window, nonfinite="pass")
    for i, norm in enumerate(norms):
        assert clip.observe(norm).threshold == np.percentile(norms[max(0, i + 1 - window) : i + 1], 30.0)
        observe_all(clip, [0.0, nan, inf])  # what is not remembered takes no place in the window
    assert clip.history.window == window


@pytest.mark.parametrize("norm", [np.float64(2.0), np.float32(2.0), 2, Fraction(2)], ids=lambda n: type(n).__name__)
def test_step_holds_plain_values_whatever_the_norm_was(norm):
    clip = AutoClip(50)
    for step in (clip.observe(norm), clip.observe(2 * norm), clip.observe(0 * norm)):
        assert [type(value) for value in step] == [float, float, float, bool, bool]
    assert type(clip.percentile) is float


def test_step_names_its_fields():
    step = ClipStep(norm=2.0, threshold=1.0, scale=0.5, clipped=True, recorded=True)
    assert step._fields == ("norm", "threshold", "scale", "clipped", "recorded")
    assert step == (2.0, 1.0, 0.5, True, True)
    assert pickle.loads(pickle.dumps(step)) == step


def test_autoclip_options_beyond_the_percentile_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        AutoClip(10.0, 100)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))])
def test_autoclip_duplicates_go_on_alike_and_apart(duplicate):
    norms = make_norms("log-normal", 900).tolist()
    clip = AutoClip(25.0, window=300, warmup=50, max_threshold=20.0)
    observe_all(clip, norms[:400])
    twin = duplicate(clip)
    assert observe_all(twin, norms[400:]) == observe_all(clip, norms[400:])
    twin.observe(1.0)
    assert (twin.steps, clip.steps) == (901, 900)


def test_autoclip_shows_itself():
    clip = AutoClip(50.0)
    observe_all(clip, [2.0, 4.0])
    assert repr(clip) == "<AutoClip percentile=50 threshold=3 steps=2 clipped_steps=1 nonfinite_steps=0>"


def test_version_is_that_of_the_distribution():
    assert autoclip_core.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = autoclip_core.no_such_name
