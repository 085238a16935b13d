"""Whether the updates of an attached optimizer are seen: nobody is to believe that it clips when it does not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from autoclip_torch.gradients import head, is_capturing
from autoclip_torch.groups import name_of
from autoclip_torch.optimizers import params_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

# How many looks without a step make a warning: if parameters change, and if nothing does.
_LATE, _IDLE = 3, 100
_every: WeakSet[Watch] = WeakSet()


class Watch:
    """Counts the steps of one optimizer, and warns if it makes updates without them.

    Who logs is warned then. Who does not is warned during a backward pass, as long as no step at all was seen.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.name = name_of(optimizer)
        self.steps = 0
        self._optimizer = ref(optimizer)
        self._before: tuple[Any, ...] | None = None  # what was there when somebody looked and found no new step
        self._looked_after = 0  # steps
        self._unseen = self._idle = 0  # looks, with updates and with nothing new since the one before
        self._warned: set[str] = set()
        self._passes = 0  # backward passes before the first step
        every = [param for group in optimizer.param_groups for param in group["params"]]
        trained = [param for param in every if param.requires_grad and param.is_leaf and not is_lazy(param)]
        # One parameter is enough, and the last one is seldom left out.
        self._handles = [param.register_post_accumulate_grad_hook(self._after_backward) for param in trained[-1:]]
        _every.add(self)

    def see_step(self) -> None:
        """Count a step."""
        self.steps += 1
        if self._handles:
            self.end()

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
        if at_start and self.steps:
            return
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
            return
        before, now = self._before, (*self._what_is_there(optimizer), self._steps_of_others(optimizer))
        self._before = now
        if before is None:
            return
        self._unseen += before[:2] != now[:2] and before[-1] == now[-1]
        self._idle += before == now and not at_start
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
        """Look after 2, 4, 8 ... backward passes: reading values costs, and gradients may be accumulated."""
        self._passes += 1
        if torch.compiler.is_compiling() or self._passes < 2 or self._passes & (self._passes - 1):
            return
        if self._optimizer() is not None and not is_capturing(param.device):
            self.look(at_start=True, stacklevel=7)

    def _steps_of_others(self, optimizer: Optimizer) -> int:
        """Return how many steps were seen of other optimizers of these parameters: updates between them are theirs."""
        own = params_of(optimizer)
        others = [(watch.steps, watch._optimizer()) for watch in _every if watch is not self and watch.steps]
        return sum(steps for steps, other in others if other is not None and own & params_of(other))

    def _what_is_there(self, optimizer: Optimizer) -> tuple[Any, ...]:
        """Return numbers that change with the parameters, twice, and with the gradients."""
        every = [param for group in optimizer.param_groups for param in group["params"]]
        params = [param for param in every if not is_lazy(param) and not param.is_inference()]
        versions = sum(param._version for param in params)
        # Not every optimizer writes so that a version tells. Reading is waiting, so after the first step only a CPU is
        # asked, where some elements will do.
        plain = [
            param.detach()
            for param in params
            if type(param) in {torch.nn.Parameter, Tensor} and param.is_floating_point() and not param.is_meta
        ]
        if self.steps:
            values: list[Any] = [head(param).tolist() for param in plain if param.is_cpu]
        else:
            values = [repr(norm.item()) for norm in torch._foreach_norm(plain, 1.0)] if plain else []
        grad = next((param.grad for param in params if param.grad is not None), None)
        return versions, values, id(grad), -1 if grad is None or grad.is_inference() else grad._version
