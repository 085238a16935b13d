"""equinox: `autoclip()` before the optimizer; `tree_serialise_leaves` of model and state saves the history."""

import equinox
import jax
import optax
from checks import HALF, PERCENTILE, STEPS
from harness import autoclip, mean_square, play, steps


def save(folder, kept):
    equinox.tree_serialise_leaves(folder / "half.eqx", kept)


def restore(folder, like):
    return equinox.tree_deserialise_leaves(folder / "half.eqx", like)


def train(folder, *, resume):
    model = equinox.nn.MLP(4, 1, 3, 1, activation=jax.numpy.tanh, key=jax.random.key(0))
    # page
    tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    state = tx.init(equinox.filter(model, equinox.is_inexact_array))
    # end of page

    @equinox.filter_jit
    def step(kept, batch):
        model, state = kept
        inputs, targets = batch
        grads = equinox.filter_grad(lambda model: mean_square(jax.vmap(model)(inputs), targets))(model)
        updates, state = tx.update(grads, state, equinox.filter(model, equinox.is_inexact_array))
        return equinox.apply_updates(model, updates), state

    model, state = steps(step, (model, state), folder, resume=resume, save=save, restore=restore)
    return STEPS - HALF * resume, equinox.filter(model, equinox.is_array), state


if __name__ == "__main__":
    play("equinox", train)
