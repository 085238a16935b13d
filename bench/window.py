"""What a longer window costs a compiled step on the CPU: in JAX's kernel and operations, and in TensorFlow."""

import gc
import os
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from autoclip_jax import autoclip, backend
from autoclip_tensorflow import AutoClip
from numpy.typing import NDArray

from bench.common import QUICK_NOTE, facts_table, machine_facts, parse, parser, say, shown, table
from bench.jax import full_state

OPENING = """\
What this isolates: a step of AutoClip alone, with a gradient of four numbers, over a window that is full. JAX's kernel
works in place. JAX's operations, which other devices run too, pass over the whole window; TensorFlow copies it around
the kernel, and XLA passes over it. Processor time of a step in microseconds, the median of {rounds} rounds."""

HEADER = ["norms", "MiB", "JAX, kernel", "JAX, operations", "TensorFlow, kernel", "TensorFlow, XLA"]
SIZES = (2**14, 2**17, 2**20, 2**24)

Norms = NDArray[np.float32]


def jax_step(norms: Norms, obstacle: str) -> Callable[[int], object]:
    """A step in JAX, and its state donated; an obstacle keeps it from the kernel."""
    tx = autoclip(window=len(norms))
    states, compiled = [full_state(tx.init(jnp.ones(4)), norms)], jax.jit(tx.update, donate_argnums=1)
    grads = [jnp.full(4, norm / 2) for norm in norms[:100]]

    def step(number: int) -> object:
        _, states[0] = compiled(grads[number % len(grads)], states[0])
        return jax.block_until_ready(states[0])

    with patch("autoclip_jax.kernel._obstacle", lambda: obstacle):
        step(0)
    return step


def tensorflow_step(norms: Norms, *, xla: bool) -> Callable[[int], object]:
    """A step in TensorFlow."""
    clip = AutoClip(window=len(norms))
    clip._state["norms"].assign(np.array([np.sort(norms), norms]))
    clip._state["counts"].assign(np.array([0, len(norms), 0, 0], np.int32))
    compiled = tf.function(clip, jit_compile=xla)
    grads = [[tf.fill((4,), norm / 2)] for norm in norms[:100]]
    return lambda number: compiled(grads[number % len(grads)])


def microseconds(step: Callable[[int], object], *, rounds: int, steps: int) -> float:
    """The median of the rounds."""
    step(0)
    found = []
    for _ in range(rounds):
        gc.disable()
        start = time.process_time_ns()
        for number in range(steps):
            step(number)
        found.append((time.process_time_ns() - start) / 1e3 / steps)
        gc.enable()
    return median(found)


def main() -> None:
    options = parse(parser(__doc__, rounds=7))
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    facts = machine_facts(["jax", "jaxlib", "tensorflow-cpu"]) | {"autoclip_jax.backend()": backend()}
    rows = []
    for size in SIZES[:1] if options.quick else SIZES:
        say(f"  {size:,}")
        norms = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
        steps = [
            *(jax_step(norms, ""), jax_step(norms, "not asked for")),
            *(tensorflow_step(norms, xla=False), tensorflow_step(norms, xla=True)),
        ]
        found = [microseconds(step, rounds=options.rounds, steps=max(2, min(300, 2**25 // size))) for step in steps]
        rows.append([f"{size:,}", shown(8 * size / 2**20), *map(shown, found)])
    parts = ["# The cost of a longer window", OPENING.format(rounds=options.rounds), *[QUICK_NOTE] * options.quick]
    page = "\n\n".join([*parts, table(HEADER, rows), facts_table(facts)]) + "\n"
    (options.output / "window.md").write_text(page, encoding="utf-8")
    print(table(HEADER, rows))
    say(f"written: window.md in {options.output}")


if __name__ == "__main__":
    main()
