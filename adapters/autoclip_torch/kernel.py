"""Norms and scaling of gradients on a CPU in one call each: for small tensors a call of torch costs more than the work.

What shaped this module, and must stay true:

- The compiled kernel reads and writes memory behind torch's back. So it gets only tensors that are nothing but memory:
  no subclass, nothing that a transform or a mode of torch watches over, no gaps.
- Torch is told of every write: autograd must see that a gradient has changed.
- Sums are of doubles, and a norm does not depend on the order of the tensors.
- No tensor is kept from step to step, nor its address: `zero_grad` makes every gradient a new tensor, and where it does
  not, the same tensor may have other memory by now.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache
from math import gcd, hypot
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoclip_core import BackendError, kernel_library

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTHS = {torch.float32: 4, torch.float64: 8}

# In elements. Torch shares out a larger tensor to threads of its own. They spin for a while after each task, and would
# keep threads of ours from their processors.
_MOST = 2**18
_HEAD = 256  # bytes


def address(tensor: Tensor) -> int:
    """Return where the kernel finds the elements of a tensor side by side; 0 if it must leave them to torch."""
    width = _WIDTHS.get(tensor.dtype)
    if width is None or type(tensor) is not Tensor or not tensor.is_cpu:
        return 0
    try:
        # A pending sign does no harm: norms do not see it, and factors commute with it.
        if tensor.is_inference() or not (tensor.is_contiguous() or _is_dense(tensor)):
            return 0
        found = tensor.data_ptr() if tensor.numel() <= _MOST else 0
    except RuntimeError:  # there is no memory: a sparse tensor, or one inside a transform
        return 0
    return 0 if found % width else found


def head(tensor: Tensor, before: int) -> bytes:
    """Return the bits of the first elements of a tensor whose `address` was known; if it has other memory now, none."""
    if tensor.data_ptr() != before:
        return b""
    return ctypes.string_at(before, min(tensor.numel() * _WIDTHS[tensor.dtype], _HEAD))


def is_usable() -> bool:
    """Return whether there is a kernel, and nothing watches over what is done to tensors."""
    return (
        _library() is not None
        and torch._C._functorch.peek_interpreter_stack() is None  # grad, vmap, functionalize
        and not torch._C._len_torch_dispatch_stack()  # fake tensors, tracing, counters
    )


class Layout:
    """What the kernel must know of tensors besides their addresses. Those of the next step have the same, as a rule.

    Args:
        tensors: of one dtype, each of which has an `address`. They are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.width = _WIDTHS[tensors[0].dtype]
        self.sizes = array("Q", map(Tensor.numel, tensors))
        # With this torch.compile compares its inputs with earlier ones: class, dispatch keys (which tell the kind of
        # device, sparse tensors and all wrappers), dtype, device, shape and strides. It takes all tensors in one call.
        guards = torch._C._dynamo.guards.TensorGuards
        self._guards = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def find(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """Return the address of each tensor, if these are as many as before, and like them; None if they are not."""
        if not self._guards.check(*tensors):
            return None
        try:
            addresses = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a wrapper that hides from whoever asks
            return None
        is_memory = all(addresses) and gcd(self.width, *addresses) == self.width
        return addresses if is_memory else None


class Memory:
    """The elements of tensors, as the kernel takes them."""

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        self._layout = layout
        self._tensors = tensors
        self.addresses = addresses

    def norms(self) -> list[float]:
        """Return the L2 norm of each tensor."""
        norms = array("d", bytes(8 * len(self.addresses)))
        self._call("autoclip_tensors_measure", norms)
        return norms.tolist()

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply each tensor by its factor."""
        changed = [tensor for tensor, factor in zip(self._tensors, factors, strict=True) if factor != 1.0]
        torch.autograd.graph.increment_version(changed)
        self._call("autoclip_tensors_scale", array("d", factors))

    def _call(self, name: str, numbers: array[float]) -> None:
        """Call a function of the kernel with a number for each tensor, which it may change."""
        addresses, sizes = array("Q", self.addresses), self._layout.sizes
        getattr(_library(), name)(_begin(addresses), _begin(sizes), len(sizes), self._layout.width, _begin(numbers))


def joint_norm(norms: Sequence[float]) -> float:
    """Return the L2 norm of all from the norms of parts, whatever their order is."""
    return hypot(*sorted(norms))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(kernel_library())
    except (BackendError, OSError):
        return None
    for function in (library.autoclip_tensors_measure, library.autoclip_tensors_scale):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        function.restype = None
    return library


def _begin(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous in some order of its dimensions, as images in channels-last are."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
