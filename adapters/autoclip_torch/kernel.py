"""Norms and scaling of gradients on a CPU in one call each: for small tensors a call of torch costs more than the work.

What shaped this module, and must stay true:

- The compiled kernel reads and writes memory behind torch's back. So it gets only tensors that are nothing but memory:
  no subclass, nothing that a transform or a mode of torch watches over, no gaps.
- Torch is told of every write: autograd must see that a gradient has changed.
- Sums are of doubles, and a norm depends neither on the order of the tensors nor on the number of threads.
- Nothing is kept from step to step. `zero_grad` makes every gradient a new tensor, and where it does not, the same
  tensor may have other memory by now.
"""

from __future__ import annotations

import ctypes
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import hypot
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoclip_core import BackendError, kernel_library

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTHS = {torch.float32: 4, torch.float64: 8}

# In elements. Threads share out pieces of tensors, and each is given what takes half a millisecond at least, beside
# which its start does not matter.
_PIECE = 2**20
_SHARE = 2**22
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
        found = tensor.data_ptr()
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


class Memory:
    """The elements of tensors, as the kernel takes them.

    Args:
        tensors: of one dtype.
        addresses: of each, none of them 0.
    """

    def __init__(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
        self._tensors = tensors
        self._width = _WIDTHS[tensors[0].dtype]
        sizes = list(map(Tensor.numel, tensors))
        self._pieces = [-(-size // _PIECE) for size in sizes] if max(sizes) > _PIECE else None  # of each tensor
        if self._pieces is not None:
            pieces = [
                (begin + self._width * at, min(_PIECE, size - at))
                for begin, size in zip(addresses, sizes, strict=True)
                for at in range(0, size, _PIECE)
            ]
            addresses, sizes = zip(*pieces, strict=True)  # type: ignore[assignment]
        threads = max(1, min(torch.get_num_threads(), sum(sizes) // _SHARE))
        self._shares = [(array("Q", addresses[at::threads]), array("Q", sizes[at::threads])) for at in range(threads)]

    def norms(self) -> list[float]:
        """Return the L2 norm of each tensor."""
        count = sum(len(sizes) for _, sizes in self._shares)
        norms = self._call("autoclip_tensors_measure", [0.0] * count)
        if self._pieces is None:
            return norms
        pieces = iter(norms)
        return [joint_norm([next(pieces) for _ in range(count)]) for count in self._pieces]

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply each tensor by its factor."""
        changed = [tensor for tensor, factor in zip(self._tensors, factors, strict=True) if factor != 1.0]
        torch.autograd.graph.increment_version(changed)
        if self._pieces is not None:
            counts = zip(factors, self._pieces, strict=True)
            factors = [factor for factor, count in counts for _ in range(count)]
        self._call("autoclip_tensors_scale", factors)

    def _call(self, name: str, values: Sequence[float]) -> list[float]:
        """Call a function of the kernel with a number for each piece; return what the numbers are afterwards."""
        function = getattr(_library(), name)
        threads = len(self._shares)

        def call(at: int) -> array[float]:
            addresses, sizes = self._shares[at]
            numbers = array("d", values[at::threads])
            function(_begin(addresses), _begin(sizes), len(sizes), self._width, _begin(numbers))
            return numbers

        if threads == 1:
            return call(0).tolist()
        after = [0.0] * len(values)
        with ThreadPoolExecutor(threads) as pool:
            for at, numbers in enumerate(pool.map(call, range(threads))):
                after[at::threads] = numbers
        return after


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
