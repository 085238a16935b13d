"""Gradients, names and steps at the edges: each is clipped as any other, and nothing is half done."""

import math

import pytest
import torch
from autoclip_torch import AutoClip, attach
from autoclip_torch.devices import is_capturing
from torch import nn

MODES = ["immediate", "deferred"]


@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_whose_elements_share_memory_are_clipped_once(mode, strides):
    weight = nn.Parameter(torch.zeros(3, 2))
    clip = AutoClip([weight], percentile=0.0, mode=mode)
    for size in (1.0, 10.0):
        weight.grad = torch.full((6,), size).as_strided((3, 2), strides)
        step = clip.step()
    assert float(step.scale) == pytest.approx(0.1)
    torch.testing.assert_close(weight.grad, torch.ones(3, 2))
    assert clip.history.values() == pytest.approx([6**0.5, 10 * 6**0.5])


# Of gradients whose values are those at the same place in 0, 1, 2, ...: how they share memory.
SHARED = {
    "one tensor": lambda memory: [memory] * 2,
    "one memory": lambda memory: [memory, memory.view(3, 4)],
    "at the beginning": lambda memory: [memory, memory[:5], memory[5:]],
    "at the end": lambda memory: [memory[:5], memory[6:], memory],
    "around it": lambda memory: [memory[5:7], memory],
    "partly": lambda memory: [memory[:7], memory[5:]],
    "with gaps": lambda memory: [memory[::2], memory[1::2], memory],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_share_memory_are_clipped_once_each(mode, scope, share, dtype):
    before = share(torch.arange(12, dtype=dtype))
    params = [nn.Parameter(torch.zeros(grad.shape, dtype=dtype)) for grad in before]
    clip = AutoClip(params, percentile=0.0, mode=mode, scope=scope)
    for size in (1.0, 8.0, 8.0):
        for param, grad in zip(params, share(torch.arange(12, dtype=dtype) * size), strict=True):
            param.grad = grad
        clip.step()
        for param, grad in zip(params, before, strict=True):
            torch.testing.assert_close(param.grad, grad)
    assert clip.steps == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_come_to_share_memory_are_clipped_once_each(mode, dtype):
    """As those of two embeddings that are added do where a batch has one element."""
    params = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in range(2)]
    clip = AutoClip(params, percentile=0.0, mode=mode)
    for size, count in ((1.0, 4), (4.0, 1), (4.0, 4), (4.0, 1)):
        for param in params:
            param.grad = None
        batch = [param[None] if count == 1 else param.expand(count, 2, 3) for param in params]
        (sum(batch) * size / count).sum().backward()
        assert (params[0].grad.data_ptr() == params[1].grad.data_ptr()) == (count == 1)
        clip.step()
        for param in params:
            torch.testing.assert_close(param.grad, torch.ones(2, 3, dtype=dtype))


def test_gradients_that_share_memory_keep_their_graph():
    weight = torch.ones(3, requires_grad=True)
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    clip = AutoClip(params, percentile=0.0)
    for size in (1.0, 4.0):
        params[0].grad = params[1].grad = weight * size
        clip.step()
    (params[0].grad + params[1].grad).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))


def test_gradients_side_by_side_stay_where_they_are():
    memory = torch.arange(24.0).view(4, 6)
    params = [nn.Parameter(torch.zeros(4, 2)) for _ in range(3)]
    for number, param in enumerate(params):
        param.grad = memory[:, 2 * number : 2 * number + 2]
    places = [param.grad.data_ptr() for param in params]
    clip = AutoClip(params, percentile=0.0)
    clip.step()
    assert [param.grad.data_ptr() for param in params] == places


@pytest.mark.parametrize("mode", MODES)
def test_gradients_made_in_inference_mode_are_clipped(mode):
    weight = nn.Parameter(torch.zeros(2))
    clip = AutoClip([weight], percentile=0.0, mode=mode)
    for size in (1.0, 10.0):
        with torch.inference_mode():
            grad = torch.tensor([0.0, size])
        weight.grad = grad
        clip.step()
    torch.testing.assert_close(weight.grad, torch.tensor([0.0, 1.0]))
    assert clip.steps == 2


def test_steps_in_inference_mode_are_clipped():
    with torch.inference_mode():
        weight = torch.zeros(2)
        clip = AutoClip([weight], percentile=0.0)
        for size in (1.0, 10.0):
            weight.grad = torch.tensor([0.0, size])
            clip.step()
        assert weight.grad.tolist() == [0.0, 1.0]


def test_equal_names_have_histories_of_their_own():
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    groups = [{"params": model.named_parameters()} for model in (first, second)]
    clip = attach(optimizer := torch.optim.SGD(groups, lr=0.1), scope="parameter")
    first.weight.grad, second.weight.grad = torch.full((1, 1), 2.0), torch.full((1, 1), 300.0)
    optimizer.step()
    assert clip.thresholds == {"weight": 2.0, "weight#2": 300.0}


@pytest.mark.parametrize("scope", ["group", "parameter"])
def test_group_that_is_removed_leaves_the_histories_of_the_others(scope):
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    clip = attach(optimizer, scope=scope)
    for weight, size in zip(weights, (1.0, 20.0, 300.0), strict=True):
        weight.grad = torch.tensor([size])
    optimizer.step()
    del optimizer.param_groups[0]
    weights[1].grad, weights[2].grad = torch.tensor([20.0]), torch.tensor([300.0])
    optimizer.step()
    assert [history.values().tolist() for history in clip.histories.values()] == [[20.0, 20.0], [300.0, 300.0]]
    new = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [new]})
    new.grad = torch.tensor([7.0])
    optimizer.step()
    assert list(clip.thresholds.values()) == [20.0, 300.0, 7.0]


def test_parameters_that_are_replaced_keep_their_histories():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clip = attach(optimizer, scope="group")
    weight.grad = torch.tensor([5.0])
    optimizer.step()
    optimizer.param_groups[0]["params"] = [other := nn.Parameter(torch.zeros(1))]
    other.grad = torch.tensor([6.0])
    optimizer.step()
    assert clip.histories["0"].values().tolist() == [5.0, 6.0]


@pytest.mark.parametrize("sizes", [(1.0, 3.7), (1.0, 1e60)])
def test_fused_float64_is_clipped_as_exactly_as_without(sizes):
    moved = []
    for fused in (False, True):
        weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
        attach(optimizer, percentile=0.0)
        direction = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for size in sizes:
            weight.grad = direction * size
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-15, atol=0.0)
    assert moved[0].abs().min() > 0.0


def test_fused_float32_with_a_tiny_scale_still_moves():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    attach(optimizer, percentile=0.0)
    for size in (1e-20, 1.8e19):
        weight.grad = torch.tensor([size])
        optimizer.step()
    assert weight.item() == pytest.approx(-2e-20, rel=1e-5)


class UnscalesByItself(torch.optim.SGD):
    """An optimizer of the old kind: its step takes the GradScaler."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        if grad_scaler is not None:
            scale = grad_scaler._get_scale_async()
            grad_scaler._check_inf_per_device(self)
            grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
            if not all(grad.isfinite().all() for grad in grads):
                return
            torch._foreach_div_(grads, scale)
        super().step()


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing:FutureWarning")
def test_optimizer_that_takes_the_grad_scaler_records_unscaled_norms():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = UnscalesByItself([weight], lr=1.0)
    clip = attach(optimizer, percentile=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for size in (1.0, math.inf, 4.0):
        optimizer.zero_grad()
        scaler.scale((weight * torch.tensor([0.0, size])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert clip.history.values().tolist() == [1.0, 4.0]
    assert clip.nonfinite_steps == 0
    assert weight.tolist() == [0.0, -2.0]


def test_a_device_that_knows_no_graphs_captures_none():
    assert not is_capturing(torch.device("meta"))
