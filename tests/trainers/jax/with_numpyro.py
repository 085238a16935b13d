"""numpyro: `optax.chain(autoclip(), ...)` as the optimizer of `SVI`; the history is in the state of the inference."""

import jax
import numpyro
import optax
from checks import HALF, PERCENTILE, STEPS
from harness import autoclip, batch_of, play, restore, save, steps
from numpyro import distributions
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal


def model(inputs, targets):
    weights = numpyro.sample("weights", distributions.Normal(jax.numpy.zeros(4), 10.0).to_event(1))
    noise = numpyro.sample("noise", distributions.LogNormal(1.0, 1.0))
    with numpyro.plate("examples", len(inputs)):
        numpyro.sample("targets", distributions.Normal(inputs @ weights, noise), obs=targets[:, 0])


def train_with(take_steps):
    def train(folder, *, resume):
        guide = AutoNormal(model)
        # page
        tx = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
        inference = SVI(model, guide, tx, Trace_ELBO())
        # end of page
        state = take_steps(inference, inference.init(jax.random.PRNGKey(0), *batch_of(0)), folder, resume=resume)
        return STEPS - HALF * resume, inference.get_params(state), state.optim_state

    return train


def by_update(inference, state, folder, *, resume):
    update = jax.jit(inference.update)
    return steps(lambda state, batch: update(state, *batch)[0], state, folder, resume=resume)


def by_run(inference, state, folder, *, resume):
    """All on one batch, in two parts."""
    if resume:
        state = restore(folder, state)
    for part in range(resume, 2):
        if part == 1 and not resume:
            save(folder, state)
        found = inference.run(jax.random.PRNGKey(0), HALF, *batch_of(0), init_state=state, progress_bar=False)
        state = found.state
    return state


if __name__ == "__main__":
    play("numpyro", train_with(by_update), "SVI.update")
    play("numpyro", train_with(by_run), "SVI.run")
