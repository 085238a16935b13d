"""AutoClip in Keras at work: bad batches, three units of the loss, and one setting that works in all of them.

A network with one hidden layer learns scikit-learn's handwritten digits with SGD. One batch in a hundred is spoiled as
happens in practice: its pixels were not divided by 255. The loss is multiplied by 1e-4, 1 and 1e4, the learning rate
divided by the same factor, so that without clipping all three are one and the same training. Each runs without
clipping, with a fixed threshold of 1, and with AutoClip at two percentiles.

What may not change, or the comparison is no longer fair: the learning rate is the best one of NO CLIPPING on clean
batches, searched here and not tuned for any other row; all rows share initial weights, batches and spoiled batches; the
digits that choose the rate are not those that judge.

Run it with `python -m autoclip_tensorflow.demo`; KERAS_BACKEND chooses the backend. Needs Keras and scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from autoclip_core import NormHistory
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH, MOMENTUM = 32, 0.9
SPOILED_SHARE, SPOILED_FACTOR = 0.01, 255.0
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
LOSS_SCALES = (1e-4, 1.0, 1e4)
FIXED_THRESHOLD = 1.0
PERCENTILES = {"AutoClip p=10": 10.0, "AutoClip p=90": 90.0}
CLIPPING = ("no clipping", "fixed threshold 1", *PERCENTILES)


class Digits(NamedTuple):
    """Images, shape (n, 64), from 0 to 1, and the digits that they show, shape (n,)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


class Data(NamedTuple):
    """The digits to learn, those that choose the learning rate, and those that judge."""

    training: Digits
    validation: Digits
    test: Digits


def read_digits() -> Data:
    """Return scikit-learn's 1,797 digits in an order of their own: 1,200 to learn, 300 to choose, 297 to judge."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    parts = np.split(np.random.default_rng(7).permutation(len(labels)), [1200, 1500])
    return Data(*(Digits((images[part] / 16).astype(np.float32), labels[part]) for part in parts))


def batches_of(digits: Digits, steps: int, spoiled_share: float) -> Digits:
    """Return the batches of a training one after another, some of them spoiled."""
    random = np.random.default_rng(0)
    rows = random.integers(len(digits.labels), size=(steps, BATCH))
    factors = np.where(random.random(steps) < spoiled_share, SPOILED_FACTOR, 1.0).astype(np.float32)
    images = digits.images[rows] * factors[:, None, None]
    return Digits(images.reshape(-1, 64), digits.labels[rows].ravel())


def train(
    data: Data,
    clipping: str,
    loss_scale: float,
    steps: int,
    *,
    learning_rate: float,
    spoiled_share: float = SPOILED_SHARE,
) -> tuple[float, float, str]:
    """Train one network; return its validation and test loss, and how much was clipped."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    )
    rates = keras.optimizers.schedules.PolynomialDecay(learning_rate / loss_scale, steps, 0.0)
    fixed = FIXED_THRESHOLD if clipping == "fixed threshold 1" else None
    optimizer = keras.optimizers.SGD(rates, momentum=MOMENTUM, global_clipnorm=fixed)
    callbacks = []
    if clipping in PERCENTILES:
        optimizer = AutoClipOptimizer(optimizer, PERCENTILES[clipping])
        callbacks.append(AutoClipLogger())

    def loss(true: Any, predicted: Any) -> Any:
        return loss_scale * keras.losses.sparse_categorical_crossentropy(true, predicted)

    model.compile(optimizer, loss)
    batches = batches_of(data.training, steps, spoiled_share)
    logs = model.fit(*batches, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks).history
    losses = (model.evaluate(*digits, verbose=0) / loss_scale for digits in (data.validation, data.test))
    clipped = (
        f"{logs['clipped'][-1]:.1%} of the steps, last threshold {logs['clip_threshold'][-1]:.3g}" if callbacks else "-"
    )
    return *losses, clipped


def choose_learning_rate(data: Data, steps: int) -> float:
    """Return the rate with the lowest validation loss without clipping, on batches of which none is spoiled."""

    def loss(rate: float) -> float:
        validation, *_ = train(data, "no clipping", 1.0, steps, learning_rate=rate, spoiled_share=0.0)
        return validation if math.isfinite(validation) else math.inf

    return min(LEARNING_RATES, key=loss)


def main() -> None:
    """Train every way at every scale, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps per run (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="take this one, and search none")
    options = parser.parse_args()
    data = read_digits()
    print(f"Keras {keras.version()} on {keras.config.backend()}, kernel: {NormHistory().backend}")
    rate = options.learning_rate
    if rate is None:
        rate = choose_learning_rate(data, options.steps)
        print(
            f"Learning rate {rate:g}: of {', '.join(f'{rate:g}' for rate in LEARNING_RATES)} the best without clipping,"
        )
        print("on clean batches; nothing is tuned for the rows below. One batch in a hundred is spoiled in them.")
    print(f"{'clipping':20}{'loss scale':>12}{'test loss':>12}   clipped")
    for clipping in CLIPPING:
        for scale in LOSS_SCALES:
            _, test, clipped = train(data, clipping, scale, options.steps, learning_rate=rate)
            print(f"{clipping:20}{scale:12g}{test:12.3f}   {clipped}", flush=True)
    print(f"A network that has learned nothing has a test loss of {math.log(10):.3f}.")


if __name__ == "__main__":
    main()
