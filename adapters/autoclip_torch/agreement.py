"""Whether all ranks see the same norms and thresholds: asked of them, because no rank can know.

A rank that takes its part of the gradient for the whole (a stage of a pipeline, parameters that nobody synchronises),
or that has lost its history, differs from the others at once. So the ranks compare in the steps 1, 2, 4, 8, ..., and
later in every 1,024th: one collective of a few numbers, for which the host waits.

It is off unless asked for. A process cannot know which others train the same model: a collective of all would hang
where some of them do something else, and would complain where each trains a model of its own.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed

from autoclip_core import AutoClipError
from autoclip_torch.devices import widest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

_EVERY = 1024  # steps
_TOLERANCE = 1e-4  # unlike machines round differently; a part of a gradient differs by more


class Agreement:
    """Ranks that must see the same.

    Args:
        ranks: a process group; True: all ranks.
    """

    def __init__(self, ranks: ProcessGroup | Literal[True]) -> None:
        self._group = None if ranks is True else ranks
        self._step = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": 0}

    def is_due(self) -> bool:
        """Count one more step; return whether the ranks compare in it."""
        self._step += 1
        return self._step % _EVERY == 0 or (self._step < _EVERY and self._step & (self._step - 1) == 0)

    def check(self, norms: Sequence[float], thresholds: Sequence[float], device: torch.device) -> None:
        """Compare what this rank sees with the others.

        Args:
            norms: of each group in this step.
            thresholds: of each group before it.
            device: on which the group can communicate.

        Raises:
            AutoClipError: they differ; on all ranks, and before anything is remembered.
        """
        seen = torch.tensor([*norms, *thresholds], dtype=widest(device), device="cpu").nan_to_num(nan=inf, posinf=inf)
        extremes = torch.cat([seen, -seen]).to(device)
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX, self._group)
        largest, smallest = extremes.cpu().chunk(2)
        agree = torch.isclose(largest, -smallest, rtol=_TOLERANCE, atol=0.0).tolist()
        if not all(agree):
            at = agree.index(False)
            what = "norm" if at < len(norms) else "threshold"
            raise AutoClipError(
                f"Ranks that train one model must see the same, but in step {self._step} the {what} is {seen[at]:g} on "
                f"this rank, and from {-smallest[at]:g} to {largest[at]:g} over the ranks. Where each has a part of "
                "the gradient, such as a stage of a pipeline, pass process_group= with the ranks that hold the other "
                "parts; where all have the same parameters, synchronise the gradients before the step; and after a "
                "restart load the state of AutoClip on every rank."
            )
