"""What devices can do, and how numbers get to them.

Every tensor of this package is made on a device that is named: a program may have set another default.
"""

from __future__ import annotations

from array import array
from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")


@cache
def has_float64(device: torch.device) -> bool:
    """Return whether the device computes in float64."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt_()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has nothing wider."""
    return torch.float64 if has_float64(device) else torch.float32


def is_capturing(device: torch.device) -> bool:
    """Return whether what is asked of the device is recorded for a graph, and not done."""
    if device == CPU:
        return False
    asks = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return asks is not None and asks()


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor on that device. The host waits only where it is to have the values itself."""
    if device.type == "cpu" or (tensor.is_cpu and not has_pinned_memory(device)):
        return tensor.to(device, dtype or tensor.dtype)
    # The device reads memory of the host by itself only if it is pinned.
    source = tensor.pin_memory() if tensor.is_cpu else tensor
    return source.to(device, dtype or tensor.dtype, non_blocking=True)


def has_events(device: torch.device) -> bool:
    """Return whether the host can ask how far the device has come."""
    try:
        torch.Event(device)
    except RuntimeError:
        return False
    return True


@cache
def has_pinned_memory(device: torch.device) -> bool:
    """Return whether there is memory of the host that the device can read and write by itself."""
    if device.type == "cuda":
        return True
    try:
        torch.empty(1, device="cpu").pin_memory()
    except RuntimeError:
        return False
    return True


def as_tensor(norms: Tensor | list[float]) -> Tensor:
    """Return norms as a tensor, if they are not one."""
    # torch.tensor takes three times as long.
    return norms if isinstance(norms, Tensor) else torch.frombuffer(array("d", norms), dtype=torch.float64)
