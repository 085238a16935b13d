"""The compiled kernel inside TensorFlow's graphs: an op over the process-wide table of shared histories.

What shaped this module:

- The op lives in the core's own library, for there is one table per process. TensorFlow never loads that library,
  and it is not linked to TensorFlow: it is told where TensorFlow's functions are, and registers its op through them.
- The op is idempotent: replicas take a step side by side, and it enters the history once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import tensorflow as tf

from autoclip_core import BackendError, NormHistory, kernel_library

# XLA says which node it cannot compile, so the node's name says what to do.
_NODE = "history_does_not_serve_with_jit_compile_so_give_window_instead"

_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)


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


def observe(
    history: NormHistory, step: tf.Tensor, previous: tf.Tensor, norm: tf.Tensor, percentile: float
) -> tf.Tensor:
    """Take step `step` of a history, which came after the norm `previous`; return the percentile, float32."""
    inputs = [
        tf.constant(history.shared_id, tf.int64),
        *(tf.convert_to_tensor(value) for value in (step, previous, norm)),
        tf.constant(percentile, tf.float64),
    ]
    return _observe_eagerly(inputs) if tf.executing_eagerly() else _observe(inputs)


def _observe(inputs: list[tf.Tensor]) -> tf.Tensor:
    # An op without a generated Python function is made by its name, and only graphs do that.
    return tf.compat.v1.get_default_graph().create_op("AutoClipObserve", inputs, name=_NODE).outputs[0]


_observe_eagerly = tf.function(_observe, autograph=False)
