"""How a device decides a step (the mathematics is in autoclip_core.arrays).

A decision is some twenty operations on a handful of numbers, and to launch them one by one takes the host longer than
the device needs for them. So on CUDA they are recorded as a graph, which is one launch. What must stay true:

- What is recorded is what is done without it: there is one rule, and its bits are the same.
- A replay reads and writes the memory that was recorded. Its numbers are copied there, and what comes of them is copied
  before anybody has it.
- Where recording fails nothing has changed, and the operations are launched one by one for good.
- Other threads use the device meanwhile: they load data, or watch over collectives.
"""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import contextmanager
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from autoclip_core import ClipStep, arrays
from autoclip_torch.devices import moved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Until then each operation is launched, and its kernel loaded; a recording takes some milliseconds.
_RECORD_AT = 10


def _sort(values: Tensor, dim: int) -> Tensor:
    # Not torch.sort: of so few numbers it takes five launches, three of them copies, where this takes two.
    return torch.topk(values, values.shape[dim], dim, largest=False)[0]


def _take_along_axis(values: Tensor, indices: Tensor, dim: int) -> Tensor:
    # Not torch.take_along_dim, which first takes the remainder of each index.
    shape = [*values.shape]
    shape[dim] = indices.shape[dim]
    return values.gather(dim, indices.expand(shape))


# Torch under the names of the array API.
_XP = SimpleNamespace(
    clip=torch.clip,
    concat=torch.cat,
    fmax=torch.fmax,
    fmin=torch.fmin,
    int64=torch.int64,
    nan_to_num=torch.nan_to_num,
    sort=_sort,
    sum=torch.sum,
    take_along_axis=_take_along_axis,
    where=torch.where,
)


class DeviceStep(NamedTuple):
    """The steps of all groups at once, which the host does not know."""

    norm: Tensor  # shape (groups,), like all others but the last
    threshold: Tensor
    scale: Tensor
    clipped: Tensor
    recorded: Tensor
    kept: Tensor  # 1, or 0 if the update is dropped: int64, shape (1,)

    def of_groups(self) -> Iterator[ClipStep]:
        """Yield the step of each group; its fields have shape ()."""
        return map(ClipStep, *(field.unbind() for field in self[:-1]))


class Decisions:
    """Steps of all groups, decided on a device.

    Args:
        device: where the norms are.
        warmup: as for the core.
        nonfinite: as for the core.
    """

    def __init__(self, device: torch.device, *, warmup: int, nonfinite: str) -> None:
        self._device = device
        self._warmup = warmup
        self._nonfinite = nonfinite
        self._infinity = moved(torch.tensor(inf, dtype=torch.float64, device="cpu"), device)
        # By the number of norms that were pending.
        self._calls = Counter[int]()
        self._recorded: dict[int, _Recorded] = {}

    def decide(self, table: Tensor, pending: Sequence[Tensor]) -> DeviceStep:
        """Decide a step, in float64.

        Args:
            table: made by `arrays.deferred_table` for each group, shape (groups, pending + 1, columns); in memory of
                the host that the device can read by itself.
            pending: the norms of the steps that are on their way to the host, this one last, each of shape (groups,),
                on the device. `NOT_SEEN` counts nowhere, and its scale is 1.

        Returns:
            The step; nothing of it is memory of these norms.
        """
        count = len(pending)
        self._calls[count] += 1
        if self._calls[count] == _RECORD_AT and self._device.type == "cuda":
            self._record(table.shape)
        norms = torch.stack([*pending]) if count > 1 else pending[0].unsqueeze(0)  # which copies nothing
        if (recorded := self._recorded.get(count)) is not None:
            return recorded.replay(table, norms)
        return self._decide(table.to(self._device, non_blocking=True), norms)

    def _decide(self, table: Tensor, norms: Tensor) -> DeviceStep:
        norms = norms.to(torch.float64, copy=True)
        pending = arrays.norm_to_remember(_XP, norms, self._infinity).mT
        threshold, limit, recorded = arrays.deferred_threshold(_XP, table, pending, warmup=self._warmup)
        norm, recorded = norms[-1], recorded[:, -1]
        scale = arrays.deferred_scale(_XP, norm, limit, nonfinite=self._nonfinite)
        least = scale if len(scale) == 1 else scale.amin(0, keepdim=True)
        kept = torch.gt(least, 0.0, out=torch.empty(1, dtype=torch.int64, device=self._device))
        return DeviceStep(norm, threshold, scale, scale < recorded, recorded, kept)

    def _record(self, shape: torch.Size) -> None:
        """Record the decision for tables of this shape, if that is possible."""
        groups, rows, _ = shape
        # No tensor of inference mode may be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            table, norms = (
                torch.zeros(size, dtype=torch.float64, device=self._device) for size in (shape, (rows - 1, groups))
            )
            graph = torch.cuda.CUDAGraph()
            try:
                with _recording(graph, self._device):
                    step = self._decide(table, norms)
                    numbers = [step.norm, step.threshold, step.scale, step.kept, step.clipped, step.recorded]
                    decided = torch.cat([field.view(torch.uint8) for field in numbers])
            except RuntimeError:
                return
        self._recorded[rows - 1] = _Recorded(graph, table, norms, decided)


class _Recorded(NamedTuple):
    """A decision as a graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    table: Tensor
    norms: Tensor  # shape (pending, groups)
    decided: Tensor  # the bytes of norms, thresholds, scales, what is kept, clipped and recorded

    def replay(self, table: Tensor, norms: Tensor) -> DeviceStep:
        self.table.copy_(table, non_blocking=True)
        self.norms.copy_(norms)
        self.graph.replay()
        groups = len(table)
        numbers, kept, flags = torch.split_with_sizes(self.decided.clone(), [24 * groups, 8, 2 * groups])
        norm, threshold, scale = numbers.view(torch.float64).view(3, -1).unbind()
        clipped, recorded = flags.view(torch.bool).view(2, -1).unbind()
        return DeviceStep(norm, threshold, scale, clipped, recorded, kept.view(torch.int64))


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record what is asked of the device meanwhile, and do nothing of it."""
    collects = gc.isenabled()
    gc.disable()  # it could free what must not be freed meanwhile
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            graph.capture_begin(capture_error_mode="thread_local")  # whatever other threads do
            try:
                yield
            finally:
                graph.capture_end()
        main.wait_stream(side)
    finally:
        if collects:
            gc.enable()
