"""What AutoClipOptimizer adds to a step of Keras's fit on the backend that KERAS_BACKEND names."""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from autoclip_tensorflow import AutoClipOptimizer
from keras import ops
from numpy.typing import NDArray

from autoclip_core import NormHistory
from bench.common import (
    CONSTANT,
    Measurements,
    Options,
    StepSubject,
    measure_steps,
    norms_like,
    parse,
    parser,
    say,
)

BACKEND = keras.config.backend()
INPUTS, HIDDEN, BATCH = 128, 128, 128

Norms = NDArray[np.float32]


def subjects_of(backend: str) -> list[StepSubject]:
    """What is measured on a backend of Keras, and what is asked of it."""
    kind, target = f"fit on {backend}", f"ratio at most {'1.15' if backend == 'torch' else '1.10'}"
    return [
        StepSubject(kind, CONSTANT, 0, "constant"),
        StepSubject(kind, "AutoClipOptimizer in variables", 10_000, "window", target),
        *([StepSubject(kind, "AutoClipOptimizer in the tree", 1_000_000, "tree", target)] if backend != "jax" else []),
    ]


def steps_of(options: Options) -> int:
    return 40 if options.quick else 500


def make_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(HIDDEN, "tanh"), keras.layers.Dense(HIDDEN, "tanh"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((INPUTS,)), *layers])


def make_batches(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, BATCH, INPUTS)).astype(np.float32)


def options_of(home: str, norms: Norms) -> dict[str, Any]:
    """Where the history is; a tree is full from the start."""
    if home == "window":
        return {"window": len(norms)}
    history = NormHistory()
    history.extend(norms)
    return {"history": history}


def fill(clip: Any, norms: Norms) -> None:
    """Put norms into the variables, oldest first."""
    clip._state["norms"].assign(np.array([np.sort(norms), norms]))
    clip._state["counts"].assign(np.array([0, len(norms), 0, 0], np.int32))


def draw_norms(batches: NDArray[np.float32]) -> list[float]:
    """The norms of the training's gradients: AutoClip measures them as it goes."""
    model = make_model()
    model.compile(AutoClipOptimizer(keras.optimizers.SGD(1e-9), 100.0, window=len(batches)), "mse")
    for batch in batches:
        model.train_on_batch(batch, batch[:, :10])
    norms: list[float] = ops.convert_to_numpy(model.optimizer._state["norms"])[1].tolist()
    return norms


class Trainer:
    """One subject: a network, its optimizer and a full history."""

    def __init__(self, subject: StepSubject, norms: Norms, batches: NDArray[np.float32]) -> None:
        fixed = float(np.percentile(norms, 10)) if subject.home == "constant" else None
        optimizer = keras.optimizers.SGD(1e-9, momentum=0.9, global_clipnorm=fixed)
        if fixed is None:
            optimizer = AutoClipOptimizer(optimizer, **options_of(subject.home, norms))
            if subject.home == "window":
                fill(optimizer, norms)
        self.model = make_model()
        self.model.compile(optimizer, "mse")
        self.batches = batches
        self.run(1)

    def run(self, steps: int) -> float:
        """Microseconds per step."""
        x = self.batches[np.arange(steps) % len(self.batches)].reshape(-1, INPUTS)
        start = time.perf_counter_ns()
        self.model.fit(x, x[:, :10], BATCH, shuffle=False, verbose=0)
        return (time.perf_counter_ns() - start) / 1e3 / steps


def measure(*, quick: bool, rounds: int, steps: int) -> Measurements:
    batches = make_batches(20)
    norms = draw_norms(batches)

    def build(subject: StepSubject) -> Callable[[int], float]:
        size = (min(subject.size, 1_000) if quick else subject.size) or 100
        return Trainer(subject, norms_like(norms, size), batches).run

    return measure_steps("keras", subjects_of(BACKEND), build, rounds=rounds, steps=steps, quick=quick)


def main() -> None:
    options = parse(parser(__doc__, rounds=15))
    say(f"python -m bench keras, on {BACKEND}")
    measured = measure(quick=options.quick, rounds=options.rounds, steps=steps_of(options))
    print(*measured.lines(), sep="\n")


if __name__ == "__main__":
    main()
