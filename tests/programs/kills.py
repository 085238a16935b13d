"""Trainings that are killed (SIGKILL) at random moments, also while they save, and resumed from the last checkpoint.

`survive` is the driver. The rest is what it kills: `python kills.py FRAMEWORK FOLDER STEPS` trains with AutoClip, saves
after every third step, and resumes from what it finds in the folder. It says what it does, one line each, so that the
driver knows when to strike and what a resumed run must repeat: to the last bit what an undisturbed one did.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS_PER_KILL = 20
SAVE_EVERY = 3
REMEMBERED = 200_000  # norms before the first step: to save them takes a while, in which a kill can strike


# --- What is killed ---------------------------------------------------------------------------------------------------


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")  # at once: a kill never leaves half a line
    sys.stdout.flush()


def train(run, folder, steps):
    """Train to the end: `run` gives the steps done, a step -> threshold, a way to save, and all that is kept."""
    checkpoint, part = folder / "checkpoint.keras", folder / "part.keras"  # Keras demands this ending
    done, step, save, state = run(checkpoint)
    say("resumed", done)
    for number in range(done + 1, steps + 1):
        say("step", number, float(step(number)).hex())
        if number % SAVE_EVERY == 0 or number == steps:
            say("saving", number)
            save(part, number)
            part.replace(checkpoint)
            say("saved", number)
    say("done", hashlib.sha256(state()).hexdigest())


def norms_before():
    import numpy as np

    return np.random.default_rng(0).lognormal(size=REMEMBERED)


def batch_of(number):
    import numpy as np

    return np.random.default_rng(number).lognormal(size=(8, 4)).astype(np.float32)


def run_torch(checkpoint):
    import torch
    from autoclip_torch import attach

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    clip = attach(optimizer)
    parts = {"model": model, "optimizer": optimizer, "clip": clip}
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        done = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
        clip.history.check()
    else:
        clip.history.extend(norms_before())

    def step(number):
        optimizer.zero_grad()
        model(torch.from_numpy(batch_of(number))).square().mean().backward()
        optimizer.step()
        return clip.threshold

    def save(file, number):
        torch.save({"step": number} | {name: part.state_dict() for name, part in parts.items()}, file)

    def state():
        weights = b"".join(param.detach().numpy().tobytes() for param in model.parameters())
        return weights + clip.history.to_bytes()

    return done, step, save, state


def run_jax(checkpoint):
    import flax.serialization
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from autoclip_jax import autoclip, load_history, metrics, save_history

    from autoclip_core import NormHistory

    history = NormHistory()
    history.extend(norms_before())
    params = {"w": jnp.linspace(-1.0, 1.0, 4)}
    opt_state = optax.chain(autoclip(history=history), optax.adam(1e-2)).init(params)
    kept = {"step": 0, "params": params, "state": opt_state, "history": save_history(history)}
    if checkpoint.exists():
        kept = flax.serialization.from_bytes(kept, checkpoint.read_bytes())
        kept |= {name: jax.tree.map(jnp.asarray, kept[name]) for name in ("params", "state")}
        history = load_history(kept["history"])
        history.check()
    tx = optax.chain(autoclip(history=history), optax.adam(1e-2))

    @jax.jit
    def update(params, state, batch):
        grads = jax.grad(lambda params: jnp.mean((batch @ params["w"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(number):
        kept["params"], kept["state"] = update(kept["params"], kept["state"], batch_of(number))
        return metrics(kept["state"])["clip_threshold"]

    def save(file, number):
        jax.block_until_ready(kept["state"])
        kept.update(step=number, history=save_history(history))
        file.write_bytes(flax.serialization.to_bytes(kept))

    def state():
        return np.asarray(kept["params"]["w"]).tobytes() + history.to_bytes()

    return kept["step"], step, save, state


def run_keras(checkpoint):
    import keras
    import numpy as np
    from autoclip_tensorflow import AutoClipOptimizer

    if checkpoint.exists():
        model = keras.models.load_model(checkpoint)
    else:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
        model.compile(AutoClipOptimizer(keras.optimizers.Adam(1e-2), window=REMEMBERED), loss="mse")
    optimizer = model.optimizer

    def step(number):
        model.train_on_batch(batch_of(number), np.zeros((8, 1)))
        return optimizer.metrics()["clip_threshold"]

    def save(file, number):
        model.save(file)

    def state():
        values = [*model.weights, *optimizer.variables]
        return b"".join(keras.ops.convert_to_numpy(value).tobytes() for value in values)

    return int(optimizer.iterations), step, save, state


FRAMEWORKS = {"torch": run_torch, "jax": run_jax, "keras": run_keras}


# --- The driver -------------------------------------------------------------------------------------------------------


def start(framework, folder, steps):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-P", __file__, framework, str(folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"},
    )


def strike(process, while_saving, random):
    """Kill the training at a random moment, or at one while it saves; return all that it said."""
    said = []
    lines = random.randrange(2, STEPS_PER_KILL)
    for line in process.stdout:
        said.append(line)
        lines -= 1
        if lines <= 0 and (not while_saving or line.startswith("saving")):
            break
    time.sleep(random.uniform(0.0, 0.003))
    process.send_signal(signal.SIGKILL)
    with process.stdout, process.stderr:
        said += process.stdout  # and not communicate(), which knows nothing of what has been read ahead
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    return [line.split() for line in said]


def finish(process):
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return [line.split() for line in said.splitlines()]


def survive(framework, folder, kills, seed=0):
    """Kill a training so many times, then let it end. The number of kills that struck while it was saving.

    Raises:
        AssertionError: a run did not resume from the last complete checkpoint, or something differs from the
            undisturbed run: a threshold, or the parameters and the history at the end; or no kill struck a save.
    """
    chance = random.Random(seed)  # noqa: S311
    steps = STEPS_PER_KILL * (kills + 1)
    undisturbed = start(framework, folder / "undisturbed", steps)
    saved = struck_saving = 0
    struck_last = False
    runs = []
    for kill in range(kills + 1):
        process = start(framework, folder / "killed", steps)
        said = strike(process, kill % 2 == 0, chance) if kill < kills else finish(process)
        runs.append(said)
        # A save that was announced may be complete although nobody could say so any more.
        resumed = int(said[0][1])
        assert said[0][0] == "resumed"
        assert saved <= resumed <= saved + (SAVE_EVERY if struck_last else 0) if kill else resumed == 0
        saved = max([resumed, *(int(words[1]) for words in said if words[0] == "saved")])
        struck_last = said[-1][0] == "saving"
        struck_saving += struck_last
    truth = finish(undisturbed)
    thresholds = {words[1]: words[2] for words in truth if words[0] == "step"}
    assert len(thresholds) == steps
    for said in runs:
        for words in said:
            assert words[0] != "step" or words[2] == thresholds[words[1]], f"step {words[1]} has another threshold"
    assert runs[-1][-1] == truth[-1], "the run ended elsewhere"
    assert struck_saving > 0, "no kill struck while the training was saving"
    return struck_saving


if __name__ == "__main__":
    train(FRAMEWORKS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))
