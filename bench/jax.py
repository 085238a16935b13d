"""What AutoClip adds to a jitted training step on the CPU: in the state, in the tree, inside scan, and undonated."""

import gc
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import autoclip_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from autoclip_core import NormHistory
from bench.common import (
    CONSTANT,
    QUICK_NOTE,
    Measurements,
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

OPENING = """\
What this isolates: what clipping adds to one training step of a small network (SGD with momentum) that XLA has compiled
for the CPU. Every subject trains the same network on the same batches and differs in its clipping alone; the learning
rate is next to nothing, so that the norms keep their distribution. Histories are full before the clock starts: a window
loses its oldest norm at every step, and new norms fall among the old ones. Each subject is there twice, and all take
turns in every round, in an order drawn anew; a round is {steps:,} steps, and each number is the median over {rounds}
rounds of the mean of the two, in microseconds per step. "More" is the median of the differences to the constant
threshold (`optax.clip_by_global_norm`) of the same round and the same kind of loop."""

KINDS = {
    "step": "a compiled step, called from Python, its state donated",
    "undonated": "the same, its state not donated: XLA copies what it changes",
    "scan": "steps inside one compiled lax.scan",
}

Params = dict[str, jax.Array]
Norms = NDArray[np.float32]


SUBJECTS = [
    StepSubject("step", "no clipping", 0, "none"),
    StepSubject("step", CONSTANT, 0, "constant"),
    StepSubject("step", "autoclip in the state, kernel", 65_536, "state", "at most 8"),
    StepSubject("step", "autoclip in the state, kernel", 131_072, "state"),
    StepSubject("step", "autoclip in the tree", 1_000_000, "tree", "at most 8"),
    StepSubject("step", "autoclip in the state, jax.numpy", 10_000, "jax.numpy", "at most 25"),
    StepSubject("undonated", CONSTANT, 0, "constant"),
    StepSubject("undonated", "autoclip in the state, kernel", 65_536, "state", "at most 60"),
    StepSubject("scan", CONSTANT, 0, "constant"),
    StepSubject("scan", "autoclip in the state, kernel", 65_536, "state", "at most 4"),
    StepSubject("scan", "autoclip in the tree", 1_000_000, "tree", "at most 4"),
]


def make_params() -> Params:
    random = np.random.default_rng(0)
    shapes = {"w1": (32, 128), "b1": (128,), "w2": (128, 10), "b2": (10,)}
    return {name: jnp.asarray(random.normal(size=shape) * 0.1, jnp.float32) for name, shape in shapes.items()}


def make_batches(count: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(count, 32, 32)), jnp.float32)


def loss(params: Params, batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(batch @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] + params["b2"] - batch[:, :10]) ** 2)


def clipping(home: str, norms: Norms) -> optax.GradientTransformation:
    """The transformation under test; only a tree holds the norms already."""
    if home == "none":
        return optax.identity()
    if home == "constant":
        return optax.clip_by_global_norm(0.2)
    if home == "tree":
        history = NormHistory()
        history.extend(norms)
        return autoclip_jax.autoclip(history=history)
    return autoclip_jax.autoclip(window=len(norms))


def full_state(state: autoclip_jax.AutoClipState, norms: Norms) -> autoclip_jax.AutoClipState:
    """A state whose window holds these norms, oldest first."""
    return state._replace(norms=jnp.asarray([np.sort(norms), norms]), counts=state.counts.at[1].set(len(norms)))


class Trainer:
    """One subject: a network, its optimizer and a full history."""

    def __init__(self, subject: StepSubject, norms: Norms, batches: jax.Array) -> None:
        self.kind, self.batches = subject.kind, batches
        tx = optax.chain(clipping(subject.home, norms), optax.sgd(1e-9, momentum=0.9))
        self.params = make_params()
        self.state = tx.init(self.params)
        if subject.home in ("state", "jax.numpy"):
            self.state = (full_state(self.state[0], norms), *self.state[1:])

        def step(params: Params, state: Any, batch: jax.Array) -> tuple[Params, Any]:
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        def scan(params: Params, state: Any, batches: jax.Array) -> tuple[Params, Any]:
            carry, _ = jax.lax.scan(lambda carry, batch: (step(*carry, batch), None), (params, state), batches)
            return carry

        donated = () if self.kind == "undonated" else (0, 1)
        self.call: Callable[..., tuple[Params, Any]] = jax.jit(
            scan if self.kind == "scan" else step, donate_argnums=donated
        )
        self.each = list(batches)
        # What the rest of the program does with the kernel cannot be asked for by name: this is the form for devices.
        with patch("autoclip_jax.kernel._obstacle", lambda: "" if subject.home != "jax.numpy" else "not asked for"):
            self.run(1)

    def run(self, steps: int) -> float:
        """Train for about so many steps; microseconds per step."""
        calls = max(1, steps // len(self.each))
        params, state, call = self.params, self.state, self.call
        gc.disable()
        start = time.perf_counter_ns()
        for _ in range(calls):
            if self.kind == "scan":
                params, state = call(params, state, self.batches)
            else:
                for batch in self.each:
                    params, state = call(params, state, batch)
        jax.block_until_ready((params, state))
        elapsed = time.perf_counter_ns() - start
        gc.enable()
        self.params, self.state = params, state
        return elapsed / 1e3 / (calls * len(self.each))


def measure(*, quick: bool, rounds: int, steps: int) -> Measurements:
    batches, params = make_batches(100), make_params()
    norms = [float(optax.tree.norm(jax.grad(loss)(params, batch))) for batch in batches]

    def build(subject: StepSubject) -> Callable[[int], float]:
        size = min(subject.size, 1_000) if quick else subject.size
        return Trainer(subject, norms_like(norms, size), batches).run

    return measure_steps("jax", SUBJECTS, build, rounds=rounds, steps=steps, quick=quick)


def rows_of(measured: Measurements) -> list[list[str]]:
    return step_rows("jax", measured, SUBJECTS, ["us more"])


def report(measured: Measurements, facts: dict[str, str], *, rounds: int, steps: int, quick: bool) -> str:
    """The Markdown page."""
    parts = ["# AutoClip in a jitted training step", OPENING.format(rounds=rounds, steps=steps)]
    if quick:
        parts.append(QUICK_NOTE)
    parts += [
        "\n".join(f"- {kind}: {meaning}" for kind, meaning in KINDS.items()),
        table(["microseconds per step", "in all", "more", "target"], rows_of(measured)),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = parse(parser(__doc__, rounds=15))
    steps = 200 if options.quick else 2_000
    facts = machine_facts(["jax", "jaxlib", "optax"])
    facts["autoclip_jax.backend()"] = autoclip_jax.backend()
    facts["devices"] = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    say("python -m bench jax")
    measured = measure(quick=options.quick, rounds=options.rounds, steps=steps)
    measured.write(options.output / "jax.csv")
    page = report(measured, facts, rounds=options.rounds, steps=steps, quick=options.quick)
    (options.output / "jax.md").write_text(page, encoding="utf-8")
    print(table(["microseconds per step", "in all", "more", "target"], rows_of(measured)))
    say(f"written: jax.csv and jax.md in {options.output}")


if __name__ == "__main__":
    main()
