"""dm-haiku: `autoclip()` before the optimizer; haiku keeps params alone, and leaves optimizers to optax."""

import pickle

import haiku
import jax
import optax
from checks import HALF, PERCENTILE, STEPS
from harness import autoclip, batch_of, mean_square, play, steps


def predict(inputs):
    return haiku.Linear(1)(jax.numpy.tanh(haiku.Linear(3)(inputs)))


def save(folder, kept):
    (folder / "half.pkl").write_bytes(pickle.dumps(jax.device_get(kept)))


def restore(folder, kept):
    return pickle.loads((folder / "half.pkl").read_bytes())


def train(folder, *, resume):
    model = haiku.without_apply_rng(haiku.transform(predict))
    params = model.init(jax.random.key(0), batch_of(0)[0])
    # page
    tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    kept = {"params": params, "state": tx.init(params)}
    # end of page

    @jax.jit
    def step(kept, batch):
        inputs, targets = batch
        grads = jax.grad(lambda params: mean_square(model.apply(params, inputs), targets))(kept["params"])
        updates, state = tx.update(grads, kept["state"], kept["params"])
        return {"params": optax.apply_updates(kept["params"], updates), "state": state}

    kept = steps(step, kept, folder, resume=resume, save=save, restore=restore)
    return STEPS - HALF * resume, kept["params"], kept["state"]


if __name__ == "__main__":
    play("dm-haiku", train)
