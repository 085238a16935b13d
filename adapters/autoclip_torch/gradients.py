"""Gradients of parameters: measured in one pass, scaled in one pass, wherever and however they are stored.

What shaped this module, and must stay true:

- All work is done by foreach functions over lists of plain tensors; no value of a single tensor reaches the host.
- Norms accumulate in float32 at least: a bfloat16 norm has three digits, and a float16 norm overflows.
- A gradient that is sharded over ranks is measured where it lies; what crosses the network is one number per group.
- A non-finite gradient is never multiplied: 0 times infinity is NaN.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

_LARGE = 2**16  # elements
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gradients:
    """The gradients that parameters have right now.

    Args:
        groups: the parameters of each group; one norm and one scale belong to each.
        process_group: a process group whose ranks hold different parameters of the same groups; None if every rank
            holds all (or holds shards of them as DTensors, which know their ranks).
    """

    first: Tensor | None  # as its parameter holds it; None if there is no gradient
    device: torch.device  # of the first gradient: there are the norms
    plain: bool  # whether there are no DTensors

    def __init__(self, groups: Sequence[Sequence[Tensor]], process_group: ProcessGroup | None = None) -> None:
        self._process_group = process_group
        # A single group is always there, if only with a norm of 0: no rank may be missing when norms are added up.
        self._present = {0} if len(groups) == 1 else set()
        # Real, dense, local tensors that share their memory with the gradients, and the group of each. One list per
        # device, dtype and the meshes over which they are sharded.
        self._lists: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
        self.first = None
        self.plain = True
        self.device = next((param.device for params in groups for param in params), torch.device("cpu"))
        for index, params in enumerate(groups):
            for param in params:
                if param.grad is not None:
                    self._add(param, param.grad, index)

    def _add(self, param: Tensor, grad: Any, index: int) -> None:
        shards: tuple[ProcessGroup, ...] = ()
        if grad.layout is not torch.strided:
            if grad.layout is torch.sparse_coo and not grad.is_coalesced():
                param.grad = grad = grad.coalesce()
            local = grad.values()
        elif type(grad) is not Tensor and _is_dtensor(grad):
            param.grad = grad = _without_partial_sums(grad)
            local, shards = grad.to_local(), _shards(grad)
            self.plain = False
        else:
            local = grad
        if local.is_complex():
            # Scaling and measuring commute with conjugation, of which a complex tensor may hold a pending one.
            local = torch.view_as_real(local.conj() if local.is_conj() else local)
        if self.first is None:
            self.first = grad
            self.device = local.device
        self._present.add(index)
        tensors, indices = self._lists.setdefault((local.device, local.dtype, shards), ([], []))
        tensors.append(local)
        indices.append(index)

    @property
    def present(self) -> list[int]:
        """The groups that have gradients, ascending; a single group even if it has none."""
        return sorted(self._present)

    def norms(self) -> Tensor:
        """Return the L2 norm of each group in `present`, shape (groups,), in float32 or wider; one collective per mesh.

        Elements above about 1e19 overflow in float32 and make the norm infinite, as in torch itself.
        """
        if len(self._lists) == 1 and self._process_group is None:
            (((_, _, shards), (tensors, indices)),) = self._lists.items()
            if not shards:
                return _norms_of_groups(tensors, indices)
        # Squares of float32 numbers are exact in float64, and cannot overflow.
        squares: dict[tuple[ProcessGroup, ...], Tensor] = {}
        present = self.present
        for (_, _, shards), (tensors, indices) in self._lists.items():
            square = _norms_of_groups(tensors, indices).to(self.device, _widest(self.device)).square()
            found = sorted(set(indices))
            if found != present:
                places = to_device([present.index(index) for index in found], self.device, torch.int64)
                square = square.new_zeros(len(present)).index_copy_(0, places, square)
            squares[shards] = squares[shards] + square if shards in squares else square
        total = torch.zeros(len(present), dtype=_widest(self.device), device=self.device)
        for shards, square in squares.items():
            for group in shards:
                torch.distributed.all_reduce(square, group=group)
            total = total + square
        if self._process_group is not None:
            torch.distributed.all_reduce(total, group=self._process_group)
        return total.sqrt()

    def scale_(self, scales: Sequence[float]) -> None:
        """Multiply the gradients of each group in `present` by its scale."""
        by_group = dict(zip(self.present, scales, strict=True))
        for tensors, indices in self._lists.values():
            if len(by_group) == 1:
                if scales[0] != 1.0:
                    torch._foreach_mul_(tensors, _factor(scales[0], tensors[0]))
                continue
            shortened = [at for at, index in enumerate(indices) if by_group[index] != 1.0]
            if shortened:
                torch._foreach_mul_([tensors[at] for at in shortened], [by_group[indices[at]] for at in shortened])

    def scale_on_device_(self, scales: Tensor, keep: Tensor | None) -> None:
        """Multiply the gradients of each group in `present` by its scale, which the host does not know.

        Args:
            scales: shape (groups,).
            keep: a bool, shape (), on the same device; where it is False the gradients become zeros, whatever they
                were. None is True.
        """
        places = {index: place for place, index in enumerate(self.present)}
        for (device, dtype, _), (tensors, indices) in self._lists.items():
            # Half precision would round the scale to three digits.
            factors = scales.to(device, _wide(dtype), non_blocking=True).unbind()
            if len(factors) == 1:
                torch._foreach_mul_(tensors, factors[0])
            else:
                torch._foreach_mul_(tensors, [factors[places[index]] for index in indices])
            if keep is not None:
                # A product of bits, so that NaN becomes zero, in one pass over all tensors.
                bits = _BITS[dtype.itemsize]
                torch._foreach_mul_([tensor.view(bits) for tensor in tensors], keep.to(device, bits, non_blocking=True))

    def zero_(self) -> None:
        """Set all gradients to zero."""
        for tensors, _ in self._lists.values():
            torch._foreach_zero_(tensors)


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of these numbers on the device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _factor(scale: float, tensor: Tensor) -> float | Tensor:
    # On a CPU a Python number is made a tensor again for each tensor: 119 us for a hundred small ones, and 38 us so.
    return torch.tensor(scale, dtype=_wide(tensor.dtype)) if tensor.device.type == "cpu" else scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    wide = _wide(tensors[0].dtype)
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


def _norms_of_groups(tensors: list[Tensor], indices: list[int]) -> Tensor:
    norms = torch.stack(_norms(tensors))
    sizes = [len(list(same)) for _, same in groupby(indices)]
    if len(sizes) == 1:
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm.reshape(1)
    if len(sizes) == len(tensors):
        return norms
    return torch.stack(torch._foreach_norm(torch.split(norms, sizes)))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _is_dtensor(grad: Tensor) -> bool:
    # There is none before somebody has imported their module, which takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(grad, module.DTensor)


def _without_partial_sums(grad: Any) -> Any:
    if not any(placement.is_partial() for placement in grad.placements):
        return grad
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    return grad.redistribute(placements=[replicate if p.is_partial() else p for p in grad.placements])


def _shards(grad: Any) -> tuple[ProcessGroup, ...]:
    mesh = grad.device_mesh
    return tuple(mesh.get_group(dim) for dim, place in enumerate(grad.placements) if not place.is_replicate())
