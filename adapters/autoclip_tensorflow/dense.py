"""Gradients and steps where Keras runs on JAX or PyTorch: their norm, the step, and scaled gradients.

PyTorch runs one operation at a time, and a step in operations of Keras would be some 300 of them. So with variables on
the CPU, where the host reads the norm anyway, it takes the step itself, and the compiled kernel keeps the norms.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from autoclip_core import BackendError, NormHistory, arrays, kernel_error, kernel_library
from autoclip_tensorflow import state as steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from autoclip_tensorflow.state import Options

# Keras by the names that autoclip_core.arrays uses.
XP = SimpleNamespace(
    arange=ops.arange,
    asarray=ops.convert_to_tensor,
    astype=ops.cast,
    concat=ops.concatenate,
    float32="float32",
    full=ops.full,
    int32="int32",
    isfinite=ops.isfinite,
    maximum=ops.maximum,
    minimum=ops.minimum,
    sqrt=ops.sqrt,
    stack=ops.stack,
    stop_gradient=ops.stop_gradient,
    take=ops.take,
    where=ops.where,
)
# And numpy, for the scalars of one step: its own astype takes none.
_HOST = SimpleNamespace(
    **vars(np) | {"astype": lambda value, dtype: np.asarray(value).astype(dtype), "stop_gradient": lambda value: value}
)


def check_history() -> None:
    """Raise BackendError, which says what to do instead, if steps on this backend cannot reach a history."""
    if keras.config.backend() == "jax":
        raise BackendError(
            "history= is for Keras's TensorFlow and PyTorch backends, and this is its jax backend; leave it out, and "
            "variables keep the last `window` norms."
        )


def update_variables(options: Options, variables: Mapping[str, keras.Variable], total: Any) -> Any:
    """Take a step with the square of the norm of a gradient: change the variables, and return the scale."""
    state = {key: variable.value for key, variable in variables.items()}
    if keras.config.backend() == "torch":
        if _library() is not None and state["norms"].device.type == "cpu":
            return _update_on_the_host(options, state, total)
        if options.history is not None:
            raise BackendError(
                "history= is for PyTorch with the variables on the CPU and a compiled kernel; leave it out, and "
                "variables keep the last `window` norms."
            )
    observe = partial(steps.observe_window, XP, state["percentile"])
    *after, scale = steps.take_step(XP, options, state, total, observe)
    for key, value in zip(("norms", "counts", "last"), after, strict=True):
        variables[key].assign(value)
    return scale


if keras.config.backend() == "torch":
    from torch import compiler

    # The kernel is not for torch.compile to trace.
    update_variables = compiler.disable(update_variables)  # type: ignore[no-untyped-call]


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(kernel_library())
    except (BackendError, OSError):
        return None
    pointer, size, number, percentile = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float, ctypes.c_double
    library.autoclip_window_observe.argtypes = [pointer, size, size, number, percentile]
    library.autoclip_window_observe.restype = ctypes.c_float
    library.autoclip_tree_observe.argtypes = [
        *(ctypes.c_uint64, ctypes.c_uint64, pointer, number, percentile, ctypes.POINTER(ctypes.c_float))
    ]
    return library


def _update_on_the_host(options: Options, state: Mapping[str, Any], total: Any) -> float:
    """Change the variables in their own memory, and return the scale."""
    host = {key: tensor.detach().numpy() for key, tensor in state.items()}
    observe = partial(_observe, options.history, arrays.percentile_of_digits(host["percentile"].tolist()))
    with np.errstate(all="ignore"):
        _, counts, last, scale = steps.take_step(_HOST, options, host, np.float32(total.item()), observe)
    host["counts"][:], host["last"][:] = counts, last
    return float(scale)


def _observe(
    history: NormHistory | None, percentile: float, norms: Any, recorded_steps: Any, norm: Any
) -> tuple[Any, np.float32]:
    """Let the norm enter the norms in their own memory, and return them and the percentile."""
    library: Any = _library()
    if history is None:
        window = norms.shape[-1]
        found = library.autoclip_window_observe(norms.ctypes.data, window, int(recorded_steps), norm, percentile)
        return norms, np.float32(found)
    threshold = ctypes.c_float()
    status = library.autoclip_tree_observe(
        history.shared_id, int(recorded_steps), norms.ctypes.data, norm, percentile, threshold
    )
    if status != 0:
        raise kernel_error(status)
    return norms, np.float32(threshold.value)


def global_square(grads: Sequence[Any]) -> Any:
    """Return the square of the L2 norm of all gradients together, float32."""
    squares = [ops.cast(ops.sum(ops.square(_wide(grad))), "float32") for grad in grads if grad is not None]
    return sum(squares, ops.zeros((), "float32"))


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
    kind = keras.backend.standardize_dtype(grad.dtype)
    # By Keras's rules float64 and float32 together are float32.
    return grad if kind == "float64" else ops.cast(grad, keras.backend.result_type(kind, "float32"))
