"""Gradients of parameters, measured and scaled wherever and however they are stored.

What shaped this module, and must stay true:

- On a CPU the compiled kernel takes all but large tensors, in double precision (kernel.py). What it must not touch, and
  all else, is left to foreach functions over lists of plain tensors; no value of a single tensor on a device reaches
  the host.
- Nothing is asked of one tensor after the other where the gradients are like those of the step before (layout.py).
- One pass reads the gradients to measure them, one scales them. Where the host does not know whether the update is
  dropped, one more sets them to zero or leaves them: torch has no function that does both at once.
- Norms accumulate in float32 at least: a bfloat16 norm has three digits, and a float16 norm overflows.
- A gradient that is sharded over ranks is measured where it lies; what crosses the network is two numbers per group, at
  once for all parameters, whichever of them have gradients on a rank: no rank may be missing when norms are added up.
- No memory is scaled twice: gradients of several parameters may be one tensor, or lie in the memory of one.
- A non-finite gradient is never multiplied: 0 times infinity is NaN.
"""

from __future__ import annotations

import sys
from bisect import bisect
from collections import Counter
from itertools import chain
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoclip_torch import kernel
from autoclip_torch.batches import version
from autoclip_torch.devices import CPU, as_tensor, moved, widest
from autoclip_torch.layout import Kind, Layout, guards_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup

    from autoclip_core import ClipStep
    from autoclip_torch.batches import Batch

# Of one object after the other, without a word of Python in between.
_grad, _scale, _versions = attrgetter("grad"), attrgetter("scale"), methodcaller("versions")

# The norm of a group without gradients, and of any other that is not to be seen. No norm is a negative zero.
NOT_SEEN = -0.0


class Gradients:
    """The gradients that parameters have right now.

    Args:
        groups: the parameters of each group; one norm and one scale belong to each.
        process_group: a process group whose ranks hold different parameters of the same groups; None if every rank
            holds all (or holds shards of them as DTensors, which know their ranks).
        device: where the norms shall be, if there is a gradient.
        layout: of the gradients that the same parameters, none of them a DTensor, had in an earlier step. Where these
            are like them, they are sorted in a fraction of the time.
    """

    count: int  # of the groups
    first: Tensor | None = None  # the first gradient's memory on this rank; None if there is no gradient
    device: torch.device  # where the norms are: the first gradient's, unless another was asked for
    plain = True  # whether there are no DTensors
    is_shared: bool  # whether norms are added up over ranks
    layout: Layout  # of these gradients
    joint: Tensor | None = None  # squares of the norms over the process group and of this rank, once they are measured
    _batches: list[Batch]
    _dtensor: Any = ()
    _shards_of: Mapping[tuple[Any, Any], tuple[ProcessGroup, ...]] = {}

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        process_group: ProcessGroup | None = None,
        device: torch.device | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.count = len(groups)
        self._process_group = process_group
        self.is_shared = process_group is not None
        batches = None if layout is None else layout.sort(list(map(_grad, chain.from_iterable(groups))))
        if layout is None or batches is None:
            self._find_shards(groups)
            self._sort(groups)
        else:
            self.layout = layout
            self._batches = batches
            self.first = self._batches[0].tensors[0]
        if device is not None and device in self.layout.devices:
            self.device = device
        elif self._batches:
            self.device = self._batches[0].kind.device
        else:
            self.device = next((param.device for params in groups for param in params), CPU)

    def _find_shards(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Find which ranks have the other shards of DTensors, if parameters are such."""
        # There are none before somebody has imported their module, which takes a second.
        if (module := sys.modules.get("torch.distributed.tensor")) is None:
            return
        self._dtensor = dtensor = module.DTensor
        if any(issubclass(kind, dtensor) for kind in set(map(type, chain.from_iterable(groups)))):
            self.plain = False
            dtensors = [param for params in groups for param in params if isinstance(param, dtensor)]
            # By mesh and placements; of all parameters, so that ranks agree whatever gradients they have.
            self._shards_of = {place: _shards(*place) for place in dict.fromkeys(map(_place, dtensors))}
            self.is_shared |= any(self._shards_of.values())
            _place_like_params(dtensors)

    @torch.no_grad()
    def _sort(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Look at one gradient after the other, and find their layout."""
        has_kernel = kernel.is_usable()
        found: dict[tuple[Any, ...], list[tuple[Tensor, int, int]]] = {}
        grads: list[Tensor | None] = []
        tensors: list[Tensor] = []
        taken: list[tuple[int, int]] = []  # memory
        found_shared = False
        for index, params in enumerate(groups):
            for param in params:
                if param.grad is not None:
                    tensor, shards = self._local(param)
                    if not _take(taken, tensor):
                        found_shared = True
                        _clone_grad(param)
                        tensor, shards = self._local(param)
                    is_taken = has_kernel and kernel.takes(tensor)
                    key = (CPU if is_taken else tensor.device, tensor.dtype, shards, is_taken)
                    found.setdefault(key, []).append((tensor, len(tensors), index))
                    tensors.append(tensor)
                grads.append(param.grad)
        self._batches = []
        for (device, dtype, shards, is_taken), items in found.items():
            alike, places, indices = map(list, zip(*items, strict=True))
            extents = kernel.Extents(alike) if is_taken else None
            sizes = Counter(indices)
            kind = Kind(device, dtype, shards, extents, guards_of(alike), places, list(sizes), list(sizes.values()))
            # What the kernel takes has memory; others may hide theirs.
            self._batches.append(kind.batch(alike, list(map(kernel.address_of, alike)) if is_taken else []))
        kinds = [batch.kind for batch in self._batches]
        self.layout = Layout(grads, tensors, kinds, may_return=not found_shared)

    def _local(self, param: Tensor) -> tuple[Tensor, tuple[ProcessGroup, ...]]:
        """Return this rank's memory of a gradient, and who has the other shards."""
        grad: Any = param.grad
        shards: tuple[ProcessGroup, ...] = ()
        if _is_read_only(grad):
            grad = _clone_grad(param)
        local = grad
        if grad.layout is not torch.strided:
            if grad.layout is torch.sparse_coo and not grad.is_coalesced():
                param.grad = grad = grad.coalesce()
            local = grad.values()
        elif isinstance(grad, self._dtensor):
            local = grad = grad.to_local()
            shards = self._shards_of[_place(param)]
        if local.is_complex():
            # Scaling and measuring commute with conjugation, of which a complex tensor may hold a pending one.
            local = torch.view_as_real(local.conj() if local.is_conj() else local)
        if self.first is None:
            self.first = grad
        return local, shards

    @property
    def present(self) -> set[int]:
        """The groups that have gradients on this rank; a single group even if it has none."""
        return {0} if self.count == 1 else {index for batch in self._batches for index in batch.kind.groups}

    def versions(self) -> int:
        """Return a number that grows when somebody writes to a gradient so that torch knows it."""
        if self.is_shared:  # whether other ranks get gradients of their later parameters is not known here
            return version(self.first)
        return sum(map(_versions, self._batches))

    def heads(self, *, anew: bool = False) -> list[int | list[Tensor]]:
        """Return of each batch the bits of some elements, or a fingerprint; none if ranks, which must agree, differ.

        Args:
            anew: whether code of others has run since the gradients were measured, which may have moved them.

        Raises:
            RuntimeError: some of them have no memory any more, or other one than they had.
        """
        return [batch.heads(anew=anew) for batch in (() if self.is_shared else self._batches)]

    def norms(self, least: torch.dtype = torch.float32) -> Tensor | list[float]:
        """Return the L2 norm of each group, shape (groups,), in float32 or wider; one collective per mesh dimension.

        As numbers if the host knows them, and need not make a tensor.

        Without gradients on any rank a group is `NOT_SEEN`, and a single group has the norm 0. Above about 1e19 a norm
        overflows in float32 and is infinite, as in torch itself.

        Args:
            least: the dtype in which norms accumulate at least.
        """
        if len(self._batches) == 1 and not self.is_shared:
            (batch,) = self._batches
            norms = batch.norms(least)
            if len(norms) == self.count:
                return norms
            if isinstance(norms, Tensor):
                return self._spread(norms, batch.kind.groups, NOT_SEEN)
            known = dict(zip(batch.kind.groups, norms, strict=True))
            return [known.get(index, NOT_SEEN) for index in range(self.count)]
        # Of each group the square of the norm, and how many times it has gradients. Squares of float32 numbers are
        # exact in float64, and cannot overflow.
        wide = widest(self.device)
        nothing = torch.zeros((2, self.count), dtype=wide, device=self.device)
        sums = dict.fromkeys([(), *self._shards_of.values()], nothing)
        for batch in sorted(self._batches, key=_name):
            squares = moved(as_tensor(batch.norms(least)), self.device, wide).square()
            found = torch.stack([squares, torch.ones_like(squares)])
            if len(squares) < self.count:
                found = self._spread(found, batch.kind.groups, 0.0)
            sums[batch.kind.shards] = sums[batch.kind.shards] + found
        for group in dict.fromkeys(group for shards in sums for group in shards):
            sharded = [shards for shards in sums if group in shards]
            joint = torch.stack([sums[shards] for shards in sharded])
            torch.distributed.all_reduce(joint, group=group)
            sums.update(zip(sharded, joint, strict=True))
        total = torch.stack(list(sums.values())).sum(0)
        if self._process_group is not None:
            own = total[0].clone()
            torch.distributed.all_reduce(total, group=self._process_group)
            self.joint = torch.cat([total[0], own])
        roots = total[0].sqrt()
        return roots if self.count == 1 else torch.where(total[1] > 0, roots, NOT_SEEN)

    def _spread(self, found: Tensor, groups: list[int], fill: float) -> Tensor:
        """Return values of the groups found, shape (..., found), as values of all groups."""
        places = moved(torch.tensor(groups, device="cpu"), self.device)
        return found.new_full((*found.shape[:-1], self.count), fill).index_copy_(-1, places, found)

    def scale_(self, steps: Mapping[int, ClipStep]) -> None:
        """Multiply the gradients of each group by its scale; where they carry a graph, it is a constant of that."""
        for batch in self._batches:
            factors = [steps[index].scale for index in batch.kind.groups]
            if factors.count(1.0) < len(factors):
                batch.scale_(factors)

    def scale_on_device_(self, scales: Tensor, kept: Tensor | None) -> None:
        """Do what `scale_` does with scales that the host does not know.

        Args:
            scales: shape (groups,), float64.
            kept: 0 if the update is dropped: all gradients become zeros, whatever they were. Else 1, int64 of shape
                (1,); None: it is not dropped.
        """
        for batch in self._batches:
            batch.scale_on_device_(scales, kept)

    def zero_(self) -> None:
        """Set all gradients to zero."""
        for batch in self._batches:
            batch.zero_()


def is_dropped(steps: Mapping[int, ClipStep]) -> bool:
    """Return whether the update must not be made: one group without a finite norm spoils it."""
    return 0.0 in map(_scale, steps.values())


def _is_read_only(grad: Any) -> bool:
    """Return whether a gradient cannot be scaled where it lies: its elements share memory, or nobody may write it."""
    if grad.is_inference() and not torch.is_inference_mode_enabled():
        return True
    if grad.layout is not torch.strided or grad.is_contiguous():
        return False
    reach = 0  # of the dimensions with shorter strides
    for stride, size in sorted(zip(grad.stride(), grad.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _clone_grad(param: Tensor) -> Any:
    """Give a parameter a gradient of the same elements in memory of its own, and return it."""
    grad: Any = param.grad
    layout = {"memory_format": torch.contiguous_format} if grad.layout is torch.strided else {}
    with torch.set_grad_enabled(grad.requires_grad):  # it may carry a graph
        param.grad = grad = grad.clone(**layout)
    return grad


def _take(taken: list[tuple[int, int]], tensor: Tensor) -> bool:
    """Note the memory of a tensor, from where to where; return False, and do nothing, if some of it is taken already.

    Of a tensor with gaps, in which others may lie, that is its first element.
    """
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # it hides from whoever asks
        return True
    if start == 0 or tensor.numel() == 0:
        return True
    stop = start + tensor.itemsize * (tensor.numel() if tensor.is_contiguous() or kernel.is_dense(tensor) else 1)
    at = bisect(taken, (start, stop))
    if (at > 0 and taken[at - 1][1] > start) or (at < len(taken) and taken[at][0] < stop):
        return False
    taken.insert(at, (start, stop))
    return True


def _name(batch: Batch) -> str:
    # In an order that does not depend on that of the gradients, for sums do.
    kind = batch.kind
    return f"{kind.device} {kind.dtype} {kind.extents is not None}"


def _place(param: Any) -> tuple[Any, Any]:
    return param.device_mesh, param.placements


def _shards(mesh: Any, placements: Any) -> tuple[ProcessGroup, ...]:
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def _place_like_params(params: list[Any]) -> None:
    """Place gradients as their parameters are: the optimizer would have to do it as well, and tensor by tensor.

    Most of them hold partial sums, as those of a norm layer in sequence parallelism do; these are added up together.
    """
    partial: dict[tuple[Any, ...], list[Any]] = {}
    for param in params:
        if param.grad is not None and param.grad.placements != param.placements:
            pairs = list(zip(param.grad.placements, param.placements, strict=True))
            dims = tuple(dim for dim, (now, wanted) in enumerate(pairs) if now != wanted)
            if all(pairs[dim][0].is_partial("sum") and pairs[dim][1].is_replicate() for dim in dims):
                partial.setdefault((param.device_mesh, dims, param.grad.dtype), []).append(param)
            else:
                param.grad = param.grad.redistribute(placements=param.placements)
    for (mesh, dims, _), group in partial.items():
        parts = [param.grad.to_local() for param in group]
        sums = torch.cat([part.reshape(-1) for part in parts])
        for dim in dims:
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
        for param, part, summed in zip(group, parts, torch.split(sums, [part.numel() for part in parts]), strict=True):
            grad = param.grad
            whole = {"shape": grad.shape, "stride": grad.stride(), "run_check": False}
            param.grad = type(grad).from_local(summed.view(part.shape), mesh, param.placements, **whole)
