"""A clipping step inside TensorFlow's graphs: one op of the compiled kernel on the CPU, TensorFlow's own elsewhere.

What shaped this module:

- One op does the whole step, because each op costs a graph microseconds. XLA does not know it and other devices do not
  have it, so there the step is taken in TensorFlow's ops.
- The op lives in the core's own library, for there is one table of histories per process. TensorFlow never loads that
  library, and it is not linked to TensorFlow: it is told where TensorFlow's functions are, and registers its op through
  them.
- With a history the op is idempotent: replicas take a step side by side, and it enters the history once.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from autoclip_core import BackendError, NormHistory, kernel_library
from autoclip_tensorflow.state import Options, rule_of, window_step

if TYPE_CHECKING:
    from collections.abc import Mapping

# XLA says which node it cannot compile, so the node's name says what to do.
_NODE = "history_does_not_serve_with_jit_compile_so_give_window_instead"

_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)

# TensorFlow by the names that autoclip_core.arrays uses.
_XP = SimpleNamespace(
    arange=tf.range,
    astype=tf.cast,
    concat=partial(tf.concat, axis=0),
    float32=tf.float32,
    full=lambda shape, value, dtype: tf.constant(value, dtype, shape),
    int32=tf.int32,
    isfinite=tf.math.is_finite,
    maximum=tf.maximum,
    minimum=tf.minimum,
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


def check_history(history: NormHistory) -> None:
    """Raise BackendError, which says what serves instead, if graphs cannot reach this history."""
    if _obstacle():
        raise BackendError(
            f"A history needs the compiled kernel, which cannot be registered with TensorFlow ({_obstacle()}); leave "
            "it out, and variables keep the last `window` norms."
        )
    _ = history.shared_id  # not every backend has one


def take_step(options: Options, variables: Mapping[str, Any], norm: tf.Tensor) -> tf.Tensor:
    """Let the norm of a gradient enter the history, change the variables, and return the scale."""
    # The kernel's op has no Python function, so it is made by its name, and only graphs do that.
    take = _take_step_eagerly if tf.executing_eagerly() else _take_step
    rule, cap = rule_of(options)
    state = {key: tf.convert_to_tensor(variable) for key, variable in variables.items()}
    # A history is known by its id: a graph that is kept for eager steps does not hold it, and serves others.
    id_only = options._replace(history=None)
    *after, scale = take(id_only, tf.constant(rule), tf.constant(cap, tf.float32), state, norm)
    for key, value in zip(("norms", "counts", "last"), after, strict=True):
        variables[key].assign(value)
    return scale


def _take_step(
    options: Options, rule: tf.Tensor, cap: tf.Tensor, state: Mapping[str, tf.Tensor], norm: tf.Tensor
) -> Any:
    def by_kernel() -> tuple[tf.Tensor, ...]:
        inputs = [rule, cap, state["percentile"], state["norms"], state["counts"], norm]
        return tuple(tf.compat.v1.get_default_graph().create_op("AutoClipStep", inputs, name=_NODE).outputs)

    if state["norms"].shape.rank == 1:  # no window: the norms are in a history
        return by_kernel()
    by_operations = partial(window_step, _XP, options, state, norm)
    if _obstacle():
        return by_operations()
    # For XLA this index is a constant that names no device.
    return tf.switch_case(tf.raw_ops.DeviceIndex(device_names=["CPU"]), [by_kernel], default=by_operations)


_take_step_eagerly = tf.function(_take_step, autograph=False)
