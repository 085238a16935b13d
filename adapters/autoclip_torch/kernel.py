"""Norms and scaling of gradients on a CPU in one call each: for small tensors a call of torch costs more than the work.

What shaped this module, and must stay true:

- The compiled kernel reads and writes memory behind torch's back. So it gets only tensors that are nothing but memory:
  no subclass, nothing that a transform or a mode of torch watches over, no gaps.
- Torch is told of every write: autograd must see that a gradient has changed.
- Sums are of doubles, and a norm depends neither on the order of the tensors nor on the number of threads.
- No tensor is kept from step to step, nor its address: `zero_grad` makes every gradient a new tensor, and where it does
  not, the same tensor may have other memory by now.
"""

from __future__ import annotations

import ctypes
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from math import gcd, hypot
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
        sizes = list(map(Tensor.numel, tensors))
        self.total = sum(sizes)
        self.pieces = [-(-size // _PIECE) for size in sizes] if max(sizes) > _PIECE else None  # of each tensor
        self._starts: list[tuple[int, int]] = []  # of pieces: which tensor, and bytes from its beginning
        if self.pieces is not None:
            places = [(at, first) for at, size in enumerate(sizes) for first in range(0, size, _PIECE)]
            self._starts = [(at, self.width * first) for at, first in places]
            sizes = [min(_PIECE, sizes[at] - first) for at, first in places]
        self.sizes = array("Q", sizes)  # of the pieces
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

    def split(self, addresses: list[int]) -> list[int]:
        """Return the address of each piece."""
        return addresses if self.pieces is None else [addresses[at] + start for at, start in self._starts]


class Memory:
    """The elements of tensors, as the kernel takes them."""

    def __init__(self, layout: Layout, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        self._layout = layout
        self._tensors = tensors
        self._addresses = array("Q", layout.split(addresses))

    def norms(self) -> list[float]:
        """Return the L2 norm of each tensor."""
        numbers = array("d", bytes(8 * len(self._addresses)))
        self._call("autoclip_tensors_measure", numbers)
        norms = numbers.tolist()
        if self._layout.pieces is None:
            return norms
        pieces = iter(norms)
        return [joint_norm(list(islice(pieces, count))) for count in self._layout.pieces]

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply each tensor by its factor."""
        changed = [tensor for tensor, factor in zip(self._tensors, factors, strict=True) if factor != 1.0]
        torch.autograd.graph.increment_version(changed)
        if self._layout.pieces is not None:
            counts = zip(factors, self._layout.pieces, strict=True)
            factors = [factor for factor, count in counts for _ in range(count)]
        self._call("autoclip_tensors_scale", array("d", factors))

    def _call(self, name: str, numbers: array[float]) -> None:
        """Call a function of the kernel with a number for each piece, which it may change."""
        function, sizes, width = getattr(_library(), name), self._layout.sizes, self._layout.width
        threads = 1 if self._layout.total < 2 * _SHARE else min(torch.get_num_threads(), self._layout.total // _SHARE)
        if threads == 1:
            function(_begin(self._addresses), _begin(sizes), len(sizes), width, _begin(numbers))
            return

        def call(share: slice) -> array[float]:
            part = numbers[share]
            addresses, few = self._addresses[share], sizes[share]
            function(_begin(addresses), _begin(few), len(few), width, _begin(part))
            return part

        shares = [slice(at, None, threads) for at in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(call, shares))
        for share, part in zip(shares, parts, strict=True):
            numbers[share] = part


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
