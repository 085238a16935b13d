"""Optimizers and habits of all kinds: attached, each real update is recorded and clipped once, or `attach` refuses.

The optimizers that are not torch's own are small stand-ins for kinds that people use: wrappers, subclasses, optimizers
made without `Optimizer.__init__`, updates that step() does not make. Each run is judged by one that clips by hand, just
before the update, and reads the gradients itself.
"""

import copy
import gc
import inspect
import io
import pickle
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict
from math import nan, sqrt

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach, attached
from torch import nn

from autoclip_core import AutoClipError, AutoClipTypeError

STEPS = 16


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False))


def make_sparse():
    torch.manual_seed(0)
    return nn.Embedding(8, 2, sparse=True)


def backward(model, number):
    """Make gradients whose size differs from step to step."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(number)
    size = float(torch.rand((), generator=generator).mul(3).exp())
    if isinstance(model, nn.Embedding):
        loss = (model(torch.randint(8, (4,), generator=generator)) - size).square().sum()
    else:
        loss = (model(torch.randn(8, 4, generator=generator)) - size).square().mean()
    loss.backward()
    return loss


def grads_of(model):
    grads = [param.grad for param in model.parameters()]
    return [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]


def poison(model):
    for param in model.parameters():
        (param.grad._values() if param.grad.is_sparse else param.grad).view(-1)[0] = nan


class ByHand:
    """The procedure of the paper, in float64."""

    def __init__(self, model):
        self.model, self.norms, self.clipped = model, [], 0

    def __call__(self):
        for param in self.model.parameters():
            if param.grad.is_sparse:
                param.grad = param.grad.coalesce()
        grads = grads_of(self.model)
        self.norms.append(sqrt(sum(float(grad.double().square().sum()) for grad in grads)))
        scale = min(float(np.percentile(self.norms, 30.0)) / self.norms[-1], 1.0)
        self.clipped += scale < 1.0
        for grad in grads:
            grad.mul_(scale)


# How a loop uses an optimizer: `before` is called when the gradients of an update are there.


def plain(model, optimizer, number, before):
    backward(model, number)
    before()
    optimizer.step()


def zeroing_after(model, optimizer, number, before):
    plain(model, optimizer, number, before)
    optimizer.zero_grad()


def closure(model, optimizer, number, before):
    def evaluate():
        loss = backward(model, number)
        before()
        return loss

    optimizer.step(evaluate)


def flag(model, optimizer, number, before):
    """What is not a closure may stand where others have theirs."""
    backward(model, number)
    before()
    optimizer.step(False)


def two_steps(model, optimizer, number, before):
    backward(model, number + 1000)
    optimizer.first_step()
    backward(model, number)
    before()
    optimizer.second_step()


def two_steps_closure(model, optimizer, number, before):
    backward(model, number + 1000)

    def evaluate():
        loss = backward(model, number)
        before()
        return loss

    optimizer.step(evaluate)


# Stand-ins


@torch.no_grad()
def descend(optimizer, closure):
    """The update of an optimizer of somebody's own."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.add_(param.grad, alpha=-0.05)
    return loss


class Descent(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        return descend(self, closure)


def forego_init(self, groups, *, hooks=True):
    """What some optimizers do in place of Optimizer.__init__."""
    self.defaults, self.state, self.param_groups = {}, defaultdict(dict), groups
    if hooks:
        for when in ("step_pre", "step_post", "state_dict_pre", "state_dict_post"):
            setattr(self, f"_optimizer_{when}_hooks", OrderedDict())


def made_without_init(params, *, hooks=True):
    """An optimizer of a class that torch has not wrapped yet."""

    class Uninitialized(torch.optim.Optimizer):
        def __init__(self):
            forego_init(self, [{"params": params}], hooks=hooks)

        def step(self, closure=None):
            return descend(self, closure)

    return Uninitialized()


def wrapper(name, *, init, hooks=True):
    """A wrapper that holds the optimizer which makes the update."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            if init:
                super().__init__(inner.param_groups, inner.defaults)
            else:
                forego_init(self, inner.param_groups, hooks=hooks)
            setattr(self, name, inner)

        def step(self, closure=None):
            return getattr(self, name).step(closure)

        def zero_grad(self):
            getattr(self, name).zero_grad()

    return lambda params: Wrapper(torch.optim.SGD(params, lr=0.05, momentum=0.9))


class Sharpness(torch.optim.Optimizer):
    """Two evaluations: away from the weights, and back with the gradient found there."""

    def __init__(self, params, base=torch.optim.SGD, lr=0.05):
        super().__init__(params, {"lr": lr})
        self.base_optimizer = base(self.param_groups, lr=lr) if base else None
        if base:
            self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for param in self.param_groups[0]["params"]:
            self.state[param]["old"] = param.clone()
            param.add_(param.grad.sign(), alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for param in self.param_groups[0]["params"]:
            param.copy_(self.state[param]["old"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def subclass(parent, *, change=None):
    """A step that calls that of its parent, whose hooks run too."""

    class Subclass(parent):
        def step(self, closure=None):
            if change is not None:
                for param in self.param_groups[0]["params"]:
                    if param.grad is not None:
                        change(param.grad)
            return super().step(closure)

    class Again(Subclass):
        def step(self, closure=None):
            return super().step(closure)

    for kind in (parent, Subclass):
        kind([nn.Parameter(torch.zeros(1))], lr=0.1)
    return Again


class Flagged(torch.optim.SGD):
    def step(self, wait=None):
        return super().step()


def patched(params):
    """A trainer that counts steps."""
    optimizer = torch.optim.SGD(params, lr=0.05)
    step = optimizer.step

    def counting(*args, **kwargs):
        return step(*args, **kwargs)

    optimizer.step = counting
    return optimizer


def scheduled(params):
    optimizer = torch.optim.SGD(params, lr=0.05)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def centralize(grad):
    if grad.ndim > 1:
        grad.sub_(grad.mean(1, keepdim=True))


def every_torch_optimizer():
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            for fused in (False, True) if name in ("SGD", "Adam", "AdamW", "Adagrad") else (False,):
                # The path of LBFGS depends on every bit.
                few = {"max_iter": 2} if name == "LBFGS" else {}
                options = {"lr": 0.01, **({"fused": True} if fused else {}), **few}
                yield f"{name}{'-fused' if fused else ''}", lambda params, k=kind, o=options: k(params, **o)


ZOO = {
    **{name: (make, (closure,) if name == "LBFGS" else (plain, closure)) for name, make in every_torch_optimizer()},
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1), (plain, closure)),
    "momentum-fused": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True), (plain, closure)),
    "one's own": (Descent, (plain, closure)),
    "without __init__": (made_without_init, (plain, zeroing_after, closure)),
    **{
        f"wrapper, {name}, {'with' if init else 'without'} __init__": (wrapper(name, init=init), (plain, closure))
        for name in ("optimizer", "base_optimizer", "_base_optimizer", "base", "original_optimizer", "opt", "_inner")
        for init in (True, False)
    },
    "wrapper without hooks": (wrapper("original_optimizer", init=False, hooks=False), (plain, zeroing_after)),
    "wrapper of a wrapper": (
        lambda p: wrapper("optimizer", init=True)(p).__class__(wrapper("_base_optimizer", init=False)(p)),
        (plain, closure),
    ),
    "sharpness-aware": (Sharpness, (two_steps, two_steps_closure)),
    "subclass": (lambda p: subclass(torch.optim.SGD)(p, lr=0.05, momentum=0.9, weight_decay=0.1), (plain, closure)),
    "subclass of a fused one": (lambda p: subclass(torch.optim.AdamW)(p, lr=0.05, fused=True), (plain, closure)),
    "subclass that changes gradients": (
        lambda p: subclass(torch.optim.AdamW, change=centralize)(p, lr=0.05),
        (plain,),
    ),
    "subclass that changes gradients, fused": (
        lambda p: subclass(torch.optim.AdamW, change=centralize)(p, lr=0.05, fused=True),
        (plain,),
    ),
    "an argument that is no closure": (lambda p: Flagged(p, lr=0.05), (flag, plain)),
    "step replaced on the object": (patched, (plain, closure)),
    "scheduler before": (scheduled, (plain, closure)),
}
CASES = [(name, how) for name, (_, ways) in ZOO.items() for how in ways]


@pytest.mark.filterwarnings("ignore:The gradient norm", "ignore:Detected call of")
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name}-{how.__name__}" for name, how in CASES])
def test_each_update_is_recorded_and_clipped_once(name, how, mode):
    make = ZOO[name][0]
    make_one = make_sparse if name == "SparseAdam" else make_model
    model, other = make_one(), make_one()
    optimizer, hand = make(list(model.parameters())), make(list(other.parameters()))
    clip, by_hand = attach(optimizer, 30.0, mode=mode), ByHand(other)
    assert attached(optimizer) is clip
    for number in range(STEPS):
        how(model, optimizer, number, lambda: None)
        how(other, hand, number, by_hand)
        # A fused optimizer divides where a product is made by hand.
        for left, right in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert clip.steps == len(by_hand.norms) >= STEPS
    assert sorted(by_hand.norms) == pytest.approx(clip.history.values().tolist(), rel=1e-3)
    assert clip.clipped_steps == by_hand.clipped > 0

    before = [param.detach().clone() for param in model.parameters()]
    how(model, optimizer, STEPS, lambda: poison(model))
    assert clip.nonfinite_steps >= 1
    for param, kept in zip(model.parameters(), before, strict=True):
        if mode == "immediate" or "fused" in name:
            assert torch.equal(param, kept)
        assert param.isfinite().all()
    assert clip.log()["grad_norm"] != clip.log()["grad_norm"]


class Deaf(Descent):
    """Makes its update from the gradients that are there, whatever it is given."""

    def step(self, closure=None):
        return super().step(None)


@pytest.mark.parametrize("given", ["place", "name"])
def test_closure_that_is_not_called_is_said_once(given):
    model = make_model()
    optimizer = Deaf(model.parameters())
    clip = attach(optimizer, 0.0)

    def train(number):
        loss = backward(model, number)
        optimizer.step(*[lambda: loss] * (given == "place"), **{"closure": lambda: loss} if given == "name" else {})

    with pytest.warns(RuntimeWarning, match=r"Deaf\.step\(\) was given a closure and has not called it") as warned:
        train(0)
    assert warned[0].filename == __file__
    train(1)
    assert clip.steps == 0
    plain(model, optimizer, 2, lambda: None)
    assert clip.steps == 1


class TakesGradients(Descent):
    def step(self, closure=None, grads=None):
        for param, grad in zip(self.param_groups[0]["params"], grads or [], strict=grads is not None):
            param.grad = grad
        return super().step(closure)


def test_gradients_given_to_a_step_are_refused():
    model = make_model()
    optimizer = TakesGradients(model.parameters())
    clip = attach(optimizer)
    plain(model, optimizer, 0, lambda: None)
    before = [param.detach().clone() for param in model.parameters()]
    grads = [torch.ones_like(param) for param in model.parameters()]
    for args, kwargs in (((None, grads), {}), ((), {"grads": grads})):
        with pytest.raises(AutoClipTypeError, match=r"TakesGradients\.step\(\) was given gradients as grads=.* \.grad"):
            optimizer.step(*args, **kwargs)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value)
    plain(model, optimizer, 1, lambda: None)
    assert clip.steps == 2


# What is refused


class Lomo(Descent):
    def fused_backward(self, loss, lr):
        loss.backward()


class Layerwise(Descent):
    """Holds an optimizer for each parameter, and makes no update itself, as the Trainer's for its layerwise kinds."""

    def __init__(self, params):
        super().__init__([torch.zeros(1)])
        self.optimizer_dict = {param: torch.optim.SGD([param], lr=0.1) for param in params}


class Bare:
    """A wrapper that is no optimizer."""

    def __init__(self, params):
        self.opt = torch.optim.SGD(params, lr=0.1)


def scheduled_without_init(params):
    optimizer = made_without_init(params)
    step = type(optimizer).step
    optimizer.step = types.MethodType(lambda self, closure=None: step(self, closure), optimizer)  # as schedulers do
    return optimizer


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (Lomo, AutoClipError, r"Lomo\.fused_backward\(\) changes each parameter during backward"),
        (Layerwise, AutoClipError, r"Layerwise leaves the updates to the optimizers in its \.optimizer_dict"),
        (
            lambda p: Sharpness(p, base=None),
            AutoClipError,
            r"makes updates in first_step\(\) and second_step",
        ),
        (lambda p: made_without_init(p, hooks=False), AutoClipError, "made without torch.optim.Optimizer.__init__"),
        (scheduled_without_init, AutoClipError, "has been replaced on the object"),
        (Bare, AutoClipTypeError, r"test_torch_zoo\.Bare is none; attach to its \.opt \(a torch\.optim\.sgd\.SGD\)"),
        (lambda p: [torch.optim.SGD(p, lr=0.1)], AutoClipTypeError, "builtins.list is none; attach to each optimizer"),
        (
            lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(p, lr=0.1), 1),
            AutoClipTypeError,
            r"StepLR is none; attach to its \.optimizer",
        ),
        (lambda p: nn.Linear(1, 1), AutoClipTypeError, "Linear is none; attach to its optimizer"),
        (
            lambda p: torch.optim.SGD,
            AutoClipTypeError,
            r"SGD is a class: attach to the optimizer that SGD\(\.\.\.\) makes",
        ),
        (lambda p: object(), AutoClipTypeError, r"builtins.object is none; .* call AutoClip\(parameters\)"),
    ],
)
def test_what_cannot_be_seen_is_refused(make, error, says):
    subject = make(list(make_model().parameters()))
    with pytest.raises(error, match=says):
        attach(subject)


def test_an_optimizer_that_is_refused_is_left_as_it_was():
    params = list(make_model().parameters())
    optimizer = made_without_init(params, hooks=False)
    with pytest.raises(AutoClipError):
        attach(optimizer)
    assert not hasattr(type(optimizer).step, "hooked")
    assert attached(optimizer) is None


@pytest.mark.parametrize("way", ["attached", "by hand"])
def test_steps_inside_backward_of_several_tensors_are_refused(way):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer) if way == "attached" else AutoClip(model)
    before = [param.detach().clone() for param in model.parameters()]

    def release(param):
        if way == "by hand":
            clip.step()
        optimizer.step()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(release)
    with pytest.raises(AutoClipError, match="sees some of the 2 gradients only"):
        backward(model, 0)
    assert clip.steps == 0
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_one_optimizer_per_tensor_may_step_inside_backward(mode):
    model = make_model()
    optimizers = {param: torch.optim.SGD([param], lr=0.01) for param in model.parameters()}
    clips = [attach(optimizer, mode=mode) for optimizer in optimizers.values()]
    norms = {param: [] for param in optimizers}

    def release(param):
        norms[param].append(param.grad.norm().item())
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(release)
    for number in range(10):
        backward(model, number)
    for clip, seen in zip(clips, norms.values(), strict=True):
        assert clip.history.values().tolist() == pytest.approx(sorted(seen))


# What stands after an exception


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: subclass(torch.optim.SGD)(p, lr=0.1)])
@pytest.mark.parametrize("value", [1.0, nan])
def test_steps_after_one_that_failed_are_seen(make, value):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    clip = attach(optimizer, 100.0)

    def fail(*_):
        raise KeyboardInterrupt

    for number in range(4):
        weight.grad = torch.tensor([value + number])
        handle = optimizer.register_step_post_hook(fail)
        kept = []
        try:
            optimizer.step()
        except KeyboardInterrupt as error:
            kept.append(error)  # and the stack with it, as a debugger does
        handle.remove()
        weight.grad = torch.tensor([2.0 + number])
        optimizer.step()
    assert clip.steps == 8
    assert clip.history.values()[-1] == 5.0


@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_gradients_hidden_in_a_step_that_failed_do_not_come_back_beside_new_ones():
    first, second = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([first, second], lr=1.0, weight_decay=0.1)
    attach(optimizer)

    def fail(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    first.grad, second.grad = torch.tensor([nan]), torch.ones(1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    optimizer.zero_grad()
    first.grad = torch.ones(1)
    optimizer.step()
    assert (first.item(), second.item(), second.grad) == (pytest.approx(-0.1), 1.0, None)


# Copies, and clips that nobody needs any more


def through_a_file(subject):
    file = io.BytesIO()
    torch.save(subject, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda subject: pickle.loads(pickle.dumps(subject)), through_a_file]


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_are_known_not_to_be_attached(make_copy):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    backward(model, 0)
    optimizer.step()
    other_model, other_optimizer, other = make_copy((model, optimizer, clip))
    assert attached(optimizer) is clip
    assert attached(other_optimizer) is None
    backward(other_model, 1)
    other_optimizer.step()
    assert other.steps == 1
    with pytest.warns(RuntimeWarning, match="This is a copy of an AutoClip that was attached"):
        other.log()
    other.log()
    assert "attached to torch.optim.sgd.SGD" in repr(clip)
    assert "attached" not in repr(other)
    again = attach(other_optimizer)
    again.load_state_dict(other.state_dict())
    backward(other_model, 1)
    other_optimizer.step()
    assert again.steps == 2


def test_copy_that_steps_by_hand_clips_and_says_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, clip = copy.deepcopy((model, attach(optimizer)))
    backward(model, 0)
    assert clip.step().recorded
    assert clip.log()["clip_scale"] == 1.0


def test_clip_whose_optimizer_is_gone_says_so_once():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer = copy.deepcopy(optimizer)
    with pytest.warns(RuntimeWarning, match="SGD to which this AutoClip was attached is gone") as warned:
        clip.log()
    assert warned[0].filename == __file__
    clip.log()
    assert "no longer attached" in repr(clip)
    assert (clip.steps, len(clip.history), len(clip.state_dict()["groups"])) == (1, 1, 1)


@pytest.mark.parametrize(("steps", "data"), [(0, False), (0, True), (3, False), (3, True)])
def test_updates_that_are_not_seen_are_said_once(steps, data):
    """The update made by something else: here by hand, in ways that a version tells or not."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    for number in range(steps):
        backward(model, number)
        optimizer.step()
        clip.log()

    def update_and_log():
        for _ in range(6):
            backward(model, 0)
            with torch.no_grad():
                for param in model.parameters():
                    (param.data if data else param).sub_(param.grad, alpha=0.01)
            clip.log()

    with pytest.warns(RuntimeWarning, match="parameters of the torch.optim.sgd.SGD change, and AutoClip sees no step"):
        update_and_log()
    update_and_log()


def train_by_hand(model, batches):
    """What an optimizer does whose step() somebody has replaced."""
    for number in range(batches):
        backward(model, number)
        with torch.no_grad():
            for param in model.parameters():
                param.sub_(param.grad, alpha=0.01)


def train(model, optimizer, batches):
    for number in range(batches):
        backward(model, number)
        optimizer.step()


def test_updates_that_are_not_seen_are_said_without_a_log():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(optimizer)
    with pytest.warns(RuntimeWarning, match="SGD change, and AutoClip sees no step") as warned:
        train_by_hand(model, 16)
    lines, first = inspect.getsourcelines(backward)  # where the user calls torch's
    assert warned[0].filename == __file__
    assert first <= warned[0].lineno < first + len(lines)
    train_by_hand(model, 50)  # said once


def accumulate(model, batches):
    for number in range(batches):
        model(torch.full((2, 4), float(number))).square().mean().backward()


@pytest.mark.parametrize("parts", [1, 5])
def test_updates_that_are_not_seen_any_more_are_said_without_a_log(parts):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(optimizer)
    for _ in range(10):
        accumulate(model, parts)
        optimizer.step()
    train_by_hand(model, parts)  # a few alone may have a reason
    train(model, optimizer, 1)
    with pytest.warns(RuntimeWarning, match="SGD change, and AutoClip sees no step") as warned:
        train_by_hand(model, 100 * parts)
    assert warned[0].filename == __file__
    train_by_hand(model, 1000)  # said once


def test_clip_whose_optimizer_is_gone_says_so_without_a_log():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    train(model, optimizer, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with pytest.warns(RuntimeWarning, match="SGD to which this AutoClip was attached is gone"):
        train(model, optimizer, 100)
    train(model, optimizer, 100)
    assert clip.steps == 10


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_parameters_that_cannot_be_read_are_no_matter():
    given_back = nn.Parameter(torch.ones(3))
    others = [
        nn.Parameter(torch.eye(2).to_sparse_coo()),
        nn.Parameter(torch.eye(2).to_sparse_csr()),
        nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False),
        nn.Parameter(torch.ones(3, device="meta"), requires_grad=False),
        given_back,
    ]
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*others, weight], lr=0.1)
    clip = attach(optimizer)
    given_back.untyped_storage().resize_(0)  # as engines do that gather a parameter when it is needed
    for _ in range(9):
        weight.square().sum().backward()
        clip.log()


def test_many_threads_attach_and_watch():
    failures = []

    def attach_many():
        try:
            kept = [attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)) for _ in range(300)]
            assert len(kept) == 300
        except RuntimeError as error:
            failures.append(error)

    def accumulate_often():
        try:
            for _ in range(40):
                weight = nn.Parameter(torch.zeros(1))
                optimizer = torch.optim.SGD([weight], lr=0.1)
                attach(optimizer)
                for _ in range(8):
                    weight.sum().backward()
                optimizer.step()
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for run in (attach_many, accumulate_often, accumulate_often)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_nobody_watches_backward_for_a_clip_that_is_gone():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(optimizer)
    train(model, optimizer, 10)
    del optimizer
    train_by_hand(model, 100)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_nobody_watches_backward_after_detach():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    train(model, optimizer, 10)
    clip.detach()
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    train_by_hand(model, 100)


def test_backward_passes_between_steps_are_no_cause_for_a_warning():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach(optimizer)
    for parts in (100, 1, 1, 30):
        accumulate(model, parts)
        optimizer.step()
    accumulate(model, 1000)  # parameters stay as they are


def test_evaluations_inside_a_step_are_no_cause_for_a_warning():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=200, tolerance_change=0.0)
    clip = attach(optimizer)

    def evaluate():
        optimizer.zero_grad()
        accumulate(model, 10)
        return torch.ones(())

    for _ in range(2):
        optimizer.step(evaluate)
    assert clip.steps > 100


def test_another_optimizer_with_an_autoclip_makes_the_first_updates():
    model = make_model()
    first = torch.optim.Adam(model.parameters(), lr=0.01)
    second = torch.optim.SGD(model.parameters(), lr=0.01)
    clips = attach(first), attach(second)
    train(model, first, 20)
    train(model, second, 20)
    assert [clip.steps for clip in clips] == [20, 20]


def test_updates_after_those_of_another_optimizer_are_watched_as_well():
    model = make_model()
    first = torch.optim.Adam(model.parameters(), lr=0.01)
    second = torch.optim.SGD(model.parameters(), lr=0.01)
    clips = attach(first), attach(second)
    train(model, first, 20)
    with pytest.warns(RuntimeWarning, match="change, and AutoClip sees no step") as warned:
        train_by_hand(model, 300)
    assert sorted(str(warning.message).split()[4] for warning in warned) == [
        "torch.optim.adam.Adam",
        "torch.optim.sgd.SGD",
    ]
    assert [clip.steps for clip in clips] == [20, 0]


def test_steps_that_stay_away_are_said_once():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    backward(model, 0)
    optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))

    def train_the_copy():
        for number in range(110):
            backward(other_model, number)
            other.step()
            clip.log()

    with pytest.warns(RuntimeWarning, match="no step of its torch.optim.sgd.SGD during 100 calls of log"):
        train_the_copy()
    train_the_copy()


def test_log_between_steps_is_no_cause_for_a_warning():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = attach(optimizer)
    for number in range(150):  # accumulating
        model[0].weight.grad = torch.ones(3, 4) * number
        clip.log()
    optimizer.step()
    for number in range(50):
        backward(model, number)
        optimizer.step()
        clip.log()
        clip.log()


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize("kind", ["by hand", "attached", "detached", "fused", "kept"])
def test_model_and_optimizer_are_freed_with_the_last_reference(kind, mode):
    gc.collect()
    gc.disable()
    try:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=kind == "fused")
        clip = AutoClip(model, mode=mode) if kind == "by hand" else attach(optimizer, mode=mode)
        for number in range(3):
            backward(model, number)
            if kind == "by hand":
                clip.step()
            optimizer.step()
        if kind == "detached":
            clip.detach()
        refs = [weakref.ref(subject) for subject in (model, optimizer, *model.parameters())]
        kept = clip if kind == "kept" else None
        del model, optimizer, clip
        assert [ref() for ref in refs] == [None] * 4
        assert kept is None or kept.steps == 3
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["by hand", "attached"])
def test_module_is_converted_by_swapping_its_tensors(way):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = AutoClip(model) if way == "by hand" else attach(optimizer)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for number, dtype in enumerate((torch.float64, torch.float32)):
            backward(model, number)
            if way == "by hand":
                clip.step()
            optimizer.step()
            model.to(dtype)
            assert model[0].weight.grad.dtype == dtype
            model.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert clip.steps == 2


# Two clips of the same parameters


def test_second_clipper_of_the_same_gradients_says_so_once():
    weight = nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1)), weight], lr=0.0) for _ in range(2)]
    clips = [attach(optimizer, 0.0) for optimizer in optimizers]

    def train(size):
        weight.grad = torch.tensor([size])
        for optimizer in optimizers:
            optimizer.step()

    train(1.0)
    with pytest.warns(RuntimeWarning, match="shares parameters with another one, which has clipped"):
        train(5.0)
    train(9.0)
    assert clips[0].history.values().tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize("first", ["by hand", "attached"])
def test_clip_by_hand_beside_an_attached_one_is_said_once(first):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clips = [AutoClip(model, 0.0), attach(optimizer, 0.0)]
    calls = [clips[0].step, optimizer.step]

    def train(number):
        backward(model, number)
        for call in calls if first == "by hand" else calls[::-1]:
            call()

    train(6)
    assert clips[0].history.values() == clips[1].history.values()

    def train_on():
        for number in range(6):
            train(number)

    with pytest.warns(RuntimeWarning, match="shares parameters with another one") as warned:
        train_on()
    assert len(warned) == 1


def test_shallow_copy_has_a_history_of_its_own():
    model = make_model()
    clip = AutoClip(model, 0.0)
    backward(model, 0)
    clip.step()
    other = copy.copy(clip)
    backward(model, 1)
    assert other.step().recorded
    assert (clip.steps, other.steps) == (1, 2)
    assert [id(param) for param in other._pipeline.groups.params] == [id(param) for param in model.parameters()]


@pytest.mark.parametrize("way", ["by hand", "attached"])
def test_lazy_parameters_may_be_there_before_they_have_a_shape(way):
    model = nn.Sequential(nn.LazyLinear(3, bias=False), nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip = AutoClip(optimizer) if way == "by hand" else attach(optimizer)
    for number in range(3):
        clip.log()
        repr(clip), clip.state_dict()
        backward(model, number)
        if way == "by hand":
            clip.step()
        optimizer.step()
    assert clip.steps == 3


def test_optimizers_with_a_backward_each_share_parameters_in_peace():
    weight = nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([weight], lr=0.0) for _ in range(2)]
    clips = [attach(optimizer, 0.0) for optimizer in optimizers]
    for size in (1.0, 5.0, 9.0):
        for optimizer in optimizers:
            weight.grad = torch.tensor([size])
            optimizer.step()
    assert [clip.history.values().tolist() for clip in clips] == [[1.0, 5.0, 9.0]] * 2
