"""Thresholds that the host need not wait for (decision.py finds them on the device).

The norms of a step are copied to the host while the device goes on, and enter the histories a step or so later. Until
then the device keeps them, and finds the threshold of the next step from them and from the few old norms around it.
"""

from __future__ import annotations

from array import array
from collections import deque
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autoclip_core import AutoClip, AutoClipError, AutoClipValueError, arrays
from autoclip_torch.decision import Decisions, DeviceStep
from autoclip_torch.devices import CPU, has_events, has_float64, has_pinned_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Each one pending widens the stretch of the history that is sent. More than a few only pile up if nobody would wait.
MOST_PENDING = 4


class Crossing:
    """Memory of the host that the device reads and writes by itself, for one step after the other.

    Args:
        device: None if it is the host itself.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._event = None if device is None else torch.Event(device)
        self._table = self._norms = torch.empty(0, device="cpu")
        self._numbers: Any = self._table.numpy()  # of the table

    def lend(self, numbers: Sequence[float]) -> Tensor:
        """Return a tensor of these numbers for the device to read, float64."""
        if self._device is None:
            return torch.frombuffer(array("d", numbers), dtype=torch.float64)  # from a list it takes ten times as long
        if len(self._table) < len(numbers):
            self._table = torch.empty(len(numbers), dtype=torch.float64, device="cpu", pin_memory=True)
            self._numbers = self._table.numpy()
        self._numbers[: len(numbers)] = numbers
        return self._table[: len(numbers)]

    def send(self, norms: Tensor) -> None:
        """Have norms copied to the host, behind all that reads what was lent."""
        if self._event is None:
            self._norms = norms.clone()
            return
        if self._norms.shape != norms.shape or self._norms.dtype != norms.dtype:
            self._norms = torch.empty(norms.shape, dtype=norms.dtype, device="cpu", pin_memory=True)
        self._norms.copy_(norms, non_blocking=True)
        self._event.record(torch.accelerator.current_stream(self._device))

    def has_arrived(self) -> bool:
        """Return whether the copy is complete."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> list[float]:
        """Return the norms, waiting for the copy if need be."""
        if self._event is not None:
            self._event.synchronize()
        norms: list[float] = self._norms.tolist()
        return norms


class _Pending(NamedTuple):
    """A step whose norms have not reached the histories."""

    norms: Tensor  # on the device
    percentile: float
    crossing: Crossing


class Deferred:
    """The histories of all groups, some steps behind their device.

    Args:
        clips: one AutoClip per group, in order.
        device: where the norms are.
        options: those of the clips, "window" and so on.
        report: called with the norms of a step, one per group, and its percentile, when they arrive.

    Raises:
        AutoClipValueError: the device lacks float64.
        AutoClipError: the device lacks events or memory that it can read by itself.
    """

    # How often the host had to wait because too many norms were on their way.
    waits = 0

    def __init__(
        self,
        clips: Sequence[AutoClip],
        device: torch.device,
        options: Mapping[str, Any],
        report: Callable[[list[float], float], None],
    ) -> None:
        _check(device)
        self._clips = list(clips)
        self.device = device
        cap = inf if options["max_threshold"] is None else options["max_threshold"]
        self._limits = {"warmup": options["warmup"], "max_threshold": cap}
        self._report = report
        window = options["window"]
        self._most = min(MOST_PENDING, window or MOST_PENDING)
        self._pending: deque[_Pending] = deque()
        self._idle: list[Crossing] = []
        self._decisions = Decisions(device, warmup=options["warmup"], nonfinite=options["nonfinite"])

    def observe(self, norms: Tensor, percentile: float) -> DeviceStep:
        """Decide a step on the device.

        Args:
            norms: shape (groups,); nobody else may change them. `NOT_SEEN` counts nowhere, and its scale is 1.
            percentile: from 0 to 100.
        """
        self.receive()
        if len(self._pending) == self._most:
            self.waits += 1
            self._receive_oldest()
        count = len(self._pending) + 1
        tables = [arrays.deferred_table(clip, count, percentile, **self._limits) for clip in self._clips]
        crossing = self._idle.pop() if self._idle else Crossing(None if self.device.type == "cpu" else self.device)
        table = crossing.lend(list(chain.from_iterable(chain.from_iterable(tables))))
        waiting = [*(step.norms for step in self._pending), norms]
        step = self._decisions.decide(table.view(len(tables), count + 1, -1), waiting)
        crossing.send(norms)
        self._pending.append(_Pending(norms, percentile, crossing))
        return step

    def receive(self, *, wait: bool = False) -> None:
        """Take in the norms that have arrived, or all of them."""
        while self._pending and (wait or self._pending[0].crossing.has_arrived()):
            self._receive_oldest()

    def _receive_oldest(self) -> None:
        step = self._pending.popleft()
        norms = step.crossing.wait()
        self._idle.append(step.crossing)
        self._report(norms, step.percentile)


def _check(device: torch.device) -> None:
    if not has_float64(device):
        raise AutoClipValueError(
            f'mode="deferred" needs float64 for thresholds that are exact, which {device.type} lacks; use "immediate".'
        )
    if device != CPU and not (has_events(device) and has_pinned_memory(device)):
        raise AutoClipError(
            f'mode="deferred" needs events and pinned memory, which torch lacks for {device.type}; use "immediate".'
        )
