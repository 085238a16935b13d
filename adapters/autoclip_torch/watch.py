"""Whether the updates of an attached optimizer are seen: nobody is to believe that it clips when it does not."""

from __future__ import annotations

import warnings
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, WeakSet, ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from autoclip_torch.batches import head
from autoclip_torch.devices import is_capturing
from autoclip_torch.groups import name_of
from autoclip_torch.optimizers import params_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

# How many looks without a step make a warning: if parameters change, and if nothing does.
_LATE, _IDLE = 3, 100
_every: WeakSet[Watch] = WeakSet()
_lock = Lock()  # for it


class Watch:
    """Counts the steps of one optimizer, and warns if it makes updates without them.

    Who logs is warned then. Who does not is warned during a backward pass: some come between two steps where gradients
    are accumulated, so only many more than there ever were look for changes.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.name = name_of(optimizer)
        self.steps = 0
        self._optimizer = ref(optimizer)
        self._before: tuple[Any, ...] | None = None  # what was there when somebody looked and found no new step
        self._looked_after = 0  # steps
        self._unseen = self._idle = 0  # looks, with updates and with nothing new since the one before
        self._warned: set[str] = set()
        self._passes = self._most_passes = 0  # backward passes since the latest step, and of all steps the most
        self._next_look = 2  # after so many passes
        every = [param for group in optimizer.param_groups for param in group["params"]]
        trained = [param for param in every if param.requires_grad and param.is_leaf and not is_lazy(param)]
        # One parameter is enough, and the last one is seldom left out.
        self._handles = [_hook(param, WeakMethod(self._after_backward)) for param in trained[-1:]]
        with _lock:
            _every.add(self)

    def see_step(self) -> None:
        """Count a step, or an evaluation of its closure: what changes from here to the next one is its update."""
        self.steps += 1
        self._most_passes = max(self._most_passes, self._passes)
        self._passes, self._next_look = 0, 4 * self._most_passes or 4

    def end(self) -> None:
        """Look no more by itself."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def warn(self, text: str, stacklevel: int = 5) -> None:
        """Warn, once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)

    def look(self, *, at_start: bool, stacklevel: int = 6) -> None:
        """Warn, once, if the optimizer is gone, or if updates are made without a step.

        Args:
            at_start: look only if there never was a step, and do not expect one at every look.
            stacklevel: of the warning, for the line of the user.
        """
        if not (at_start and self.steps):
            self._look(expects_steps=not at_start, stacklevel=stacklevel + 1)

    def _look(self, *, expects_steps: bool, stacklevel: int) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            self.warn(
                f"The {self.name} to which this AutoClip was attached is gone, and its steps with it. A copy of an "
                "optimizer, or a loaded one, is not attached: attach to that, and load_state_dict() this state.",
                stacklevel,
            )
            return
        if self.steps != self._looked_after:
            self._looked_after, self._before, self._unseen, self._idle = self.steps, None, 0, 0
            if expects_steps:  # at every look, so most of them find one
                return
        before, now = self._before, (*self._what_is_there(optimizer), self._steps_of_others(optimizer))
        self._before = now
        if before is None:
            return
        self._unseen += before[:2] != now[:2] and before[-1] == now[-1]
        self._idle += before == now and expects_steps
        if self._unseen == _LATE:
            self.warn(
                f"The parameters of the {self.name} change, and AutoClip sees no step of it: nothing is clipped. Who "
                "makes the updates? attached(optimizer) tells whether an optimizer has an AutoClip; a copy has none.",
                stacklevel,
            )
        elif self._idle == _IDLE:
            self.warn(
                f"AutoClip has seen no step of its {self.name} during {_IDLE} calls of log(), and no new gradient "
                "either. If another optimizer is used in its place (a copy has no AutoClip), attach to that.",
                stacklevel,
            )

    def _after_backward(self, param: Tensor) -> None:
        """Look after twice as many backward passes each time: reading values costs."""
        self._passes += 1
        if self._passes < self._next_look or is_capturing(param.device):
            return
        self._next_look = 2 * self._passes
        self._look(expects_steps=False, stacklevel=8)

    def _steps_of_others(self, optimizer: Optimizer) -> int:
        """Return how many steps were seen of other optimizers of these parameters: updates between them are theirs."""
        own = params_of(optimizer)
        with _lock:
            every = list(_every)
        others = [(watch.steps, watch._optimizer()) for watch in every if watch is not self and watch.steps]
        return sum(steps for steps, other in others if other is not None and own & params_of(other))

    def _what_is_there(self, optimizer: Optimizer) -> tuple[Any, ...]:
        """Return numbers that change with the parameters, twice, and with the gradients."""
        every = [param for group in optimizer.param_groups for param in group["params"]]
        params = [param for param in every if not is_lazy(param) and not param.is_inference()]
        versions = sum(param._version for param in params)
        # Not every optimizer writes so that a version tells. Some elements do, where to read them is not to wait.
        values = [head(param.detach()).tolist() for param in params if _is_at_hand(param)]
        grad = next((param.grad for param in params if param.grad is not None), None)
        return versions, values, id(grad), -1 if grad is None or grad.is_inference() else grad._version


def _is_at_hand(param: Tensor) -> bool:
    """Return whether elements can be read, at once."""
    is_plain = type(param) in {torch.nn.Parameter, Tensor} and param.layout is torch.strided
    return is_plain and param.is_cpu and param.untyped_storage().nbytes() > 0


def _hook(param: Tensor, after_backward: WeakMethod[Callable[[Tensor], None]]) -> RemovableHandle:
    """Have a method called after each backward pass of a parameter, as long as its object is there."""

    def call(param: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        method = after_backward()
        if method is not None:
            method(param)
        else:
            handle.remove()

    handle: RemovableHandle = param.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
    return handle
