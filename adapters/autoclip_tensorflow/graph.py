"""Gradients and steps in TensorFlow: their global norm over all replicas, the step, and scaled gradients.

What shaped this module, and must stay true:

- Norms are observed by one op of the compiled kernel on the CPU. XLA does not know it and other devices do not have it,
  so there TensorFlow's own operations do it.
- The op lives in the core's own library, for there is one table of histories per process. TensorFlow never loads that
  library, and it is not linked to TensorFlow: it is told where TensorFlow's functions are, and registers its op through
  them.
- The op is registered when this module is imported: programs from elsewhere may name it, SavedModels and those of a
  coordinator, and an import is done by one thread.
- `tf.config.run_functions_eagerly` does not concern the function that takes steps for eager code: the op has no other
  way in.
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
from autoclip_tensorflow.state import Options, first_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# TensorFlow says which node it cannot compile or run, so the node's name says what to do.
_NODE = "history_is_for_this_process_without_jit_compile_so_give_window_instead"

_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)


def _where(condition: Any, x: Any, y: Any) -> tf.Tensor:
    """Do what `tf.where` does, whose op takes three times as long for scalars, because it asks how shapes broadcast."""
    dtype = next((value.dtype for value in (x, y) if tf.is_tensor(value)), None)
    x, y = tf.convert_to_tensor(x, dtype), tf.convert_to_tensor(y, dtype)
    if condition.shape == x.shape == y.shape:
        return tf.raw_ops.Select(condition=condition, x=x, y=y)
    return tf.where(condition, x, y)


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
    sqrt=tf.sqrt,
    stack=tf.stack,
    stop_gradient=tf.stop_gradient,
    take=tf.gather,
    where=_where,
)


def _register() -> str:
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


_OBSTACLE = _register()


def check_history() -> None:
    """Raise BackendError, which says what to do instead, if graphs cannot reach a history."""
    if _OBSTACLE:
        raise BackendError(
            f"A history needs the compiled kernel, which cannot be registered with TensorFlow ({_OBSTACLE}); leave "
            "it out, and variables keep the last `window` norms."
        )
    if isinstance(tf.distribute.get_strategy(), tf.distribute.experimental.ParameterServerStrategy):
        raise BackendError(
            "history= is in this process, and under a ParameterServerStrategy other processes take the steps; leave it "
            "out, and variables keep the last `window` norms."
        )


def update_variables(options: Options, variables: Mapping[str, Any], total: tf.Tensor) -> tf.Tensor:
    """Take a step with the square of the norm of a gradient: change the variables, and return the scale."""
    # A history is known by its id: a graph that is kept for eager steps does not hold it, and is that of others too.
    history = tf.constant(0 if options.history is None else options.history.shared_id, tf.int64)
    options = Options(*options)._replace(history=None)
    state = {key: tf.convert_to_tensor(variable) for key, variable in variables.items()}
    if tf.executing_eagerly():
        *after, scale = _graph(options, state["norms"].shape)(history, state, total)
    else:
        *after, scale = _take_step(options, history, state, total)
    for key, value in zip(("norms", "counts", "last"), after, strict=True):
        variables[key].assign(value)
    return scale


def _take_step(options: Options, history: tf.Tensor, state: Mapping[str, tf.Tensor], total: tf.Tensor) -> Any:
    in_window = state["norms"].shape.rank == 2  # else the norms are in a history

    def observe(*given: tf.Tensor) -> Any:
        def by_kernel() -> Any:
            # The op has no Python function, so it is made by its name, and only graphs do that.
            graph, inputs = tf.compat.v1.get_default_graph(), [*given, state["percentile"], history]
            return tuple(graph.create_op("AutoClipObserve", inputs, name=None if in_window else _NODE).outputs)

        if not in_window:
            return by_kernel()
        operations = partial(steps.observe_window, XP, state["percentile"], *given)
        if _OBSTACLE:
            return operations()
        # Where a branch is not taken its nodes cost time all the same: so all of these are one node.
        by_operations = tf.function(operations, autograph=False, experimental_attributes={"_noinline": True})
        # For XLA this index is a constant that names no device.
        return tf.switch_case(tf.raw_ops.DeviceIndex(device_names=["CPU"]), [by_kernel], default=by_operations)

    return steps.take_step(XP, options, state, total, observe)


@cache
def _graph(options: Options, shape: tf.TensorShape) -> Any:
    """Return `_take_step` as a graph, for eager code."""
    like = {key: tf.TensorSpec(value.shape, value.dtype) for key, value in first_state(options, 0.0).items()}
    with tf.init_scope(), tf.device(None):
        take = tf.function(partial(_take_step, options), autograph=False)
        return take.get_concrete_function(
            tf.TensorSpec((), tf.int64), like | {"norms": tf.TensorSpec(shape)}, tf.TensorSpec(())
        )


def global_square(grads: Sequence[Any]) -> tf.Tensor:
    """Return the square of the L2 norm of all gradients together, float32.

    Under tf.distribute it is that of their sums over the replicas.
    """
    grads = [grad for grad in grads if grad is not None]
    replica = tf.distribute.get_replica_context()
    if grads and replica is not None and replica.num_replicas_in_sync > 1:
        grads = replica.all_reduce(tf.distribute.ReduceOp.SUM, grads)
    halves = [tf.nn.l2_loss(_wide(_dense_rows(grad))) for grad in grads]
    return 2.0 * tf.add_n([tf.cast(half, tf.float32) for half in halves]) if halves else tf.constant(0.0)


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
