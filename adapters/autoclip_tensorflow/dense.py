"""A clipping step where Keras runs on JAX or PyTorch: the norm of gradients, the step itself, and scaled gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from autoclip_core import BackendError, NormHistory
from autoclip_tensorflow.state import window_step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autoclip_tensorflow.state import Options

# Keras by the names that autoclip_core.arrays uses.
_XP = SimpleNamespace(
    arange=ops.arange,
    astype=ops.cast,
    concat=ops.concatenate,
    float32="float32",
    full=ops.full,
    int32="int32",
    isfinite=ops.isfinite,
    maximum=ops.maximum,
    minimum=ops.minimum,
    stack=ops.stack,
    take=ops.take,
    where=ops.where,
)


def check_history(history: NormHistory) -> None:
    """Raise BackendError, which says what serves instead, if steps on this backend cannot reach this history."""
    if keras.config.backend() == "jax":
        raise BackendError(
            "history= serves on Keras's TensorFlow and PyTorch backends, and this is its jax backend; leave it out, "
            "and variables keep the last `window` norms."
        )
    _ = history.shared_id  # not every backend has one


def take_step(options: Options, variables: Mapping[str, keras.Variable], norm: Any) -> Any:
    """Let the norm of a gradient enter the history, change the variables, and return the scale."""
    state = {key: variable.value for key, variable in variables.items()}
    if keras.config.backend() == "torch":
        from autoclip_tensorflow import direct

        scale = direct.take_step(options, state, norm)
        if scale is not None:
            return scale
        if options.history is not None:
            raise BackendError(
                "history= serves where PyTorch has the variables on the CPU and the kernel is compiled; leave it out, "
                "and variables keep the last `window` norms."
            )
    *after, scale = window_step(_XP, options, state, norm)
    for key, value in zip(("norms", "counts", "last"), after, strict=True):
        variables[key].assign(value)
    return scale


def global_norm(grads: Sequence[Any]) -> Any:
    """Return the L2 norm of all gradients together, float32."""
    squares = [ops.cast(ops.sum(ops.square(_wide(grad))), "float32") for grad in grads if grad is not None]
    return ops.sqrt(sum(squares, ops.zeros((), "float32")))


def count_replicas() -> int:
    """Return how many replicas take each step side by side: here one program sees all gradients."""
    return 1


def scaled(grad: Any, scale: Any) -> Any:
    """Return the gradient times the scale: zeros where that is 0, for then the gradient may hold infinities."""
    if grad is None:
        return None
    wide = _wide(grad)
    if isinstance(scale, float):
        return ops.cast(wide * scale if scale > 0.0 else ops.zeros_like(wide), grad.dtype)
    return ops.cast(ops.where(scale > 0.0, wide * ops.cast(scale, wide.dtype), 0.0), grad.dtype)


def _wide(grad: Any) -> Any:
    return ops.cast(grad, keras.backend.result_type(grad.dtype, "float32"))
