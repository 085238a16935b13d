"""Whether gradients are those that a step has left, so that the same ones are not taken for new ones.

Nothing cheap can tell for certain. No version changes where a replayed CUDA graph, a kernel of others or `.data`
writes, and a norm may be that of other gradients: that of a linear loss is the same at every step. So gradients are the
same only if all of this is so:

- The first one carries our mark. A reference would keep the gradient alive, and a weak one would forbid torch to swap
  it when a module is converted.
- Nobody has written to one of them, as far as their versions tell.
- Some of their elements have the bits with which they were left. On a CPU, where the kernel does a step of small
  gradients in the time of a few calls of torch, they are read from the first time on that gradients look like old ones;
  and before, until some were known to be new.
- Each group has the norm with which it was left: to the last bit where nobody has scaled it, else but for the rounding
  of its elements.

All else is new: to record a gradient twice does less harm than to lose steps. What was left stays what is compared, so
that gradients cannot drift away in small steps. Where norms are added up over ranks, elements are not looked at,
because all ranks must come to the same answer.
"""

from __future__ import annotations

from itertools import count
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoclip_torch.deferred import DeviceStep
from autoclip_torch.gradients import moved, version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autoclip_core import ClipStep
    from autoclip_torch.gradients import Gradients

_Sample = tuple[list[int], bytes] | Tensor  # of the gradients of one device and dtype (see Gradients.heads)

_MARK = "_autoclip_mark"
_marks = count()


class Repeats:
    """The gradients that the latest step left."""

    # Norm and scale of each group, by its index, or shape (2, groups); until `touch` has copied those of a device, the
    # step itself. None: whatever comes is new.
    _left: dict[int, tuple[float, float]] | DeviceStep | Tensor | None = None
    # Whether the gradients at hand are those; on a device, with the norms and tolerances that they were left with.
    _same: bool | tuple[Tensor, Tensor, Tensor] = False
    _before: tuple[Tensor, Tensor, Tensor] | None = None  # the same of the latest step
    _mark: int | None = None  # of the first gradient of this rank, if there is one
    _version = 0  # of it, when it was left
    _versions = 0  # of all, after the step
    _samples: Mapping[Any, _Sample] = {}
    # Whether elements are read. At first they are, and not where each step finds gradients that torch knows to be new.
    _reads: bool | None = None
    _could_read: bool | None = None  # the same of the latest step
    _is_exact = True  # whether a norm that AutoClip did not scale is what was measured
    _are_zeros = True

    def leave(
        self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep, *, may_keep_nonfinite: bool, exactly: bool
    ) -> None:
        """Remember what a step leaves (see Pipeline.leave), whose elements `touch` is to see as they are then."""
        same = self._same
        if same is True:
            return
        self.forget()
        if gradients.first is None and not gradients.is_shared:
            return  # where nobody has a gradient there is nothing to be left
        self._mark = None if gradients.first is None else next(_marks)
        if gradients.first is not None:
            setattr(gradients.first, _MARK, self._mark)
        self._version = version(gradients.first)
        self._is_exact = exactly
        if isinstance(steps, DeviceStep):
            self._left = steps
            self._before = same or None
            self._are_zeros = not may_keep_nonfinite  # all of them, if one is dropped
        elif any(step.scale == 0.0 for step in steps.values()):
            self._left = dict.fromkeys(steps, (0.0, 0.0))
        else:
            self._left = {index: (step.norm, step.scale) for index, step in steps.items()}

    def touch(self, gradients: Gradients) -> None:
        """Take for ours what was written since: fused optimizers write the gradients that they have scaled."""
        self._versions = gradients.versions()
        self._is_exact = self._is_exact and version(gradients.first) == self._version
        if isinstance(self._left, DeviceStep):
            self._samples, self._left = _copy(gradients, [self._left.norm, self._left.scale], reads=self._reads)
        else:
            self._samples, _ = _copy(gradients, reads=self._reads)

    def forget(self) -> None:
        """Take whatever comes for new."""
        self._left = self._before = None
        self._same, self._samples = False, {}

    def has(self, gradients: Gradients, norms: dict[int, float]) -> bool:
        """Return whether the gradients, which have these norms, are those that were left."""
        left = self._left
        self._same = False
        if not isinstance(left, dict) or not self._is_untouched(gradients) or norms.keys() != left.keys():
            return False
        rounding = _rounding_of(gradients)
        unscaled = 0.0 if self._is_exact else rounding
        near = all(_is_near(norm, *left[index], unscaled, rounding) for index, norm in norms.items())
        self._same = near and all(_is_equal(*pair) for pair in self._pairs(gradients))
        return self._same

    def has_on_device(self, gradients: Gradients, norms: Tensor) -> Tensor | None:
        """Return the same as a tensor, shape (), or None if they cannot be."""
        self._same = False
        if not isinstance(self._left, Tensor) or not self._is_untouched(gradients):
            return None
        before, scale = moved(self._left, norms.device)
        left = before * scale  # NaN of a group that is dropped
        if self._are_zeros:
            left = torch.where(left.isnan().any(), 0.0, left)
        rounding = _rounding_of(gradients)
        tolerance = torch.where(scale == 1.0, 0.0 if self._is_exact else rounding, rounding)
        if self._before is not None:
            was_same, left_before, tolerance_before = self._before
            left = torch.where(was_same, left_before, left)
            tolerance = torch.where(was_same, tolerance_before, tolerance)
        near = (norms - left).abs() <= tolerance * norms.abs()
        same: Tensor = (near | ~(norms.isfinite() | left.isfinite())).all()
        for old, new in self._pairs(gradients):
            if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
                same = same & moved((old == new).all(), same.device)
            elif isinstance(old, Tensor) or isinstance(new, Tensor) or old != new:
                return None
        self._same = same, left, tolerance
        return same

    def _is_untouched(self, gradients: Gradients) -> bool:
        """Return whether nobody has written to the gradients of this rank, be it none, as far as torch knows."""
        mark = None if gradients.first is None else getattr(gradients.first, _MARK, -1)
        found = mark == self._mark and gradients.versions() == self._versions
        self._could_read, self._reads = self._reads, found or bool(self._reads)
        return found

    def _pairs(self, gradients: Gradients) -> Iterable[tuple[_Sample | None, _Sample | None]]:
        """Yield some elements as they were left, and as they are."""
        now, _ = _copy(gradients, reads=self._could_read)
        return ((self._samples.get(key), now.get(key)) for key in self._samples.keys() | now.keys())


def _copy(
    gradients: Gradients, numbers: Sequence[Tensor] = (), *, reads: bool | None
) -> tuple[dict[tuple[Any, ...], _Sample], Tensor | None]:
    """Return some elements, and copies of numbers, stacked: a caller may change what a step returns."""
    samples: dict[tuple[Any, ...], _Sample] = {}
    copied = None
    bits = [number.view(torch.uint8) for number in numbers]
    for key, heads in gradients.heads(reads=reads is not False).items():
        if isinstance(heads, tuple):
            samples[key] = heads
        elif copied is None and numbers and numbers[0].device == heads[0].device:
            # In one launch.
            size = sum(map(Tensor.numel, bits))
            both = torch.cat([*bits, *heads])
            samples[key], copied = both[size:], both[:size].view(numbers[0].dtype).view(len(numbers), -1)
        else:
            samples[key] = torch.cat(heads)
    return samples, torch.stack([*numbers]) if numbers and copied is None else copied


def _rounding_of(gradients: Gradients) -> float:
    """Return by what part of it scaling may change a norm, beside the scale."""
    return max(1e-5, gradients.rounding / 2)


def _is_near(norm: float, before: float, scale: float, unscaled: float, rounding: float) -> bool:
    left = before * scale
    if not isfinite(norm):
        return not isfinite(left)
    return abs(norm - left) <= (unscaled if scale == 1.0 else rounding) * norm


def _is_equal(left: _Sample | None, now: _Sample | None) -> bool:
    if isinstance(left, Tensor) and isinstance(now, Tensor):
        return torch.equal(left, now)
    return left == now
