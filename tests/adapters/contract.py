"""What every way of clipping must do, stated once: an adapter brings its ways, and passes.

The numbers have two sources that know nothing of frameworks: the core's AutoClip, and numpy.percentile of a list. Where
a framework computes in float32 its thresholds are theirs, rounded.

An adapter's tests say for each of its ways how a clip is made, in a `Way`, and derive their test classes from the
contracts that concern it. Such a clip has

    step(grad)    give it a gradient of two float32 numbers; return a ClipStep, and the update that an optimizer makes
                  with it at a learning rate of 1
    run(grads)    several steps, in one program where there are some: the same, each an array over the steps
    percentile    may be assigned
    counts()      steps, recorded steps, clipped steps, steps with a norm that was not finite
    norms()       the norms that are remembered, ascending
    save(folder)  return its state, as users of the framework save it
    load(state)   continue from it, or raise and change nothing
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np
import pytest

from autoclip_core import AutoClip, AutoClipTypeError, AutoClipValueError, ClipStep, NonFiniteNormError, NormHistory

from ..core.reference import assert_survived, hostile_gradients  # noqa: TID252


@dataclass(frozen=True)
class Way:
    """A way of clipping.

    make: takes the percentile and the options of AutoClip, returns a clip.
    in_float32: whether thresholds and scales are rounded to float32.
    ulps: how far a rounded threshold may be from the float32 that is nearest.
    most_steps: how many steps of the recorded trace are to be taken.
    loads_at_once: whether a state that is refused has changed nothing; else the framework loads piece by piece.
    """

    make: Callable[..., Any]
    in_float32: bool = True
    ulps: int = 0
    most_steps: int = 1_000
    loads_at_once: bool = True


def stacked(steps):
    """ClipSteps as one, whose fields are arrays."""
    return ClipStep(*(np.array(field, np.float64) for field in zip(*steps, strict=True)))


class ByStep:
    """The `run` of a clip that takes one step at a time."""

    def run(self, grads):
        steps, updates = zip(*map(self.step, grads), strict=True)
        return stacked(steps), np.array(updates)


def gradient(norm, number=0):
    """A gradient of this norm to the last bit, of either sign and in either place."""
    grad = np.zeros(2, np.float32)
    grad[number % 2] = norm if number % 3 else -norm
    return grad


def ulps(actual, expected):
    """The largest distance of float32 numbers of one sign in units in the last place; infinity is one more."""
    actual, expected = (np.asarray(values, np.float32).view(np.int32).astype(np.int64) for values in (actual, expected))
    return np.abs(actual - expected).max(initial=0)


def run_core(norms, percentile=10.0, **options):
    """What the core decides, and the core after that."""
    core = AutoClip(percentile, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [core.observe(np.float32(abs(norm)).item()) for norm in norms], core


def assert_steps(way, grads, found, expected, *, warmup=0, max_threshold=inf):
    """Steps, and the updates that they left, are what they must be."""
    (norm, threshold, scale, clipped, recorded), updates = found
    exact = stacked(expected)
    np.testing.assert_array_equal(norm, exact.norm)
    np.testing.assert_array_equal(recorded, exact.recorded)
    if way.in_float32:
        assert ulps(threshold, exact.threshold) <= way.ulps
        np.testing.assert_allclose(scale, exact.scale, rtol=3e-7)
        limit = np.where(np.cumsum(recorded) > warmup, threshold, max_threshold)
        np.testing.assert_array_equal(clipped, np.isfinite(norm) & (norm > limit))
        rounded_away = clipped != exact.clipped
        np.testing.assert_allclose(norm[rounded_away], threshold[rounded_away], rtol=3e-7)
    else:
        np.testing.assert_array_equal(threshold, exact.threshold)
        np.testing.assert_array_equal(scale, exact.scale)
        np.testing.assert_array_equal(clipped, exact.clipped)
    kept = scale > 0.0
    np.testing.assert_allclose(updates[kept], np.float64(grads)[kept] * scale[kept, None], rtol=3e-7)
    np.testing.assert_array_equal(updates[~kept], 0.0)


def assert_scaled(update, grad, threshold):
    """The update is the gradient, clipped to the threshold."""
    np.testing.assert_allclose(update, np.float64(grad) * min(threshold / np.abs(grad).max(), 1.0), rtol=3e-7)


def assert_counts(clip, found, core, norms):
    """The counters, and what is remembered, are those of the core."""
    clipped_steps = np.count_nonzero(found[0].clipped)
    assert clip.counts() == (core.steps, core.recorded_steps, clipped_steps, core.nonfinite_steps)
    assert clipped_steps == pytest.approx(core.clipped_steps, abs=10)
    np.testing.assert_array_equal(clip.norms(), core.history.values())
    assert core.nonfinite_steps == np.count_nonzero(~np.isfinite(norms))


def recorded(trace, count):
    """So many norms of the recorded trace: equal ones at the beginning, and all kinds that are not remembered."""
    unusual = [norm for norm in trace[9_000:12_000] if not 0.0 < norm < inf]
    norms = [*trace[9_950:10_020], *unusual, *trace[12_000:]] if count < len(trace) else trace
    return norms[:count]


# Zeros, NaN and infinities before the first norm, within a warm-up of 3 norms, and after it; norms above the threshold
# at its last step, and at the one after it; norms at a cap of 5, and beside it; norms equal to the threshold.
NORMS_FOR_OPTIONS = [
    *(0.0, nan, inf, 4.0, 0.0, np.nextafter(np.float32(5), np.float32(9)).item(), nan, 9.0, 8.0, inf, 2.0, 7.0),
    *(5.0, np.nextafter(np.float32(5), np.float32(0)).item(), -0.0, nan, 3.0, 3.0, 100.0, 1e-3, 30.0),
]

BAD_OPTIONS = [
    ({"percentile": -1.0}, AutoClipValueError, "percentile must be from 0 to 100, but -1"),
    ({"percentile": 100.5}, AutoClipValueError, "percentile must be from 0 to 100, but 100.5"),
    ({"percentile": nan}, AutoClipValueError, "percentile must be from 0 to 100, but nan"),
    ({"percentile": "10"}, AutoClipTypeError, "percentile must be a real number, but '10'"),
    ({"window": 0}, AutoClipValueError, "window must be at least 1 .* but 0"),
    ({"window": -5}, AutoClipValueError, "window must be at least 1 .* but -5"),
    ({"window": 2.5}, AutoClipTypeError, "window must be a whole number, but 2.5"),
    ({"warmup": -1}, AutoClipValueError, "warmup must be at least 0 .* but -1"),
    ({"warmup": 0.5}, AutoClipTypeError, "warmup must be a whole number, but 0.5"),
    ({"max_threshold": 0.0}, AutoClipValueError, "max_threshold must be above 0 or None, but 0.0"),
    ({"max_threshold": nan}, AutoClipValueError, "max_threshold must be above 0 or None, but nan"),
    ({"max_threshold": "1"}, AutoClipTypeError, "max_threshold must be a real number, but '1'"),
    ({"nonfinite": "drop"}, AutoClipValueError, "nonfinite must be \"skip\", .* but 'drop' was given"),
]


@pytest.mark.filterwarnings("ignore:The gradient norm")
class Contract:
    """What every way of clipping must do."""

    def test_recorded_trace_of_the_core_gives_the_same_steps(self, way, trace):
        assert_takes_the_trace(way, trace, 10.0)

    @pytest.mark.parametrize(
        "options",
        [{"warmup": 3}, {"max_threshold": 5.0, "nonfinite": "pass"}, {"warmup": 3, "max_threshold": 5.0}],
        ids=str,
    )
    def test_options_act_as_in_the_core(self, way, options):
        expected, core = run_core(NORMS_FOR_OPTIONS, 50.0, **options)
        grads = [gradient(norm, number) for number, norm in enumerate(NORMS_FOR_OPTIONS)]
        clip = way.make(50.0, **options)
        steps, updates = zip(*map(clip.step, grads), strict=True)
        found = stacked(steps), np.array(updates)
        limits = {name: options[name] for name in ("warmup", "max_threshold") if name in options}
        assert_steps(way, grads, found, expected, **limits)
        assert_counts(clip, found, core, NORMS_FOR_OPTIONS)
        is_finite = np.isfinite(NORMS_FOR_OPTIONS)
        assert set(found[0].scale[~is_finite]) == {1.0 if "nonfinite" in options else 0.0}

    def test_percentile_may_change_at_any_step(self, way):
        norms = np.random.default_rng(5).lognormal(size=20).astype(np.float32).tolist()
        clip, clipped_steps = way.make(10), 0
        for number, norm in enumerate(norms):
            if number % 7 == 6:
                clip.percentile = (0.1, 99.9)[number // 7]
            grad = gradient(norm, number)
            step, update = clip.step(grad)
            exact = np.percentile(norms[: number + 1], clip.percentile)
            assert ulps(step.threshold, exact) <= way.ulps if way.in_float32 else step.threshold == exact
            assert_scaled(update, grad, exact)
            clipped_steps += bool(step.clipped)
        assert clip.percentile == 99.9
        assert clip.counts() == (20, 20, clipped_steps, 0)
        for bad, error in ((101, AutoClipValueError), (-0.1, AutoClipValueError), ("50", AutoClipTypeError)):
            with pytest.raises(error, match="percentile must be"):
                clip.percentile = bad
            assert clip.percentile == 99.9

    def test_state_may_be_saved_and_loaded_at_any_step(self, way, tmp_path):
        assert_resumes(way, tmp_path)

    def test_hostile_gradients_spoil_nothing(self, way):
        clip = way.make()
        grads = hostile_gradients()
        steps, updates = clip.run(grads)
        scale = np.float64(steps.scale)
        assert ((scale >= 0.0) & (scale <= 1.0)).all()
        kept = scale > 0.0
        np.testing.assert_allclose(updates[kept], np.float64(grads)[kept] * scale[kept, None], rtol=1e-6, atol=2e-45)
        assert_survived(steps.norm, clip.norms(), 1.0 - 0.1 * np.cumsum(updates, axis=0))

    @pytest.mark.parametrize(("options", "error", "says"), BAD_OPTIONS, ids=lambda value: str(value)[:30])
    def test_bad_options_are_refused(self, way, options, error, says):
        with pytest.raises(error, match=says):
            way.make(**options)


@pytest.mark.filterwarnings("ignore:The gradient norm")
class WindowContract:
    """What every way must do that takes a window."""

    def test_recorded_trace_of_the_core_gives_the_same_steps(self, way, trace):
        assert_takes_the_trace(way, trace, 75.0, window=min(5_000, way.most_steps // 4))

    @pytest.mark.parametrize("window", [1, 7])
    def test_window_remembers_the_last_norms(self, way, window):
        norms = np.float32([*range(1, 12), *range(12, 3, -1), *[2.5] * 9, 0.1, 0.7]).tolist()
        clip = way.make(30.0, window=window)
        for number, norm in enumerate(norms):
            grad = gradient(norm, number)
            step, update = clip.step(grad)
            last = norms[max(0, number + 1 - window) : number + 1]
            assert ulps(step.threshold, np.percentile(last, 30.0)) <= way.ulps
            assert_scaled(update, grad, np.percentile(last, 30.0))
            assert clip.norms() == sorted(last)
        assert clip.counts()[1] == len(norms) > 2 * window

    def test_state_may_be_saved_and_loaded_at_any_step(self, way, tmp_path):
        assert_resumes(way, tmp_path, window=3)

    def test_state_of_another_window_is_refused_and_changes_nothing(self, way, tmp_path):
        clip, other = way.make(window=4), way.make(window=5)
        for number in range(6):
            clip.step(gradient(1.0 + number))
            other.step(gradient(10.0 - number))
        state, before = clip.save(tmp_path), (other.counts(), other.norms())
        with pytest.raises(ValueError, match=r"window|shape"):
            other.load(state)
        assert (other.counts(), other.norms()) == before or not way.loads_at_once


def assert_takes_the_trace(way, trace, percentile, **options):
    """Each step is the core's."""
    norms = recorded(trace, way.most_steps)
    expected, core = run_core(norms, percentile, **options)
    grads = [gradient(norm, number) for number, norm in enumerate(norms)]
    clip = way.make(percentile, **options)
    found = clip.run(grads)
    assert_steps(way, grads, found, expected)
    assert_counts(clip, found, core, norms)
    assert core.nonfinite_steps > 0
    assert 0.0 in norms
    assert 0 < core.clipped_steps < core.recorded_steps < core.steps


def assert_resumes(way, folder, **options):
    """A clip goes on from each state as the one does that it was saved from."""
    norms = [3.0, nan, 1.0, 0.0, 9.0, 2.0, inf, 5.0]
    grads = [gradient(norm, number) for number, norm in enumerate(norms)]
    whole, follower, fresh = (way.make(40.0, **options) for _ in range(3))
    for number, grad in enumerate(grads):
        (folder / str(number)).mkdir()
        state = whole.save(folder / str(number))
        if number == 4:
            middle = state
        # The follower has run before, and further than the state, at another percentile.
        follower.percentile = 90.0
        follower.step(gradient(1e3, number))
        follower.load(state)
        assert follower.percentile == 40.0
        assert (follower.counts(), follower.norms()) == (whole.counts(), whole.norms())
        (step, update), (step_after, update_after) = (clip.step(grad) for clip in (whole, follower))
        np.testing.assert_equal([*step_after, *update_after], [*step, *update])
    # What was saved is a copy.
    fresh.load(middle)
    steps, updates = fresh.run(grads[4:])
    np.testing.assert_equal([*(field[-1] for field in steps), *updates[-1]], [*step, *update])
    assert (fresh.counts(), fresh.norms()) == (whole.counts(), whole.norms())


class HostContract(Contract):
    """What else every way must do where the host decides."""

    def test_raise_tells_of_each_norm_that_is_not_finite(self, way):
        clip, kept, raised = way.make(50.0, nonfinite="raise"), [], []
        for number, norm in enumerate([2.0, nan, 3.0, 4.0, inf, 5.0, 1.0]):
            try:
                step, update = clip.step(gradient(norm, number))
            except NonFiniteNormError as error:
                raised.append(str(error))
                continue
            assert np.isfinite(update).all()
            if isfinite(norm):
                kept.append(norm)
                assert step.threshold == np.percentile(clip.norms(), 50.0)
        assert ["nan" in raised[0], "inf" in raised[1], len(raised)] == [True, True, 2]
        assert clip.counts()[3] == 2
        assert {*kept} <= {*clip.norms()} <= {1.0, 2.0, 3.0, 4.0, 5.0}
        assert len(kept) >= 3


class CompiledContract(Contract):
    """What else every way must do where a compiled program decides."""

    @pytest.mark.parametrize(
        ("options", "error", "says"),
        [
            ({"nonfinite": "raise"}, AutoClipValueError, "cannot be done inside a compiled program"),
            ({"history": [1.0]}, AutoClipTypeError, "history must be a NormHistory or None, but a list was given"),
            ({"history": NormHistory(5)}, AutoClipValueError, "give window=5"),
            ({"history": NormHistory(), "window": 7}, AutoClipValueError, "window=7 and a history were given"),
            ({"history": None, "window": None}, AutoClipValueError, "give history=NormHistory"),
            ({"history": None, "window": 2**24 + 1}, AutoClipValueError, "at most 16,777,216 in .* but 16,777,217"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_what_no_program_can_do_is_refused(self, way, options, error, says):
        with pytest.raises(error, match=says):
            way.make(**options)
