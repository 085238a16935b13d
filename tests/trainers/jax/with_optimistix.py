"""optimistix: `optax.chain(autoclip(), ...)` in its `OptaxMinimiser`; the history is in the solver's state."""

import sys

import equinox
import jax
import jax.numpy as jnp
import optax
import optimistix
from checks import HALF, PERCENTILE, STEPS
from harness import autoclip, batch_of, loss_of, make_params, play, steps


def train_with(take_steps):
    def train(folder, *, resume):
        # page
        tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
        solver = optimistix.OptaxMinimiser(tx, rtol=1e-6, atol=1e-6)
        # end of page
        return take_steps(solver, make_params(), folder, resume=resume)

    return train


def by_step(solver, params, folder, *, resume):
    """One step after the other, as its documentation shows for what is to be looked at."""
    loss = lambda params, batch: (loss_of(params, batch), None)
    like = jax.ShapeDtypeStruct((), jnp.float32)
    state = solver.init(loss, params, batch_of(0), {}, like, None, frozenset())

    @equinox.filter_jit
    def step(kept, batch):
        params, state = kept
        params, state, _ = solver.step(loss, params, batch, {}, state, frozenset())
        return params, state

    save = lambda folder, kept: equinox.tree_serialise_leaves(folder / "half.eqx", kept)
    restore = lambda folder, like: equinox.tree_deserialise_leaves(folder / "half.eqx", like)
    params, state = steps(step, (params, state), folder, resume=resume, save=save, restore=restore)
    return int(state.step) - HALF * resume, params, state.opt_state


def by_minimise(solver, params, folder, *, resume):
    """A whole minimisation on one batch, which has no checkpoint."""
    found = optimistix.minimise(loss_of, solver, params, batch_of(0), max_steps=STEPS, throw=False)
    return int(found.stats["num_steps"]), found.value, found.state.opt_state


if __name__ == "__main__":
    play("optimistix", train_with(by_step), "step by step")
    if sys.argv[1] == "train":
        play("optimistix", train_with(by_minimise), "minimise")
