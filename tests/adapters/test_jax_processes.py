"""One training on a mesh over two processes: each has the thresholds of numpy, in the state or in a tree of its own."""

import json
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from autoclip_core import NormHistory
from autoclip_jax import autoclip, load_history, metrics, save_history
from jax.sharding import Mesh, NamedSharding, PartitionSpec

process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
mesh = Mesh(np.array(jax.devices()), ("data",))


def on_mesh(values, *axes):
    values = np.asarray(values)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def batch_of(step):
    random = np.random.default_rng(step)
    return (random.normal(size=(8, 6)) * random.lognormal()).astype(np.float32)


def loss_of(params, batch):
    return jnp.mean((jnp.tanh(batch @ params) - 2.0) ** 2)


def train(transform, params, state, steps):
    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_of)(params, batch)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.global_norm(grads)

    seen = []
    for number in steps:
        params, state, norm = step(params, state, on_mesh(batch_of(number), "data"))
        seen.append((float(norm), float(metrics(state)["clip_threshold"])))
    return params, state, seen


def make(**options):
    return optax.chain(autoclip(30.0, **options), optax.sgd(0.05, momentum=0.9))


start = on_mesh(np.ones((6, 3), np.float32))
window = make(window=64)
params, state, first = train(window, start, jax.jit(window.init)(start), range(10))
saved = jax.tree.map(np.asarray, (params, state))  # whole in each process
_, _, undisturbed = train(window, params, state, range(10, 20))
_, _, resumed = train(window, *jax.tree.map(on_mesh, saved), range(10, 20))
history = NormHistory()
tree = make(history=history)
params, state, in_tree = train(tree, start, jax.jit(tree.init)(start), range(10))
saved, saved_history = jax.tree.map(np.asarray, (params, state)), save_history(history, state)
_, _, undisturbed_tree = train(tree, params, state, range(10, 20))
again = make(history=load_history(saved_history))
_, _, resumed_tree = train(again, *jax.tree.map(on_mesh, saved), range(10, 20))
seen = {"window": first + undisturbed, "resumed": first + resumed}
seen |= {"tree": in_tree + undisturbed_tree, "resumed tree": in_tree + resumed_tree}
print(json.dumps(seen | {"history": history.values().tolist()}))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-P", "-c", PROGRAM]
    started = [
        subprocess.Popen([*command, str(process), port], cwd=folder, stdout=subprocess.PIPE, text=True)
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_processes_see_the_same_to_the_last_bit(printed):
    assert printed[0] == printed[1]


@pytest.mark.parametrize("home", ["window", "tree"])
def test_thresholds_are_those_of_numpy(printed, home):
    import numpy as np

    norms, thresholds = np.float32(printed[0][home]).T
    for step in range(len(norms)):
        assert thresholds[step] == np.float32(np.percentile(norms[: step + 1].astype(np.float64), 30.0))
    assert (thresholds < norms).any()


def test_state_that_is_put_on_the_mesh_again_goes_on(printed):
    assert printed[0]["resumed"] == printed[0]["window"]
    assert printed[0]["resumed tree"] == printed[0]["tree"]


def test_each_process_has_the_whole_history(printed):
    norms = [norm for norm, _ in printed[0]["tree"]]
    assert printed[0]["history"] == sorted(norms)
