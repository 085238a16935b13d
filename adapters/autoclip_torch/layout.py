"""How gradients were sorted, so that those of the next step need not be looked at one after the other.

To ask a small tensor all that decides about it takes longer than to clip it. But the gradients of the next step are
like those before, as a rule, and whether they are can be asked of all at once. Nothing else is taken over from step to
step: neither a tensor nor where it is, nor what it holds.
"""

from __future__ import annotations

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
    indices: list[int]  # of their groups, ascending
    sizes: list[int]  # how many are of each group that has any


class Layout:
    """How gradients were sorted.

    Args:
        grads: of all parameters, in order; None of those that have none. They are not kept.
        kinds: of the batches.
        guards: what tells gradients like these from others.
    """

    def __init__(self, grads: Sequence[Tensor | None], kinds: Sequence[Kind], guards: Any) -> None:
        self.kinds = kinds
        absent = [grad is None for grad in grads]
        self._absent = absent if any(absent) else None
        self._guards = guards

    def sort(self, grads: list[Any]) -> list[tuple[list[Tensor], kernel.Memory | None]] | None:
        """Return the tensors of each batch, and their memory if the kernel takes them; None if they are not like those.

        Args:
            grads: of the same parameters.
        """
        if self._absent is not None:
            if [grad is None for grad in grads] != self._absent:
                return None
            grads = [grad for grad in grads if grad is not None]
        # Where no graph is made, the guards do not ask for one.
        if kernel.is_watched() or not self._guards.check(*grads) or grads[0].requires_grad:
            return None
        batches = []
        for kind in self.kinds:
            tensors = grads if len(self.kinds) == 1 else [grads[place] for place in kind.places]
            memory = None if kind.memory is None else kind.memory.find(tensors)
            if memory is None and kind.memory is not None:
                return None
            batches.append((tensors, memory))
        return batches


def layout_of(grads: Sequence[Tensor | None], kinds: Sequence[Kind]) -> Layout | None:
    """Return the layout of gradients, none of which is more than a tensor; None if others cannot be told from them."""
    present = [grad for grad in grads if grad is not None]
    if set(map(type, present)) != {Tensor} or kernel.is_watched():
        return None
    try:
        # With this torch.compile compares its inputs with earlier ones: class, dispatch keys (which tell the kind of
        # device, sparse tensors and all wrappers), dtype, device, shape and strides.
        guards = torch._C._dynamo.guards.TensorGuards(*present, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, RuntimeError):  # torch does not promise this name; and some tensors have no strides
        return None
    return Layout(grads, kinds, guards)
