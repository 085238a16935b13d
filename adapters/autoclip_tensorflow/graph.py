"""Gradients and steps in TensorFlow: their global norm over all replicas, the step, and scaled gradients.

What shaped this module, and must stay true:

- Norms are observed by one op of the compiled kernel on the CPU. XLA does not know it and other devices do not have it,
  so there TensorFlow's own operations do it.
- The op lives in the core's own library, for there is one table of histories per process. TensorFlow never loads that
  library, and it is not linked to TensorFlow: it is told where TensorFlow's functions are, and registers its op through
  them.
- With a history the op is idempotent: replicas take a step side by side, and it enters the history once.
- A gradient may be None, or an IndexedSlices that names a row twice: such rows add up before they are squared.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from autoclip_core import BackendError, kernel_library
from autoclip_tensorflow import state as steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autoclip_tensorflow.state import Options

# XLA says which node it cannot compile, so the node's name says what to do.
_NODE = "history_is_not_for_jit_compile_so_give_window_instead"

_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)

# TensorFlow by the names that autoclip_core.arrays uses.
XP = SimpleNamespace(
    arange=tf.range,
    asarray=tf.constant,
    astype=tf.cast,
    concat=partial(tf.concat, axis=0),
    float32=tf.float32,
    full=lambda shape, value, dtype: tf.constant(value, dtype, shape),
    int32=tf.int32,
    isfinite=tf.math.is_finite,
    maximum=tf.maximum,
    minimum=tf.minimum,
    ones_like=tf.ones_like,
    stack=tf.stack,
    take=tf.gather,
    where=tf.where,
)


@cache
def _obstacle() -> str:
    """Register the op; return why that cannot be done, "" if it is."""
    try:
        kernel = ctypes.CDLL(kernel_library())
        frameworks = sorted(Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.*"))
        if not frameworks:
            return f"there is no libtensorflow_framework in {tf.sysconfig.get_lib()}"
        framework = ctypes.CDLL(str(frameworks[0]))
        register = kernel.autoclip_tensorflow_register
    except (BackendError, OSError, AttributeError) as error:
        return str(error)

    def find(name: bytes) -> int | None:
        function = getattr(framework, name.decode(), None)
        return ctypes.cast(function, ctypes.c_void_p).value if function is not None else None

    register.restype = ctypes.c_char_p
    missing: bytes | None = register(_FIND(find))
    return missing.decode() if missing is not None else ""


def check_history() -> None:
    """Raise BackendError, which says what to do instead, if graphs cannot reach a history."""
    if _obstacle():
        raise BackendError(
            f"A history needs the compiled kernel, which cannot be registered with TensorFlow ({_obstacle()}); leave "
            "it out, and variables keep the last `window` norms."
        )


def take_step(options: Options, variables: Mapping[str, Any], norm: tf.Tensor) -> tf.Tensor:
    """Let the norm of a gradient enter the history, change the variables, and return the scale."""
    # The kernel's op has no Python function, so it is made by its name, and only graphs do that.
    take = _take_step_eagerly if tf.executing_eagerly() else _take_step
    # A history is known by its id: a graph that is kept for eager steps does not hold it, and is that of others too.
    history = tf.constant(0 if options.history is None else options.history.shared_id, tf.int64)
    state = {key: tf.convert_to_tensor(variable) for key, variable in variables.items()}
    *after, scale = take(options._replace(history=None), history, state, norm)
    for key, value in zip(("norms", "counts", "last"), after, strict=True):
        variables[key].assign(value)
    return scale


def _take_step(options: Options, history: tf.Tensor, state: Mapping[str, tf.Tensor], norm: tf.Tensor) -> Any:
    def observe(*given: tf.Tensor) -> Any:
        inputs = [*given, state["percentile"], history]
        return tf.compat.v1.get_default_graph().create_op("AutoClipObserve", inputs, name=_NODE).outputs

    by_kernel = partial(steps.take_step, XP, options, state, norm, observe)
    if state["norms"].shape.rank == 1:  # no window: the norms are in a history
        return by_kernel()
    by_operations = partial(steps.take_step, XP, options, state, norm)
    if _obstacle():
        return by_operations()
    # For XLA this index is a constant that names no device.
    return tf.switch_case(tf.raw_ops.DeviceIndex(device_names=["CPU"]), [by_kernel], default=by_operations)


_take_step_eagerly = tf.function(_take_step, autograph=False)


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
