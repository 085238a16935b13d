"""Parameters of several AutoClips: after one backward() the second one sees what the first has clipped."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

from autoclip_torch.batches import version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from autoclip_core import ClipStep
    from autoclip_torch.groups import Groups

_MARK = "_autoclip_owner"
_every: WeakSet[Sharing] = WeakSet()
_lock = Lock()  # for it


class Sharing:
    """What an AutoClip shares with those that were there before, and with those that came later."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.shared: set[int] = set()  # parameters, by id; none if there is no other one
        self._warned = False
        own = set(map(id, groups.params))
        with _lock:
            for other in _every:
                common = own.intersection(map(id, other._groups.params))
                other.shared |= common
                self.shared |= common
            _every.add(self)

    def mark(self, latest: Mapping[str, ClipStep]) -> None:
        """Say on a shared gradient who has clipped it, once nobody writes to it any more in this step."""
        if any(step.clipped for step in latest.values()) and (grad := self._gradient()) is not None:
            setattr(grad, _MARK, (id(self), version(grad)))

    def look(self) -> None:
        """Warn, once, if another one has clipped a gradient that is to be measured."""
        if self._warned or (grad := self._gradient()) is None:
            return
        owner, clipped = getattr(grad, _MARK, (id(self), 0))
        if owner != id(self) and clipped == version(grad):
            self._warned = True
            warnings.warn(
                "This AutoClip shares parameters with another one, which has clipped the gradients since backward(): "
                "it remembers norms that are clipped. Use one of them, or call backward() before each.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _gradient(self) -> Tensor | None:
        shared = (param.grad for param in self._groups.params if id(param) in self.shared)
        return next((grad for grad in shared if grad is not None), None)
