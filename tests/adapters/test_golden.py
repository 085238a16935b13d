"""States that earlier releases saved go on to the thresholds of the core: golden/make.py made them."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from autoclip_core import AutoClip as Core
from autoclip_core import NormHistory

from .golden.make import FOLDER, NORMS, PERCENTILE, WINDOW

LATER = [2.5, 0.0, 9.0, 0.5, float("nan"), 4.5, 1.5, 3.5, 7.5]


def golden(kind):
    """The files of a kind, each with the options it was made with and the core after the same norms."""
    return [
        pytest.param(file, name, home, id=file.name)
        for home in ("window", "tree")
        for name in NORMS
        for file in sorted(FOLDER.glob(f"*[0-9]-{kind}-{home}-{name}{'.index' if kind == 'tensorflow' else '.npz'}"))
    ]


def steps_after(name, home):
    """What the core decides after these norms."""
    core = Core(PERCENTILE, window=WINDOW if home == "window" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [core.observe(norm) for norm in [*NORMS[name], *LATER]][len(NORMS[name]) :], core


def check(found, core):
    """That the metrics of the last step are those of the core."""
    assert (found["steps"], found["clipped_steps"], found["nonfinite_steps"]) == (
        *(core.steps, core.clipped_steps, core.nonfinite_steps),
    )


def test_golden_states_are_all_there():
    kinds = ["jax", "tensorflow", "keras-tensorflow", "keras-torch"]
    assert [len(golden(kind)) for kind in kinds] == [4] * 4
    assert len(golden("keras-jax")) == 2


@pytest.mark.parametrize(("file", "name", "home"), golden("jax"))
@pytest.mark.parametrize("saved", ["arrays", "flax"])
def test_state_of_jax_goes_on(file, name, home, saved):
    flax = pytest.importorskip("flax.serialization")
    import jax
    import jax.numpy as jnp
    import optax
    from autoclip_jax import autoclip, load_history, metrics

    with np.load(file) as arrays:
        options = {"window": WINDOW} if home == "window" else {"history": load_history(arrays["history"])}
        tx = optax.chain(autoclip(PERCENTILE, **options), optax.adam(0.1))
        state = tx.init(jnp.zeros(1))
        if saved == "flax":
            state = flax.from_bytes(state, arrays["flax"].tobytes())
        else:
            state = (state[0]._replace(**{field: jnp.asarray(arrays[field]) for field in state[0]._fields}), *state[1:])
    steps, core = steps_after(name, home)

    def step(state, norm):
        _, state = tx.update(norm[None], state)
        return state, (state[0].clip_threshold, state[0].clip_scale)

    state, found = jax.jit(lambda state, norms: jax.lax.scan(step, state, norms))(state, jnp.array(LATER))
    np.testing.assert_array_equal(found[0], np.float32([step.threshold for step in steps]))
    np.testing.assert_allclose(found[1], [step.scale for step in steps], rtol=1e-6)
    check(metrics(state), core)


@pytest.mark.parametrize(("file", "name", "home"), golden("tensorflow"))
def test_checkpoint_of_tensorflow_goes_on(file, name, home):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    tf = pytest.importorskip("tensorflow")
    from autoclip_tensorflow import AutoClip

    path = file.with_suffix("")
    if home == "window":
        options = {"window": WINDOW}
    else:
        options = {"history": NormHistory.from_bytes(Path(f"{path}.history").read_bytes())}
    clip = AutoClip(PERCENTILE, **options)
    tf.train.Checkpoint(clip=clip).read(path).assert_consumed()
    steps, core = steps_after(name, home)
    for norm, step in zip(LATER, steps, strict=True):
        clip([tf.constant([norm])])
        found = {key: value.numpy() for key, value in clip.metrics().items()}
        assert found["clip_threshold"] == np.float32(step.threshold)
    check(found, core)


def check_keras(file, name, home):
    """For the suite of Keras, which runs once for each backend."""
    import keras

    with np.load(file) as arrays:
        store = dict(arrays)
    optimizer = keras.optimizers.deserialize(json.loads(str(store.pop("config"))))
    variable = keras.Variable([0.0])
    optimizer.build([variable])
    optimizer.load_own_variables(store)
    assert optimizer.percentile == PERCENTILE
    steps, core = steps_after(name, home)
    for norm, step in zip(LATER, steps, strict=True):
        optimizer.apply([keras.ops.convert_to_tensor([norm])], [variable])
        found = {key: keras.ops.convert_to_numpy(value).item() for key, value in optimizer.metrics().items()}
        assert found["clip_threshold"] == pytest.approx(np.float32(step.threshold), rel=2.0**-23)
    check(found, core)
