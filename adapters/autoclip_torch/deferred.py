"""Thresholds that the host need not wait for (the mathematics is in autoclip_core.arrays).

The norms of a step are copied to the host while the device goes on, and enter the histories a step or so later. Until
then the device keeps them, and finds the threshold of the next step from them and from the few old norms around it.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autoclip_core import AutoClip, arrays
from autoclip_torch.gradients import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Each one pending widens the stretch of the history that is sent. More than a few only pile up if nobody would wait.
MOST_PENDING = 4


class DeviceStep(NamedTuple):
    """A ClipStep of every group at once, which the host does not know: each field has shape (groups,)."""

    norm: Tensor
    threshold: Tensor
    scale: Tensor
    clipped: Tensor
    recorded: Tensor


class Pending:
    """The norms of one step, on their way to the host."""

    def __init__(self, norms: Tensor, percentile: float) -> None:
        self.norms = norms
        self.percentile = percentile
        if norms.device.type == "cpu":
            self._copy, self._event = norms, None
        else:
            self._copy = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True)
            self._copy.copy_(norms, non_blocking=True)
            self._event = torch.get_device_module(norms.device).Event()
            self._event.record(torch.get_device_module(norms.device).current_stream(norms.device))

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
        options: those of the clips.
        report: called with the norms of a step, one per group, and its percentile, when they arrive.
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
        self._clips = list(clips)
        self.device = device
        cap = inf if options["max_threshold"] is None else options["max_threshold"]
        self._options = {"warmup": options["warmup"], "nonfinite": options["nonfinite"], "max_threshold": cap}
        self._report = report
        self._window = options["window"]
        self._most = min(MOST_PENDING, self._window or MOST_PENDING)
        self._pending: deque[Pending] = deque()

    def observe(self, norms: Tensor, percentile: float) -> DeviceStep:
        """Decide a step on the device.

        Args:
            norms: shape (groups,), float64. A negative one was not seen: it counts nowhere, and its scale is 1.
            percentile: from 0 to 100.
        """
        self.receive()
        if len(self._pending) == self._most:
            self.waits += 1
            self._receive_oldest()
        latest = Pending(norms, percentile)
        rows = [arrays.deferred_table(clip, len(self._pending) + 1, percentile) for clip in self._clips]
        table = to_device(rows, self.device, torch.float64)
        self._pending.append(latest)
        pending = torch.stack([step.norms for step in self._pending], -1)
        threshold, recorded_steps = arrays.deferred_threshold(torch, table, pending, percentile, self._window)
        decision = arrays.decide(torch, norms, threshold, recorded_steps, **self._options)
        return DeviceStep(norms, *decision, arrays.norm_to_remember(torch, norms) < inf)

    def receive(self, *, wait: bool = False) -> None:
        """Take in the norms that have arrived, or all of them."""
        while self._pending and (wait or self._pending[0].has_arrived()):
            self._receive_oldest()

    def _receive_oldest(self) -> None:
        step = self._pending.popleft()
        self._report(step.wait(), step.percentile)
