"""AutoClip for JAX takes every step as the core does: in the state by the kernel and by jax.numpy, and in the tree."""

import doctest
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from math import inf
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from autoclip_jax import AutoClipState, autoclip, backend, kernel, load_history, metrics, save_history
from hypothesis import given
from hypothesis import strategies as st

import autoclip_core
from autoclip_core import (
    AutoClipTypeError,
    AutoClipValueError,
    BackendError,
    ClipStep,
    NormHistory,
    SnapshotError,
    StateError,
    arrays,
)

from ..core.reference import SHAPES, make_norms  # noqa: TID252
from .contract import CompiledContract, Way, WindowContract, ulps

HOMES = ("kernel", "jax.numpy", "tree")


class Clip:
    """A transformation and its state, as the contract holds them: a step is compiled, or several as a scan."""

    def __init__(self, home, percentile=10.0, **options):
        if home == "tree":
            options = {"history": NormHistory(), **options}
        elif home == "jax.numpy":
            options = {"window": 20_000, **options}  # each step passes over the whole window
        self.home, self.options = home, options
        self.percentile = percentile
        self.state = self.tx.init(jnp.zeros(2))

    @property
    def percentile(self):
        return self._percentile

    @percentile.setter
    def percentile(self, percentile):
        self.tx = autoclip(percentile, **self.options)
        self._percentile = percentile
        self.one = jax.jit(self.take)
        self.many = jax.jit(lambda state, grads: jax.lax.scan(self.take, state, grads))

    def take(self, state, grad):
        updates, after = self.tx.update(grad, state)
        recorded = after.recorded_steps - state.recorded_steps
        return after, (ClipStep(*list(metrics(after).values())[:4], recorded), updates)

    def call(self, program, grads):
        with without_the_kernel() if self.home == "jax.numpy" else nullcontext():
            self.state, found = program(self.state, np.asarray(grads))
        return jax.tree.map(np.asarray, found)

    def step(self, grad):
        return self.call(self.one, grad)

    def run(self, grads):
        return self.call(self.many, grads)

    def counts(self):
        state = self.state
        return tuple(map(int, (state.steps, state.recorded_steps, state.clipped_steps, state.nonfinite_steps)))

    def norms(self):
        if self.home == "tree":
            self.options["history"].check()
            return self.options["history"].values().tolist()
        ascending, ring = np.asarray(self.state.norms)
        size = min(int(self.state.recorded_steps), len(ring))
        assert (ascending[size:] == np.finfo(np.float32).max).all()
        assert sorted(ring) == ascending.tolist()
        return ascending[:size].tolist()

    def save(self, folder):
        jax.block_until_ready(self.state)
        history = save_history(self.options["history"]) if self.home == "tree" else None
        return jax.tree.map(np.asarray, self.state), history, self.percentile

    def load(self, saved):
        state, history, percentile = saved
        state = jax.tree.map(jnp.asarray, state)
        jax.eval_shape(self.tx.update, jnp.zeros(2), state)
        if history is not None:
            self.options = {**self.options, "history": load_history(history)}
        self.percentile = percentile  # a program has it and its history within
        self.state = state


def without_the_kernel():
    return mock.patch.object(kernel, "_obstacle", return_value="this test does without")


WAYS = {
    home: Way(partial(Clip, home), ulps=int(home == "jax.numpy"), most_steps=20_000 if home == "jax.numpy" else 100_000)
    for home in HOMES
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestContract(CompiledContract):
    pass


WITH_WINDOW = {home: way for home, way in WAYS.items() if home != "tree"}


@pytest.mark.parametrize("way", WITH_WINDOW.values(), ids=WITH_WINDOW)
class TestWindow(WindowContract):
    pass


@pytest.fixture
def make(monkeypatch):
    """Make an autoclip whose history has its home in the state, computed by one or the other, or in the tree."""

    def make(home, percentile=10.0, **options):
        if home == "tree":
            options = {"history": NormHistory(), **options}
        elif home == "jax.numpy":
            monkeypatch.setattr(kernel, "_obstacle", lambda: "this test does without")
        return autoclip(percentile, **options)

    return make


def feed(tx, norms, state=None):
    """Run updates of these norms, in one compiled scan; the last state, and the metrics of every step."""
    if state is None:
        state = tx.init(jnp.zeros(1))

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, {**metrics(state), "update": updates[0]}

    return jax.jit(lambda state, norms: jax.lax.scan(step, state, norms))(state, jnp.asarray(norms, jnp.float32))


def numpy_thresholds(norms, percentile, window=None):
    """As the issue words it: np.float32(np.percentile(float64 history))."""
    norms = np.asarray(norms, np.float32).astype(np.float64)
    starts = [0 if window is None else max(0, end - window) for end in range(1, len(norms) + 1)]
    return np.array(
        [np.percentile(norms[start:end], percentile) for end, start in enumerate(starts, start=1)], np.float32
    )


def test_kernel_is_used_where_it_is_there():
    assert backend() == "native"


# The rule.


@pytest.mark.parametrize(
    ("home", "window"), [(home, window) for home in ("kernel", "jax.numpy") for window in (1, 2, 64, 300)]
)
def test_thresholds_are_those_of_numpy(home, window, make):
    percentiles = (0.0, 1e-3, 10.0, 33.3, 50.0, 99.9, 100.0)
    transformations = [make(home, percentile, window=window) for percentile in percentiles]
    states = [tx.init(jnp.zeros(1)) for tx in transformations]

    def step(states, norm):
        states = [tx.update(norm[None], state)[1] for tx, state in zip(transformations, states, strict=True)]
        return states, [state.clip_threshold for state in states]

    run = jax.jit(lambda norms: jax.lax.scan(step, states, norms)[1])
    for shape in sorted(set(SHAPES) - {"denormal", "huge", "both signs", "every magnitude"}):
        norms = np.maximum(make_norms(shape, 200).astype(np.float32), np.float32(1e-18))  # smaller ones have no square
        for percentile, found in zip(percentiles, run(norms), strict=True):
            assert ulps(found, numpy_thresholds(norms, percentile, window)) <= (home == "jax.numpy")


percentile_of = jax.jit(lambda ascending, size, percentile: arrays.percentile_of(jnp, ascending, size, percentile))


@given(
    st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=20),
    st.floats(2**-20, 100, width=32) | st.sampled_from([0.0, 1e-3, 10.0, 99.875]),
)
def test_percentile_over_arrays_is_within_an_ulp_for_any_neighbours(norms, percentile):
    norms = np.sort(np.array(norms, np.float32))
    percentile = np.float32(percentile)
    ascending = np.full(20, inf, np.float32)
    ascending[: len(norms)] = norms
    found = percentile_of(ascending, len(norms), percentile)
    assert ulps(found, np.float32(np.percentile(norms.astype(np.float64), float(percentile)))) <= 1


def test_percentile_over_arrays_is_within_an_ulp_where_neighbours_are_far_apart():
    # The percentile of 2 norms of any magnitudes is where each rounding of a float32 shows.
    random = np.random.default_rng(0)
    pairs = np.sort(np.exp2(random.uniform(-20, 20, (200_000, 2))).astype(np.float32))
    percentiles = random.uniform(0, 100, len(pairs)).astype(np.float32)
    found = jax.vmap(percentile_of, in_axes=(0, None, 0))(pairs, 2, percentiles)
    low, high = pairs.astype(np.float64).T
    assert ulps(found, low + (high - low) * (percentiles.astype(np.float64) / 100)) <= 1


@pytest.mark.parametrize("percentile", [33.3, 99.999999999, 100 / 3, 1e-9])
def test_percentile_reaches_the_kernel_to_the_last_bit(percentile):
    assert sum(map(float, np.asarray(kernel._exact(percentile)))) == percentile


def test_rank_is_exact_in_the_longest_window():
    # Where float32 has no digit left for the rank: every norm is its own rank.
    last = arrays.MAX_WINDOW - 1
    for percentile in (1e-5, 10.0, 33.3, 50.0, 99.99999, 100.0):
        rank, fraction, rest = arrays._position(jnp, jnp.int32(last), percentile)
        exact = last * percentile / 100
        assert int(rank) + float(fraction) + float(rest) == pytest.approx(exact, rel=1e-15, abs=1e-9)


def test_norm_is_global_and_in_float32():
    tree = {"a": jnp.full((3, 4), 2.0), "b": [jnp.full(5, -1.0, jnp.bfloat16), jnp.array([3.0 + 4.0j])]}
    tx = autoclip(window=4)
    updates, state = tx.update(tree, tx.init(tree))
    assert state.grad_norm == np.float32(np.sqrt(12 * 4 + 5 + 25))
    assert state.grad_norm.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), updates) == jax.tree.map(
        lambda leaf: (leaf.dtype, leaf.shape), tree
    )

    # 256 ones: in bfloat16 the sum of squares would stop at 256, and the norm have three digits.
    ones = jnp.full(1021, 1.0, jnp.bfloat16)
    _, state = tx.update(ones, tx.init(ones))
    assert state.grad_norm == np.float32(np.sqrt(1021))


def test_update_is_scaled_in_float32_and_keeps_its_type():
    tx = autoclip(0.0, window=4)
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.ones(1, jnp.bfloat16), state)
    updates, state = tx.update(jnp.full(1, 3.0, jnp.bfloat16), state)
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == 1.0
    assert state.clip_scale == np.float32(1) / np.float32(3)


def test_leaves_of_every_kind_that_has_a_norm():
    """Eight bits promote to nothing in JAX; numpy's float64 and plain numbers are arrays as soon as they are used."""
    eight = jnp.array([2.0, -1.0], jnp.float8_e4m3fn)
    tx = autoclip(percentile=0.0)
    state = tx.init(None)
    _, state = tx.update({"eight": eight, "numpy": np.full(4, 1.0), "number": 4.0}, state)
    updates, state = tx.update({"eight": eight * 2, "numpy": np.full(4, 2.0), "number": 8.0}, state)
    assert float(metrics(state)["clip_threshold"]) == 5.0
    assert updates["eight"].dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(updates["eight"].astype(jnp.float32), [2.0, -1.0])
    np.testing.assert_array_equal(updates["numpy"], np.full(4, 1.0))
    assert updates["number"] == 4.0


def test_complex_updates_keep_their_direction():
    tx = autoclip(0.0, window=4)
    grad = jnp.array([3.0 + 4.0j])
    _, state = tx.update(grad, tx.init(grad))
    updates, _ = tx.update(2 * grad, state)
    np.testing.assert_array_equal(updates, grad)


def test_half_updates_are_scaled_with_all_digits_of_the_scale():
    tx = autoclip(0.0, window=4)
    grad = jnp.linspace(0.1, 1, 500).astype(jnp.bfloat16)
    _, state = tx.update(grad, tx.init(grad))
    updates, state = tx.update(3 * grad, state)
    wide, scale = (3 * grad).astype(jnp.float32), state.clip_scale
    np.testing.assert_array_equal(updates, (wide * scale).astype(jnp.bfloat16))
    assert (updates != (wide * scale.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)).any()


def test_window_is_that_of_what_was_saved_with_the_default():
    assert autoclip().init(jnp.zeros(1)).norms.shape == (2, 131_072)


def test_window_of_the_largest_size_is_taken():
    autoclip(window=arrays.MAX_WINDOW)


def test_updates_without_leaves_are_a_zero_norm():
    tx = autoclip(window=4)
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert (state.steps, state.recorded_steps, state.grad_norm) == (1, 0, 0.0)


def test_thresholds_are_the_same_in_float64(run_python):
    code = """
import jax; jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np
from autoclip_core import NormHistory
from autoclip_jax import autoclip, kernel, metrics
norms = np.random.default_rng(0).lognormal(size=200).astype(np.float32).astype(float)
for home, worst in (("kernel", 0), ("tree", 0), ("jax.numpy", 1)):
    if home == "jax.numpy": kernel._obstacle = lambda: "this test does without"
    for percentile in (33.3, jnp.float64(33.3), jnp.float32(33.25)):
        home_of_norms = {"history": NormHistory()} if home == "tree" else {"window": 256}
        tx = autoclip(percentile, max_threshold=jnp.float64(1e6), **home_of_norms)
        def step(state, norm):
            updates, state = tx.update(norm[None], state)
            assert updates.dtype == jnp.float64
            return state, state.clip_threshold
        state, found = jax.lax.scan(step, tx.init(jnp.zeros(1)), jnp.asarray(norms))
        exact = np.float32([np.percentile(norms[: i + 1], float(percentile)) for i in range(200)])
        assert abs(np.asarray(found).view("i4") - exact.view("i4")).max() <= worst, (home, percentile)
        assert found.dtype == state.grad_norm.dtype == jnp.float32
"""
    assert run_python(code) == ""


# The tree.


def test_tree_remembers_all_and_is_shared():
    history = NormHistory()
    history.extend([10.0] * 5)
    norms = make_norms("log-normal", 300).astype(np.float32)
    _, found = feed(autoclip(history=history), norms)
    jax.block_until_ready(found)
    assert len(history) == 305
    np.testing.assert_array_equal(found["clip_threshold"], numpy_thresholds([10.0] * 5 + norms.tolist(), 10.0)[5:])
    history.push(1e9)  # other code may push at any time
    history.check()


def test_state_without_its_history_is_refused():
    state, _ = feed(autoclip(history=NormHistory()), [1.0] * 20)
    older = NormHistory()
    older.extend([1.0] * 19)
    for history in (NormHistory(), older):
        with pytest.raises(jax.errors.JaxRuntimeError, match="restore both from one checkpoint"):
            jax.block_until_ready(feed(autoclip(history=history), [1.0], state))


def test_history_of_another_run_is_refused():
    history = NormHistory()
    tx = autoclip(history=history)
    jax.block_until_ready(feed(tx, [1.0, 2.0, 3.0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="use a history in one run only"):
        jax.block_until_ready(feed(tx, [4.0]))
    assert len(history) == 3


def test_step_that_is_taken_again_is_recorded_once():
    history = NormHistory()
    tx = autoclip(history=history)
    state, _ = feed(tx, [1.0, 2.0, 3.0])
    step = jax.jit(tx.update)
    first, second = (step(jnp.ones(1), state)[1] for _ in range(2))
    assert first.clip_threshold == second.clip_threshold
    assert len(history) == 4


def test_saved_history_has_the_outcome_that_the_state_kept():
    history = NormHistory()
    tx = autoclip(history=history)
    start, _ = feed(tx, [1.0])
    outcomes = [tx.update(jnp.full(1, norm), start)[1] for norm in (2.0, 3.0)]
    for kept in (1, 0):
        saved = save_history(history, {"optimizer": outcomes[kept]})
        assert load_history(saved).values().tolist() == [1.0, 2.0 + kept]
    assert load_history(save_history(history)).values().tolist() == [1.0, 2.0]


def test_history_is_saved_with_its_own_state_only():
    empty = NormHistory()
    assert len(load_history(save_history(empty, autoclip(history=empty).init(jnp.ones(1))))) == 0
    history = NormHistory()
    feed(autoclip(history=history), [1.0, 2.0])
    other = NormHistory()
    states = [autoclip(history=other).init(jnp.ones(1))]
    for norms in ([1.0, 2.5], [1.0, 2.0, 3.0]):
        other.clear()
        states.append(feed(autoclip(history=other), norms)[0])
    for state in states:
        with pytest.raises(StateError, match="use a history in one run only"):
            save_history(history, state)


def test_history_that_is_gone_is_an_error():
    history = NormHistory()
    gone = history.shared_id
    del history
    step = jax.jit(lambda: kernel.observe_tree(gone, jnp.ones(1), jnp.int32(0), jnp.float32(1.0), 10.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no history with this id"):
        jax.block_until_ready(step())


# Bad input.


def test_options_in_arrays_are_checked_too():
    with pytest.raises(AutoClipValueError, match="from 0 to 100, but 200"):
        autoclip(jnp.float32(200))
    with pytest.raises(AutoClipValueError, match=r"warmup must be at least 0 .* but -1"):
        autoclip(warmup=jnp.int32(-1))
    with pytest.raises(AutoClipValueError, match="max_threshold must be above 0 or None, but 0"):
        autoclip(max_threshold=jnp.float32(0))
    assert autoclip(window=jnp.int32(8)).init(None).norms.shape == (2, 8)


def test_saved_history_may_come_back_as_any_array():
    history = NormHistory()
    history.extend([1.0, 300.0])
    saved = save_history(history)
    for back in (saved, jnp.asarray(saved), saved.astype(np.int64), saved.tolist()):
        assert load_history(back).values().tolist() == [1.0, 300.0]
    saved[:] = 0  # it is the caller's
    assert len(history) == 2


def test_damaged_history_is_refused():
    with pytest.raises(SnapshotError):
        load_history(save_history(NormHistory())[:-1])


def test_history_without_the_kernel_is_refused(other_backend, monkeypatch):
    with pytest.raises(BackendError, match="'numba' backend"):
        autoclip(history=NormHistory(backend="numba"))
    monkeypatch.setattr(kernel, "_obstacle", lambda: "no such thing")
    tx = autoclip(history=NormHistory(backend="native"))
    with pytest.raises(BackendError, match="no such thing"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


@pytest.mark.parametrize("state", [None, (), optax.EmptyState(), {"steps": 0}])
def test_update_before_init_is_refused(state):
    with pytest.raises(AutoClipTypeError, match="made by its init"):
        autoclip().update(jnp.ones(1), state)


def test_state_of_another_window_or_home_is_refused():
    params = jnp.ones(1)
    state = autoclip(window=8).init(params)
    for window in (7, 9):
        with pytest.raises(StateError, match=f"window=8, but this autoclip has window={window}"):
            autoclip(window=window).update(params, state)
    with pytest.raises(StateError, match="keeps its norms in a NormHistory"):
        autoclip(history=NormHistory()).update(params, state)
    with pytest.raises(StateError, match="keeps its norms in the state"):
        autoclip().update(params, autoclip(history=NormHistory()).init(params))


def test_properties_of_a_state_are_its_metrics():
    tx = autoclip(50.0, window=4)
    state = tx.init(jnp.ones(1))
    for norm in (0.0, np.nan, 2.0, np.inf, 8.0, np.nan):
        _, state = tx.update(jnp.full(1, norm), state)
        found = metrics(state)
        assert found.pop("skipped_in_a_row") == (not np.isfinite(norm))
        for name, value in found.items():
            np.testing.assert_array_equal(getattr(state, name), value)


def test_metrics_are_named_and_found_anywhere():
    tx = optax.chain(optax.identity(), optax.chain(autoclip(window=4), optax.adam(1e-3)))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    found = metrics(state)
    assert list(found) == [
        *("grad_norm", "clip_threshold", "clip_scale", "clipped"),
        *("steps", "clipped_steps", "nonfinite_steps", "skipped_in_a_row"),
    ]
    assert found["grad_norm"] == found["clip_threshold"] == np.float32(np.sqrt(3))
    for wrong in (optax.adam(1e-3).init(params), (state, state)):
        with pytest.raises(AutoClipValueError, match="one AutoClipState"):
            metrics(wrong)


def test_state_is_arrays_with_one_owner_each():
    leaves = jax.tree.leaves(autoclip().init(jnp.ones(1)))
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in leaves)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == len(AutoClipState._fields)


def test_rule_is_that_of_the_core_version_installed():
    assert autoclip_core.arrays is arrays


@pytest.mark.parametrize("name", ["clip", "kernel"])
def test_examples_in_the_docstrings_are_true(name, capsys):
    failed, _ = doctest.testmod(import_module(f"autoclip_jax.{name}"))
    assert failed == 0, capsys.readouterr().out
