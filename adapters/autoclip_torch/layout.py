"""How gradients were sorted, so that those of the next step need not be looked at one after the other.

To ask a small tensor all that decides about it takes longer than to clip it. But the gradients of the next step are
like those before, as a rule, and whether they are can be asked of all at once. Nothing else is taken over from step to
step: neither a tensor nor where it is, nor what it holds.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autoclip_torch import kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


class Kind(NamedTuple):
    """What the tensors of a batch have in common, and where they belong."""

    device: torch.device
    dtype: torch.dtype
    shards: tuple[ProcessGroup, ...]  # over which they are sharded
    memory: kernel.Layout | None  # of all of them, if the kernel takes them
    places: list[int]  # of their gradients, among all that there are
    groups: list[int]  # that have any of them, ascending
    sizes: list[int]  # how many each of these groups has


class Layout:
    """How gradients were sorted.

    Args:
        grads: of all parameters, in order; None of those that have none. They are not kept.
        tensors: what was taken of each of them that there is.
        kinds: of the batches.
    """

    def __init__(self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self.devices = {kind.device for kind in kinds}
        # By what part of it scaling may change a norm, beside the scale.
        self.rounding = max([1e-5, *(torch.finfo(kind.dtype).eps / 2 for kind in kinds)])
        self._count = len(grads)
        self._absent = [grad is None for grad in grads] if len(tensors) < len(grads) else None
        self._guards = _guards([grad for grad in grads if grad is not None], tensors)

    def sort(self, grads: Sequence[Any]) -> list[tuple[Kind, Sequence[Tensor], kernel.Memory | None]] | None:
        """Return the kind, the tensors and the memory of each batch; None if the gradients are not like those before.

        Args:
            grads: of the same parameters.
        """
        if self._guards is None or len(grads) != self._count or kernel.is_watched():
            return None
        if self._absent is not None:
            if [grad is None for grad in grads] != self._absent:
                return None
            grads = [grad for grad in grads if grad is not None]
        # Where no graph is made, the guards do not ask for one.
        if not self._guards.check(*grads) or grads[0].requires_grad:
            return None
        batches = []
        for kind in self.kinds:
            tensors = grads if len(self.kinds) == 1 else [grads[at] for at in kind.places]
            memory = None
            if kind.memory is not None and (memory := kind.memory.measure(tensors)) is None:
                return None
            batches.append((kind, tensors, memory))
        return batches


def _guards(grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
    """Return what tells gradients like these from others; None if they are more than tensors, and something may not."""
    if set(map(type, grads)) != {Tensor} or not all(map(is_, grads, tensors)) or kernel.is_watched():
        return None
    try:
        # With this torch.compile compares its inputs with earlier ones: class, dispatch keys (which tell the kind of
        # device, sparse tensors and all wrappers), dtype, device, shape and strides.
        return torch._C._dynamo.guards.TensorGuards(*grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, RuntimeError):  # torch does not promise this name; and some tensors have no strides
        return None
