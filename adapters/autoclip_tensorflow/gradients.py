"""TensorFlow gradients as AutoClip needs them: their global norm over all replicas, and scaled.

A gradient may be None, or an IndexedSlices that names a row twice: such rows add up before they are squared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

if TYPE_CHECKING:
    from collections.abc import Sequence


def global_norm(grads: Sequence[Any]) -> tf.Tensor:
    """Return the L2 norm of all gradients together, float32; under tf.distribute that of their sums over replicas."""
    grads = [grad for grad in grads if grad is not None]
    replica = tf.distribute.get_replica_context()
    if grads and replica is not None and replica.num_replicas_in_sync > 1:
        grads = replica.all_reduce(tf.distribute.ReduceOp.SUM, grads)
    halves = [tf.nn.l2_loss(_wide(_dense_rows(grad))) for grad in grads]
    return tf.sqrt(2.0 * tf.add_n([tf.cast(half, tf.float32) for half in halves])) if halves else tf.constant(0.0)


def count_replicas() -> int:
    """Return how many replicas take each step side by side."""
    count: int = tf.distribute.get_strategy().num_replicas_in_sync
    return count


def scaled(grad: Any, scale: tf.Tensor) -> Any:
    """Return the gradient times the scale: zeros where that is 0, for then the gradient may hold infinities."""
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(scaled(grad.values, scale), grad.indices, grad.dense_shape)
    wide = _wide(grad)
    return tf.cast(tf.math.multiply_no_nan(wide, tf.cast(scale, wide.dtype)), grad.dtype)


def _wide(values: Any) -> tf.Tensor:
    values = tf.convert_to_tensor(values)
    return values if values.dtype == tf.float64 else tf.cast(values, tf.float32)


def _dense_rows(grad: Any) -> Any:
    if not isinstance(grad, tf.IndexedSlices):
        return grad
    rows, row_of = tf.unique(grad.indices)
    return tf.math.unsorted_segment_sum(_wide(grad.values), row_of, tf.size(rows))
