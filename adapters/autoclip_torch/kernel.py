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
from functools import cache
from itertools import islice
from math import hypot, inf, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from autoclip_core import BackendError, kernel_functions
from autoclip_torch.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autoclip_torch.layout import Kind

_WIDTHS = {torch.float32: 4, torch.float64: 8}
_LARGEST = sqrt(torch.finfo(torch.float32).max)  # the largest number with a square in float32

# In elements. Torch shares out a larger tensor to threads of its own. They spin for a while after each task, and would
# keep threads of ours from their processors.
_MOST = 2**18

# Of one tensor after the other, without a word of Python in between. An address is 0 where there is no memory, and
# a RuntimeError where a tensor hides it.
address_of, _version = Tensor.data_ptr, attrgetter("_version")


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


class Extents:
    """What the kernel must know of tensors besides their addresses: how many elements they have, and of what width.

    Args:
        tensors: of one dtype, which the kernel `takes`. They are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sizes = array("Q", map(Tensor.numel, tensors))
        self.no_norms = array("d", [0.0]) * len(self._sizes)  # room for the norm of each
        # As all functions of the kernel take them: where the sizes are, how many there are, and of what width.
        self.arguments = self._sizes.buffer_info()[0], len(self._sizes), _WIDTHS[tensors[0].dtype]

    def has(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors, which are looked at one after the other, differ in their addresses alone."""
        width = self.arguments[-1]
        alike = (takes(tensor) and tensor.itemsize == width for tensor in tensors)
        return all(alike) and array("Q", map(Tensor.numel, tensors)) == self._sizes


class KernelBatch(Batch):
    """Tensors that the kernel takes, measured as soon as they are here.

    Args:
        kind, tensors: as of every batch.
        extents: of these tensors.
        addresses: where they begin in memory.

    Raises:
        RuntimeError: one has no memory.
    """

    __slots__ = ("_addresses", "_arguments", "_extents", "_norms")

    def __init__(self, kind: Kind, tensors: list[Tensor], extents: Extents, addresses: list[int]) -> None:
        super().__init__(kind, tensors)
        self._extents = extents
        self._addresses = array("Q", addresses)
        self._arguments = arguments = self._addresses.buffer_info()[0], *extents.arguments
        norms = extents.no_norms[:]
        if not _functions().tensors_measure(*arguments, norms.buffer_info()[0]):
            raise RuntimeError("A gradient has no memory.")
        self._norms: list[float] = norms.tolist()

    def norms(self, least: torch.dtype) -> list[float]:
        """Return the norm of each group that is here, whatever the order of its tensors is."""
        sizes, found = self.kind.sizes, self._norms
        if len(sizes) == 1:
            found = [hypot(*sorted(found))]
        elif len(sizes) < len(found):
            norms = iter(found)
            found = [hypot(*sorted(islice(norms, size))) for size in sizes]
        # Where torch measures in float32, squares overflow. A step must not depend on who does it.
        if not max(found) <= _LARGEST and least == self.kind.dtype == torch.float32:
            found = [inf if norm > _LARGEST else norm for norm in found]
        return found

    def versions(self) -> int:
        """Return the sum of the versions of some, for time counts; the kernel takes no inference tensors."""
        some = self.tensors[:: len(self.tensors) // 4 + 1]
        return sum(map(_version, [*some, self.tensors[-1]]))

    def heads(self, *, anew: bool) -> int:
        """Return a number that tells where the tensors are, and their first elements, from others.

        Raises:
            RuntimeError: the kernel must not have them any more.
        """
        arguments = self._arguments
        if anew:
            guards = self.kind.guards
            if not (guards.check(*self.tensors) if guards is not None else self._extents.has(self.tensors)):
                raise RuntimeError("A gradient has become another kind of tensor.")
            addresses = array("Q", list(map(address_of, self.tensors)))
            if 0 in addresses:
                raise RuntimeError("The memory of a gradient has been given back.")
            arguments = addresses.buffer_info()[0], *arguments[1:]
        found: int = _functions().tensors_fingerprint(*arguments)
        return found

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply the tensors of each group by its factor, and let torch know."""
        each = self._of_each(factors)
        increment_version(self._changed(each) if 1.0 in factors else self.tensors)
        _functions().tensors_scale(*self._arguments, each.buffer_info()[0])


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
