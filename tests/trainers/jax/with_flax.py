"""flax: the same transformation, in linen's `TrainState` or nnx's `Optimizer`; the history is in what they save."""

import flax.linen
import flax.serialization
import jax
import optax
from checks import HALF, PERCENTILE
from flax import nnx
from flax.training.train_state import TrainState
from harness import autoclip, batch_of, mean_square, play, steps


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, inputs):
        return flax.linen.Dense(1)(jax.numpy.tanh(flax.linen.Dense(3)(inputs)))


def train_linen(folder, *, resume):
    model = Linen()
    variables = model.init(jax.random.key(0), batch_of(0)[0])
    # page
    tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    # end of page

    @jax.jit
    def step(state, batch):
        inputs, targets = batch
        loss = lambda params: mean_square(state.apply_fn({"params": params}, inputs), targets)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def save(folder, state):
        (folder / "half.msgpack").write_bytes(flax.serialization.to_bytes(state))

    def restore(folder, state):
        return flax.serialization.from_bytes(state, (folder / "half.msgpack").read_bytes())

    state = steps(step, state, folder, resume=resume, save=save, restore=restore)
    return int(state.step) - HALF * resume, state.params, state.opt_state


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.head(nnx.tanh(self.body(inputs)))


def train_nnx(folder, *, resume):
    model = Nnx(nnx.Rngs(0))
    tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    # page
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # end of page

    @nnx.jit
    def update(model, optimizer, batch):
        inputs, targets = batch
        grads = nnx.grad(lambda model: mean_square(model(inputs), targets))(model)
        optimizer.update(model, grads)

    def step(kept, batch):
        nnx.update((model, optimizer), kept)
        update(model, optimizer, batch)
        return nnx.state((model, optimizer))

    kept = steps(step, nnx.state((model, optimizer)), folder, resume=resume)
    nnx.update((model, optimizer), kept)
    state = nnx.as_pure(optimizer.opt_state)
    return int(optimizer.step[...]) - HALF * resume, nnx.as_pure(nnx.state(model)), state


if __name__ == "__main__":
    play("flax", train_linen, "linen, its serialization")
    play("flax", train_nnx, "nnx, orbax")
