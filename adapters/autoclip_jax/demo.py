"""AutoClip at work in JAX: bad batches, three units of the loss, and one setting that works in all of them.

A network with one hidden layer learns scikit-learn's handwritten digits with SGD. One batch in a hundred is spoiled as
happens in practice: its pixels were not divided by 255. The loss is multiplied by 1e-4, 1 and 1e4, the learning rate
divided by the same factor, so that without clipping all three are one and the same training. Each runs without
clipping, with a fixed threshold of 1, and with AutoClip at two percentiles: one compiled scan per way to clip.

What may not change, or the comparison is no longer fair: the learning rate is the best one of NO CLIPPING on clean
batches, searched here and not tuned for any other row; all rows share initial weights, batches and spoiled batches; the
digits that choose the rate are not those that judge.

Run it with `python -m autoclip_jax.demo`. Needs the extra: pip install "autoclip-core[demo]".
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoclip_jax import autoclip, metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, BATCH, MOMENTUM = 64, 32, 0.9
SPOILED_SHARE, SPOILED_FACTOR = 0.01, 255.0
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
LOSS_SCALES = (1e-4, 1.0, 1e4)
ARMS = {
    "no clipping": optax.identity,
    "fixed threshold 1": lambda: optax.clip_by_global_norm(1.0),
    "AutoClip p=10": autoclip,
    "AutoClip p=90": lambda: autoclip(90.0),
}

Params = dict[str, Array]


class Digits(NamedTuple):
    """Pictures of digits, shape (n, 64), from 0 to 1, and what they show, shape (n,)."""

    pictures: Array
    labels: Array


class Data(NamedTuple):
    """The digits to learn, those that choose the learning rate, and those that judge."""

    training: Digits
    validation: Digits
    test: Digits


class Run(NamedTuple):
    """One training: the share of steps that were clipped, the last threshold, and losses of digits not learned from."""

    arm: str
    loss_scale: float
    clipped_share: float
    threshold: float
    validation: float
    test: float


def read_digits() -> Data:
    """Return scikit-learn's 1,797 digits in an order of their own: 1,200 to learn, 300 to choose, 297 to judge."""
    from sklearn import datasets

    pictures, labels = datasets.load_digits(return_X_y=True)
    parts = np.split(np.random.default_rng(7).permutation(len(labels)), [1200, 1500])
    return Data(*(Digits(jnp.asarray(pictures[part] / 16.0, jnp.float32), jnp.asarray(labels[part])) for part in parts))


def make_params(key: Array) -> Params:
    """Return the weights that every run begins with."""
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, HIDDEN)) / 8.0,
        "hidden_bias": jnp.zeros(HIDDEN),
        "output": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "output_bias": jnp.zeros(10),
    }


def loss_of(params: Params, digits: Digits) -> Array:
    """Return the mean cross-entropy of digits, in nats."""
    hidden = jax.nn.relu(digits.pictures @ params["hidden"] + params["hidden_bias"])
    scores = hidden @ params["output"] + params["output_bias"]
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(scores, digits.labels)
    return losses.mean()


@partial(jax.jit, static_argnames=("arm", "steps"))
def run_steps(
    arm: str, steps: int, digits: Digits, loss_scale: Array, learning_rate: Array, spoiled_share: Array
) -> tuple[Params, optax.OptState, Array]:
    """Return the weights, the state of the optimizer and the norms of a training, from one compiled program per arm."""
    rates = optax.linear_schedule(learning_rate / loss_scale, 0.0, steps)
    tx = optax.chain(ARMS[arm](), optax.sgd(rates, momentum=MOMENTUM))

    def step(carry: tuple[Params, optax.OptState], key: Array) -> tuple[tuple[Params, optax.OptState], Array]:
        params, state = carry
        chosen, spoiled = jax.random.split(key)
        rows = jax.random.choice(chosen, len(digits.labels), (BATCH,))
        factor = jnp.where(jax.random.uniform(spoiled) < spoiled_share, SPOILED_FACTOR, 1.0)
        batch = Digits(digits.pictures[rows] * factor, digits.labels[rows])
        grads = jax.grad(lambda params: loss_scale * loss_of(params, batch))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    params = make_params(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), norms = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, state, norms


def train(
    arm: str, loss_scale: float, data: Data, steps: int, *, learning_rate: float, spoiled_share: float = SPOILED_SHARE
) -> Run:
    """Train once and measure."""
    numbers = map(jnp.float32, (loss_scale, learning_rate, spoiled_share))
    params, state, norms = run_steps(arm, steps, data.training, *numbers)
    if arm.startswith("AutoClip"):
        measured = metrics(state)
        share, threshold = measured["clipped_steps"] / measured["steps"], measured["clip_threshold"]
    else:
        threshold = jnp.float32(1.0 if arm.startswith("fixed") else jnp.inf)
        share = jnp.mean(norms > threshold)
    losses = (float(loss_of(params, digits)) for digits in (data.validation, data.test))
    return Run(arm, loss_scale, float(share), float(threshold), *losses)


def choose_learning_rate(data: Data, steps: int) -> float:
    """Return the rate with the lowest validation loss without clipping, on batches of which none is spoiled."""

    def loss(rate: float) -> float:
        run = train("no clipping", 1.0, data, steps, learning_rate=rate, spoiled_share=0.0)
        return run.validation if math.isfinite(run.validation) else math.inf

    return min(LEARNING_RATES, key=loss)


def tabulate(runs: Sequence[Run]) -> list[str]:
    """Return the results as lines of text, a header first."""
    header = ("clipping", "loss scale", "test loss", "steps clipped", "last threshold")
    rows = [
        (run.arm, f"{run.loss_scale:g}", f"{run.test:.3f}", f"{run.clipped_share:.1%}", f"{run.threshold:.3g}")
        for run in runs
    ]
    return [f"{arm:18}" + "".join(f"{cell:>16}" for cell in others) for arm, *others in [header, *rows]]


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
        description="Teach a small network handwritten digits, one batch in a hundred being spoiled: without clipping, "
        "with a fixed threshold and with AutoClip, each at three scales of the loss.",
    )
    parser.add_argument("--steps", type=positive, default=600, help="training steps per run (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        data = read_digits()
    except ImportError as error:
        parser.exit(1, f'error: {error.name} is missing: pip install "autoclip-core[demo]"\n')
    rate = choose_learning_rate(data, options.steps)
    print(f"Learning rate {rate:g}: of {', '.join(f'{rate:g}' for rate in LEARNING_RATES)} the best without clipping,")
    print(
        "on clean batches; nothing is tuned for the rows below, in whose trainings one batch in a hundred is spoiled.\n"
    )
    runs = [train(arm, scale, data, options.steps, learning_rate=rate) for arm in ARMS for scale in LOSS_SCALES]
    print(*tabulate(runs), sep="\n")
    print(f"\nA network that has learned nothing has a test loss of {math.log(10):.3f}.")


if __name__ == "__main__":
    main()
