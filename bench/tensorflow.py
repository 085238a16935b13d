"""What AutoClip adds to a TensorFlow training step on the CPU, in variables and in the tree, and to Keras's fit."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
import numpy as np
import tensorflow as tf
from autoclip_tensorflow import AutoClip
from numpy.typing import NDArray

from bench import ROOT
from bench.common import (
    CONSTANT,
    QUICK_NOTE,
    Measurements,
    Options,
    StepSubject,
    facts_table,
    machine_facts,
    measure_steps,
    norms_like,
    parse,
    parser,
    say,
    step_rows,
    table,
)
from bench.keras import Norms, draw_norms, fill, make_batches, make_model, options_of, steps_of, subjects_of

OPENING = """\
What this isolates: what clipping adds to one training step of a small network that TensorFlow runs on the CPU as a
graph. Every subject trains the same network on the same batches and differs in its clipping alone; the learning rate is
next to nothing, so that the norms keep their distribution. Histories are full before the clock starts: a window loses
its oldest norm at every step, and new norms fall among the old ones. Each subject is there twice, and all take turns in
each of {rounds} rounds of {steps} steps, in an order drawn anew; each number is a median over the rounds of the mean of
the two. "Ratio" and "more" are the medians of the ratios and of the differences to the constant threshold of the same
round and the same kind of loop."""

KINDS = {
    "step": "a `tf.function` step with `tf.GradientTape` and SGD with momentum, called from Python; the constant "
    "threshold is `tf.clip_by_global_norm`",
    "fit": "a step inside Keras's `fit` of arrays, without callbacks, on each of its backends; the constant threshold "
    "is `global_clipnorm`",
}
BACKENDS = ("tensorflow", "jax", "torch")

SUBJECTS = [
    StepSubject("step", "no clipping", 0, "none"),
    StepSubject("step", CONSTANT, 0, "constant"),
    StepSubject("step", "AutoClip in variables", 10_000, "window", "ratio at most 1.15"),
    StepSubject("step", "AutoClip in variables", 65_536, "window", "at most 500 more"),
    StepSubject("step", "AutoClip in the tree", 1_000_000, "tree", "ratio at most 1.05"),
]


class Trainer:
    """One subject: a network, its optimizer and a full history."""

    def __init__(self, subject: StepSubject, norms: Norms, batches: NDArray[np.float32]) -> None:
        optimizer, model = keras.optimizers.SGD(1e-9, momentum=0.9), make_model()
        optimizer.build(model.trainable_variables)
        constant = float(np.percentile(norms, 10))
        if subject.home == "none":
            clip: Any = lambda grads: grads  # noqa: E731
        elif subject.home == "constant":
            clip = lambda grads: tf.clip_by_global_norm(grads, constant)[0]  # noqa: E731
        else:
            clip = AutoClip(**options_of(subject.home, norms))
            if subject.home == "window":
                fill(clip, norms)

        @tf.function
        def step(batch: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(batch, training=True) - batch[:, :10]) ** 2)
            grads = clip(tape.gradient(loss, model.trainable_variables))
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

        self.step = step
        self.batches = [tf.constant(batch) for batch in batches]
        self.run(1)

    def run(self, steps: int) -> float:
        """Microseconds per step."""
        calls = max(1, steps // len(self.batches))
        gc.disable()
        start = time.perf_counter_ns()
        for _ in range(calls):
            for batch in self.batches:
                self.step(batch)
        elapsed = time.perf_counter_ns() - start
        gc.enable()
        return elapsed / 1e3 / (calls * len(self.batches))


def measure(*, quick: bool, rounds: int, steps: int) -> Measurements:
    batches = make_batches(20)
    norms = draw_norms(batches)

    def build(subject: StepSubject) -> Callable[[int], float]:
        size = (min(subject.size, 1_000) if quick else subject.size) or 100
        return Trainer(subject, norms_like(norms, size), batches).run

    return measure_steps("tensorflow", SUBJECTS, build, rounds=rounds, steps=steps, quick=quick)


def measure_fit(backend: str, options: Options) -> Measurements:
    """What bench/keras.py measures, in a process of its own: there is one backend in each."""
    command = [sys.executable, "-m", "bench.keras", f"--rounds={options.rounds}", f"--output={options.output}"]
    done = subprocess.run(
        command + ["--quick"] * options.quick,
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measurements.from_lines(done.stdout)


def rows_of(measured: Measurements) -> list[list[str]]:
    comparisons = ["ratio", "us more"]
    rows = step_rows("tensorflow", measured, SUBJECTS, comparisons)
    for backend in BACKENDS:
        rows += step_rows("keras", measured, subjects_of(backend), comparisons)
    return rows


HEADER = ["microseconds per step", "in all", "ratio", "more", "target"]


def report(measured: Measurements, facts: dict[str, str], *, rounds: int, steps: int, quick: bool) -> str:
    """The Markdown page."""
    parts = ["# AutoClip in a TensorFlow training step", OPENING.format(rounds=rounds, steps=steps)]
    if quick:
        parts.append(QUICK_NOTE)
    parts += [
        "\n".join(f"- {kind}: {meaning}" for kind, meaning in KINDS.items()),
        table(HEADER, rows_of(measured)),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = parse(parser(__doc__, rounds=15))
    steps = steps_of(options)
    facts = machine_facts(["tensorflow-cpu", "keras", "jax", "torch"])
    say("python -m bench tensorflow")
    measured = measure(quick=options.quick, rounds=options.rounds, steps=steps)
    for backend in BACKENDS:
        measured.update(measure_fit(backend, options))
    measured.write(options.output / "tensorflow.csv")
    page = report(measured, facts, rounds=options.rounds, steps=steps, quick=options.quick)
    (options.output / "tensorflow.md").write_text(page, encoding="utf-8")
    print(table(HEADER, rows_of(measured)))
    say(f"written: tensorflow.csv and tensorflow.md in {options.output}")


if __name__ == "__main__":
    main()
