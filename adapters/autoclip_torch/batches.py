"""Tensors of one kind that are measured and scaled together: what all have in common, and how torch does it.

What the compiled kernel does instead is in kernel.py.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from functools import cache
from itertools import chain, repeat
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoclip_torch.devices import moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autoclip_torch.layout import Kind

_LARGE = 2**16  # elements
_HEAD = 64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOWEST = 0 if sys.byteorder == "little" else -1  # which part of an integer has its lowest bits

_requires_grad = attrgetter("requires_grad")


class Batch(ABC):
    """Real, dense, local tensors of one kind that share their memory with gradients.

    Args:
        kind: what is known of them.
        tensors: those of each group side by side.
    """

    __slots__ = ("kind", "tensors")

    def __init__(self, kind: Kind, tensors: list[Tensor]) -> None:
        self.kind = kind
        self.tensors = tensors

    @abstractmethod
    def norms(self, least: torch.dtype) -> Tensor | list[float]:
        """Return the norm of each group that is here, accumulated in `least` or wider; as numbers if they are known."""

    @abstractmethod
    def versions(self) -> int:
        """Return a number that grows when somebody writes to the tensors so that torch knows it."""

    @abstractmethod
    def heads(self, *, anew: bool) -> int | list[Tensor]:
        """Return the bits of some elements, or a fingerprint (see Gradients.heads)."""

    @abstractmethod
    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply the tensors of each group by its factor, one of which at least is not 1."""

    def scale_on_device_(self, scales: Tensor, kept: Tensor | None) -> None:
        """Multiply each tensor by the scale of its group; and by what is `kept`, bit by bit, so that NaN becomes 0."""
        device, dtype = self.kind.device, self.kind.dtype
        with torch.set_grad_enabled(self._carries_graph()):
            for factors in _factors(scales, device, dtype):
                start = 0
                for index, size in zip(self.kind.groups, self.kind.sizes, strict=True):
                    _multiply_(self.tensors[start : start + size], factors[index])
                    start += size
            if kept is not None:
                bits = _BITS[dtype.itemsize]
                kept = moved(kept, device).view(bits)[_LOWEST]
                torch._foreach_mul_([tensor.view(bits) for tensor in self.tensors], kept)

    def zero_(self) -> None:
        """Set all tensors to zero."""
        with torch.set_grad_enabled(self._carries_graph()):
            torch._foreach_zero_(self.tensors)

    def _carries_graph(self) -> bool:
        """Return whether gradients are part of a graph (create_graph=True), which their scaling can enter as well."""
        in_graph = list(filter(_requires_grad, self.tensors))
        return bool(in_graph) and not any(tensor.is_leaf or tensor._is_view() for tensor in in_graph)

    def _of_each(self, factors: Sequence[float]) -> array[float]:
        """Return the factor of each tensor from those of the groups."""
        sizes = self.kind.sizes
        if len(sizes) == 1:
            return array("d", factors) * sizes[0]
        return array("d", chain.from_iterable(map(repeat, factors, sizes)))

    def _changed(self, factors: array[float]) -> list[Tensor]:
        """Return the tensors whose factor is not 1."""
        return [tensor for tensor, factor in zip(self.tensors, factors, strict=True) if factor != 1.0]


class ForeachBatch(Batch):
    """Tensors of any device and dtype, for torch's foreach functions."""

    __slots__ = ()

    def norms(self, least: torch.dtype) -> Tensor:
        """Return the norm of each group that is here, accumulated in `least` or wider, on the device."""
        return _norms_of_groups(self.tensors, self.kind.sizes, least)

    def versions(self) -> int:
        """Return the sum of the versions."""
        return sum(map(version, self.tensors))

    def heads(self, *, anew: bool) -> list[Tensor]:
        """Return the bits of the first elements of the first and of the last tensor."""
        ends = (0, -1) if len(self.tensors) > 1 else (0,)
        return [head(self.tensors[at]) for at in ends]

    def scale_(self, factors: Sequence[float]) -> None:
        """Multiply the tensors of each group by its factor, one of which at least is not 1."""
        with torch.set_grad_enabled(self._carries_graph()):
            if len(factors) == 1:
                torch._foreach_mul_(self.tensors, _factor(factors[0], self.tensors[0]))
            else:
                each = self._of_each(factors)
                torch._foreach_mul_(self._changed(each), [factor for factor in each if factor != 1.0])


def head(tensor: Tensor) -> Tensor:
    """Return the bits of the first elements, shape (bytes,)."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    while tensor.dim() > 1:
        tensor = tensor[0]
    return tensor[:_HEAD].contiguous().view(torch.uint8)


def version(tensor: Tensor | None) -> int:
    """Return how often a tensor was written to so that torch knows it; an inference tensor does not count."""
    try:
        return tensor._version  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return 0


def _factor(scale: float, tensor: Tensor) -> float | Tensor:
    # On a CPU a Python number is made a tensor again for each tensor: 119 us for a hundred small ones, and 38 us so.
    on_cpu = tensor.device.type == "cpu"
    return torch.tensor(scale, dtype=_wide(tensor.dtype), device="cpu") if on_cpu else scale


def _factors(scales: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return what to multiply gradients of this dtype by, one factor of all groups after the other.

    On a CPU half precision is multiplied by float32. Elsewhere a factor has the dtype of the tensors, or each tensor is
    a launch, and the factor is rounded to that dtype even so. float16 has a function of its own that takes a float32.
    bfloat16 has none. A bfloat16 scale errs by up to 0.4 %, and so does the norm that is left; as a product of two it
    errs by less than 0.04 %, for one pass more. The norm of normally distributed gradients then errs by 0.03 % (root
    mean square; 0.16 % with one factor, and 0.014 % with a float32, because elements are rounded to bfloat16).
    """
    if dtype != torch.bfloat16 or device.type == "cpu":
        return [moved(scales, device, _wide(dtype))]
    scales = moved(scales, device)
    place = (scales.view(torch.int64) >> _MANTISSA - _PLACES) & 2**_PLACES - 1
    first = _first_factors(device).index_select(0, place)
    second = torch.div(scales, first, out=torch.empty(scales.shape, dtype=dtype, device=device))
    return [first, second]


# Bits of a float64 after the point, and how many of them decide about the first of two factors.
_MANTISSA = 52
_PLACES = 12


@cache
def _first_factors(device: torch.device) -> Tensor:
    """Return by the first digits of a number the bfloat16 that, with a second one, has a product nearest to it."""
    numbers = 1 + (torch.arange(2**_PLACES, dtype=torch.float64, device="cpu")[:, None] + 0.5) / 2**_PLACES
    numbers[0] = 1.0  # it is to be 1 times 1
    first = 1 + torch.arange(128, dtype=torch.float64, device="cpu") / 128
    second = (numbers / first).to(torch.bfloat16)
    best = (first * second / numbers - 1).abs().argmin(1)
    return moved(first[best].to(torch.bfloat16), device)


def _multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    if tensors[0].dtype == torch.float16 and factor.device.type != "cpu":
        # What a GradScaler divides with. It reports infinities, which nobody reads here.
        unread = torch.empty((), dtype=torch.float32, device=factor.device)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, unread, factor)
    else:
        torch._foreach_mul_(tensors, factor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norms(tensors: list[Tensor], least: torch.dtype) -> list[Tensor]:
    wide = torch.promote_types(tensors[0].dtype, least)
    norms: dict[int, Tensor] = {}
    if tensors[0].device.type == "cpu" and tensors[0].dtype == wide:
        # There the BLAS takes half the time of torch's norm of large tensors, and errs by 1e-7 where that errs by 1e-5.
        for at, tensor in enumerate(tensors):
            if tensor.numel() >= _LARGE and tensor.is_contiguous():
                flat = tensor.view(-1)
                norms[at] = torch.dot(flat, flat).sqrt()
    others = [at for at in range(len(tensors)) if at not in norms]
    if others:
        norms.update(zip(others, torch._foreach_norm([tensors[at] for at in others], 2.0, dtype=wide), strict=True))
    return [norms[at] for at in range(len(tensors))]


@torch.no_grad()
def _norms_of_groups(tensors: list[Tensor], sizes: list[int], least: torch.dtype) -> Tensor:
    norms = torch.stack(_norms(tensors, least))
    if len(sizes) == 1:
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm.reshape(1)
    if len(sizes) == len(tensors):
        return norms
    return torch.stack(torch._foreach_norm(torch.split(norms, sizes)))
