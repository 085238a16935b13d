"""A run that is saved and resumed is the run that was never interrupted."""

import pickle
from math import inf, nan
from types import MappingProxyType

import hypothesis.strategies as st
import pytest
from hypothesis import given

from autoclip_core import AutoClip, AutoClipError, AutoClipTypeError, SnapshotError, StateError

from .reference import make_norms

KEYS = {"format", "percentile", "window", "steps", "recorded_steps", "clipped_steps", "nonfinite_steps", "history"}

norms_of_a_run = st.lists(st.floats(1e-3, 1e3) | st.sampled_from([0.0, nan, inf, 1.0]), max_size=80)


def run(clip, norms):
    return [clip.observe(norm)[1:] for norm in norms]  # without the norm itself, which may be NaN


def trained(window=None, count=20):
    clip = AutoClip(30.0, window=window, nonfinite="pass")
    run(clip, [*make_norms("log-normal", count).tolist(), 0.0, nan])
    return clip


def test_state_is_plain_scalars_and_bytes():
    for window in (None, 5):
        state = trained(window).state_dict()
        assert state.keys() == KEYS
        assert type(state["history"]) is bytes
        assert {type(value) for value in state.values()} <= {int, float, bytes, type(None)}
        assert pickle.loads(pickle.dumps(state)) == state


def test_state_is_a_copy_that_later_steps_leave_alone():
    clip = trained()
    state = clip.state_dict()
    kept = dict(state)
    clip.observe(3.0)
    other = AutoClip()
    other.load_state_dict(state)
    other.observe(4.0)
    assert state == kept


@given(
    norms_of_a_run,
    st.integers(0, 80),
    st.none() | st.integers(1, 30),
    st.integers(0, 40),
    st.sampled_from(["skip", "pass"]),
    st.none() | st.floats(1e-2, 1e2),
    st.floats(0.0, 100.0),
)
@pytest.mark.filterwarnings("ignore:The gradient norm:RuntimeWarning")
def test_resumed_run_is_the_uninterrupted_one(norms, cut, window, warmup, nonfinite, max_threshold, percentile):
    options = {"window": window, "warmup": warmup, "nonfinite": nonfinite, "max_threshold": max_threshold}
    whole = AutoClip(percentile, **options)
    first = AutoClip(percentile, **options)
    expected = run(whole, norms)
    steps = run(first, norms[:cut])
    second = AutoClip(**options)  # the percentile comes with the state
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    steps += run(second, norms[cut:])
    assert steps == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("window", [None, 1000])
def test_resumed_run_is_the_uninterrupted_one_in_a_large_history(window):
    norms = make_norms("drifting", 12_000).tolist()
    whole, first, second = (AutoClip(10.0, window=window) for _ in range(3))
    expected = run(whole, norms)
    run(first, norms[:7000])
    second.load_state_dict(first.state_dict())
    assert run(second, norms[7000:]) == expected[7000:]
    assert second.state_dict() == whole.state_dict()
    second.history.check()


def test_state_brings_its_percentile_and_leaves_the_other_options():
    clip = AutoClip(90.0, warmup=100, max_threshold=1e-9, nonfinite="raise")
    clip.load_state_dict(trained().state_dict())
    assert clip.percentile == 30.0
    assert clip.observe(5.0).scale == 1e-9 / 5.0
    with pytest.raises(FloatingPointError):
        clip.observe(nan)
    clip.percentile = 90.0
    assert clip.percentile == 90.0


def test_state_of_a_run_that_never_began_loads():
    clip = trained()
    clip.load_state_dict(AutoClip(20.0).state_dict())
    assert clip.state_dict() == AutoClip(20.0).state_dict()


def test_state_loads_from_any_mapping_and_leaves_it_alone():
    state = trained().state_dict()
    clip = AutoClip()
    clip.load_state_dict(MappingProxyType(state | {"added_by_a_later_release": 1}))
    assert clip.state_dict() == state


def refuses(clip, state, error, match):
    before = clip.state_dict()
    history = clip.history
    with pytest.raises(error, match=match) as caught:
        clip.load_state_dict(state)
    assert isinstance(caught.value, AutoClipError)
    assert clip.state_dict() == before
    assert clip.history is history


@pytest.mark.parametrize(("saved", "into"), [(None, 5), (5, None), (5, 6)])
def test_state_of_another_window_is_refused(saved, into):
    refuses(trained(into), trained(saved).state_dict(), StateError, rf"window={saved}\b.*window={into}\b")


@pytest.mark.parametrize("key", sorted(KEYS - {"format"}))
def test_state_that_lacks_a_value_is_refused(key):
    state = trained(5).state_dict()
    del state[key]
    refuses(trained(5), state, StateError, f"lacks {key}")


@pytest.mark.parametrize("format_", [0, 2, "1", None])
def test_state_of_another_format_is_refused(format_):
    refuses(trained(), trained().state_dict() | {"format": format_}, StateError, f"format {format_!r}")


@pytest.mark.parametrize("state", [None, [], b"state", 3, trained])
def test_state_that_is_no_mapping_is_refused(state):
    refuses(trained(), state, AutoClipTypeError, type(state).__name__)


def test_state_that_is_empty_is_refused():
    refuses(trained(), {}, StateError, "state_dict")


@pytest.mark.parametrize(
    "damage",
    [
        {"percentile": nan},
        {"percentile": 101.0},
        {"percentile": "10"},
        {"percentile": None},
        {"window": 7},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": True},
        {"steps": 2**63},
        {"recorded_steps": None},
        {"clipped_steps": "3"},
        {"nonfinite_steps": -3},
        {"history": None},
        {"history": "text"},
        {"history": b""},
        {"history": [1.0, 2.0]},
    ],
    ids=str,
)
def test_state_with_a_damaged_value_is_refused(damage):
    ((key, value),) = damage.items()
    shown = {"history": "snapshot"}.get(key, key)
    refuses(trained(5), trained(5).state_dict() | damage, (ValueError, TypeError), rf"{shown}|{value}")


def test_state_with_a_damaged_history_is_refused():
    state = trained().state_dict()
    damaged = bytearray(state["history"])
    damaged[70] ^= 4
    refuses(trained(), state | {"history": bytes(damaged)}, SnapshotError, f"{len(damaged)} bytes")


def test_state_of_one_backend_goes_on_alike_in_the_other(backend, other_backend, run_python):
    # AutoClip takes the backend of its process, so the other one needs a process of its own.
    clip = AutoClip(25.0, window=300)
    run(clip, make_norms("log-normal", 1000).tolist())
    code = f"""
import pickle
from autoclip_core import AutoClip

clip = AutoClip(window=300)
clip.load_state_dict(pickle.loads({pickle.dumps(clip.state_dict())!r}))
steps = [clip.observe(1.0 + i % 7) for i in range(500)]
print(pickle.dumps((clip.history.backend, steps, clip.state_dict())).hex())
"""
    other, steps, state = pickle.loads(bytes.fromhex(run_python(code, AUTOCLIP_BACKEND=other_backend)))
    assert (clip.history.backend, other) == (backend, other_backend)
    assert [clip.observe(1.0 + i % 7) for i in range(500)] == steps
    assert clip.state_dict() == state
