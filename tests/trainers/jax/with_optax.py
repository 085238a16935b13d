"""optax: `autoclip()` before the optimizer in `optax.chain`; what wraps an optimizer goes around both."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from checks import HALF, PERCENTILE, STEPS
from harness import autoclip, loss_of, make_params, play, steps

GROUPS = {"body": "body", "head": "head"}
RATES = optax.linear_schedule(0.02, 0.005, STEPS)


def wrapped():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    # page
    clipped = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    parts = optax.MultiSteps(clipped, 2, should_skip_update_fn=optax.skip_not_finite)
    finite = optax.apply_if_finite(clipped, 5)
    ahead = optax.lookahead(clipped, sync_period=4, slow_step_size=0.5)
    sharp = optax.contrib.sam(clipped, adversary, sync_period=2)
    free = optax.contrib.schedule_free(clipped, 1e-2)
    tuned = optax.contrib.mechanize(clipped)
    # end of page
    return {
        "chain": clipped,
        "MultiSteps": parts,
        "apply_if_finite": finite,
        "lookahead": ahead,
        "sam": sharp,
        "schedule_free": free,
        "mechanize": tuned,
    }


def others():
    clipped = optax.chain(autoclip(PERCENTILE), optax.adam(1e-2))
    injected = optax.inject_hyperparams(autoclip, static_args=("window", "warmup"))(percentile=PERCENTILE)
    return {
        # Its fast optimizer begins anew, and an AutoClip in it would do so too.
        "lookahead that resets": optax.chain(
            autoclip(PERCENTILE), optax.lookahead(optax.adam(1e-2), 4, 0.5, reset_state=True)
        ),
        "inject_hyperparams": optax.chain(injected, optax.inject_hyperparams(optax.adam)(RATES)),
        "reduce_on_plateau": optax.chain(clipped, optax.contrib.reduce_on_plateau(patience=2)),
        "masked": optax.chain(
            optax.masked(clipped, {"body": True, "head": False}),
            optax.masked(optax.set_to_zero(), {"body": False, "head": True}),
        ),
        "multi_transform": optax.multi_transform(dict.fromkeys(GROUPS, clipped), GROUPS),
        "partition": optax.partition(dict.fromkeys(GROUPS, clipped), GROUPS),
        "split_real_and_imaginary": optax.contrib.split_real_and_imaginary(clipped),
        "dpsgd's noise": optax.chain(
            optax.contrib.differentially_private_aggregate(1e3, 0.1, key=jax.random.key(3)), clipped
        ),
    }


def train_with(name, tx):
    every = 2 if name in ("MultiSteps", "sam") else 1

    def train(folder, *, resume):
        params = make_params()
        is_double, is_private = name.startswith("lookahead"), name.startswith("dpsgd")
        if is_double:
            params = optax.LookaheadParams.init_synced(params)
        extra = {"value"} if name == "reduce_on_plateau" else set()

        @partial(jax.jit, donate_argnums=0)
        def step(kept, batch):
            params = kept["params"]
            value, grads = jax.value_and_grad(loss_of)(params.fast if is_double else params, batch)
            if is_private:  # it wants the gradient of each example
                each = jax.tree.map(lambda part: part[:, None], batch)
                grads = jax.vmap(jax.grad(loss_of), (None, 0))(params, each)
            updates, state = tx.update(grads, kept["state"], params, **({"value": value} if extra else {}))
            return {"params": optax.apply_updates(params, updates), "state": state}

        kept = {"params": params, "state": tx.init(params)}
        kept = steps(step, jax.tree.map(jnp.copy, kept), folder, resume=resume)
        states = kept["state"].inner_states.values() if hasattr(kept["state"], "inner_states") else [kept["state"]]
        return (STEPS - HALF * resume) // every * len(states), kept["params"], *states

    return train


if __name__ == "__main__":
    for name, tx in (wrapped() | others()).items():
        play("optax", train_with(name, tx), name)
