"""How a device decides a step (the mathematics is in autoclip_core.arrays).

A decision is some twenty operations on a handful of numbers, and to launch them one by one takes the host longer than
the device needs for them. So they are recorded as a CUDA graph, which is one launch. What must stay true:

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

from autoclip_core import arrays
from autoclip_torch.gradients import moved

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


class Decisions:
    """Thresholds and scales of steps, of all groups at once.

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

    def remember(self, norms: Tensor) -> Tensor:
        """Return what the rule remembers of norms, which a caller may change from here on."""
        remembered: Tensor = arrays.norm_to_remember(_XP, norms, self._infinity)
        return remembered

    def decide(self, table: Tensor, norms: Tensor, pending: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decide a step.

        Args:
            table: made by `arrays.deferred_table` for each group, shape (groups, pending + 1, columns), on the host.
            norms: of the step, shape (groups,), on the device. Float64, like all others.
            pending: what is remembered of the steps that are on their way to the host, this one last.

        Returns:
            The threshold, the scale and whether the norm is recorded, each of shape (groups,).
        """
        count = len(pending)
        self._calls[count] += 1
        if self._calls[count] == _RECORD_AT and self._device.type == "cuda":
            self._record(count, table.shape)
        if (recorded := self._recorded.get(count)) is not None:
            return recorded.replay(table, norms, pending)
        together = torch.stack([*pending], -1) if count > 1 else pending[0].unsqueeze(-1)  # which copies nothing
        return self._decide(moved(table, self._device), norms, together)

    def _decide(self, table: Tensor, norms: Tensor, pending: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold, limit, recorded = arrays.deferred_threshold(_XP, table, pending, warmup=self._warmup)
        scale = arrays.deferred_scale(_XP, norms, limit, nonfinite=self._nonfinite)
        return threshold, scale, recorded[:, -1]

    def _record(self, count: int, shape: torch.Size) -> None:
        """Record the decision for so many pending norms and a table of this shape, if that is possible."""
        # No tensor of inference mode may be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            table, norms = (
                torch.zeros(size, dtype=torch.float64, device=self._device) for size in (shape, (shape[0], count + 1))
            )
            graph = torch.cuda.CUDAGraph()
            try:
                with _recording(graph, self._device):
                    parts = self._decide(table, norms[:, -1], norms[:, :-1])
                    decided = torch.cat([part.view(torch.uint8) for part in parts])
            except RuntimeError:
                return
        self._recorded[count] = _Recorded(graph, table, norms, decided)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    table: Tensor
    norms: Tensor  # those that are pending, and that of the step: shape (groups, pending + 1)
    decided: Tensor  # the bytes of the thresholds, of the scales, and of what is recorded

    def replay(self, table: Tensor, norms: Tensor, pending: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        self.table.copy_(table.pin_memory(), non_blocking=True)
        torch.stack([*pending, norms], -1, out=self.norms)
        self.graph.replay()
        groups = len(table)
        decided = self.decided.clone()
        threshold, scale = decided[:-groups].view(torch.float64).view(2, groups)
        return threshold, scale, decided[-groups:].view(torch.bool)


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Record what is asked of the device meanwhile, and do nothing of it."""
    collects = gc.isenabled()
    gc.disable()  # it could free what must not be freed meanwhile
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
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
