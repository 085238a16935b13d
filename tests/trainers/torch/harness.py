"""What all programs of this folder share: a small training, and the checks of what AutoClip did in it.

A program is run in two processes. The first trains, and saves the library's own checkpoint on the way. The second one
resumes it: what it clips has to be, to the last bit, what the first one has clipped after saving.

The checks read what optimizers are given by hooks of their own, which run before AutoClip's, and take the norm in
float64 with a few lines of torch; thresholds are those of numpy.percentile of a list.
"""

import hashlib
import importlib.util
import json
import logging
import math
import sys
import types
import warnings
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from autoclip_torch import attached
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autoclip_core import AutoClipError

PERCENTILE = 30.0
STEPS, HALF = 16, 8
ROUNDING = 1e-6  # of a float32 norm, relative; what bfloat16 gradients lose is not looked at here


# What is trained.


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


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


# What is watched.


class Update(NamedTuple):
    norm: float  # of the gradients that the optimizer is given, before AutoClip sees them
    remembered: float  # the norm that AutoClip says it was
    threshold: float
    left: float  # the norm of the gradients after AutoClip
    has_moved: bool  # a parameter


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
        has_moved = any(not torch.equal(param, value) for param, value in pairs)
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


def check(updates, earlier=()):
    """Return the largest relative error of a norm; AssertionError if an update is not clipped once, by the rule."""
    norms, error = list(earlier), 0.0
    for number, update in enumerate(updates):
        norms.append(update.remembered)
        threshold = float(np.percentile(norms, PERCENTILE))
        assert update.threshold == threshold, f"update {number}: threshold {update.threshold}, and not {threshold}"
        error = max(error, abs(update.remembered - update.norm) / update.norm)
        assert error < ROUNDING, f"update {number}: remembered {update.remembered} of a gradient of {update.norm}"
        left = min(update.norm, threshold)
        assert abs(update.left - left) < 1e-5 * left, f"update {number}: left {update.left}"
        assert update.has_moved, f"update {number}: no parameter has moved"
    return error


# What a program says of its training.


class Trained(NamedTuple):
    updates: int  # as the library counts them in this process
    params: list[torch.Tensor]  # at the end
    logged: dict[str, float] = {}  # the latest numbers that AutoClip gave the library to log  # noqa: RUF012


def result(library, case="", *, package=None, **more):
    """Print a result for run.py."""
    print("RESULT", json.dumps({"library": library, "case": case, "version": version(package or library), **more}))


def play(library, train, case="", *, package=None, replays=True):
    """Train in the first process, resume in the second; check and report.

    Args:
        library: the row of the table.
        train: from a folder for checkpoints, and whether to resume from there, to what was Trained.
        case: what is special.
        package: whose version counts, if not the library's.
        replays: whether the library resumes all that makes the batches. If not (an environment that is not saved), the
            history alone has to go on, by the rule.
    """
    what, folder = sys.argv[1], Path(sys.argv[2]) / (case or "usual").replace(" ", "-").replace("/", "-")
    folder.mkdir(exist_ok=True)
    quieten()
    trained = train(folder, resume=what == "resume")
    streams = watch.take()
    assert trained.updates == sum(map(len, streams)) > 0, f"{trained.updates} updates, seen {list(map(len, streams))}"
    digest = hashlib.sha256(b"".join(param.detach().numpy().tobytes() for param in trained.params)).hexdigest()
    record = {"streams": streams, "saved": watch.saved, "digest": digest}
    if what == "train":
        (folder / "trained.json").write_text(json.dumps(record))
        error = max(check(updates) for updates in streams)
    else:
        before = json.loads((folder / "trained.json").read_text())
        earlier = [[Update(*update) for update in updates] for updates in before["streams"]]
        error = 0.0
        for number, (updates, all_before) in enumerate(zip(streams, earlier, strict=True)):
            saved = len(all_before) - len(updates) if replays else before["saved"][number]
            assert saved > 0, "nothing was resumed"
            if replays:
                assert updates == all_before[saved:], "resumed, it does not clip as before to the last bit"
            error = max(error, check(updates, [update.remembered for update in all_before[:saved]]))
        assert not replays or digest == before["digest"], "resumed, the parameters are others"
    last = {stream[-1] for stream in streams}
    if trained.logged:
        pairs = [(update.remembered, update.threshold) for update in last]
        numbers = [trained.logged[name] for name in ("grad_norm", "clip_threshold")]  # of some libraries in float32
        assert any(np.allclose(numbers, pair, rtol=ROUNDING, atol=0.0) for pair in pairs), (numbers, pairs)
    clipped = sum(update.remembered > update.threshold for updates in streams for update in updates)
    assert clipped, "nothing was clipped, so nothing was tried"
    found = {"updates": trained.updates, "clipped": clipped, "error": error, "logs": bool(trained.logged)}
    result(library, case, package=package, **(found if what == "train" else {"resumed": replays or "history"}))


@contextmanager
def refused(words):
    """What stands below is refused, in these words among others."""
    try:
        yield
    except AutoClipError as error:
        if words not in str(error):
            raise
    else:
        raise AssertionError(f"not refused, and that in words like {words!r}")


def quieten():
    warnings.filterwarnings("error", module="autoclip")
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
