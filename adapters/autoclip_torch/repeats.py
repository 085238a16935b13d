"""Whether gradients are those that a step has left, so that the same ones are not taken for new ones.

The version of a tensor alone cannot tell: a CUDA graph writes without changing it. Nor can the norm: that of a linear
loss is the same at every step.

A tensor is known by a mark that it carries. A reference would keep the gradient alive, and a weak one would forbid
torch to swap it when a module is converted.
"""

from __future__ import annotations

from itertools import count
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autoclip_torch.deferred import DeviceStep
from autoclip_torch.gradients import moved

if TYPE_CHECKING:
    from autoclip_core import ClipStep
    from autoclip_torch.gradients import Gradients

_MARK = "_autoclip_mark"
_marks = count()


class Repeats:
    """The gradients that the latest step left."""

    _norms: dict[int, float] | Tensor | None = None  # those that the gradients have now; None: whatever comes is new
    _mark: int | None = None  # of the first gradient of this rank, if there is one
    _version = 0
    _tolerance = 0.0
    _are_zeros = True

    def leave(self, gradients: Gradients, steps: dict[int, ClipStep] | DeviceStep, *, may_keep_nonfinite: bool) -> None:
        """Remember the gradients as a step has left them (see Pipeline.leave)."""
        self.forget()
        first = gradients.first
        if first is None and not gradients.is_shared:
            return  # where nobody has a gradient there is nothing to be left
        self._mark = None if first is None else next(_marks)
        if first is not None:
            setattr(first, _MARK, self._mark)
            self.touch(first)
        # The scale rounds each element by half a unit.
        self._tolerance = max(1e-5, torch.finfo(torch.float32 if first is None else first.dtype).eps / 2)
        if isinstance(steps, DeviceStep):
            self._norms = steps.norm * steps.scale  # NaN of a group that is dropped
            self._are_zeros = not may_keep_nonfinite  # all of them, then
        elif any(step.scale == 0.0 for step in steps.values()):
            self._norms = dict.fromkeys(steps, 0.0)
        else:
            self._norms = {index: step.norm * step.scale for index, step in steps.items()}

    def touch(self, first: Tensor) -> None:
        """Take the optimizer's own writes for ours: fused ones write the gradients they have scaled."""
        self._version = _version(first)

    def forget(self) -> None:
        """Take whatever comes for new."""
        self._norms = None

    def has(self, gradients: Gradients, norms: dict[int, float]) -> bool:
        """Return whether the gradients, which have these norms, are those that were left."""
        left = self._norms
        if not isinstance(left, dict) or not self._is_untouched(gradients) or norms.keys() != left.keys():
            return False
        return all(
            abs(norm - left[index]) <= self._tolerance * norm or not (isfinite(norm) or isfinite(left[index]))
            for index, norm in norms.items()
        )

    def has_on_device(self, gradients: Gradients, norms: Tensor) -> Tensor | None:
        """Return the same as a tensor, shape (), or None if they cannot be."""
        if not isinstance(self._norms, Tensor) or not self._is_untouched(gradients):
            return None
        left = moved(self._norms, norms.device)
        if self._are_zeros:
            left = torch.where(left.isnan().any(), 0.0, left)
        near = (norms - left).abs() <= self._tolerance * norms.abs()
        same: Tensor = (near | ~(norms.isfinite() | left.isfinite())).all()
        return same

    def _is_untouched(self, gradients: Gradients) -> bool:
        """Return whether nobody has written to the first gradient of this rank, be it none."""
        first = gradients.first
        if first is None:
            return self._mark is None
        return getattr(first, _MARK, None) == self._mark is not None and _version(first) == self._version


def _version(tensor: Tensor) -> int:
    # An inference tensor has none.
    return 0 if tensor.is_inference() else tensor._version
