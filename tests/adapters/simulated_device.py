"""A CUDA device made of CPU tensors: what is asynchronous there is asynchronous here, on a torch without CUDA.

- Operations on its tensors are queued on a stream, and done later, in order; only their shapes are known at once.
- A copy between it and pinned memory takes place when its turn comes: who reads or writes the memory earlier is wrong.
  Pinned memory that nothing was copied to holds NaN.
- Whatever makes the host wait is an error: reading a value, a copy that is not `non_blocking`. On a patient machine the
  host waits, and that is counted. A copy that neither waits nor is of pinned memory is always an error.
- Tensors of two devices do not mix, and what was queued on another stream is there only after a wait for it.
- Launches are counted as torch's CUDA functions make them: a foreach function is one launch for as many tensors as fit,
  or one per tensor where a factor has another dtype; there a factor is also rounded to the dtype of the tensors.

It computes with the CPU's kernels, and knows nothing of kernels, their order of summation or their speed.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from autoclip_torch import batches, devices
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
NO_LAUNCH = {"detach", "empty", "expand", "lift_fresh", "select", "slice", "split", "split_with_sizes", "t", "unbind"}
NO_LAUNCH |= {
    "alias",
    "as_strided",
    "empty_like",
    "empty_strided",
    "new_empty",
    "squeeze",
    "transpose",
    "unsqueeze",
    "view",
}
TENSORS_PER_LAUNCH = 110
# Beside what the function is, as counted on an H200 with torch 2.11: sort counts, and copies its values and two lists
# of places; topk also sorts what it found; sum first makes integers of what is true; a norm starts from zeros, and adds
# up its parts.
MORE_LAUNCHES = {"sort": 4, "topk": 1, "sum": 1, "_foreach_norm": 2}


class HostWaitsError(AssertionError):
    """The host would wait for the device."""


class DeviceTensor(torch.Tensor):
    """A tensor of the device.

    `ghost` is a CPU tensor of the same shape, whose values mean nothing; `value` is [None] until the tensor is made.
    """

    @staticmethod
    def __new__(cls, ghost: torch.Tensor, device: torch.device, value: list[Any]) -> Any:
        layout = {"strides": ghost.stride(), "storage_offset": ghost.storage_offset(), "dtype": ghost.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, ghost.size(), device=device, **layout)

    def __init__(self, ghost: torch.Tensor, device: torch.device, value: list[Any]) -> None:
        self.ghost, self.value = ghost, value

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the simulation")

    def __getitem__(self, index: Any) -> Any:
        # Torch itself would ask for a guard of CUDA devices, which a build without CUDA lacks.
        index = index if isinstance(index, tuple) else (index,)
        at = index.index(...) if ... in index else len(index)
        rest = self.dim() - sum(item is not None and item is not ... for item in index)
        result, dim = self, 0
        for item in [*index[:at], *[slice(None)] * rest, *index[at + 1 :]]:
            if item is None:
                result = result.unsqueeze(dim)
            elif isinstance(item, int):
                result, dim = result.select(dim, item), dim - 1
            elif item != slice(None):
                result = aten.slice.Tensor(result, dim, item.start, item.stop, item.step or 1)
            dim += 1
        return result

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:  # noqa: FBT001, FBT002 - torch's; for the same reason
        Machine.active._copy(self, source, non_blocking, "copy_")
        return self

    def tolist(self) -> Any:
        return Machine.active.read(self, "tolist").tolist()

    def pin_memory(self) -> Any:
        raise RuntimeError("only dense CPU tensors can be pinned")


class Stream:
    def __init__(self) -> None:
        self.queue: deque[Any] = deque()

    def advance(self) -> bool:
        """Do the next operation, if it need not wait for another stream."""
        if not self.queue or (isinstance(self.queue[0], list) and not self.queue[0]):
            return False
        work = self.queue.popleft()
        if callable(work):
            work()
        return True

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.queue.append(event.done)


class Event:
    def __init__(self, device: torch.device | None = None) -> None:
        self.done: list[bool] = []

    def record(self, stream: Stream) -> None:
        self.done = done = []  # whatever was recorded before
        stream.queue.append(lambda: done.append(True))

    def query(self) -> bool:
        if Machine.active.capturing:  # CUDA then fails at the end of the capture, whatever was raised meanwhile
            raise AssertionError("an event was queried while a graph is captured")
        return bool(self.done)

    def synchronize(self) -> None:
        Machine.active.waits_for_events += not self.done
        while not self.done:
            Machine.active.advance()


class Graph:
    """A CUDA graph: what is asked meanwhile is not done, but at each replay, in one launch."""

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads could spoil it"
        Machine.active.capturing, Machine.active.recording = True, []

    def capture_end(self) -> None:
        self.work = Machine.active.recording
        Machine.active.capturing, Machine.active.recording = False, None

    def replay(self) -> None:
        for work in self.work:
            Machine.active.current[0].queue.append(work)
        Machine.active.launch(torch.device(Machine.active.kind, 0), lambda: None, "graph", 1)


class Machine(TorchDispatchMode):
    """Devices with a stream each.

    Args:
        kind: their type.
        speed: how many operations are done, on average, while one is queued. 0: none before somebody waits for it.
        patient: whether the host may wait.
        has_float64: whether the devices have it.
    """

    active: Machine

    def __init__(self, kind: str, speed: float, *, patient: bool = False, has_float64: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.streams = [Stream(), Stream()]
        self.current = self.streams[:]
        self.chance, self.speed = random.Random(0), speed  # noqa: S311
        self.patient, self.has_float64 = patient, has_float64
        self.waits, self.waits_for_events, self.capturing = 0, 0, False
        self.recording: list[Any] | None = None
        self.launched: Counter[str] = Counter()
        self._pinned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    # For tests

    def put(self, tensor: torch.Tensor, index: int = 0) -> DeviceTensor:
        """Return a copy of a tensor of the host on a device."""
        with _disable_current_modes():
            return DeviceTensor(torch.zeros_like(tensor), torch.device(self.kind, index), [tensor.detach().clone()])

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """Do all that is queued, and return the values of a tensor."""
        while any(stream.queue for stream in self.streams):
            self.advance()
        return tensor.value[0] if isinstance(tensor, DeviceTensor) else tensor

    @contextmanager
    def counting(self):
        """Count what is launched meanwhile."""
        self.launched.clear()
        yield self.launched

    @contextmanager
    def side_stream(self):
        """Another stream, which waits for this one first, and this one for it afterwards."""
        main, side = self.current[0], self.new_stream()
        side.wait_stream(main)
        self.current[0] = side
        yield
        main.wait_stream(side)
        self.current[0] = main

    @contextmanager
    def capture(self):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    @property
    def pinned_blocks(self) -> int:
        """How many there are that somebody holds."""
        return len(self._pinned)

    # The machine

    def new_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def advance(self) -> None:
        advanced = [stream.advance() for stream in self.streams]
        assert any(advanced), "the streams wait for each other"

    def read(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.waits += 1
        if not self.patient:
            raise HostWaitsError(name)
        return self.get(tensor)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, spec = tree_flatten((args, kwargs))
        ours = [item for item in flat if isinstance(item, DeviceTensor)]
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        on_device = wanted is not None and wanted.type == self.kind
        if on_device:
            wanted = torch.device(self.kind, wanted.index or 0)
        pin = kwargs.pop("pin_memory", None)
        if pin and (ours or on_device):
            raise RuntimeError("only dense CPU tensors can be pinned")
        if not ours and not on_device:
            if func is aten._pin_memory.default:
                return self.pin(args[0].clone())
            result = func(*args, **kwargs)
            return self.pin(result.fill_(float("nan"))) if pin else result
        if func in READS:
            with _disable_current_modes():
                return func(*[self.read(item, str(func)) if isinstance(item, DeviceTensor) else item for item in args])
        if func is aten._to_copy.default:
            return self._to_copy(args[0], wanted, kwargs.get("dtype"), kwargs.get("non_blocking", False))
        if func is aten.copy_.default:
            self._copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False), "copy_")
            return args[0]
        return self._compute(func, flat, spec, ours, wanted or ours[0].device)

    def _compute(self, func, flat, spec, ours, device):
        name = func._schema.name.split("::")[1]
        for item in flat:
            if isinstance(item, torch.Tensor) and (
                item.device != device if isinstance(item, DeviceTensor) else item.dim()
            ):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {name} got {item.device}, {device}"
                )
        if name == "_amp_foreach_non_finite_check_and_unscale_" and flat[0].dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        if name.startswith("cumsum") and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

        def call(pick):
            args, kwargs = tree_unflatten(
                [pick(item) if isinstance(item, DeviceTensor) else item for item in flat], spec
            )
            kwargs.pop("pin_memory", None)
            if name == "_foreach_mul_" and isinstance(args[1], torch.Tensor):
                args = [args[0], args[1].to(args[0][0].dtype)]
            elif name == "_foreach_mul_" and isinstance(args[1], list) and isinstance(args[1][0], torch.Tensor):
                args = [args[0], [item.to(args[0][0].dtype) if item.dim() == 0 else item for item in args[1]]]
            with _disable_current_modes():
                return func(*args, **({**kwargs, "device": "cpu"} if kwargs.get("device") else kwargs))

        made = call(lambda item: item.ghost)
        same = {id(item.ghost): item for item in ours}
        new = lambda item: isinstance(item, torch.Tensor) and id(item) not in same
        places = [[None] if new(item) else None for item in tree_flatten(made)[0]]
        left = iter(places)

        def wrap(item):
            place = next(left)
            self._check(item)
            return DeviceTensor(item, device, place) if place is not None else same.get(id(item), item)

        result = tree_map(wrap, made)

        def work():
            for place, item in zip(places, tree_flatten(call(_value))[0], strict=True):
                if place is not None:
                    place[0] = item

        self.launch(device, work, name, _launches(name, *tree_unflatten(flat, spec)[0]))
        return result

    def _check(self, item):
        if not self.has_float64 and isinstance(item, torch.Tensor) and item.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64: this device does not have it")

    def _to_copy(self, source, device, dtype, non_blocking):
        device = device or source.device
        with _disable_current_modes():
            ghost = torch.zeros(source.shape, dtype=dtype or source.dtype, device="cpu")
            target = DeviceTensor(ghost, device, [ghost.clone()]) if device.type == self.kind else ghost
        if device.type == self.kind:
            self._check(ghost)
        self._copy(target, source, non_blocking, "_to_copy")
        return target

    def _copy(self, target, source, non_blocking, name):
        to, here = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
        assert self.recording is None or to == here, f"{name}: a graph would copy the same memory of the host again"
        waits = False
        if to != here:
            host = target if here else source
            pinned = host.untyped_storage()._cdata in self._pinned
            if non_blocking and not pinned:
                raise AssertionError(f"{name} of shape {tuple(host.shape)} may be read before it is filled")
            waits = not non_blocking
        device = source.device if here else target.device
        apart = to and here and target.device != source.device
        if apart:
            self.current[device.index].wait_stream(self.current[target.device.index])

        def work():  # it holds the memory, as torch's allocator does until the copy has taken place
            with _disable_current_modes():
                (_value(target) if to else target).copy_(_value(source) if here else source)

        self.launch(device, work, name, 1)
        if apart:
            self.current[target.device.index].wait_stream(self.current[device.index])
        if waits:
            self.read(source if here else target, f"{name} of shape {tuple(source.shape)}")

    def launch(self, device, work, name, launches):
        if self.recording is not None:
            self.recording.append(work)
            return
        self.launched[name] += launches
        self.current[device.index].queue.append(work)
        for _ in range(int(self.chance.random() * 2 * self.speed + 0.5)):
            self.chance.choice(self.streams).advance()


def _value(tensor: DeviceTensor) -> torch.Tensor:
    assert tensor.value[0] is not None, "a stream reads what another one has not made yet"
    return tensor.value[0]


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    return aten._pin_memory.default(tensor)


def _launches(name: str, *args: Any) -> int:
    if name in NO_LAUNCH:
        return 0
    count = 1
    if name.startswith("_foreach"):
        tensors, *rest = [item for item in args if isinstance(item, list)] + [
            [item] for item in args if isinstance(item, torch.Tensor)
        ]
        fits = all(isinstance(item, float) or item.dtype == tensors[0].dtype for items in rest for item in items)
        rest = [items for items in rest if isinstance(items[0], torch.Tensor)]
        fits = fits and all(len(items) == 1 or items[0].dim() == tensors[0].dim() for items in rest)
        count = -(-len(tensors) // TENSORS_PER_LAUNCH) if fits else len(tensors)
    return count + MORE_LAUNCHES.get(name, 0)


@contextmanager
def simulated_device(monkeypatch, speed=0.8, kind="cuda", **options):
    """Yield a Machine whose devices are torch's devices of that type."""
    machine = Machine.active = Machine(kind, speed, **options)

    def forget():
        devices.has_float64.cache_clear()
        devices.has_pinned_memory.cache_clear()
        batches._first_factors.cache_clear()

    with monkeypatch.context() as patch, machine:
        patch.setattr(torch, "Event", Event)
        patch.setattr(torch.accelerator, "current_stream", lambda device: machine.current[device.index])
        module = getattr(torch, kind)
        patch.setattr(module, "is_current_stream_capturing", lambda: machine.capturing, raising=False)
        patch.setattr(module, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "Stream", lambda device: machine.new_stream())
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: machine.current[device.index])
        patch.setattr(torch.Tensor, "pin_memory", _pin_memory)
        forget()
        try:
            yield machine
        finally:
            forget()
