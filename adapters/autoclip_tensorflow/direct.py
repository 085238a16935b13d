"""A clipping step by a direct call of the compiled kernel, for Keras on PyTorch with its variables on the CPU.

PyTorch runs one operation at a time, and a step in operations of Keras would be some 300 of them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from autoclip_core import BackendError, StateError, kernel_library
from autoclip_tensorflow.state import rule_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autoclip_tensorflow.state import Options


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(kernel_library())
    except (BackendError, OSError):
        return None
    address = ctypes.c_void_p
    library.autoclip_arrays_step.argtypes = [
        *(address, ctypes.c_float, address, address, ctypes.c_size_t, address, ctypes.c_float, address)
    ]
    library.autoclip_status_message.restype = ctypes.c_char_p
    return library


@torch.compiler.disable  # type: ignore[untyped-decorator]
def take_step(options: Options, state: Mapping[str, torch.Tensor], norm: torch.Tensor) -> float | None:
    """Change the variables in their own memory, and return the scale; None where the kernel cannot be called."""
    library: Any = _library()
    if library is None or state["norms"].device.type != "cpu":
        return None
    rule, cap = rule_of(options)
    norms, counts, last = state["norms"], state["counts"], state["last"]
    status = library.autoclip_arrays_step(
        rule.ctypes.data,
        cap,
        state["percentile"].data_ptr(),
        norms.data_ptr(),
        norms.numel(),
        counts.data_ptr(),
        norm.item(),
        last.data_ptr(),
    )
    if status != 0:
        raise StateError(library.autoclip_status_message(status).decode())
    return last[2].item()
