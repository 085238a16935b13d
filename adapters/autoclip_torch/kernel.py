"""Norms and scaling of gradients on a CPU in one call each: for small tensors a call of torch costs more than the work.

What shaped this module, and must stay true:

- The compiled kernel reads and writes memory behind torch's back. So it gets only tensors that are nothing but memory:
  no subclass, nothing that a graph, a transform or a mode of torch watches over, no gaps.
- Torch is told of every write: autograd must see that a gradient has changed.
- Sums are of doubles, and a norm does not depend on the order of the tensors.
- No tensor is kept from step to step, nor its address: `zero_grad` makes every gradient a new tensor, and where it does
  not, the same tensor may have other memory by now. So it may behind an optimizer's step, if code of others took part.
"""

from __future__ import annotations

from array import array
from functools import cache, partial
from math import hypot
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from autoclip_core import BackendError, kernel_functions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_WIDTHS = {torch.float32: 4, torch.float64: 8}

# In elements. Torch shares out a larger tensor to threads of its own. They spin for a while after each task, and would
# keep threads of ours from their processors.
_MOST = 2**18


def is_watched() -> bool:
    """Return whether a transform or a mode of torch may take tensors for something else than they are."""
    try:
        # grad, vmap, functionalize; fake tensors, tracing, counters.
        return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:  # torch promises neither name, and where nobody knows, it does the work itself
        return True


def is_usable() -> bool:
    """Return whether there is a kernel, and nothing watches over what is done to tensors."""
    return _functions() is not None and not is_watched()


def takes(tensor: Tensor) -> bool:
    """Return whether the kernel may have this tensor, of which it gets the elements side by side."""
    width = _WIDTHS.get(tensor.dtype)
    if width is None or type(tensor) is not Tensor or not tensor.is_cpu or tensor.requires_grad:
        return False
    try:
        # A pending sign does no harm: norms do not see it, and factors commute with it.
        if tensor.is_inference() or not (tensor.is_contiguous() or is_dense(tensor)) or tensor.numel() > _MOST:
            return False
        address = tensor.data_ptr()
    except RuntimeError:  # there is no memory: a sparse tensor, or one inside a transform
        return False
    return address != 0 and address % width == 0


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return where tensors begin, 0 of one that has no memory.

    Raises:
        RuntimeError: one hides from whoever asks.
    """
    return list(map(Tensor.data_ptr, tensors))


class Layout:
    """What the kernel must know of tensors besides their addresses.

    Args:
        tensors: of one dtype, which the kernel `takes`. They are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes = array("Q", map(Tensor.numel, tensors))
        self._no_norms = array("d", [0.0]) * len(self._sizes)
        # As all functions of the kernel take them: where the sizes are, how many there are, and of what width.
        self._arguments = self._sizes.buffer_info()[0], len(self._sizes), _WIDTHS[tensors[0].dtype]

    def measure(self, places: Sequence[int]) -> Memory | None:
        """Measure tensors that differ from those in their addresses alone; return None if one has no memory."""
        addresses = array("Q", places)  # of an iterator an array takes longer
        norms = self._no_norms[:]
        arguments = addresses.buffer_info()[0], *self._arguments
        if not _functions().tensors_measure(*arguments, norms.buffer_info()[0]):
            return None
        return _memory((norms.tolist(), arguments, (self, addresses)))

    def has(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors, which are looked at one after the other, differ in their addresses alone."""
        width = self._arguments[-1]
        alike = (takes(tensor) and tensor.itemsize == width for tensor in tensors)
        return all(alike) and array("Q", map(Tensor.numel, tensors)) == self._sizes

    def fingerprint(self, tensors: Sequence[Tensor]) -> int:
        """Return what `Memory.fingerprint` does, of tensors that may have other memory than when they were measured.

        Raises:
            RuntimeError: one has no memory.
        """
        addresses = array("Q", addresses_of(tensors))
        if 0 in addresses:
            raise RuntimeError("The memory of a gradient has been given back.")
        found: int = _functions().tensors_fingerprint(addresses.buffer_info()[0], *self._arguments)
        return found


class Memory(NamedTuple):
    """The elements of tensors, as the kernel takes them, and their norms as they were measured."""

    norms: list[float]
    arguments: tuple[int, ...]
    owners: Any  # of what the arguments point to

    def scale_(self, factors: array[float], changed: Sequence[Tensor]) -> None:
        """Multiply each tensor by its factor; those that are changed by it are given for torch to know."""
        increment_version(changed)
        _functions().tensors_scale(*self.arguments, factors.buffer_info()[0])

    def fingerprint(self) -> int:
        """Return a number that tells where the tensors are, and their first elements, from others."""
        found: int = _functions().tensors_fingerprint(*self.arguments)
        return found


_memory: Callable[[tuple[Any, ...]], Memory] = partial(tuple.__new__, Memory)  # in half the time of Memory()


def joint_norm(norms: Sequence[float]) -> float:
    """Return the L2 norm of all from the norms of parts, whatever their order is."""
    return hypot(*sorted(norms))


@cache
def _functions() -> Any:
    try:
        return kernel_functions()
    except BackendError:
        return None


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous in some order of its dimensions, as images in channels-last are."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
