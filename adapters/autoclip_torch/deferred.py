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

from autoclip_core import AutoClip, AutoClipError, AutoClipValueError, ClipStep, arrays
from autoclip_torch.decision import Decisions
from autoclip_torch.gradients import has_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Each one pending widens the stretch of the history that is sent. More than a few only pile up if nobody would wait.
MOST_PENDING = 4


class DeviceStep(NamedTuple):
    """The steps of all groups at once, which the host does not know: each field has shape (groups,)."""

    norm: Tensor
    threshold: Tensor
    scale: Tensor
    recorded: Tensor

    def of_groups(self) -> Iterator[ClipStep]:
        """Yield the step of each group; its fields have shape ()."""
        norm, threshold, scale, recorded = self
        fields = norm, threshold, scale, scale < recorded, recorded
        return map(ClipStep, *(field.unbind() for field in fields))


class Pending:
    """The norms of one step, on their way to the host; `remembered` is what the rule remembers of them."""

    def __init__(self, norms: Tensor, remembered: Tensor, percentile: float) -> None:
        self.remembered = remembered
        self.percentile = percentile
        self._event: torch.Event | None = None
        if norms.device.type == "cpu":
            self._copy = norms.clone()  # a caller may change what a step returns
        else:
            self._copy = torch.empty(norms.shape, dtype=norms.dtype, device="cpu", pin_memory=True)
            self._copy.copy_(norms, non_blocking=True)
            self._event = torch.Event(norms.device)
            self._event.record(torch.accelerator.current_stream(norms.device))

    def has_arrived(self) -> bool:
        """Return whether the copy is complete."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> list[float]:
        """Return the norms, waiting for the copy if need be."""
        if self._event is not None:
            self._event.synchronize()
        norms: list[float] = self._copy.tolist()
        return norms


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
        self._pending: deque[Pending] = deque()
        self._decisions = Decisions(device, warmup=options["warmup"], nonfinite=options["nonfinite"])

    def observe(self, norms: Tensor, percentile: float, measured: Tensor) -> DeviceStep:
        """Decide a step on the device.

        Args:
            norms: shape (groups,), float64. `NOT_SEEN` counts nowhere, and its scale is 1.
            percentile: from 0 to 100.
            measured: the norms that the step tells, seen or not.
        """
        self.receive()
        if len(self._pending) == self._most:
            self.waits += 1
            self._receive_oldest()
        count = len(self._pending) + 1
        tables = [arrays.deferred_table(clip, count, percentile, **self._limits) for clip in self._clips]
        # From nested lists torch takes ten times as long.
        numbers = array("d", list(chain.from_iterable(chain.from_iterable(tables))))
        table = torch.frombuffer(numbers, dtype=torch.float64).view(len(tables), count + 1, -1)
        self._pending.append(Pending(norms, self._decisions.remember(norms), percentile))
        decided = self._decisions.decide(table, norms, [step.remembered for step in self._pending])
        return DeviceStep(measured, *decided)

    def receive(self, *, wait: bool = False) -> None:
        """Take in the norms that have arrived, or all of them."""
        while self._pending and (wait or self._pending[0].has_arrived()):
            self._receive_oldest()

    def _receive_oldest(self) -> None:
        step = self._pending.popleft()
        self._report(step.wait(), step.percentile)


def _check(device: torch.device) -> None:
    if not has_float64(device):
        raise AutoClipValueError(
            f'mode="deferred" needs float64 for thresholds that are exact, which {device.type} lacks; use "immediate".'
        )
    if device.type != "cpu":
        try:
            torch.Event(device)
            torch.empty(1, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise AutoClipError(
                f'mode="deferred" needs events and pinned memory, which torch lacks for {device.type}; use "immediate".'
            ) from error
