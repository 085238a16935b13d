"""AutoClip in Keras at work: one small network, trained at three scales of its loss, and what was clipped.

The network learns the handwritten digits that scikit-learn carries. All runs share initial weights and batches. The
optimizer is Adam with an epsilon so small that it does not care about the scale of the gradients, so the unit of the
loss is all that differs between the rows of one way to clip.

Run it with `python -m autoclip_tensorflow.demo`; KERAS_BACKEND chooses the backend. Needs Keras and scikit-learn.
"""

from __future__ import annotations

import argparse
from typing import Any

import keras
import numpy as np

from autoclip_core import NormHistory
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer

LOSS_SCALES = (1e-4, 1.0, 1e4)
FIXED_THRESHOLD = 1.0


def read_digits() -> tuple[Any, Any, Any, Any]:
    """Return images of 64 pixels from 0 to 1 and their digits, for training and then for validation."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return images[:1500], digits[:1500], images[1500:], digits[1500:]


def train(data: tuple[Any, Any, Any, Any], clipping: str, loss_scale: float, epochs: int) -> tuple[float, str]:
    """Train one network; return the share of validation digits that it knows, and how much was clipped."""
    keras.utils.set_random_seed(0)
    images, digits, validation_images, validation_digits = data
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    )
    fixed = FIXED_THRESHOLD if clipping == "fixed threshold 1" else None
    optimizer = keras.optimizers.Adam(1e-2, epsilon=1e-14, global_clipnorm=fixed)
    callbacks = []
    if clipping == "AutoClip p=10":
        optimizer = AutoClipOptimizer(optimizer)
        callbacks.append(AutoClipLogger())

    def loss(true: Any, predicted: Any) -> Any:
        return loss_scale * keras.losses.sparse_categorical_crossentropy(true, predicted)

    model.compile(optimizer, loss, metrics=["accuracy"])
    logs = model.fit(images, digits, batch_size=50, epochs=epochs, verbose=0, callbacks=callbacks).history
    accuracy = model.evaluate(validation_images, validation_digits, verbose=0, return_dict=True)["accuracy"]
    if not callbacks:
        return accuracy, "-"
    return accuracy, f"{np.mean(logs['clipped']):.1%} of steps, last threshold {logs['clip_threshold'][-1]:.3g}"


def main() -> None:
    """Train every way at every scale, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the 1,500 digits of each run (default 5)")
    epochs = parser.parse_args().epochs
    data = read_digits()
    print(f"Keras {keras.version()} on {keras.config.backend()}, kernel: {NormHistory().backend}")
    print(f"{'clipping':20}{'loss scale':>12}{'digits known':>14}   clipped")
    for clipping in ("AutoClip p=10", "fixed threshold 1", "none"):
        for loss_scale in LOSS_SCALES:
            accuracy, clipped = train(data, clipping, loss_scale, epochs)
            print(f"{clipping:20}{loss_scale:12g}{accuracy:14.1%}   {clipped}", flush=True)


if __name__ == "__main__":
    main()
