"""What all programs of this folder share: a small training, and the checks of what AutoClip did in it.

The checks read what optimizers are given by hooks of their own, which run before AutoClip's, and take the norm in
float64 with a few lines of torch.
"""

import importlib.util
import logging
import math
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from weakref import WeakKeyDictionary

import checks
import torch
from autoclip_torch import attached
from checks import HALF, ROUNDING, STEPS, Update
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# What is trained.


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def make_wide_model():
    """A model with a matrix that is large enough for low-bit states, which are for 4096 values or more."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def has_low_bits(optimizer):
    """Return whether some state of an optimizer is quantized: as bytes, or by torchao."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return any(
        type(value).__module__.startswith("torchao.") or getattr(value, "dtype", None) == torch.uint8
        for value in values
    )


def make_optimizer(params):
    return torch.optim.Adam(params, lr=0.01)


def batch_of(step):
    """Inputs and targets of a step, whose gradients differ in size from step to step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 4, generator=generator)
    size = float(torch.rand((), generator=generator).mul(3).exp())
    return inputs, inputs.sum(1, keepdim=True) * size


def batches(first=0, last=STEPS):
    return [batch_of(step) for step in range(first, last)]


def examples():
    """All batches one after the other, for libraries that make batches of 8 by themselves."""
    inputs, targets = zip(*batches(), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def backward(model, step):
    inputs, targets = batch_of(step)
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    return loss


def steps_of(folder, kept, *, resume):
    """Yield the steps of a process: it keeps the states before step `HALF`, or loads them and goes on from there."""
    if resume:
        for name, state in torch.load(folder / "half.pt").items():
            kept[name].load_state_dict(state)
    for step in range(HALF if resume else 0, STEPS):
        if step == HALF and not resume:
            torch.save({name: each.state_dict() for name, each in kept.items()}, folder / "half.pt")
        yield step


# What is watched.


def norm_of(params):
    grads = [param.grad for param in params if param.grad is not None]
    grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return math.sqrt(sum(float(grad.detach().double().square().sum()) for grad in grads))


def when_evaluated(args, kwargs, see):
    """Call `see` now, or after each call of the closure that makes the gradients; return the arguments for that."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        see()
        return None

    def evaluate():
        loss = closure()
        see()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluate}
    return (args[0], evaluate, *args[2:]), kwargs


class Watch:
    """The updates of each attached optimizer, in the order of their first ones."""

    dtype = float
    rounding, units = ROUNDING, 0
    may_rest = False  # whether an update may leave all parameters as they are

    def __init__(self):
        self.updates = {}
        self.saved = []
        self._pending, self._held, self._last_hooks = {}, [], WeakKeyDictionary()
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def before(self, clip, params, owner=None):
        """Take the norm of what an update is given."""
        pending = self._pending.get(id(clip))
        if (
            pending is not None and pending["owner"] is owner and "left" in pending
        ):  # an optimizer evaluates its closure once more
            self.after(clip)
            pending = None
        if pending is None or pending["owner"] is not owner:  # of a wrapper and what it wraps the latter updates
            params = [param for param in params if param.requires_grad]
            values = [param.detach().clone() for param in params]
            self._pending[id(clip)] = {"owner": owner, "params": params, "norm": norm_of(params), "values": values}

    def clipped(self, clip, scale=1.0):
        """Take the norm of what AutoClip has left, which some optimizers then write over."""
        pending = self._pending[id(clip)]
        pending.setdefault("left", norm_of(pending["params"]) / scale)

    def after(self, clip):
        """See what has become of it."""
        pending = self._pending.pop(id(clip), None)
        if pending is None:
            return
        pairs = zip(pending["params"], pending["values"], strict=True)
        has_moved = self.may_rest or any(not torch.equal(param, value) for param, value in pairs)
        update = Update(pending["norm"], clip.log()["grad_norm"], clip.threshold, pending["left"], has_moved)
        # An agent's optimizer is attached anew in each training: the stream is the optimizer's, where there is one.
        owner = clip if pending["owner"] is None else pending["owner"]
        self.updates.setdefault(id(owner), []).append(update)
        self._held.append(owner)  # an id is to stay that of one

    def _before_step(self, optimizer, args, kwargs):
        clip = attached(optimizer)
        if clip is None:
            return None
        attached_before, handle = self._last_hooks.get(optimizer, (None, None))
        if attached_before is not clip:
            if handle is not None:
                handle.remove()
            self._last_hooks[optimizer] = (
                clip,
                optimizer.register_step_pre_hook(self._before_update),
            )  # behind AutoClip's
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return when_evaluated(args, kwargs, lambda: self.before(clip, params, optimizer))

    def _before_update(self, optimizer, args, kwargs):
        clip = attached(optimizer)
        if clip is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it in its own pass
        return when_evaluated(args, kwargs, lambda: self.clipped(clip, 1.0 if scale is None else float(scale)))

    def _after_step(self, optimizer, *_):
        if (clip := attached(optimizer)) is not None:
            self.after(clip)

    def mark(self):
        """Say that the library's checkpoint is made now."""
        self.saved = [len(stream) for stream in self.updates.values()]

    def take(self):
        """Return the updates since the last call, of all optimizers one after the other's."""
        streams, self.updates = list(self.updates.values()), {}
        return streams


watch = Watch()


def play(library, train, case="", **options):
    """Train in the first process, resume in the second; check and report."""

    def train_here(folder, *, resume):
        trained = train(folder, resume=resume)
        return trained._replace(params=[param.detach() for param in trained.params])

    quieten()
    checks.play(watch, library, train_here, case, **options)


def quieten():
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def stand_in(package):
    """Let a package be imported that is built for GPUs alone, and of which a training here uses nothing."""

    class Anything(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return cls

        def __call__(cls, *args, **options):
            return args[0] if len(args) == 1 and callable(args[0]) else type.__call__(cls)

    class Module(types.ModuleType):
        __path__ = ()
        __version__ = "0.0.0"

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name, (), {})

    class Finder(MetaPathFinder, Loader):
        def find_spec(self, name, *_):
            is_ours = name == package or name.startswith(f"{package}.")
            return importlib.util.spec_from_loader(name, self, is_package=True) if is_ours else None

        def create_module(self, spec):
            return Module(spec.name)

        def exec_module(self, module):
            pass

    sys.meta_path.insert(0, Finder())
