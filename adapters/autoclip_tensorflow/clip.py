"""AutoClip for loops with tf.GradientTape.

What shaped this module, and must stay true:

- Every rule is the core's: `autoclip_core.arrays`. Here gradients become one norm, and a scale becomes scaled
  gradients.
- All state is in variables made at construction: so `tf.function`, XLA and `tf.train.Checkpoint` work with nothing
  to do, and so does tf.distribute where it is constructed under the strategy's scope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar, cast

import tensorflow as tf

from autoclip_core import arrays
from autoclip_tensorflow.graph import XP, check_history, global_square, scaled, update_variables
from autoclip_tensorflow.state import DEFAULT_WINDOW, Options, digits_of, first_state

if TYPE_CHECKING:
    from autoclip_core import NormHistory

Grads = TypeVar("Grads")  # a structure of gradients


class AutoClip(tf.Module):  # type: ignore[misc] # tensorflow has no types
    r"""Clip gradients to a percentile of the gradient norms seen so far.

    At step t the global L2 norm n(t) of the gradients joins the history, the threshold is the p-th percentile of that
    history, and the gradients are multiplied by

        scale = min(threshold / n(t), 1)

    It works eagerly, in `tf.function` and with `jit_compile=True`. Construct it once, under the scope of the strategy
    if there is one, and call it in the replica context with the gradients of the replica, as the optimizer takes them:
    the norm is that of their sum over the replicas. `tf.train.Checkpoint(clip=clip)` saves all of it.

    Args:
        percentile: from 0 (clip to the smallest norm seen) to 100 (never clip). May be assigned at any step.
        window: how many norms the variables remember, the oldest leaving first: all norms until the window is full. It
            takes 8 bytes per norm. At most 2**24.
        history: a NormHistory of the core that remembers every norm instead, without bound, on the host; other code of
            the process may read it or push to it. Not with `jit_compile=True`. It is not in the variables: save
            `history.to_bytes()` beside the checkpoint.
        warmup: do not clip before this many norms have been recorded.
        nonfinite: what a NaN or infinite norm does. "skip": the gradients become zeros; the optimizer's momentum and
            weight decay still act. "pass": nothing.
        max_threshold: an upper cap on the threshold, in the unit of the norm.
        name: the name of the module.

    Raises:
        AutoClipTypeError, AutoClipValueError: an argument cannot be used.
        BackendError: a history was given, and it or this TensorFlow cannot be reached by the kernel.

    >>> clip = AutoClip(percentile=50.0)
    >>> for size in (2.0, 8.0):
    ...     grads = clip([tf.constant([0.0, size]), None])
    >>> grads[0].numpy()
    array([0., 5.], dtype=float32)

    Source: Seetharaman, Wichern, Pardo, Le Roux, MLSP 2020, arXiv:2007.14469, Algorithm 1.
    """

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int = DEFAULT_WINDOW,
        history: NormHistory | None = None,
        warmup: int = 0,
        nonfinite: Literal["skip", "pass"] = "skip",
        max_threshold: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        options = Options(window, history, warmup, nonfinite, max_threshold)
        state = first_state(options, percentile)
        if history is not None:
            check_history()
        self._options = options  # once they are known to be good: tf.Module wraps what it is given
        self._state = {
            key: tf.Variable(value, trainable=False, name=key, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            for key, value in state.items()
        }

    @property
    def percentile(self) -> float:
        """The percentile, from 0 to 100. Assign to change it from the next step on, compiled steps included."""
        return arrays.percentile_of_digits(self._state["percentile"].numpy().tolist())

    @percentile.setter
    def percentile(self, percentile: float) -> None:
        self._state["percentile"].assign(digits_of(percentile))

    @property
    def history(self) -> NormHistory | None:
        """The history that was given, None where variables keep the norms."""
        return self._options.history

    def __call__(self, grads: Grads) -> Grads:
        """Take a step: remember the norm of the gradients, and return them clipped.

        Args:
            grads: the gradients of all parameters, in any structure that tf.nest knows: tensors, IndexedSlices, or
                None.

        Returns:
            The same structure, in which None stays None.
        """
        scale = update_variables(self._options, self._state, global_square(tf.nest.flatten(grads)))
        return cast("Grads", tf.nest.map_structure(lambda grad: scaled(grad, scale), grads))

    def metrics(self) -> dict[str, tf.Tensor]:
        """Return what was measured at the latest step, and counts.

        Returns:
            `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` of the latest step, and the
            counts `steps`, `clipped_steps`, `nonfinite_steps`, and `skipped_in_a_row`, how many of the latest updates
            were dropped one after the other; scalar tensors.

        >>> clip = AutoClip()
        >>> _ = clip([tf.constant([3.0, 4.0])])
        >>> float(clip.metrics()["grad_norm"])
        5.0
        """
        return arrays.metrics(XP, *(tf.convert_to_tensor(self._state[key]) for key in ("counts", "last")))
