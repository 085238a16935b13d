"""Whether gradients are those that a step has left, so that the same ones are not taken for new ones.

Nothing cheap can tell for certain. No version changes where a replayed CUDA graph, a kernel of others or `.data`
writes, and a norm may be that of other gradients: that of a linear loss is the same at every step. So gradients are the
same only if all of this is so:

- The first one carries our mark. A reference would keep the gradient alive, and a weak one would forbid torch to swap
  it when a module is converted.
- Nobody has written to one of them, as far as their versions tell.
- Some of their elements have the bits with which they were left: the first ones of every gradient where the kernel
  does the work, else of the first and the last.
- Each group has the norm with which it was left: to the last bit where nobody has scaled it, else but for the rounding
  of its elements.

All else is new: to record a gradient twice does less harm than to lose steps. What was left stays what is compared, so
that gradients cannot drift away in small steps. Where norms are added up over ranks, elements are not looked at,
because all ranks must come to the same answer.
"""

from __future__ import annotations

from itertools import count, starmap, zip_longest
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoclip_core import ClipStep
from autoclip_torch.decision import DeviceStep
from autoclip_torch.devices import moved
from autoclip_torch.gradients import is_dropped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from autoclip_torch.gradients import Gradients

_Sample = int | Tensor  # of the gradients of one batch (see Gradients.heads)

_ZEROS = ClipStep(0.0, 0.0, 0.0, clipped=False, recorded=False)  # what a dropped step leaves
_MARK = "_autoclip_mark"
_marks = count()


class Repeats:
    """The gradients that the latest step left: the latest that came to its end."""

    # The step of each group, by its index; or, of a device, norms and scales, shape (2, groups).
    # None: whatever comes is new.
    _left: Mapping[int, ClipStep] | Tensor | None = None
    # Whether the gradients at hand are those; on a device, with the norms and tolerances that they were left with.
    _same: bool | tuple[Tensor, Tensor, Tensor] = False
    _before: tuple[Tensor, Tensor, Tensor] | None = None  # the same of the latest step
    _mark: int | None = None  # of the first gradient of this rank, if there is one
    _versions: int  # of all
    _samples: Sequence[_Sample] = ()
    _is_exact = True  # whether a norm that AutoClip did not scale is what was measured
    _are_zeros: bool  # whether a dropped step of a device has left zeros

    def leave(
        self,
        gradients: Gradients,
        steps: dict[int, ClipStep] | DeviceStep,
        *,
        may_keep_nonfinite: bool,
        exactly: bool,
        anew: bool,
    ) -> None:
        """Remember what a step leaves (see Pipeline.leave); another time in the same step, what it has left by then."""
        same, left = self._same, self._left
        self._left = self._before = None
        if (first := gradients.first) is not None:
            self._mark = next(_marks)
            setattr(first, _MARK, self._mark)
        elif gradients.is_shared:
            self._mark = None
        else:
            return  # where nobody has a gradient there is nothing to be left
        try:
            heads = gradients.heads(anew=anew)
        except RuntimeError:  # what is left is not known
            return
        self._versions = gradients.versions()
        self._is_exact = exactly and (self._is_exact or same is not True)
        if isinstance(steps, DeviceStep):
            self._before = same if isinstance(same, tuple) else None
            self._are_zeros = not may_keep_nonfinite  # all of them, if one is dropped
            self._samples, self._left = _samples_and_copies(heads, [steps.norm, steps.scale])
        else:
            self._samples = _samples(heads)
            if same is True:
                self._left = left
            else:
                self._left = dict.fromkeys(steps, _ZEROS) if is_dropped(steps) else steps

    def forget(self) -> None:
        """Take whatever comes for new."""
        self._left = self._before = None
        self._same, self._samples = False, ()

    def has(self, gradients: Gradients, norms: dict[int, float]) -> bool:
        """Return whether the gradients, which have these norms, are those that were left."""
        left = self._left
        self._same = False
        if not isinstance(left, dict) or len(norms) != len(left):
            return False
        rounding = gradients.layout.rounding
        unscaled = 0.0 if self._is_exact else rounding
        for index, norm in norms.items():  # first, for it tells nearly all that are new
            if (step := left.get(index)) is None:
                return False
            known = step.norm * step.scale
            if isfinite(norm):
                if not abs(norm - known) <= (unscaled if step.scale == 1.0 else rounding) * norm:
                    return False
            elif isfinite(known):
                return False
        self._same = self._is_untouched(gradients) and all(starmap(_is_equal, self._pairs(gradients)))
        return self._same

    def has_on_device(self, gradients: Gradients, norms: Tensor) -> Tensor | None:
        """Return the same as a tensor, shape (), or None if they cannot be."""
        self._same = False
        if not isinstance(self._left, Tensor) or not self._is_untouched(gradients):
            return None
        norms = norms.double()
        before, scale = moved(self._left, norms.device)
        left = before * scale  # NaN of a group that is dropped
        if self._are_zeros:
            left = torch.where(left.isnan().any(), 0.0, left)
        rounding = gradients.layout.rounding
        tolerance = torch.where(scale == 1.0, 0.0 if self._is_exact else rounding, rounding)
        if self._before is not None:
            was_same, left_before, tolerance_before = self._before
            left = torch.where(was_same, left_before, left)
            tolerance = torch.where(was_same, tolerance_before, tolerance)
        near = (norms - left).abs() <= tolerance * norms.abs()
        same: Tensor = (near | ~(norms.isfinite() | left.isfinite())).all()
        for old, new in self._pairs(gradients):
            if isinstance(old, Tensor) and isinstance(new, Tensor) and _is_comparable(old, new):
                same = same & moved((old == new).all(), same.device)
            elif not _is_equal(old, new):
                return None
        self._same = same, left, tolerance
        return same

    def _is_untouched(self, gradients: Gradients) -> bool:
        """Return whether nobody has written to the gradients of this rank, be it none, as far as torch knows."""
        mark = None if gradients.first is None else getattr(gradients.first, _MARK, -1)
        return mark == self._mark and gradients.versions() == self._versions

    def _pairs(self, gradients: Gradients) -> Iterable[tuple[_Sample | None, _Sample | None]]:
        """Yield the samples of each batch, as it was left and as it is."""
        return zip_longest(self._samples, _samples(gradients.heads()))


def _samples(found: Sequence[int | list[Tensor]]) -> list[_Sample]:
    """Return some elements of each batch (see Gradients.heads)."""
    return [heads if isinstance(heads, int) else torch.cat(heads) for heads in found]


def _samples_and_copies(found: Sequence[int | list[Tensor]], numbers: Sequence[Tensor]) -> tuple[list[_Sample], Tensor]:
    """Return the samples, and copies of numbers, stacked: a caller may change what a step returns."""
    samples: list[_Sample] = []
    copied = None
    for heads in found:
        if isinstance(heads, int):
            samples.append(heads)
        elif copied is None and numbers[0].device == heads[0].device:
            # In one launch.
            bits = [number.view(torch.uint8) for number in numbers]
            size = sum(map(Tensor.numel, bits))
            both = torch.cat([*bits, *heads])
            samples.append(both[size:])
            copied = both[:size].view(numbers[0].dtype).view(len(numbers), -1)
        else:
            samples.append(torch.cat(heads))
    return samples, torch.stack([*numbers]) if copied is None else copied


def _is_equal(old: _Sample | None, new: _Sample | None) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return _is_comparable(old, new) and torch.equal(old, new)
    return not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new


def _is_comparable(old: Tensor, new: Tensor) -> bool:
    return old.device == new.device and old.shape == new.shape
