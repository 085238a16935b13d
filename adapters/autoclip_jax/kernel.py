"""The compiled kernel inside XLA programs: C handlers on the CPU, the core's rule over `jax.numpy` everywhere else.

What shaped this module:

- The handlers live in the core's own library, for there is one table of shared histories per process.
- They are registered when a program is first traced, and not at import: registering needs JAX's devices, and asking for
  these too early would forbid `jax.distributed.initialize`.
- A handler counts as a pure function: JAX then may shard, batch, recompute and donate around it. The window is one. The
  tree is made to look like one: its steps are counted, and one that is taken again is recorded once.
"""

from __future__ import annotations

import ctypes
from functools import cache
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ffi

from autoclip_core import BackendError, EmptyHistoryError, arrays, kernel_error, kernel_library

_WINDOW = "autoclip_xla_window"
_TREE = "autoclip_xla_tree"
_REGISTERING = Lock()
# XLA says which target it lacks, so its name says what to do.
_NO_TREE = "autoclip: history=NormHistory() is for the CPU only; on this device leave it out, or give window=N"


def backend() -> str:
    """Return what keeps windows on the CPU: "native", the compiled kernel, or "jax.numpy" where it cannot be reached.

    On other devices it is always "jax.numpy". Calling this makes JAX look for its devices, and registers the kernel
    with it: call it before a program is loaded that another process has compiled.
    """
    return "jax.numpy" if _obstacle() else "native"


def _obstacle() -> str:
    """Register the handlers; return why that cannot be done, "" if it is."""
    with _REGISTERING:  # a cache lets two threads in
        return _register()


@cache
def _register() -> str:
    try:
        jax.devices("cpu")  # without a device to register for, JAX may end the process
        library = ctypes.CDLL(kernel_library())
        for name in (_WINDOW, _TREE):
            handler = ffi.pycapsule(getattr(library, name))  # type: ignore[no-untyped-call]
            ffi.register_ffi_target(name, handler, platform="cpu")
    except (BackendError, OSError, AttributeError, RuntimeError) as error:
        return str(error)
    return ""


def observe_window(norms: Array, recorded_steps: Array, norm: Array, percentile: float | Array) -> tuple[Array, Array]:
    """Do what `arrays.observe` does for a window in one array: in the kernel where that can be.

    `norms` has the window ascending and in order of age, shape (2, N). Returns it with the norm, and the percentile.
    """

    def by_kernel(norms: Array, recorded_steps: Array, norm: Array) -> tuple[Array, Array]:
        # Results look like these operands, for JAX's sharding as well.
        call: Any = ffi.ffi_call(_WINDOW, (norms, norm), vmap_method="sequential", input_output_aliases={0: 0})
        after, found = call(norms, recorded_steps, norm, _exact(percentile))
        return after, found

    def by_numpy(norms: Array, recorded_steps: Array, norm: Array) -> tuple[Array, Array]:
        return arrays.observe_window(jnp, norms, recorded_steps, norm, percentile)

    if _obstacle():
        return by_numpy(norms, recorded_steps, norm)
    found: tuple[Array, Array] = jax.lax.platform_dependent(
        norms, recorded_steps, norm, cpu=by_kernel, default=by_numpy
    )
    return found


def observe_tree(
    shared_id: int, previous: Array, recorded_steps: Array, norm: Array, percentile: float | Array
) -> tuple[Array, Array]:
    """Let a norm enter a shared history, as step `recorded_steps` after the norm `previous`, shape (1,).

    Returns:
        What is `previous` at the next step, and the percentile.

    Raises:
        BackendError: the kernel cannot be registered here.
    """
    if _obstacle():
        raise BackendError(
            f"A history needs the compiled kernel, which cannot be registered with JAX ({_obstacle()}); leave it out, "
            "and the optimizer's state keeps the last `window` norms."
        )

    def call(target: str) -> Any:
        made: Any = ffi.ffi_call(target, (previous, norm), vmap_method="sequential")
        return lambda *operands: made(*operands, _exact(percentile), history=np.int64(shared_id))

    found: tuple[Array, Array] = jax.lax.platform_dependent(
        previous, recorded_steps, norm, cpu=call(_TREE), default=call(_NO_TREE)
    )
    return found


def settle(shared_id: int, previous: Array, recorded_steps: Array) -> None:
    """Let a shared history hold the outcome of the latest step that a state has.

    Raises:
        StateError: the history is not that of the state.
    """
    step = ctypes.CDLL(kernel_library()).autoclip_shared_percentile_step
    unread = ctypes.c_double()  # a percentile: to ask for one settles the outcome
    previous_norm, steps = ctypes.c_double(float(previous[0])), ctypes.c_uint64(int(recorded_steps))
    status = step(ctypes.c_uint64(shared_id), steps, previous_norm, unread, ctypes.byref(unread))
    if status != 0 and not isinstance(error := kernel_error(status), EmptyHistoryError):
        raise error


def _exact(percentile: float | Array) -> Array:
    """Return numbers whose sum is the percentile: three float32 hold any double, where JAX has none."""
    if not isinstance(percentile, float):
        return jnp.reshape(percentile, (1,))
    parts = []
    for _ in range(3):
        parts.append(np.float32(percentile))
        percentile -= float(parts[-1])
    return jnp.asarray(np.array(parts))
