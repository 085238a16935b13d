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
- Every tensor is made on a device that is named: a program may have set another default.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect
from collections import Counter
from functools import cache, partial
from itertools import chain, islice, repeat
from math import inf, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autoclip_torch import kernel
from autoclip_torch.layout import Kind, Layout, guards_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed import ProcessGroup

    from autoclip_core import ClipStep

_CPU = torch.device("cpu")
_MOST = sqrt(torch.finfo(torch.float32).max)  # the largest number with a square in float32
_LARGE = 2**16  # elements
_HEAD = 64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOWEST = 0 if sys.byteorder == "little" else -1  # which part of an integer has its lowest bits

# Of one tensor after the other, without a word of Python in between.
_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")
_version, _scale = attrgetter("_version"), attrgetter("scale")

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
            self._batches = list(map(_batch, batches))
            self.first = self._batches[0].tensors[0]
        if device is not None and device in self.layout.devices:
            self.device = device
        elif self._batches:
            self.device = self._batches[0].kind.device
        else:
            self.device = next((param.device for params in groups for param in params), _CPU)

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
                    key = (_CPU if is_taken else tensor.device, tensor.dtype, shards, is_taken)
                    found.setdefault(key, []).append((tensor, len(tensors), index))
                    tensors.append(tensor)
                grads.append(param.grad)
        self._batches = []
        for (device, dtype, shards, is_taken), items in found.items():
            alike, places, indices = map(list, zip(*items, strict=True))
            memory = kernel.Layout(alike) if is_taken else None
            sizes = Counter(indices)
            kind = Kind(device, dtype, shards, memory, guards_of(alike), places, list(sizes), list(sizes.values()))
            self._batches.append(
                _Batch(kind, alike, None if memory is None else memory.measure(kernel.addresses_of(alike)))
            )
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
        return sum(map(_Batch.versions, self._batches))

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
            if factors.count(1.0) == len(factors):
                continue
            if batch.memory is not None:
                each = batch.factors(factors)
                changed = batch.changed(each) if 1.0 in factors else batch.tensors
                batch.memory.scale_(each, changed)
            else:
                with torch.set_grad_enabled(batch.carries_graph()):
                    batch.scale_(factors)

    def scale_on_device_(self, scales: Tensor, kept: Tensor | None) -> None:
        """Do what `scale_` does with scales that the host does not know.

        Args:
            scales: shape (groups,), float64.
            kept: 0 if the update is dropped: all gradients become zeros, whatever they were. Else 1, int64 of shape
                (1,); None: it is not dropped.
        """
        for batch in self._batches:
            with torch.set_grad_enabled(batch.carries_graph()):
                batch.scale_on_device_(scales, kept)

    def zero_(self) -> None:
        """Set all gradients to zero."""
        for batch in self._batches:
            with torch.set_grad_enabled(batch.carries_graph()):
                torch._foreach_zero_(batch.tensors)


class _Batch(NamedTuple):
    """Real, dense, local tensors of one kind that share their memory with gradients."""

    kind: Kind
    tensors: list[Tensor]
    memory: kernel.Memory | None  # of all of them, if the kernel takes them

    def norms(self, least: torch.dtype) -> Tensor | list[float]:
        """Return the norm of each group that is here; as numbers, if the kernel has measured them."""
        sizes = self.kind.sizes
        if self.memory is None:
            return _norms_of_groups(self.tensors, sizes, least)
        found = self.memory.norms
        if len(sizes) == 1:
            found = [kernel.joint_norm(found)]
        elif len(sizes) < len(found):
            norms = iter(found)
            found = [kernel.joint_norm(list(islice(norms, size))) for size in sizes]
        # Where torch measures in float32, squares overflow. A step must not depend on who does it.
        if not max(found) <= _MOST and least == self.kind.dtype == torch.float32:
            found = [inf if norm > _MOST else norm for norm in found]
        return found

    def versions(self) -> int:
        """Return the sum of the versions; of small tensors on a CPU, of some of them."""
        if self.memory is not None:  # the kernel takes no inference tensors, and time counts
            some = self.tensors[:: len(self.tensors) // 4 + 1]
            return sum(map(_version, [*some, self.tensors[-1]]))
        return sum(map(version, self.tensors))

    def heads(self, *, anew: bool) -> int | list[Tensor]:
        """Return the bits of the first elements of the first and of the last tensor; or a fingerprint of all."""
        if self.memory is not None:
            return self.kind.fingerprint(self.tensors) if anew else self.memory.fingerprint()
        ends = (0, -1) if len(self.tensors) > 1 else (0,)
        return [head(self.tensors[at]) for at in ends]

    def carries_graph(self) -> bool:
        """Return whether gradients are part of a graph (create_graph=True), which their scaling can enter as well."""
        in_graph = list(filter(_requires_grad, self.tensors))
        return bool(in_graph) and not any(tensor.is_leaf or tensor._is_view() for tensor in in_graph)

    def scale_(self, factors: list[float]) -> None:
        """Multiply the tensors of each group by its factor."""
        if len(factors) == 1:
            torch._foreach_mul_(self.tensors, _factor(factors[0], self.tensors[0]))
        else:
            each = self.factors(factors)
            torch._foreach_mul_(self.changed(each), [factor for factor in each if factor != 1.0])

    def factors(self, of_groups: list[float]) -> array[float]:
        """Return the factor of each tensor."""
        sizes = self.kind.sizes
        if len(sizes) == 1:
            return array("d", of_groups) * sizes[0]
        return array("d", chain.from_iterable(map(repeat, of_groups, sizes)))

    def changed(self, factors: array[float]) -> list[Tensor]:
        """Return the tensors whose factor is not 1."""
        return [tensor for tensor, factor in zip(self.tensors, factors, strict=True) if factor != 1.0]

    def scale_on_device_(self, scales: Tensor, kept: Tensor | None) -> None:
        """Multiply each tensor by the scale of its group; and by what is `kept`, bit by bit, so that NaN becomes 0."""
        device, dtype = self.kind.device, self.kind.dtype
        for factors in _factors(scales, device, dtype):
            start = 0
            for index, size in zip(self.kind.groups, self.kind.sizes, strict=True):
                _multiply_(self.tensors[start : start + size], factors[index])
                start += size
        if kept is not None:
            bits = _BITS[dtype.itemsize]
            torch._foreach_mul_([tensor.view(bits) for tensor in self.tensors], moved(kept, device).view(bits)[_LOWEST])


_batch: Callable[[tuple[Any, ...]], _Batch] = partial(tuple.__new__, _Batch)  # in a third of the time of _Batch._make


def is_dropped(steps: Mapping[int, ClipStep]) -> bool:
    """Return whether the update must not be made: one group without a finite norm spoils it."""
    return 0.0 in map(_scale, steps.values())


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


@cache
def has_float64(device: torch.device) -> bool:
    """Return whether the device computes in float64."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt_()
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has nothing wider."""
    return torch.float64 if has_float64(device) else torch.float32


def as_tensor(norms: Tensor | list[float]) -> Tensor:
    """Return norms as a tensor, if they are not one."""
    # torch.tensor takes three times as long.
    return norms if isinstance(norms, Tensor) else torch.frombuffer(array("d", norms), dtype=torch.float64)


def is_capturing(device: torch.device) -> bool:
    """Return whether what is asked of the device is recorded for a graph, and not done."""
    if device == _CPU:
        return False
    asks = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return asks is not None and asks()


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor on that device. The host waits only where it is to have the values itself."""
    if device.type == "cpu":
        return tensor.to(device, dtype or tensor.dtype)
    # The device reads memory of the host by itself only if it is pinned.
    source = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
    return source.to(device, dtype or tensor.dtype, non_blocking=True)


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


def _name(batch: _Batch) -> str:
    # In an order that does not depend on that of the gradients, for sums do.
    device, dtype, _, memory, *_ = batch.kind
    return f"{device} {dtype} {memory is not None}"


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
