"""Gradients as AutoClip needs them where Keras runs on JAX or PyTorch: their global norm, and scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

if TYPE_CHECKING:
    from collections.abc import Sequence


def global_norm(grads: Sequence[Any]) -> Any:
    """Return the L2 norm of all gradients together, float32."""
    squares = [ops.cast(ops.sum(ops.square(_wide(grad))), "float32") for grad in grads if grad is not None]
    return ops.sqrt(sum(squares, ops.zeros((), "float32")))


def scaled(grad: Any, scale: Any) -> Any:
    """Return the gradient times the scale: zeros where that is 0, for then the gradient may hold infinities."""
    if grad is None:
        return None
    wide = _wide(grad)
    return ops.cast(ops.where(scale > 0.0, wide * ops.cast(scale, wide.dtype), 0.0), grad.dtype)


def _wide(grad: Any) -> Any:
    return ops.cast(grad, keras.backend.result_type(grad.dtype, "float32"))
