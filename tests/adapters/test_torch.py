"""autoclip_torch on real PyTorch: the adapter translates, so every number here has a second source.

Norms are judged by PyTorch's own helper and by float64, thresholds by numpy.percentile over the recorded norms, whole
runs by a loop that clips by hand.
"""

import copy
import doctest
import importlib
import io
import pickle
import subprocess
import sys
import weakref
from functools import partial
from math import inf, isfinite, nan, sqrt

import autoclip_torch
import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach, kernel
from torch import nn

import autoclip_core
from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError, ClipStep, NonFiniteNormError

from .contract import ByStep, HostContract, Way, WindowContract

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model, step):
    """A loss whose gradients differ in size from step to step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator)
    return (model(inputs) - 3.0).square().mean() * float(torch.rand((), generator=generator).exp())


def backward(model, step):
    model.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def param_with(grad, dtype=None):
    """A parameter with the gradient given."""
    grad = torch.as_tensor(grad, dtype=dtype)
    param = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    param.grad = grad
    return param


def values_of(model):
    return [param.detach().clone() for param in model.parameters()]


def are_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def norm_of(grads):
    return torch.cat([grad.flatten().double() for grad in grads]).norm().item()


def clip_by_hand(model, norms, percentile=10.0):
    """The procedure of the paper, in float64 on the host; returns the scale."""
    norms.append(norm_of([param.grad for param in model.parameters()]))
    scale = min(float(np.percentile(norms, percentile)) / norms[-1], 1.0)
    for param in model.parameters():
        param.grad *= scale
    return scale


# The contract


class Clip(ByStep):
    """An AutoClip and what it is given to, as the contract holds them: parameters are zeros before each step.

    An attached one may be of a fused optimizer, which scales the gradients by itself.
    """

    def __init__(self, percentile=10.0, *, attached=False, fused=None, **options):
        self.param = nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.SGD([self.param], lr=1.0, fused=fused)
        self.attached = attached
        self.clip = (attach if attached else AutoClip)(self.optimizer, percentile, **options)

    @property
    def percentile(self):
        return self.clip.percentile

    @percentile.setter
    def percentile(self, percentile):
        self.clip.percentile = percentile

    def step(self, grad):
        self.param.data.zero_()
        self.param.grad = torch.from_numpy(grad.copy())
        if self.attached:
            before = self.counts()[1]
            self.optimizer.step()
            log = list(self.clip.log().values())
            step = (*log[:4], self.counts()[1] - before)
        else:
            step = self.clip.step()
            self.optimizer.step()
            if isinstance(step, dict):
                (step,) = step.values()
        fields = [field.item() if isinstance(field, torch.Tensor) else field for field in step]
        return ClipStep(*fields), -self.param.detach().numpy()

    def state_of_the_group(self):
        (state,) = self.clip.state_dict()["groups"].values()
        return state

    def counts(self):
        state = self.state_of_the_group()
        return tuple(state[name] for name in ("steps", "recorded_steps", "clipped_steps", "nonfinite_steps"))

    def norms(self):
        (history,) = self.clip.histories.values()
        history.check()
        return history.values().tolist()

    def save(self, folder):
        torch.save(self.clip.state_dict(), folder / "state")
        return torch.load(folder / "state")

    def load(self, state):
        self.clip.load_state_dict(state)


HOW = {
    "by hand": {},
    "attached": {"attached": True},
    "fused": {"attached": True, "fused": True},
    "each group": {"scope": "group"},
    "each parameter": {"scope": "parameter"},
    "each named": {"scope": lambda name: f"all with {name}"},
    "fused, each parameter": {"attached": True, "fused": True, "scope": "parameter"},
}
MOST_STEPS = {("by hand", "immediate"): 20_000, ("by hand", "deferred"): 5_000}
WAYS = {
    f"{how}, {mode}": Way(
        partial(Clip, mode=mode, **HOW[how]), in_float32=False, most_steps=MOST_STEPS.get((how, mode), 1_000)
    )
    for how in HOW
    for mode in ("immediate", "deferred")
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestContract(HostContract):
    pass


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestWindow(WindowContract):
    pass


# What a step does


def test_step_measures_as_pytorch_does():
    model = make_model()
    clip = AutoClip(model)
    for step in range(20):
        backward(model, step)
        grads = [param.grad.clone() for param in model.parameters()]
        norm = clip.step().norm
        assert norm == pytest.approx(nn.utils.get_total_norm(grads).item(), rel=1e-6)
        assert norm == pytest.approx(norm_of(grads), rel=1e-12)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 99.999, 100.0])
def test_step_takes_the_percentile_of_the_recorded_norms(percentile):
    model = make_model()
    clip = AutoClip(model, percentile)
    norms = []
    for number in range(100):
        backward(model, number)
        step = clip.step()
        norms.append(step.norm)
        assert step.threshold == np.percentile(norms, percentile)
        assert step.threshold == clip.threshold
    assert clip.history.values().tolist() == sorted(norms)


def test_step_scales_every_gradient_by_one_factor():
    model = make_model()
    clip = AutoClip(model, 50.0)
    clipped = 0
    for number in range(30):
        backward(model, number)
        before = [param.grad.clone() for param in model.parameters()]
        step = clip.step()
        after = [param.grad for param in model.parameters()]
        assert are_equal(after, [grad * step.scale for grad in before])
        assert nn.utils.get_total_norm(after).item() <= step.threshold * (1 + 1e-6)
        clipped += step.clipped
    assert 0 < clipped == clip.clipped_steps < 30
    assert clip.steps == 30


@pytest.mark.parametrize("is_built", [True, False])
def test_step_waits_for_the_device_once(is_built, monkeypatch):
    if not is_built:
        monkeypatch.setattr(kernel, "_functions", lambda: None)
    model = make_model()
    clip = AutoClip(model)
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, name=name, read=read: reads.append(name) or read(tensor))
    for number in range(5):
        backward(model, number)
        reads.clear()
        clip.step()
        assert reads == ([] if kernel.is_usable() else ["tolist"])  # the kernel measures on the host


# Gradients of every kind


def test_params_are_tensors_a_module_or_an_optimizer():
    model = make_model()
    sources = [
        model,
        list(model.parameters()),
        model.parameters(),
        [*model.parameters(), *model.parameters()],
        model.named_parameters(),
        OPTIMIZERS["sgd"](model.parameters()),
    ]
    backward(model, 0)
    assert len({AutoClip(source).step() for source in sources}) == 1
    assert AutoClip(model[0].weight).step().norm == pytest.approx(model[0].weight.grad.norm().item())


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ([], AutoClipValueError, "no parameters"),
        (iter(()), AutoClipValueError, "used up"),
        (nn.Tanh(), AutoClipValueError, "no parameters to clip in the Tanh"),
        (None, AutoClipTypeError, "NoneType"),
        (3, AutoClipTypeError, "int"),
        ([torch.zeros(1), None], AutoClipTypeError, "item 1 is a NoneType"),
        ([{"params": [torch.zeros(1)]}], AutoClipTypeError, "item 0 is a dict"),
        ([("weight", 3)], AutoClipTypeError, r"item 0 is a tuple; give model.parameters\(\)"),
        ("weights", AutoClipTypeError, "item 0 is a str"),
    ],
)
def test_params_that_cannot_be_clipped_are_refused(params, error, says):
    with pytest.raises(error, match=says):
        AutoClip(params)


def test_attach_that_failed_has_left_nothing_behind():
    optimizer = OPTIMIZERS["sgd"](make_model().parameters())
    with pytest.raises(AutoClipValueError):
        attach(optimizer, 101.0)
    attach(optimizer)


def test_parameters_without_a_gradient_are_left_out():
    model = make_model()
    model[0].requires_grad_(False)
    backward(model, 0)
    step = AutoClip(model).step()
    assert step.norm == pytest.approx(norm_of([param.grad for param in model[2].parameters()]), rel=1e-12)
    assert model[0].weight.grad is None


def test_step_without_any_gradient_warns_once_and_records_nothing():
    model = make_model()
    clip = AutoClip(model)
    with pytest.warns(RuntimeWarning, match="No parameter has a gradient") as warned:
        step = clip.step()
    assert warned[0].filename == __file__
    assert step == (0.0, inf, 1.0, False, False)
    clip.step()
    assert (clip.steps, len(clip.history)) == (2, 0)


def test_zero_gradient_is_not_recorded():
    param = param_with([0.0, 0.0])
    assert AutoClip(param).step() == (0.0, inf, 1.0, False, False)


def test_tensors_without_elements_change_nothing():
    assert (
        AutoClip([param_with(torch.zeros(0)), param_with([3.0, 4.0]), param_with(torch.zeros(2, 0))]).step().norm == 5.0
    )


def test_float16_norm_does_not_overflow():
    params = [param_with(torch.full((1000,), 6e4), torch.float16), param_with([1.0], torch.float16)]
    clip = AutoClip(params, 0.0)
    norm = clip.step().norm
    assert norm == pytest.approx(sqrt(1000) * params[0].grad[0].item(), rel=1e-6)
    for param in params:
        param.grad *= 0.5
    clip.step()
    assert clip.history.values().tolist() == pytest.approx([norm / 2, norm], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_norm_has_the_digits_of_float32(dtype):
    torch.manual_seed(0)
    params = [param_with(torch.randn(1000), dtype) for _ in range(5)]
    exact = sqrt(sum(param.grad.double().square().sum().item() for param in params))
    assert AutoClip(params).step().norm == pytest.approx(exact, rel=1e-6)


def test_half_gradients_are_scaled_in_their_dtype():
    param = param_with([3.0, 4.0], torch.bfloat16)
    clip = AutoClip(param, 0.0)
    clip.step()
    param.grad = torch.tensor([30.0, 40.0], dtype=torch.bfloat16)
    assert clip.step().scale == 0.1
    assert param.grad.dtype == torch.bfloat16
    assert param.grad.tolist() == [3.0, 4.0]


def test_float64_norm_stays_float64():
    torch.manual_seed(0)
    param = param_with(torch.randn(1000, dtype=torch.float64))
    assert AutoClip(param).step().norm == pytest.approx(param.grad.norm().item(), rel=1e-15)


def test_gradients_of_several_dtypes_have_one_norm():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    params = [param_with([2.0], dtype) for dtype in dtypes]
    clip = AutoClip(params, 0.0)
    assert clip.step().norm == pytest.approx(sqrt(20.0), rel=1e-7)
    for param in params:
        param.grad *= 2
    assert clip.step().scale == pytest.approx(0.5)
    assert [param.grad.real.item() for param in params] == pytest.approx([2.0] * 5)


def test_complex_gradients_are_measured_and_scaled():
    param = param_with([3 + 4j, 0j])
    clip = AutoClip(param, 0.0)
    assert clip.step().norm == 5.0
    param.grad = torch.tensor([6 + 8j, 0j])
    assert clip.step().scale == 0.5
    assert param.grad.tolist() == [3 + 4j, 0j]


def test_conjugated_gradients_are_scaled_in_place():
    # Autograd leaves the conjugation pending here, and view_as_real refuses such a tensor.
    param = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    clip = AutoClip(param, 0.0)
    for factor in (1, 2):
        param.grad = None
        (param.conj() * torch.tensor([3 + 4j]) * factor).real.sum().backward()
        assert param.grad.is_conj()
        assert clip.step().norm == 5.0 * factor
    assert param.grad.tolist() == [3 + 4j]


@pytest.mark.parametrize("norm_of_the_small", [None, 0.0, 3.0])
def test_large_gradients_are_measured_beside_small_ones_and_alone(norm_of_the_small):
    large = [param_with(torch.full((2**16,), 0.25)), param_with(torch.full((2, 2**16), -0.5))]
    small = [] if norm_of_the_small is None else [param_with([0.0, norm_of_the_small])]
    norm = AutoClip([large[0], *small, large[1]]).step().norm
    assert norm == pytest.approx(sqrt(2**12 + 2**15 + (norm_of_the_small or 0.0) ** 2), rel=1e-6)


@pytest.mark.parametrize("are_coalesced", [False, True])
def test_sparse_gradients_are_coalesced_before_they_are_measured(are_coalesced):
    embedding = nn.Embedding(10, 2, sparse=True)
    clip = AutoClip(embedding, 0.0)

    def set_grad(value):
        embedding.zero_grad()
        (embedding(torch.tensor([1, 1, 7])) * value).sum().backward()
        assert embedding.weight.grad.is_sparse
        if are_coalesced:
            embedding.weight.grad = embedding.weight.grad.coalesce()

    set_grad(1.0)
    assert clip.step().norm == pytest.approx(sqrt(2 * 2**2 + 2 * 1**2))
    set_grad(4.0)
    assert clip.step().scale == pytest.approx(0.25)
    assert embedding.weight.grad.to_dense()[[0, 1, 7]].tolist() == [[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_gradients_that_carry_a_graph_are_scaled(mode):
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    clip = AutoClip(param, 0.0, mode=mode)
    for factor in (0.5, 1.0):
        (param.grad,) = torch.autograd.grad(factor * param.square().sum(), param, create_graph=True)
        clip.step()
    assert param.grad.tolist() == pytest.approx([3.0, 4.0])
    # A half of (x^2)' is clipped away, and so of (x^2)'': in the graph the scale is a constant.
    assert torch.autograd.grad(param.grad.sum(), param)[0].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_gradient_that_carries_a_graph_is_scaled_beside_others(at, mode):
    params = [nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(3)]
    clip = AutoClip(params, 0.0, mode=mode)
    for factor in (0.5, 1.0):
        for param in params:
            param.grad = torch.zeros(2)
        param = params[at]
        (param.grad,) = torch.autograd.grad(factor * param.square().sum(), param, create_graph=True)
        clip.step()
    assert torch.autograd.grad(param.grad.sum(), param)[0].tolist() == pytest.approx([1.0, 1.0])
    params[at].grad = torch.tensor([6.0, 8.0], requires_grad=True)
    clip.step()
    assert params[at].grad.tolist() == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_meta_gradients_pass_through_differentiable_steps(attached, mode):
    """The derivative of what is learned with respect to a factor of the loss."""
    factor, slope = torch.tensor(1.0, requires_grad=True), torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, differentiable=True)
    learned = optimizer.param_groups[0]["params"][0] = torch.zeros(2, requires_grad=True).clone()
    clip = (attach if attached else AutoClip)(optimizer, 0.0, mode=mode)
    for size in (1.0, 4.0):  # norms of 5 and 20: the second gradient is scaled to a quarter
        loss = factor * size * (slope * learned).sum()
        (learned.grad,) = torch.autograd.grad(loss, learned, create_graph=True)
        if not attached:
            clip.step()
        optimizer.step()
    assert learned.tolist() == pytest.approx([-0.6, -0.8])
    (derivative,) = torch.autograd.grad(learned.sum(), factor)
    assert derivative.item() == pytest.approx(-0.1 * (1.0 + 0.25 * 4.0) * 7.0)


# Norms that are not finite


def poison(model, value, number=0):
    backward(model, number)
    model[0].weight.grad[3, 2] = value


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_skipped_gradients_become_zeros(value):
    model = make_model()
    clip = AutoClip(model)
    backward(model, 0)
    clip.step()
    poison(model, value, 1)
    with pytest.warns(RuntimeWarning, match="dropped"):
        step = clip.step()
    assert step[1:] == (clip.threshold, 0.0, False, False)
    assert not isfinite(step.norm)
    assert all(not param.grad.any() for param in model.parameters())
    poison(model, value, 1)
    clip.step()
    assert (clip.steps, clip.nonfinite_steps, len(clip.history)) == (3, 2, 1)


def test_raise_leaves_the_gradients_as_they_are():
    model = make_model()
    clip = AutoClip(model, nonfinite="raise")
    poison(model, inf)
    before = [param.grad.clone() for param in model.parameters()]
    with pytest.raises(NonFiniteNormError, match="inf"):
        clip.step()
    assert are_equal(before, [param.grad for param in model.parameters()])
    assert clip.nonfinite_steps == 1


def test_pass_leaves_the_gradients_as_they_are():
    model = make_model()
    poison(model, inf)
    before = [param.grad.clone() for param in model.parameters()]
    step = AutoClip(model, nonfinite="pass").step()
    assert (step.norm, step.scale) == (inf, 1.0)
    assert are_equal(before, [param.grad for param in model.parameters()])


@every_optimizer
def test_attached_skip_leaves_parameters_and_optimizer_alone(make_optimizer):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    clip = attach(optimizer)
    for number in range(3):
        backward(model, number)
        optimizer.step()
    before, state = values_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    poison(model, nan)
    grads = [param.grad for param in model.parameters()]
    with pytest.warns(RuntimeWarning, match="dropped"):
        optimizer.step()
    assert are_equal(before, values_of(model))
    for name, kept in state.items():
        now = optimizer.state_dict()["state"][name]
        assert all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(now[key])) for key in kept)
    assert all(param.grad is grad and not grad.any() for param, grad in zip(model.parameters(), grads, strict=True))
    backward(model, 4)
    optimizer.step()
    assert not are_equal(before, values_of(model))
    assert (clip.steps, clip.nonfinite_steps) == (5, 1)


def test_attached_raise_leaves_parameters_alone():
    model = make_model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    attach(optimizer, nonfinite="raise")
    before = values_of(model)
    poison(model, nan)
    with pytest.raises(NonFiniteNormError):
        optimizer.step()
    assert are_equal(before, values_of(model))


class TwoEvaluations(torch.optim.Optimizer):
    """Calls the closure twice, as sharpness-aware optimizers do."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                closure()
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.sub_(0.1 * param.grad)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_skip_inside_a_closure_concerns_its_own_evaluation_only(poisoned):
    model = make_model()
    optimizer = TwoEvaluations(model.parameters())
    clip = attach(optimizer)
    evaluations = iter(range(2))
    before = values_of(model)

    def closure():
        if next(evaluations) == poisoned:
            return poison(model, nan)
        return backward(model, 1)

    with pytest.warns(RuntimeWarning, match="dropped"):
        optimizer.step(closure)
    assert clip.nonfinite_steps == 1
    assert all(param.grad.isfinite().all() for param in model.parameters())
    assert any(param.grad.any() for param in model.parameters()) == (poisoned == 0)
    assert are_equal(before, values_of(model)) == (poisoned == 1)


def test_skipped_gradients_are_not_kept_alive():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    clip = attach(optimizer)
    poison(model, nan)
    with pytest.warns(RuntimeWarning, match="dropped"):
        optimizer.step()
    grad = weakref.ref(model[0].weight.grad)
    model.zero_grad()
    assert grad() is None
    assert clip.nonfinite_steps == 1


# Attached to an optimizer


@every_optimizer
def test_attach_gives_the_run_of_clipping_by_hand(make_optimizer):
    by_hand, attached = make_model(), make_model()
    hand, optimizer = make_optimizer(by_hand.parameters()), make_optimizer(attached.parameters())
    clip = attach(optimizer, 30.0)
    norms = []
    for number in range(50):
        backward(by_hand, number)
        clip_by_hand(by_hand, norms, 30.0)
        hand.step()
        backward(attached, number)
        optimizer.step()
        if optimizer.defaults["fused"]:  # it divides by a float32, where a product is made by hand
            torch.testing.assert_close(values_of(by_hand), values_of(attached))
        else:
            assert are_equal(values_of(by_hand), values_of(attached))
    if not optimizer.defaults["fused"]:
        assert clip.history.values().tolist() == pytest.approx(sorted(norms), rel=1e-12)
    assert 0 < clip.clipped_steps < 50


@pytest.mark.parametrize("as_keyword", [False, True])
def test_attach_clips_what_the_closure_computed(as_keyword):
    by_hand, attached = make_model(), make_model()
    hand, optimizer = OPTIMIZERS["sgd"](by_hand.parameters()), OPTIMIZERS["sgd"](attached.parameters())
    clip = attach(optimizer, 30.0)
    norms = []
    for number in range(20):
        loss = backward(by_hand, number)
        clip_by_hand(by_hand, norms, 30.0)
        hand.step()

        def closure(number=number):
            return backward(attached, number)

        got = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert got.item() == loss.item()
        if optimizer.defaults["fused"]:  # it divides by a float32, where a product is made by hand
            torch.testing.assert_close(values_of(by_hand), values_of(attached))
        else:
            assert are_equal(values_of(by_hand), values_of(attached))
    if not optimizer.defaults["fused"]:
        assert clip.history.values().tolist() == pytest.approx(sorted(norms), rel=1e-12)


def test_attach_takes_a_closure_that_is_none():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    clip = attach(optimizer)
    backward(model, 0)
    optimizer.step(None)
    backward(model, 1)
    optimizer.step(closure=None)
    assert clip.steps == 2


def test_attach_says_that_lbfgs_needs_a_closure():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    clip = attach(optimizer)
    backward(model, 0)
    before = values_of(model)
    with pytest.raises(AutoClipTypeError, match=r"LBFGS\.step\(\) needs a closure"):
        optimizer.step(None)
    assert are_equal(before, values_of(model))
    assert clip.steps == 0


@every_optimizer
def test_attached_step_without_any_gradient_warns_once_and_changes_nothing(make_optimizer):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    clip = attach(optimizer)
    before = values_of(model)
    with pytest.warns(RuntimeWarning, match="No parameter has a gradient"):
        optimizer.step()
    optimizer.step()
    assert are_equal(before, values_of(model))
    assert len(clip.history) == 0
    backward(model, 0)
    optimizer.step()
    assert len(clip.history) == 1


def test_attach_records_every_gradient_that_lbfgs_evaluates():
    by_hand, attached = make_model(), make_model()
    hand = torch.optim.LBFGS(by_hand.parameters(), max_iter=5)
    optimizer = torch.optim.LBFGS(attached.parameters(), max_iter=5)
    clip = attach(optimizer, 60.0)
    norms = []

    def closure_by_hand():
        loss = backward(by_hand, 0)
        clip_by_hand(by_hand, norms, 60.0)
        return loss

    for _ in range(4):
        hand.step(closure_by_hand)
        optimizer.step(lambda: backward(attached, 0))
    assert are_equal(values_of(by_hand), values_of(attached))
    assert clip.history.values().tolist() == pytest.approx(sorted(norms), rel=1e-12)
    assert clip.steps > 4


def test_attach_leaves_the_state_of_the_optimizer_as_it_was():
    model = make_model()
    optimizer, plain = OPTIMIZERS["adamw"](model.parameters()), OPTIMIZERS["adamw"](model.parameters())
    attach(optimizer)
    backward(model, 0)
    optimizer.step()
    plain.step()
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    assert copy.deepcopy(optimizer).state_dict().keys() == plain.state_dict().keys()


def test_attach_sees_groups_added_later_and_a_loaded_state():
    model, more = make_model(), param_with([1e6])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    clip = attach(optimizer, 0.0)
    backward(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [more]})
    optimizer.step()
    assert clip.history.values()[-1] >= 1e6
    assert more.grad.item() < 1e3
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the list of groups
    more.grad = torch.tensor([1e7])
    optimizer.step()
    assert clip.history.values()[-1] >= 1e7


def test_detach_ends_the_clipping_and_keeps_the_history():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    clip = attach(optimizer)
    backward(model, 0)
    optimizer.step()
    clip.detach()
    clip.detach()
    optimizer.step()
    assert (clip.steps, len(clip.history)) == (1, 1)
    backward(model, 1)
    assert clip.step().recorded
    attach(optimizer)


def test_two_clippers_on_one_optimizer_are_refused():
    optimizer = OPTIMIZERS["sgd"](make_model().parameters())
    attach(optimizer)
    with pytest.raises(AutoClipError, match="SGD has an AutoClip attached already"):
        attach(optimizer)


def test_step_of_an_attached_clipper_is_refused():
    model = make_model()
    clip = attach(OPTIMIZERS["sgd"](model.parameters()))
    backward(model, 0)
    with pytest.raises(AutoClipError, match="attached"):
        clip.step()
    assert clip.steps == 0


@pytest.mark.parametrize("subject", [None, [param_with([1.0])], make_model()])
def test_attach_refuses_what_is_no_optimizer(subject):
    with pytest.raises(AutoClipTypeError, match=type(subject).__name__):
        attach(subject)


@pytest.mark.parametrize("unscale_first", [False, True])
@every_optimizer
def test_attach_sees_unscaled_gradients_under_a_gradscaler(make_optimizer, unscale_first):
    plain, scaled = make_model(), make_model()
    reference, optimizer = make_optimizer(plain.parameters()), make_optimizer(scaled.parameters())
    clips = attach(reference, 30.0), attach(optimizer, 30.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    for number in range(30):
        backward(plain, number)
        reference.step()
        scaled.zero_grad()
        scaler.scale(loss_of(scaled, number)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    # Powers of two: scaling is exact, up to the order in which a fused kernel multiplies.
    assert clips[1].history.values() == pytest.approx(clips[0].history.values(), rel=1e-4)
    assert clips[1].clipped_steps == clips[0].clipped_steps > 0
    for left, right in zip(values_of(plain), values_of(scaled), strict=True):
        torch.testing.assert_close(left, right)


@every_optimizer
def test_steps_that_a_gradscaler_skips_are_not_seen(make_optimizer):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    clip = attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    before = values_of(model)
    model.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    model[0].weight.grad[0, 0] = inf
    scaler.step(optimizer)
    scaler.update()
    assert are_equal(before, values_of(model))
    assert (clip.steps, clip.nonfinite_steps, len(clip.history)) == (1, 0, 1)


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_fused_optimizer_without_gradients_may_have_a_gradscaler(mode):
    """One of two that take turns: torch then says that infinities were found 0 times, as a number."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.Adam([param], fused=True) for param in params]
    clips = [attach(optimizer, mode=mode) for optimizer in optimizers]
    scaler = torch.amp.GradScaler("cpu")
    for step in range(4):
        params[0].grad = params[1].grad = None
        scaler.scale(params[step % 2].sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert [clip.history.values().tolist() for clip in clips] == [[pytest.approx(3**0.5)] * 2] * 2


# Save, load, resume


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


def test_state_holds_bytes_and_plain_scalars_only():
    model = make_model()
    clip = AutoClip(model, window=5)
    backward(model, 0)
    clip.step()
    state = clip.state_dict()
    values = [state["format"], state["scope"], *state["groups"]["global"].values()]
    assert {type(value) for value in values} <= {int, float, bool, str, bytes, type(None)}


RUN = """
import sys
import torch
from autoclip_torch import attach

first, last, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
runs = [("plain", "global", "immediate"), ("fused", "global", "deferred"), ("plain", "parameter", "immediate")]
for kind, scope, mode in runs:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=kind == "fused")
    clip = attach(optimizer, 30.0, scope=scope, mode=mode)
    parts = {"model": model, "optimizer": optimizer, "clip": clip}
    path = f"{folder}/{kind}-{scope}"
    if first:
        for name, state in torch.load(path).items():
            parts[name].load_state_dict(state)
    for step in range(first, last):
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((model(inputs) - 3.0).square().mean() * (1.0 + step % 7)).backward()
        optimizer.step()
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    print([param.tolist() for param in model.parameters()], clip.thresholds, clip.clipped_steps)
"""


def test_run_goes_on_in_a_new_process_as_if_it_had_not_ended(tmp_path):
    def run(first, last, name):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-c", RUN, str(first), str(last), tmp_path / name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    whole = run(0, 80, "whole")
    half = run(0, 40, "parts")
    assert len(whole) == 3
    assert not set(half) & set(whole)
    assert run(40, 80, "parts") == whole


@pytest.mark.parametrize("window", [None, 10])
def test_resumed_run_is_the_same_to_the_last_bit(window):
    def start():
        model = make_model()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, attach(optimizer, 40.0, window=window)

    def train(run, numbers):
        model, optimizer, clip = run
        thresholds = []
        for number in numbers:
            backward(model, number)
            optimizer.step()
            thresholds.append(clip.threshold)
        return thresholds

    whole, first, second = start(), start(), start()
    expected = train(whole, range(60))
    train(first, range(30))
    checkpoint = through_a_file([part.state_dict() for part in first])
    for part, state in zip(second, checkpoint, strict=True):
        part.load_state_dict(state)
    assert train(second, range(30, 60)) == expected[30:]
    assert are_equal(values_of(whole[0]), values_of(second[0]))
    for counter in ("steps", "clipped_steps", "nonfinite_steps", "percentile"):
        assert getattr(whole[2], counter) == getattr(second[2], counter)


def test_state_of_a_group_is_that_of_the_core():
    model = make_model()
    clip, core = AutoClip(model), autoclip_core.AutoClip()
    for number in range(5):
        backward(model, number)
        core.observe(clip.step().norm)
    assert clip.state_dict()["groups"] == {"global": core.state_dict()}


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_copies_are_independent_and_not_attached(through, mode):
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    clip = attach(optimizer, 30.0, mode=mode)
    backward(model, 0)
    optimizer.step()
    other_model, other = through((model, clip))
    assert other.state_dict() == clip.state_dict()
    backward(other_model, 1)
    other.step()
    assert (clip.steps, other.steps) == (1, 2)
    other.detach()
    with pytest.raises(AutoClipError, match="attached"):
        clip.step()


def test_state_brings_its_percentile():
    clip = AutoClip(make_model(), 25.0)
    other = AutoClip(make_model())
    other.load_state_dict(clip.state_dict())
    assert other.percentile == 25.0


def test_state_is_independent_of_the_clipper():
    model = make_model()
    clip = AutoClip(model)
    backward(model, 0)
    clip.step()
    state = clip.state_dict()
    kept = copy.deepcopy(state)
    other = AutoClip(model)
    other.load_state_dict(state)
    backward(model, 1)
    clip.step()
    state["groups"]["global"].clear()
    assert (len(clip.history), len(other.history)) == (2, 1)
    assert other.state_dict() == kept


def with_history(change):
    def spoil(state):
        state["groups"]["global"]["history"] = change(state["groups"]["global"]["history"])
        return state

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: None, "NoneType was given"),
        (lambda state: {}, "format None"),
        (lambda state: state | {"format": 99}, "format 99"),
        (lambda state: state["groups"]["global"], "made by autoclip_torch.AutoClip"),
        (lambda state: state | {"scope": "parameter"}, "scope='parameter'.*scope='global'"),
        (lambda state: state | {"groups": {}}, "lacks 1 of the groups, among them 'global'"),
        (lambda state: state | {"groups": state["groups"] | {"x": 1}}, "has besides 1 of the groups, among them 'x'"),
        (lambda state: state | {"groups": {"global": state["groups"]["global"] | {"window": 5}}}, "window"),
        (with_history(lambda history: history[:-1]), "not a snapshot"),
        (with_history(lambda history: history[:-1] + bytes([history[-1] ^ 1])), "damaged"),
        (with_history(lambda history: b""), "snapshot"),
        (with_history(lambda history: None), "NoneType"),
    ],
)
def test_spoiled_state_is_refused_and_changes_nothing(spoil, says):
    model = make_model()
    clip, other = AutoClip(model), AutoClip(model)
    for number in range(3):
        backward(model, number)
        other.step()
    backward(model, 0)
    clip.step()
    before = other.state_dict()
    with pytest.raises(AutoClipError, match=says):
        other.load_state_dict(spoil(clip.state_dict()))
    assert other.state_dict() == before


# The package


def test_examples_in_the_docstrings_are_true():
    for module in ("autoclip_torch.attach", "autoclip_torch.clip"):
        failed, tried = doctest.testmod(importlib.import_module(module), report=True)
        assert failed == 0 < tried


def test_public_names_are_those_that_the_package_lists():
    assert sorted(autoclip_torch.__all__) == ["AutoClip", "ClipStep", "attach", "attached"]
    assert autoclip_torch.ClipStep is autoclip_core.ClipStep


def test_repr_tells_the_state():
    model = make_model()
    text = repr(AutoClip(model, 12.5))
    assert "4 parameters" in text
    assert "percentile=12.5" in text


# What once went wrong


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_first_step_of_a_fused_sgd_may_be_dropped(mode):
    garbage = [torch.full((64,), 7.0) for _ in range(100)]
    del garbage
    weight = nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=True)
    attach(optimizer, 100.0, mode=mode)
    for value in (nan, 1.0):
        weight.grad = torch.full((64,), value)
        optimizer.step()
    assert torch.equal(weight, torch.full((64,), -1.0))


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_norms_of_scaled_gradients_may_be_beyond_float32(mode):
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    clip = attach(optimizer, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**66)
    for _ in range(3):
        weight.grad = scaler.scale(torch.ones(4))
        scaler.step(optimizer)
        scaler.update()
    assert clip.history.values().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("scope", ["global", "group", "parameter", lambda name: "all"])
def test_tied_weights_count_once(scope):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight, weight], lr=0.1)
    clip = AutoClip(optimizer, 0.0, scope=scope)
    for norm in (1.0, 4.0):
        weight.grad = torch.tensor([norm])
        clip.step()
    assert weight.grad.item() == 1.0
    [history] = clip.histories.values()
    assert history.values().tolist() == [1.0, 4.0]


def test_state_of_a_group_added_later_is_saved_and_loaded():
    def start():
        model = make_model()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        clip = attach(optimizer, scope="group")
        optimizer.add_param_group({"params": list(model[2].parameters())})
        return model, optimizer, clip

    model, optimizer, clip = start()
    assert clip.state_dict()["groups"].keys() == {"0", "1"}
    backward(model, 0)
    optimizer.step()
    _, _, other = start()
    other.load_state_dict(clip.state_dict())
    assert other.state_dict() == clip.state_dict()


def test_frozen_integers_may_come_first():
    model = nn.Module()
    model.frozen = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.weight = nn.Parameter(torch.zeros(3))
    model.weight.grad = torch.ones(3)
    assert AutoClip(model).step().recorded


def test_new_half_gradients_of_about_the_same_norm_are_recorded():
    weight = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    weight.grad = torch.ones(8, dtype=torch.bfloat16)
    clip = AutoClip([weight], 100.0)
    for number in range(20):
        weight.grad.data.fill_(1.0 + number % 5 / 100.0)  # behind the back of autograd, as a CUDA graph does
        clip.step()
    assert len(clip.history) >= 16  # a bfloat16 cannot tell all of them apart


def test_deferred_step_on_the_same_gradients_is_never_recorded():
    weight = nn.Parameter(torch.zeros(1))
    clip = AutoClip([weight], 0.0, mode="deferred")
    for norm in (1.0, 4.0):
        weight.grad = torch.tensor([norm])
        clip.step()
    assert [clip.step().norm.item() for _ in range(3)] == [1.0, 1.0, 1.0]
    assert clip.history.values().tolist() == [1.0, 4.0]


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_dropped_gradients_are_not_counted_again(mode):
    weight = nn.Parameter(torch.zeros(2))
    clip = AutoClip([weight], mode=mode)
    weight.grad = torch.tensor([nan, 1.0])
    clip.step()
    clip.step()
    assert (clip.steps, clip.nonfinite_steps) == (1, 1)


@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_gradient_after_a_dropped_step_that_failed_is_kept():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clip = attach(optimizer)

    def fail(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    weight.grad = torch.tensor([nan])
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert (weight.item(), clip.history.values().tolist()) == (-2.0, [2.0])


def test_scale_after_a_step_that_failed_is_that_of_the_gradscaler():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    clip = attach(optimizer, 0.0)

    def fail(*_):
        raise KeyboardInterrupt

    def step(grad, scale):
        # What a GradScaler does with a fused optimizer.
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        weight.grad = torch.tensor([grad * scale])
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    step(1.0, 4.0)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        step(2.0, 4.0)
    handle.remove()
    step(4.0, 8.0)
    assert clip.history.values().tolist() == [1.0, 2.0, 4.0]
    assert weight.item() == -2.0
