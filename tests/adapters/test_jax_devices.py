"""AutoClip for JAX on four devices, in a process of its own that pretends to have them."""

import jax
import pytest

recent_jax = pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="jax.shard_map and jax.set_mesh are newer")

PROLOGUE = """
import warnings; warnings.simplefilter("error")
import autoclip_core, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from autoclip_core import NormHistory
from autoclip_jax import autoclip, metrics

STEPS = 200
assert jax.device_count() == 4
data = np.random.default_rng(0).lognormal(size=(STEPS, 8)).astype(np.float32)
norms = []

def loss(w, batch):
    return jnp.mean(batch) * w.sum()

def check(state, norms, history=None):
    found = metrics(state)
    assert found["steps"] == STEPS
    assert float(found["clip_threshold"]) == np.float32(np.percentile(np.float64(norms), 10.0)), found
    assert history is None or len(history) == STEPS
"""

ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def on_four_devices(run_python):
    def run(code):
        assert run_python(PROLOGUE + code, timeout=300, **ENVIRONMENT) == ""

    return run


JIT = """
mesh = jax.make_mesh((4,), ("data",), axis_types=(AXIS,))
with jax.set_mesh(mesh):
    for history in (None, NormHistory()):
        tx = optax.chain(autoclip(window=256) if history is None else autoclip(history=history), optax.sgd(1e-3))
        w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
        state = jax.jit(tx.init)(w)
        @jax.jit
        def step(w, state, batch):
            grads = jax.grad(loss)(w, batch)
            updates, state = tx.update(grads, state, w)
            return optax.apply_updates(w, updates), state
        norms = []
        for batch in data:
            w, state = step(w, state, jax.device_put(batch, NamedSharding(mesh, P("data"))))
            norms.append(float(metrics(state)["grad_norm"]))
        check(state, norms, history)
        assert len(w.sharding.device_set) == 4
"""


@recent_jax
@pytest.mark.parametrize("axis", ["Auto", "Explicit"])
def test_jit_over_a_mesh(axis, on_four_devices):
    on_four_devices(JIT.replace("AXIS", f"jax.sharding.AxisType.{axis}"))


@recent_jax
def test_shard_map(on_four_devices):
    on_four_devices("""
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for history in (None, NormHistory()):
    tx = autoclip(window=256) if history is None else autoclip(history=history)
    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    def step(w, state, batch):
        # Not through jax.grad, which would reduce by itself: the gradients of one device, and their mean.
        grads = jax.lax.pmean(jnp.mean(batch) * jnp.ones(8), "data")
        updates, state = tx.update(grads, state)
        return w - 1e-3 * updates, state
    w, state, norms = jnp.ones(8), tx.init(jnp.ones(8)), []
    for batch in data:
        w, state = step(w, state, batch)
        norms.append(float(metrics(state)["grad_norm"]))
    check(state, norms, history)
""")


SHARD_MAP = """
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
tx = autoclip(window=256)
batches = jnp.asarray(data[:, :4])

def stacked(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)
"""


@recent_jax
def test_shard_map_refuses_a_norm_that_differs_where_the_state_does_not(on_four_devices):
    on_four_devices(
        SHARD_MAP
        + """
step = jax.shard_map(tx.update, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))
for run in (step, jax.jit(step)):
    try:
        run(batches[0], tx.init(jnp.ones(4)))
    except autoclip_core.AutoClipError as error:
        assert "axis 'data'" in str(error) and "pmean(gradients, 'data')" in str(error), error
    else:
        raise AssertionError
"""
    )


@recent_jax
def test_shard_map_trains_a_model_on_each_device(on_four_devices):
    on_four_devices(
        SHARD_MAP
        + """
for is_own in (True, False):
    def train(w, batches):
        def step(state, batch):
            grads = batch if is_own else jax.lax.pmean(batch, "data")
            updates, state = tx.update(grads, state)
            return state, None
        # Parameters that differ make a state that may differ, whatever the gradients do.
        return stacked(jax.lax.scan(step, tx.init(w), batches)[0])
    run = jax.shard_map(train, mesh=mesh, in_specs=(P("data"), P(None, "data")), out_specs=P("data"))
    state = jax.jit(run)(jnp.ones(4), batches)
    for device in range(4):
        norms = data[:, device] if is_own else np.asarray(batches.mean(1))
        check(jax.tree.map(lambda leaf: leaf[device], state), norms)
"""
    )


def test_pmap(on_four_devices):
    on_four_devices("""
for history in (None, NormHistory()):
    tx = autoclip(window=256) if history is None else autoclip(history=history)
    def step(w, state, batch):
        grads = jax.lax.pmean(jax.grad(loss)(w, batch), "data")
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state
    step = jax.pmap(step, axis_name="data")
    copies = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), tree)
    w, state, norms = copies(jnp.ones(8)), copies(tx.init(jnp.ones(8))), []
    for batch in data:
        w, state = step(w, state, batch.reshape(4, 2))
        norms.append(float(metrics(state)["grad_norm"][0]))
    for device in range(4):
        check(jax.tree.map(lambda leaf: leaf[device], state), norms, history)
""")
