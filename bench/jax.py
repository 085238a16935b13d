"""What AutoClip adds to a jitted training step on the CPU: in the state, in the tree, inside scan, and undonated."""

import gc
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import autoclip_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    say,
    shown,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OPENING = """\
What this isolates: what clipping adds to one training step of a small network (SGD with momentum) that XLA has compiled
for the CPU. Every subject trains the same network on the same batches and differs in its clipping alone; the learning
rate is next to nothing, so that the norms keep their distribution. Histories are full before the clock starts: a window
loses its oldest norm at every step, and new norms fall among the old ones. Subjects take turns in every round; a round
is {steps:,} steps, and each number is the median of {rounds} rounds, in microseconds per step. "More" is the median of
the differences to the constant threshold (`optax.clip_by_global_norm`) of the same round and the same kind of loop."""

CONSTANT = "constant threshold"
KINDS = {
    "step": "a compiled step, called from Python, its state donated",
    "undonated": "the same, its state not donated: XLA copies what it changes",
    "scan": "steps inside one compiled lax.scan",
}

Params = dict[str, jax.Array]
Norms = NDArray[np.float32]


class Subject(NamedTuple):
    kind: str
    name: str
    # How many norms the history holds, where they are, and how much the step may take more; 0: no target.
    size: int
    home: str
    target: float


SUBJECTS = [
    Subject("step", "no clipping", 0, "none", 0),
    Subject("step", CONSTANT, 0, "constant", 0),
    Subject("step", "autoclip in the state, kernel", 65_536, "state", 8),
    Subject("step", "autoclip in the state, kernel", 131_072, "state", 0),
    Subject("step", "autoclip in the tree", 1_000_000, "tree", 8),
    Subject("step", "autoclip in the state, jax.numpy", 10_000, "jax.numpy", 25),
    Subject("undonated", CONSTANT, 0, "constant", 0),
    Subject("undonated", "autoclip in the state, kernel", 65_536, "state", 60),
    Subject("scan", CONSTANT, 0, "constant", 0),
    Subject("scan", "autoclip in the state, kernel", 65_536, "state", 4),
    Subject("scan", "autoclip in the tree", 1_000_000, "tree", 4),
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

    def __init__(self, subject: Subject, norms: Norms, batches: jax.Array) -> None:
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


def draw_norms(batches: jax.Array, size: int) -> Norms:
    """Norms distributed like those of the training: those of its batches, each time a little different."""
    params = make_params()
    measured = [float(optax.tree.norm(jax.grad(loss)(params, batch))) for batch in batches]
    random = np.random.default_rng(2)
    return (random.choice(measured, size) * random.uniform(0.98, 1.02, size)).astype(np.float32)


def measure(sizes: dict[int, int], *, rounds: int, steps: int) -> Measurements:
    """Every subject in every round; `sizes` gives the size to use for the one that is meant."""
    batches = make_batches(100)
    trainers = {}
    for subject in SUBJECTS:
        say(f"  {subject.kind}: {subject.name}, {subject.size:,}")
        size = sizes.get(subject.size, subject.size)
        trainers[subject] = Trainer(subject, draw_norms(batches, size), batches)
    measured = Measurements()
    for count in range(rounds):
        say(f"  round {count + 1} of {rounds}")
        for subject, trainer in trainers.items():
            trainer.run(steps // 10)
            measured.add(Key("jax", subject.kind, subject.size, subject.name, "us per step"), trainer.run(steps))
    for subject in SUBJECTS:
        values = measured.values[Key("jax", subject.kind, subject.size, subject.name, "us per step")]
        constant = measured.values[Key("jax", subject.kind, 0, CONSTANT, "us per step")]
        for value, reference in zip(values, constant, strict=True):
            measured.add(Key("jax", subject.kind, subject.size, subject.name, "us more"), value - reference)
    return measured


def rows_of(measured: Measurements) -> list[list[str]]:
    rows = []
    for kind, name, size, _, target in SUBJECTS:
        rows.append(
            [
                f"{kind}: {name}" + (f", {size:,} norms" if size else ""),
                shown(measured.median("jax", kind, size, name, "us per step")),
                "-" if name == CONSTANT else shown(measured.median("jax", kind, size, name, "us more")),
                f"at most {target:g}" if target else "-",
            ]
        )
    return rows


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
    sizes = dict.fromkeys((65_536, 131_072, 1_000_000, 10_000), 1_000) if options.quick else {}
    measured = measure(sizes, rounds=options.rounds, steps=steps)
    measured.write(options.output / "jax.csv")
    page = report(measured, facts, rounds=options.rounds, steps=steps, quick=options.quick)
    (options.output / "jax.md").write_text(page, encoding="utf-8")
    print(table(["microseconds per step", "in all", "more", "target"], rows_of(measured)))
    say(f"written: jax.csv and jax.md in {options.output}")


if __name__ == "__main__":
    main()
