"""AutoClip at work in JAX: one small network, nine trainings, one table.

A network with one hidden layer learns scikit-learn's handwritten digits three ways: with AutoClip at its default
percentile, with a fixed threshold of 1 and without clipping, each with the loss multiplied by 1e-4, 1 and 1e4. All nine
share the initial weights, the batches and the learning rate; each is one compiled scan. The optimizer is Adam with an
epsilon so small that it does not care about the scale of the gradients: so the unit of the loss is all that differs
within an arm.

Run it with `python -m autoclip_jax.demo`. Needs the extra: pip install "autoclip-core[demo]".
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoclip_jax import autoclip, metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, BATCH = 64, 64
LEARNING_RATE = 3e-3
LOSS_SCALES = (1e-4, 1.0, 1e4)
ARMS = {
    "AutoClip p=10": autoclip,
    "fixed threshold 1": lambda: optax.clip_by_global_norm(1.0),
    "no clipping": optax.identity,
}

Params = dict[str, Array]


class Digits(NamedTuple):
    """Pictures of digits, shape (n, 64), from 0 to 1, and what they show; and others for the judgement."""

    pictures: Array
    labels: Array
    unseen: Array
    unseen_labels: Array


class Run(NamedTuple):
    """One training run: the share of steps that were clipped, the last threshold, and how much it recognises."""

    arm: str
    loss_scale: float
    clipped_share: float
    threshold: float
    accuracy: float


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits, every fifth for the judgement."""
    from sklearn import datasets

    pictures, labels = datasets.load_digits(return_X_y=True)
    pictures, unseen = (pictures / 16.0).astype(np.float32), np.arange(len(labels)) % 5 == 0
    return Digits(*map(jnp.asarray, (pictures[~unseen], labels[~unseen], pictures[unseen], labels[unseen])))


def make_params(key: Array) -> Params:
    """Return the weights that every run begins with."""
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, HIDDEN)) / 8.0,
        "hidden_bias": jnp.zeros(HIDDEN),
        "output": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "output_bias": jnp.zeros(10),
    }


def scores_of(params: Params, pictures: Array) -> Array:
    """Return the scores of the ten digits, shape (n, 10)."""
    hidden = jax.nn.relu(pictures @ params["hidden"] + params["hidden_bias"])
    return hidden @ params["output"] + params["output_bias"]


def train(arm: str, loss_scale: float, digits: Digits, steps: int) -> Run:
    """Train once, in one compiled program, and measure."""
    tx = optax.chain(ARMS[arm](), optax.adam(LEARNING_RATE, eps=1e-14))

    def loss(params: Params, batch: Array) -> Array:
        scores = scores_of(params, digits.pictures[batch])
        losses: Array = optax.softmax_cross_entropy_with_integer_labels(scores, digits.labels[batch])
        return loss_scale * losses.mean()

    def step(carry: tuple[Params, optax.OptState], key: Array) -> tuple[tuple[Params, optax.OptState], Array]:
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.choice(key, len(digits.labels), (BATCH,)))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    params = make_params(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), norms = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
    accuracy = jnp.mean(scores_of(params, digits.unseen).argmax(axis=1) == digits.unseen_labels)
    if arm.startswith("AutoClip"):
        measured = metrics(state)
        share, threshold = measured["clipped_steps"] / measured["steps"], measured["clip_threshold"]
    else:
        threshold = jnp.float32(1.0 if arm.startswith("fixed") else jnp.inf)
        share = jnp.mean(norms > threshold)
    return Run(arm, loss_scale, float(share), float(threshold), float(accuracy))


def tabulate(runs: Sequence[Run]) -> list[str]:
    """Return the results as lines of text, a header first."""
    rows = [("clipping", "loss scale", "steps clipped", "last threshold", "recognised")]
    for arm, scale, share, threshold, accuracy in runs:
        rows.append((arm, f"{scale:g}", f"{share:.1%}", f"{threshold:.3g}", f"{accuracy:.1%}"))
    return [f"{arm:18}" + "".join(f"{cell:>16}" for cell in others) for arm, *others in rows]


def positive(text: str) -> int:
    """Return a whole number above 0, as argparse wants it."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(
        "python -m autoclip_jax.demo",
        description="Teach a small network handwritten digits with AutoClip, with a fixed threshold and without "
        "clipping, each at three scales of the loss.",
    )
    parser.add_argument("--steps", type=positive, default=1000, help="training steps per run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        digits = load_digits()
    except ImportError as error:
        parser.exit(1, f'error: {error.name} is missing: pip install "autoclip-core[demo]"\n')
    runs = [train(arm, loss_scale, digits, options.steps) for arm in ARMS for loss_scale in LOSS_SCALES]
    print(*tabulate(runs), sep="\n")
    print("\nAutoClip's threshold follows the unit of the loss; a fixed one clips all steps, some, or none.")


if __name__ == "__main__":
    main()
