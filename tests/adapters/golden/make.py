"""Write the golden states of this folder: what a release saved must load in every later one.

They were made by the first release, 0.1.0. To add those of a later one, give its number and the backend of Keras:

    KERAS_BACKEND=jax python -P tests/adapters/golden/make.py 0.1.0
"""

import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np

from autoclip_core import NormHistory

FOLDER = Path(__file__).resolve().parent
WINDOW = 5
PERCENTILE = 30.0
# A window with empty places, one that has lost its oldest norms, and what enters neither.
NORMS = {"partial": [0.0, 4.0, float("nan"), 1.0, 3.0], "full": [5.0, 4.0, 7.0, 0.0, 6.0, 1.0, 2.0, 8.0, 3.0]}


def jax_states(release):
    import flax.serialization
    import jax.numpy as jnp
    import optax
    from autoclip_jax import autoclip, save_history

    for name, norms in NORMS.items():
        for home in ("window", "tree"):
            history = NormHistory() if home == "tree" else None
            options = {"window": WINDOW} if history is None else {"history": history}
            tx = optax.chain(autoclip(PERCENTILE, **options), optax.adam(0.1))
            state = tx.init(jnp.zeros(1))
            for norm in norms:
                _, state = tx.update(jnp.array([norm]), state)
            leaves = {field: np.asarray(getattr(state[0], field)) for field in state[0]._fields}
            leaves["flax"] = np.frombuffer(flax.serialization.to_bytes(state), np.uint8)
            if history is not None:
                leaves["history"] = save_history(history)
            np.savez_compressed(FOLDER / f"{release}-jax-{home}-{name}.npz", **leaves)


def tensorflow_states(release):
    import tensorflow as tf
    from autoclip_tensorflow import AutoClip

    for name, norms in NORMS.items():
        for home in ("window", "tree"):
            history = NormHistory() if home == "tree" else None
            options = {"window": WINDOW} if history is None else {"history": history}
            clip = AutoClip(PERCENTILE, **options)
            for norm in norms:
                clip([tf.constant([norm])])
            path = FOLDER / f"{release}-tensorflow-{home}-{name}"
            tf.train.Checkpoint(clip=clip).write(path)
            if history is not None:
                (FOLDER / f"{path.name}.history").write_bytes(history.to_bytes())


def keras_states(release):
    import keras
    from autoclip_tensorflow import AutoClipOptimizer

    backend = keras.config.backend()
    for name, norms in NORMS.items():
        for home in ("window",) if backend == "jax" else ("window", "tree"):
            options = {"window": WINDOW} if home == "window" else {"history": NormHistory()}
            optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), PERCENTILE, **options)
            variable = keras.Variable([0.0])
            for norm in norms:
                optimizer.apply([keras.ops.convert_to_tensor([norm])], [variable])
            store = {}
            optimizer.save_own_variables(store)
            arrays = {key: np.asarray(value) for key, value in store.items()}
            arrays["config"] = np.array(json.dumps(keras.optimizers.serialize(optimizer)))
            np.savez_compressed(FOLDER / f"{release}-keras-{backend}-{home}-{name}.npz", **arrays)


if __name__ == "__main__":
    keras_states(sys.argv[1])
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        tensorflow_states(sys.argv[1])
        jax_states(sys.argv[1])
