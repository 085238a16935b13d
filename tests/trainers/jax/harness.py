"""What all programs of this folder share: a small training, and the checks of what AutoClip did in it.

The programs take `autoclip` from here: it is autoclip_jax's, and a callback from the compiled step that sees what it is
given and what it leaves. The norms are taken in float64 with a few lines of numpy.
"""

import math
from functools import wraps

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from autoclip_jax import autoclip as the_autoclip
from autoclip_jax import metrics
from checks import HALF, ROUNDING, STEPS, Trained, Update
from jax.experimental import io_callback

# What is trained.


def make_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "body": {"weights": jax.random.normal(first, (4, 3)), "bias": jnp.zeros(3)},
        "head": {"weights": jax.random.normal(second, (3, 1)), "bias": jnp.zeros(1)},
    }


def predict(params, inputs):
    body, head = params["body"], params["head"]
    return jnp.tanh(inputs @ body["weights"] + body["bias"]) @ head["weights"] + head["bias"]


def batch_of(step):
    """Inputs and targets of a step, whose gradients differ in size from step to step."""
    random = np.random.default_rng(step)
    inputs = random.normal(size=(8, 4)).astype(np.float32)
    size = np.float32(np.exp(3 * random.uniform()))
    return inputs, inputs.sum(axis=1, keepdims=True) * size


def mean_square(predicted, targets):
    return jnp.mean((predicted - targets) ** 2)


def loss_of(params, batch):
    inputs, targets = batch
    return mean_square(predict(params, inputs), targets)


# What is watched.


def norm_of(tree):
    return math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(tree)))


class Watch:
    """The updates of each AutoClip, told apart by the shapes of what they clip.

    A step that is evaluated and then discarded, as by some transformations, is evaluated again: the last one counts.
    """

    dtype = np.float32
    rounding, units = ROUNDING, 0

    def __init__(self):
        self.updates = {}
        self.saved = []

    def see(self, given, left, state):
        shapes = str(jax.tree.map(np.shape, given))
        update = Update(norm_of(given), float(state.grad_norm), float(state.clip_threshold), norm_of(left))
        self.updates.setdefault(shapes, {})[int(state.steps)] = update

    def mark(self):
        """Say that the library's checkpoint is made now."""
        jax.effects_barrier()
        self.saved = [len(stream) for stream in self.updates.values()]

    def take(self):
        jax.effects_barrier()
        streams, self.updates = self.updates, {}
        return [[stream[step] for step in sorted(stream)] for stream in streams.values()]


watch = Watch()


@wraps(the_autoclip)  # optax.inject_hyperparams reads its signature
def autoclip(*arguments, **options):
    clip = the_autoclip(*arguments, **options)

    def update(updates, state, params=None, **more):
        left, after = clip.update(updates, state, params, **more)
        io_callback(watch.see, None, updates, left, after, ordered=True)
        return left, after

    return optax.GradientTransformationExtraArgs(clip.init, update)


def play(library, train, case="", **options):
    """Train in the first process, resume in the second; check and report.

    `train` returns how many updates there were, the params, and the states of AutoClip.
    """

    def train_here(folder, *, resume):
        updates, params, *states = train(folder, resume=resume)
        measured = [metrics(state) for state in states]
        seen = [dict(stream) for stream in watch.updates.values()]
        assert sorted(int(each["steps"]) for each in measured) == sorted(max(stream) for stream in seen), "steps"
        return Trained(updates, jax.tree.leaves(params), measured[-1])

    checks.play(watch, library, train_here, case, **options)


# The loop of those who write it themselves, and the checkpoints that most of them use.


def save(folder, kept):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "half", kept)


def restore(folder, like):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve() / "half", jax.eval_shape(lambda: like))


def steps(step, kept, folder, *, resume, save=save, restore=restore):
    """Take the steps of a run, from the checkpoint in the middle if it is resumed; return what is kept at the end.

    Args:
        step: from what is kept and a batch to what is kept.
        kept: all that a checkpoint has to have.
        folder: for the checkpoint.
        resume: whether to begin with it.
        save: of the library.
        restore: of the library; it is given what is kept at the start.
    """
    if resume:
        kept = restore(folder, kept)
    for number in range(HALF if resume else 0, STEPS):
        if number == HALF and not resume:
            save(folder, kept)
            watch.mark()
        kept = step(kept, batch_of(number))
    return kept
