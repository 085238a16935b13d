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
from autoclip_torch.batches import ForeachBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

    from autoclip_torch.batches import Batch


class Kind(NamedTuple):
    """What the tensors of a batch have in common, and where they belong."""

    device: torch.device
    dtype: torch.dtype
    shards: tuple[ProcessGroup, ...]  # over which they are sharded
    extents: kernel.Extents | None  # of all of them, if the kernel takes them
    guards: Any  # what tells tensors like these from others at once; None if that is not to be had
    places: list[int]  # of their gradients, among all that there are
    groups: list[int]  # that have any of them, ascending
    sizes: list[int]  # how many each of these groups has

    def batch(self, tensors: list[Tensor], addresses: list[int]) -> Batch:
        """Return tensors of this kind, which begin at these addresses, as what measures and scales them.

        Raises:
            RuntimeError: the kernel takes them, but one has no memory.
        """
        if self.extents is None:
            return ForeachBatch(self, tensors)
        return kernel.KernelBatch(self, tensors, self.extents, addresses)


class Layout:
    """How gradients were sorted.

    Args:
        grads: of all parameters, in order; None of those that have none. They are not kept.
        tensors: what was taken of each of them that there is.
        kinds: of the batches.
        may_return: whether the next ones may be sorted like these. Where some had to be given memory of their own, they
            will have to be again.
    """

    def __init__(
        self, grads: Sequence[Tensor | None], tensors: Sequence[Tensor], kinds: Sequence[Kind], *, may_return: bool
    ) -> None:
        self.kinds = kinds
        self.devices = {kind.device for kind in kinds}
        # By what part of it scaling may change a norm, beside the scale.
        self.rounding = max([1e-5, *(torch.finfo(kind.dtype).eps / 2 for kind in kinds)])
        self._count = len(grads)
        self._absent = [grad is None for grad in grads] if len(tensors) < len(grads) else None
        present = [grad for grad in grads if grad is not None]
        # What is taken of a gradient that is more than a tensor does not tell all of it.
        self._is_guarded = may_return and bool(kinds) and all(kind.guards is not None for kind in kinds)
        self._is_guarded &= all(map(is_, present, tensors))
        self._distinct = 0  # addresses at which the tensors begin; those that have no memory count once
        if self._is_guarded:
            try:
                self._distinct = len(set(map(kernel.address_of, tensors)))
            except RuntimeError:
                self._is_guarded = False

    def sort(self, grads: list[Any]) -> list[Batch] | None:
        """Return the batches; None if the gradients are not like those before.

        Args:
            grads: of the same parameters.
        """
        if not self._is_guarded or len(grads) != self._count or kernel.is_watched():
            return None
        if self._absent is not None:
            if [grad is None for grad in grads] != self._absent:
                return None
            grads = [grad for grad in grads if grad is not None]
        batches: list[Batch] = []
        distinct: set[int] = set()
        for kind in self.kinds:
            tensors = grads if len(self.kinds) == 1 else [grads[at] for at in kind.places]
            # Where no graph is made, the guards do not ask for one.
            if not kind.guards.check(*tensors) or tensors[0].requires_grad:
                return None
            try:
                addresses = list(map(kernel.address_of, tensors))
                batches.append(kind.batch(tensors, addresses))
            except RuntimeError:
                return None
            distinct.update(addresses)
        # Fewer addresses: some have come to share memory, and have to be told apart.
        return batches if len(distinct) >= self._distinct else None


def guards_of(tensors: Sequence[Tensor]) -> Any:
    """Return what tells tensors like these from others; None if they are more than tensors, and nothing may."""
    if set(map(type, tensors)) != {Tensor} or kernel.is_watched():
        return None
    try:
        # With this torch.compile compares its inputs with earlier ones: class, dispatch keys (which tell the kind of
        # device, sparse tensors and all wrappers), dtype, device, shape and strides.
        return torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, RuntimeError):  # torch does not promise this name; and some tensors have no strides
        return None
