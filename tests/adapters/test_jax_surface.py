"""AutoClip for JAX inside everything that JAX, optax, flax, equinox and orbax do with a transformation."""

from contextlib import nullcontext
from functools import partial

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from autoclip_jax import AutoClipState, autoclip, kernel, metrics
from flax import nnx
from flax.training.train_state import TrainState
from jax.experimental import checkify

from autoclip_core import AutoClip, NormHistory

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

NORMS = np.random.default_rng(0).lognormal(size=60).astype(np.float32)
PROPERTIES = [name for name, member in vars(AutoClipState).items() if isinstance(member, property)]


def core_steps(norms, percentile=10.0, **options):
    clip = AutoClip(percentile, **options)
    return [clip.observe(float(norm)) for norm in norms]


def thresholds(steps):
    return np.array([step.threshold for step in steps], np.float32)


def quadratic(weights, batch):
    """A loss whose gradient has the norm of the batch where weights are 1."""
    return jnp.sum(weights * batch)


def same(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and jax.tree.all(
        jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right)
    )


@pytest.fixture(params=["state", "tree"])
def options(request):
    """Both homes of the history."""
    return {"window": 64} if request.param == "state" else {"history": NormHistory()}


def test_jit_and_donation_reuse_the_window():
    tx = autoclip(window=1000)
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(jnp.ones(1))
    # Donated memory alone is not enough: the kernel has to write there, not into a copy.
    assert "output_to_operand_aliasing" in step.lower(jnp.ones(1), state).compile().as_text()
    found = []
    for norm in NORMS:
        before, pointer = state, state.norms.unsafe_buffer_pointer()
        _, state = step(jnp.array([norm]), state)
        assert before.norms.is_deleted()
        assert state.norms.unsafe_buffer_pointer() == pointer
        found.append(float(state.clip_threshold))
    np.testing.assert_array_equal(found, thresholds(core_steps(NORMS)))


def test_state_that_is_not_donated_stays(options):
    tx = autoclip(**options)
    step = jax.jit(tx.update)
    _, state = step(jnp.array([2.0]), tx.init(jnp.ones(1)))
    copy = jax.tree.map(np.array, state)
    _, after = step(jnp.array([1.0]), state)
    assert same(copy, state)
    assert (after.steps, after.clip_threshold) == (2, np.float32(1.1))


def test_update_without_jit(options):
    tx = autoclip(**options)
    state = tx.init(jnp.ones(1))
    for norm in NORMS[:5]:
        _, state = tx.update(jnp.array([norm]), state)
    assert state.clip_threshold == thresholds(core_steps(NORMS[:5]))[-1]


def test_scan_unrolled_and_nested(options):
    tx = autoclip(**options)

    def step(state, norm):
        _, state = tx.update(norm[None], state)
        return state, state.clip_threshold

    def chunk(state, norms):
        return jax.lax.scan(step, state, norms, unroll=5)

    _, found = jax.jit(lambda norms: jax.lax.scan(chunk, tx.init(jnp.ones(1)), norms.reshape(6, 10)))(NORMS)
    np.testing.assert_array_equal(found.ravel(), thresholds(core_steps(NORMS)))


def test_vmap_keeps_one_history_per_member():
    tx = autoclip(window=16)
    members = NORMS.reshape(3, 20)
    states = jax.vmap(tx.init)(jnp.ones((3, 1)))
    assert states.norms.shape == (3, 2, 16)
    step = jax.jit(jax.vmap(tx.update))
    for norms in members.T:
        _, states = step(norms[:, None], states)
    for member, norms in enumerate(members):
        expected = core_steps(norms, window=16)
        assert states.clip_threshold[member] == thresholds(expected)[-1]
        assert states.clipped_steps[member] == sum(step.clipped for step in expected)
        alone = jax.tree.map(lambda leaf, member=member: leaf[member], states)
        for name in PROPERTIES:
            assert getattr(states, name).shape == (3,)
            assert getattr(states, name)[member] == getattr(alone, name)


def test_vmap_over_one_tree_is_refused():
    tx = autoclip(history=NormHistory())
    states = jax.vmap(tx.init)(jnp.ones((3, 1)))
    step = jax.vmap(tx.update)
    norms = jnp.array([[1.0], [2.0], [3.0]])
    _, states = step(norms, states)
    with pytest.raises(jax.errors.JaxRuntimeError, match="use a history in one run only"):
        jax.block_until_ready(step(norms, states))


def test_remat_takes_each_step_once(options):
    tx = autoclip(percentile=50.0, **options)

    @jax.checkpoint
    def train_two_steps(weights, state):
        for _ in range(2):
            updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(weights), state)
            weights = weights - 0.1 * updates
        return jnp.sum(weights**2), state

    (_, state), gradient = jax.jit(jax.value_and_grad(train_two_steps, has_aux=True))(jnp.ones(4), tx.init(jnp.ones(4)))
    assert jnp.isfinite(gradient).all()
    assert (state.steps, state.recorded_steps) == (2, 2)
    if "history" in options:
        assert len(options["history"]) == 2


def test_multi_steps_shows_accumulated_gradients_only(options):
    tx = optax.MultiSteps(optax.chain(autoclip(**options), optax.sgd(1.0)), every_k_schedule=3)
    params = jnp.ones(1)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for norm in NORMS:
        _, state = step(jnp.array([norm]), state, params)
    found = metrics(state)
    assert found["steps"] == len(NORMS) // 3
    assert "history" not in options or len(options["history"]) == len(NORMS) // 3
    means = NORMS.reshape(-1, 3).astype(np.float64).mean(axis=1)
    assert found["clip_threshold"] == pytest.approx(np.percentile(means, 10.0), rel=1e-6)


def test_multi_steps_survive_a_nan_in_one_part(options):
    for guard, skipped in ((optax.skip_not_finite, 0), (None, 3)):
        options = {"history": NormHistory()} if "history" in options else options
        guarded = {} if guard is None else {"should_skip_update_fn": guard}
        tx = optax.MultiSteps(optax.chain(autoclip(**options), optax.sgd(1.0)), every_k_schedule=2, **guarded)
        state = tx.init(jnp.ones(1))
        step = jax.jit(tx.update)
        for norm in (1.0, 2.0, np.nan, 3.0, 4.0, 5.0, 6.0, 7.0):
            _, state = step(jnp.array([norm]), state, jnp.ones(1))
        assert metrics(state)["skipped_in_a_row"] == skipped
        assert (metrics(state)["grad_norm"] > 0.0) == (guard is not None)


def test_sam_blends_states_and_thresholds_stay_numbers():
    tx = optax.contrib.sam(optax.chain(autoclip(50.0, window=8), optax.sgd(0.1)), optax.sgd(0.05), sync_period=2)
    state = tx.init(jnp.ones(1))
    step = jax.jit(tx.update)
    for norm in (9.0, 1.0, 9.0, np.nan, 9.0, 3.0):
        _, state = step(jnp.array([norm]), state, jnp.ones(1))
    assert metrics(state.opt_state)["clip_threshold"] == 2.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_promotion_of_types(dtype, options):
    with jax.numpy_dtype_promotion("strict"):
        tx = autoclip(50.0, **options)
        state = tx.init(jnp.ones(1, dtype))
        for norm in (0.0, 2.0, 4.0):
            updates, state = jax.jit(tx.update)(jnp.array([norm], dtype), state)
        assert (updates.dtype, state.clip_threshold, updates[0]) == (dtype, 3.0, 3.0)


SWITCHES = {
    "debug_nans": partial(jax.debug_nans, True),
    "debug_infs": partial(jax.debug_infs, True),
    "disable_jit": jax.disable_jit,
    "enable_x64": partial(enable_x64, True),
    "rank_promotion": partial(jax.numpy_rank_promotion, "raise"),
    "checkify": nullcontext,
}


@pytest.mark.parametrize("home", ["kernel", "jax.numpy", "tree"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_steps_are_the_same_under_every_switch(switch, home, monkeypatch):
    if home == "jax.numpy":
        monkeypatch.setattr(kernel, "_obstacle", lambda: "this test does without")
    norms = [0.0, 3.0, 1.0, 9.0, 2.0, 5.0]
    with SWITCHES[switch]():
        tx = autoclip(50.0, **({"history": NormHistory()} if home == "tree" else {"window": 4}))
        state, found = tx.init(jnp.ones(1)), []
        update = checkify.checkify(tx.update, errors=checkify.all_checks) if switch == "checkify" else tx.update
        step = jax.jit(update)
        for norm in norms:
            after = step(jnp.array([norm], jnp.float32), state)
            if switch == "checkify":
                error, after = after
                error.throw()
            _, state = after
            if norm > 0.0:
                found.append(metrics(state)["clip_threshold"].item())
    expected = core_steps(norms, 50.0, window=None if home == "tree" else 4)
    assert found == [step.threshold for step in expected[1:]]


def test_frozen_leaves_count_unless_they_are_masked():
    # The programs of the page.
    params, trained = {"body": jnp.ones(100), "head": jnp.ones(2)}, {"body": False, "head": True}
    frozen = optax.masked(optax.set_to_zero(), {"body": True, "head": False})
    for tx, norm in (
        (optax.chain(autoclip(), frozen), np.sqrt(102)),
        (optax.chain(frozen, autoclip()), np.sqrt(2)),
        (optax.chain(optax.masked(autoclip(), trained), frozen), np.sqrt(2)),
    ):
        _, state = tx.update(params, tx.init(params), params)
        assert metrics(state)["grad_norm"] == np.float32(norm)


@pytest.mark.parametrize("home", ["kernel", "jax.numpy", "tree"])
def test_threshold_is_a_constant_where_a_step_is_differentiated(home, monkeypatch):
    if home == "jax.numpy":
        monkeypatch.setattr(kernel, "_obstacle", lambda: "this test does without")
    tx = autoclip(50.0, **({"history": NormHistory()} if home == "tree" else {"window": 4}))
    _, state = tx.update(jnp.array([1.0, 0.0]), tx.init(jnp.ones(2)))
    start = np.array([3.0, -2.0])
    norm = np.linalg.norm(3 * start**2)

    def after(weights, xp, clip):
        return xp.sum((weights - 0.1 * clip(3 * weights**2)) ** 2)

    def constant(grad):
        return (1 + norm) / 2 / np.linalg.norm(grad) * grad

    derivative = jax.grad(after)(jnp.array(start), jnp, lambda grad: tx.update(grad, state)[0])
    expected = [
        (after(start + step, np, constant) - after(start - step, np, constant)) / 2e-6 for step in 1e-6 * np.eye(2)
    ]
    np.testing.assert_allclose(derivative, expected, rtol=1e-4)
    # A zero gradient has a norm that has no derivative.
    np.testing.assert_array_equal(jax.grad(after)(jnp.zeros(2), jnp, lambda grad: tx.update(grad, state)[0]), 0.0)


def test_apply_if_finite_hides_what_is_not(options):
    tx = optax.apply_if_finite(optax.chain(autoclip(**options), optax.sgd(0.1, momentum=0.9)), 5)
    params = jnp.ones(1)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for norm in (2.0, np.nan, np.inf, 4.0):
        updates, state = step(jnp.array([norm]), state, params)
        assert np.isfinite(norm) or updates[0] == 0.0
    found = metrics(state)
    assert (found["steps"], found["nonfinite_steps"]) == (2, 0)
    assert found["clip_threshold"] == np.float32(2.2)


@pytest.mark.parametrize("static_args", [(), ("window", "warmup")])
def test_inject_hyperparams_schedules_the_percentile(static_args):
    schedule = optax.linear_schedule(50.0, 10.0, len(NORMS))
    tx = optax.inject_hyperparams(autoclip, static_args=static_args)(percentile=schedule)
    state = tx.init(jnp.ones(1))
    step = jax.jit(tx.update)
    clip = AutoClip()
    for count, norm in enumerate(NORMS):
        _, state = step(jnp.array([norm]), state, jnp.ones(1))
        clip.percentile = float(state.hyperparams["percentile"])
        assert clip.percentile == pytest.approx(float(schedule(count)))
        assert metrics(state)["clip_threshold"] == np.float32(clip.observe(float(norm)).threshold)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_inject_hyperparams_takes_its_numbers_from_small_floats(dtype):
    params = jnp.ones(1, dtype)
    tx = optax.inject_hyperparams(autoclip)(percentile=lambda count: 50.0, max_threshold=3.0)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for norm, threshold in ((2.0, 2.0), (8.0, 3.0), (1.0, 2.0)):
        updates, state = step(params * norm, state, params)
        assert metrics(state)["clip_threshold"] == threshold
        assert updates.dtype == dtype


def test_inject_hyperparams_traces_a_warmup_that_acts():
    tx = optax.inject_hyperparams(autoclip)(percentile=0.0, warmup=2)
    state = tx.init(jnp.ones(1))
    step = jax.jit(tx.update)
    for norm, scale in ((1.0, 1.0), (4.0, 1.0), (2.0, 0.5), (8.0, 0.125)):
        _, state = step(jnp.array([norm]), state, jnp.ones(1))
        assert metrics(state)["clip_scale"] == scale


def test_percentile_that_is_traced_is_a_constant_where_a_step_is_differentiated():
    _, state = autoclip(window=4).update(jnp.ones(1), autoclip(window=4).init(jnp.ones(1)))

    def after(percentile):
        return autoclip(percentile, window=4).update(jnp.full(1, 9.0), state)[0][0]

    assert (after(50.0), jax.grad(after)(50.0)) == (5.0, 0.0)


def test_arguments_for_later_transformations_pass_through():
    tx = optax.chain(autoclip(0.0, window=4), optax.sgd(1.0), optax.contrib.reduce_on_plateau())
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), value=1.0)
    assert updates == -1.0


def test_inject_hyperparams_holds_a_percentile_within_its_bounds_and_names_what_is_static():
    tx = optax.inject_hyperparams(autoclip, static_args="window")(percentile=lambda count: 150.0 - 100.0 * count)
    state = jax.jit(tx.init)(jnp.ones(1))
    step = jax.jit(tx.update)
    for norm, threshold in ((1.0, 1.0), (2.0, 1.5), (3.0, 1.0)):  # percentiles 100, 50, 0
        _, state = step(jnp.array([norm]), state, jnp.ones(1))
        assert metrics(state)["clip_threshold"] == threshold
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(optax.inject_hyperparams(autoclip)(percentile=lambda count: 10.0).init)(jnp.ones(1))


PARAMS = {"body": {"w": jnp.ones(2), "b": jnp.ones(1)}, "head": jnp.ones(3)}
LABELS = {"body": {"w": "body", "b": "body"}, "head": "head"}


def group_gradients(random):
    return jax.tree.map(lambda leaf: jnp.asarray(random.lognormal(size=leaf.shape), jnp.float32), PARAMS)


def norm_of(tree):
    return float(np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree))))


@pytest.mark.parametrize("combine", ["multi_transform", "partition"])
def test_groups_have_a_history_each(combine):
    tx = getattr(optax, combine)({"body": autoclip(window=64), "head": autoclip(25.0, history=NormHistory())}, LABELS)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    random = np.random.default_rng(1)
    norms = {"body": [], "head": []}
    for _ in range(30):
        grads = group_gradients(random)
        _, state = step(grads, state)
        for group, into in norms.items():
            into.append(norm_of(grads[group]))
    for group, percentile in (("body", 10.0), ("head", 25.0)):
        found = metrics(state.inner_states[group])
        assert found["clip_threshold"] == pytest.approx(np.percentile(norms[group], percentile), rel=1e-6)


def test_masked_clips_the_chosen_parameters_only():
    tx = optax.masked(autoclip(0.0, window=8), {"body": True, "head": False})
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    grads = PARAMS
    for factor in (1.0, 4.0):
        grads = jax.tree.map(lambda leaf, factor=factor: factor * leaf, PARAMS)
        updates, state = step(grads, state)
    np.testing.assert_array_equal(updates["head"], grads["head"])
    assert norm_of(updates["body"]) == pytest.approx(norm_of(PARAMS["body"]))
    assert metrics(state)["grad_norm"] == pytest.approx(norm_of(grads["body"]))


# The libraries above optax.

INPUTS = np.random.default_rng(2).normal(size=(40, 8, 3)).astype(np.float32)


def check_training(state, options, losses):
    found = metrics(state)
    assert found["steps"] == len(INPUTS)
    assert 0 < found["clipped_steps"] < len(INPUTS)
    assert losses[-1] < losses[0]
    if "history" in options:
        assert len(options["history"]) == len(INPUTS)


def test_flax_linen_train_state(options):
    model = nn.Dense(1)
    tx = optax.chain(autoclip(10.0, **options), optax.adam(1e-2))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), INPUTS[0]), tx=tx)

    @jax.jit
    def step(state, batch):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((state.apply_fn(params, batch) - 1.0) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    losses = []
    for batch in INPUTS:
        state, loss = step(state, batch)
        losses.append(loss)
    check_training(state.opt_state, options, losses)


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="nnx.Optimizer was another before")
def test_flax_nnx_optimizer(options):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(autoclip(10.0, **options), optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(batch) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, batch) for batch in INPUTS]
    check_training(nnx.as_pure(optimizer.opt_state), options, losses)


def test_equinox_filtering(options):
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))  # with leaves that are functions
    tx = optax.chain(autoclip(10.0, **options), optax.adam(1e-2))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(model, state, batch):
        loss, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(batch) - 1.0) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for batch in INPUTS:
        model, state, loss = step(model, state, jnp.asarray(batch))
        losses.append(loss)
    check_training(state, options, losses)


# Checkpoints of the state.


def save_with_orbax(state, template, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


def save_with_flax(state, template, folder):
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))


def save_with_numpy(state, template, folder):
    leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(folder / "state.npz", **leaves)
    with np.load(folder / "state.npz") as saved:
        return jax.tree.unflatten(jax.tree.structure(template), [jnp.asarray(saved[number]) for number in leaves])


@pytest.mark.parametrize("save", [save_with_orbax, save_with_flax, save_with_numpy])
def test_resume_from_a_checkpoint_is_bit_identical(save, tmp_path):
    tx = optax.chain(autoclip(window=32), optax.adam(1e-2))
    step = jax.jit(tx.update)
    params = {"w": jnp.ones(2)}

    def run(state, norms):
        for norm in norms:
            updates, state = step({"w": jnp.array([0.6, 0.8]) * norm}, state, params)
        return updates, state

    _, state = run(tx.init(params), NORMS[:45])
    expected = run(state, NORMS[45:])
    restored = save(state, tx.init(params), tmp_path)
    assert isinstance(restored[0], AutoClipState)
    assert same(restored, state)
    assert same(run(restored, NORMS[45:]), expected)


def test_state_restored_into_another_window_is_refused():
    saved = flax.serialization.to_bytes(autoclip(window=8).init(jnp.ones(1)))
    tx = autoclip(window=16)
    restored = flax.serialization.from_bytes(tx.init(jnp.ones(1)), saved)
    with pytest.raises(ValueError, match="window=8"):
        tx.update(jnp.ones(1), restored)


def test_norms_of_the_state_have_no_gradient():
    tx = autoclip(50.0, window=4)
    state = tx.init(jnp.zeros(2))
    slope = jax.grad(lambda norms: tx.update(jnp.ones(2), state._replace(norms=norms))[0].sum())(state.norms)
    assert (slope == 0.0).all()
