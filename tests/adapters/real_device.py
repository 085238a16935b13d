"""The accelerator of this machine, with the few functions that tests of a device need (see simulated_device.py)."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

TYPE = getattr(torch.accelerator.current_accelerator(), "type", None) if torch.accelerator.is_available() else None
IS_THERE = TYPE in {"cuda", "xpu"}


class RealMachine:
    """Whatever makes the host wait is an error, where torch can tell (on CUDA), but for `put` and `get`."""

    kind = TYPE

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()

    def put(self, tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
        with self._may_wait():
            return tensor.detach().to(f"{self.kind}:{index}")

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._may_wait():
            return tensor.detach().cpu()

    @contextmanager
    def counting(self):
        """Count what is launched meanwhile, as the device saw it: kernels, copies and fills."""
        self.launched.clear()
        with self._may_wait():
            torch.accelerator.synchronize()
            with profile(activities=[getattr(ProfilerActivity, self.kind.upper())], acc_events=True) as profiler:
                yield self.launched
                torch.accelerator.synchronize()
        self.launched.update(event.name for event in profiler.events() if event.device_type.name == self.kind.upper())

    @contextmanager
    def side_stream(self):
        """Another stream, which waits for this one first, and this one for it afterwards."""
        side, main = torch.Stream(self.kind), torch.accelerator.current_stream()
        side.wait_stream(main)
        with side:
            yield
        main.wait_stream(side)

    @contextmanager
    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), self._may_wait():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            with torch.cuda.graph(graph):
                yield

    @contextmanager
    def never_waiting(self):
        """Demand that the host does not wait."""
        if self.kind == "cuda":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def _may_wait(self):
        before = torch.cuda.get_sync_debug_mode() if self.kind == "cuda" else 0
        if before:
            torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            if before:
                torch.cuda.set_sync_debug_mode(before)
