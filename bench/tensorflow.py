"""What AutoClip adds to a TensorFlow training step on the CPU, in variables and in the tree, and to Keras's fit."""

import gc
import os
import time
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from autoclip_tensorflow import AutoClip, AutoClipOptimizer
from numpy.typing import NDArray

from autoclip_core import NormHistory
from bench.common import (
    QUICK_NOTE,
    Key,
    Measurements,
    facts_table,
    machine_facts,
    parse,
    parser,
    ratio,
    say,
    shown,
    table,
)

OPENING = """\
What this isolates: what clipping adds to one training step of a small network that TensorFlow runs on the CPU as a
graph. Every subject trains the same network on the same batches and differs in its clipping alone; the learning rate is
next to nothing, so that the norms keep their distribution. Histories are full before the clock starts: a window loses
its oldest norm at every step, and new norms fall among the old ones. Subjects take turns in every round; a round is
{steps:,} steps, and each number is the median of {rounds} rounds. "Ratio" and "more" are the medians of the ratios and
of the differences to the constant threshold of the same round and the same kind of loop."""

CONSTANT = "constant threshold"
KINDS = {
    "step": "a `tf.function` step with `tf.GradientTape` and SGD with momentum, called from Python",
    "fit": "a step inside Keras's `fit`, without callbacks; the constant threshold is `global_clipnorm`",
}

Norms = NDArray[np.float32]


class Subject(NamedTuple):
    kind: str
    name: str
    # How many norms the history holds, where they are, and the target in words.
    size: int
    home: str
    target: str


SUBJECTS = [
    Subject("step", "no clipping", 0, "none", "-"),
    Subject("step", CONSTANT, 0, "constant", "-"),
    Subject("step", "AutoClip in variables", 10_000, "window", "ratio at most 1.15"),
    Subject("step", "AutoClip in variables", 65_536, "window", "at most 500 more"),
    Subject("step", "AutoClip in the tree", 1_000_000, "tree", "ratio at most 1.05"),
    Subject("fit", CONSTANT, 0, "constant", "-"),
    Subject("fit", "AutoClipOptimizer in variables", 10_000, "window", "ratio at most 1.10"),
    Subject("fit", "AutoClipOptimizer in the tree", 1_000_000, "tree", "ratio at most 1.10"),
]

INPUTS, HIDDEN, BATCH = 128, 128, 128


def make_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(HIDDEN, "tanh"), keras.layers.Dense(HIDDEN, "tanh"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((INPUTS,)), *layers])


def make_batches(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, BATCH, INPUTS)).astype(np.float32)


def options_of(subject: Subject, norms: Norms) -> dict[str, Any]:
    """Where the history is; a tree is full from the start."""
    if subject.home == "window":
        return {"window": subject.size}
    history = NormHistory()
    history.extend(norms)
    return {"history": history}


def fill(clip: AutoClip | AutoClipOptimizer, norms: Norms) -> None:
    """Put norms into the variables, oldest first."""
    clip._state["norms"].assign(np.array([np.sort(norms), norms]))
    clip._state["counts"].assign([0, len(norms), 0, 0])


class Trainer:
    """One subject: a network, its optimizer and a full history."""

    def __init__(self, subject: Subject, norms: Norms, batches: NDArray[np.float32]) -> None:
        self.model = make_model()
        self.batches = batches
        constant = float(np.percentile(norms, 10))
        if subject.kind == "fit":
            fixed = constant if subject.home == "constant" else None
            optimizer: Any = keras.optimizers.SGD(1e-9, momentum=0.9, global_clipnorm=fixed)
            if fixed is None:
                optimizer = AutoClipOptimizer(optimizer, **options_of(subject, norms))
                if subject.home == "window":
                    fill(optimizer, norms)
            self.model.compile(optimizer, "mse")
            x = batches.reshape(-1, INPUTS)
            self.data = tf.data.Dataset.from_tensor_slices((x, x[:, :10])).batch(BATCH).cache().repeat()
            self.run = self._run_fit
        else:
            self.step = self._make_step(subject, norms, constant)
            self.tensors = [tf.constant(batch) for batch in batches]
            self.run = self._run_steps
        self.run(1)

    def _make_step(self, subject: Subject, norms: Norms, constant: float) -> Any:
        optimizer, model = keras.optimizers.SGD(1e-9, momentum=0.9), self.model
        optimizer.build(model.trainable_variables)
        if subject.home == "none":
            clip: Any = lambda grads: grads  # noqa: E731
        elif subject.home == "constant":
            clip = lambda grads: tf.clip_by_global_norm(grads, constant)[0]  # noqa: E731
        else:
            clip = AutoClip(**options_of(subject, norms))
            if subject.home == "window":
                fill(clip, norms)

        @tf.function
        def step(batch: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(batch, training=True) - batch[:, :10]) ** 2)
            grads = clip(tape.gradient(loss, model.trainable_variables))
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

        return step

    def _run_steps(self, steps: int) -> float:
        """Microseconds per step."""
        calls = max(1, steps // len(self.tensors))
        gc.disable()
        start = time.perf_counter_ns()
        for _ in range(calls):
            for batch in self.tensors:
                self.step(batch)
        elapsed = time.perf_counter_ns() - start
        gc.enable()
        return elapsed / 1e3 / (calls * len(self.tensors))

    def _run_fit(self, steps: int) -> float:
        steps = max(steps, 20)
        start = time.perf_counter_ns()
        self.model.fit(self.data, steps_per_epoch=steps, shuffle=False, verbose=0)
        return (time.perf_counter_ns() - start) / 1e3 / steps


def draw_norms(batches: NDArray[np.float32], size: int) -> Norms:
    """Norms distributed like those of the training: those of its batches, each time a little different."""
    model = make_model()
    measured = []
    for batch in batches:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(batch) - batch[:, :10]) ** 2)
        measured.append(float(tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables))))
    random = np.random.default_rng(2)
    return (random.choice(measured, size) * random.uniform(0.98, 1.02, size)).astype(np.float32)


def measure(*, quick: bool, rounds: int, steps: int) -> Measurements:
    """Every subject in every round."""
    batches = make_batches(20)
    trainers = {}
    for subject in SUBJECTS:
        say(f"  {subject.kind}: {subject.name}, {subject.size:,}")
        size = min(subject.size, 1_000) if quick else subject.size
        trainers[subject] = Trainer(subject._replace(size=size), draw_norms(batches, size or 100), batches)
    measured = Measurements()
    for count in range(rounds):
        say(f"  round {count + 1} of {rounds}")
        for subject, trainer in trainers.items():
            trainer.run(steps // 10)
            measured.add(Key("tensorflow", subject.kind, subject.size, subject.name, "us per step"), trainer.run(steps))
    for kind, name, size, _, _ in SUBJECTS:
        values = measured.values[Key("tensorflow", kind, size, name, "us per step")]
        constant = measured.values[Key("tensorflow", kind, 0, CONSTANT, "us per step")]
        for value, reference in zip(values, constant, strict=True):
            measured.add(Key("tensorflow", kind, size, name, "us more"), value - reference)
            measured.add(Key("tensorflow", kind, size, name, "ratio"), ratio(value, reference) or 0.0)
    return measured


def rows_of(measured: Measurements) -> list[list[str]]:
    return [
        [
            f"{kind}: {name}" + (f", {size:,} norms" if size else ""),
            *(
                shown(measured.median("tensorflow", kind, size, name, metric))
                for metric in ("us per step", "ratio", "us more")
            ),
            target,
        ]
        for kind, name, size, _, target in SUBJECTS
    ]


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
    steps = 40 if options.quick else 200
    facts = machine_facts(["tensorflow-cpu", "keras"])
    say("python -m bench tensorflow")
    measured = measure(quick=options.quick, rounds=options.rounds, steps=steps)
    measured.write(options.output / "tensorflow.csv")
    page = report(measured, facts, rounds=options.rounds, steps=steps, quick=options.quick)
    (options.output / "tensorflow.md").write_text(page, encoding="utf-8")
    print(table(HEADER, rows_of(measured)))
    say(f"written: tensorflow.csv and tensorflow.md in {options.output}")


if __name__ == "__main__":
    main()
