"""What all programs of this folder share: a small training, and the checks of what AutoClip did in it.

What is seen of an update is seen between the batches, so that the compiled step is the one that users have: the
gradient is taken once more by the backend's own means, at the weights before the batch, and its norm in float64; what
AutoClip has left to the optimizer is told by SGD's velocities, before the batch and after it.
"""

import math

import checks
import keras
import numpy as np
from autoclip_tensorflow import AutoClipOptimizer
from checks import HALF, STEPS, Update

SIZE = 8  # of a batch
RATE, MOMENTUM = 0.01, 0.5


def examples():
    """All batches one after the other, whose gradients differ in size from batch to batch."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(SIZE * STEPS, 4)).astype(np.float32)
    sizes = np.exp(3 * random.uniform(size=STEPS)).astype(np.float32)
    return inputs, inputs.sum(axis=1, keepdims=True) * np.repeat(sizes, SIZE)[:, None]


def half(number):
    at = slice(SIZE * HALF * number, SIZE * HALF * (number + 1))
    return tuple(part[at] for part in examples())


def make_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])


def make_sgd():
    return keras.optimizers.SGD(RATE, momentum=MOMENTUM)


def fit(model, data, *callbacks, **options):
    """One epoch in the order of the data, watched."""
    watch.data = data
    options = {"batch_size": SIZE, "shuffle": False, "verbose": 0, "callbacks": [watch, *callbacks]} | options
    return model.fit(*data, **options)


def as_numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)


def gradient_of(model, inputs, targets):
    """The gradient of a model's loss, by the means of the backend."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = model.compute_loss(inputs, targets, model(inputs))
        variables = [getattr(variable, "_value", variable) for variable in model.trainable_variables]
        grads = tape.gradient(loss, variables)
        grads = [tf.convert_to_tensor(grad) for grad in grads]
    elif keras.config.backend() == "torch":
        import torch

        variables = [variable.value for variable in model.trainable_variables]
        grads = torch.autograd.grad(
            model.compute_loss(inputs, keras.ops.convert_to_tensor(targets), model(inputs)), variables
        )
    else:
        import jax

        trained, others = (
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )

        def loss(trained):
            predicted, _ = model.stateless_call(trained, others, inputs)
            return model.compute_loss(inputs, targets, predicted)

        grads = jax.grad(loss)(trained)
    return [as_numpy(grad) for grad in grads]


def norm_of(grads):
    return math.sqrt(sum(float(np.square(grad).sum()) for grad in grads))


def clipper_of(optimizer):
    while not isinstance(optimizer, AutoClipOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


class Watch(keras.callbacks.Callback):
    """The updates of each training, in order; `data` is what is trained with."""

    dtype = np.float32
    rounding = 1e-5  # the gradient is taken by another program than the one that is clipped
    units = int(keras.config.backend() == "jax")  # where XLA rounds in an order of its own

    def __init__(self):
        super().__init__()
        self.streams, self.saved, self.data = [], [], None
        self._grads, self._clip = [], None

    def __deepcopy__(self, memo):
        return self  # tuners copy what they are given

    def on_train_batch_begin(self, batch, logs=None):
        at = slice(SIZE * batch, SIZE * (batch + 1))
        inputs, targets = self.data
        inputs = {name: part[at] for name, part in inputs.items()} if isinstance(inputs, dict) else inputs[at]
        clip = clipper_of(self.model.optimizer)
        self.begin(self.model, inputs, targets[at], clip, clip.inner_optimizer)

    def on_train_batch_end(self, batch, logs=None):
        clip = clipper_of(self.model.optimizer)
        self.end(clip, clip.inner_optimizer, clip.gradient_accumulation_steps or 1)

    def begin(self, model, inputs, targets, clip, sgd):
        if self._clip is not clip:
            self._clip, self._steps = clip, int(clip.metrics()["steps"])
            self.streams.append([])
        self._grads.append(gradient_of(model, inputs, targets))
        self._velocities = [as_numpy(velocity) for velocity in getattr(sgd, "momentums", [])]

    def end(self, clip, sgd, batches=1):
        measured = {name: float(number) for name, number in clip.metrics().items()}
        if len(self._grads) < batches:
            assert measured["steps"] == self._steps, "a step between the updates"
            return
        self._steps += 1
        assert measured["steps"] == self._steps, f"{measured['steps']} steps, and not {self._steps}"
        grads = [sum(parts) / batches for parts in zip(*self._grads, strict=True)]
        after = [as_numpy(velocity) for velocity in sgd.momentums]
        before = self._velocities or [0.0] * len(after)
        left = [(MOMENTUM * old - new) / RATE for old, new in zip(before, after, strict=True)]
        numbers = norm_of(grads), measured["grad_norm"], measured["clip_threshold"], norm_of(left)
        self.streams[-1].append(Update(*numbers, has_moved=any(velocity.any() for velocity in after)))
        self._grads = []

    def mark(self):
        """Say that the library's checkpoint is made now."""
        self.saved = [len(stream) for stream in self.streams]

    def take(self):
        streams, self.streams, self._clip = self.streams, [], None
        return streams


watch = Watch()


def play(library, train, case="", **options):
    """Train in the first process, resume in the second; check and report, with the backend in the case."""
    case = ", ".join(filter(None, (case, keras.config.backend())))
    checks.play(watch, library, train, case, **options)
