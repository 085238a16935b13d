"""`attach` under Accelerate, which needs nothing of its own: parameters as those of a plain loop, to the last bit."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from autoclip_torch import attach
from torch import nn


@pytest.fixture(autouse=True)
def _forget():
    forget()
    yield
    forget()


def forget():
    """Make the next Accelerator the first of its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data():
    return torch.utils.data.DataLoader(torch.randn(96, 5, generator=torch.Generator().manual_seed(1)), batch_size=8)


def make_optimizer(net, *, fused=False):
    return torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)


def loss_of(net, batch):
    return (net(batch).float() - 3.0).square().mean() * batch.std().exp()


def run(accelerator, net, optimizer, data):
    for batch in data:
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch))
            optimizer.step()
            optimizer.zero_grad()


def run_by_hand(accumulate, dtype, *, fused):
    net = make_net()
    optimizer = make_optimizer(net, fused=fused)
    clip = attach(optimizer)
    for batches in zip(*[iter(make_data())] * accumulate, strict=True):
        for batch in batches:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                predicted = net(batch)
            (loss_of(lambda batch, predicted=predicted: predicted, batch) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, clip


def are_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_attach_clips_what_accelerate_steps(first, accumulate, precision, fused):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    net = make_net()
    optimizer = make_optimizer(net, fused=fused)
    if first == "attach":
        clip = attach(optimizer)
    net, optimizer, data = accelerator.prepare(net, optimizer, make_data())
    if first == "prepare":
        clip = attach(optimizer)
    run(accelerator, net, optimizer, data)
    plain, expected = run_by_hand(accumulate, torch.bfloat16 if precision == "bf16" else None, fused=fused)
    assert are_equal(net, plain)
    assert clip.history.values().tolist() == expected.history.values().tolist()
    assert 0 < clip.clipped_steps < clip.steps == 12 // accumulate


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_measured_unscaled(fused):
    # Accelerate makes its GradScaler for accelerators only; a CPU's does the same.
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    net = make_net()
    net, optimizer, data = accelerator.prepare(net, make_optimizer(net, fused=fused), make_data())
    clip = attach(optimizer)
    for index, batch in enumerate(data):
        accelerator.backward(loss_of(net, batch) * (1e38 if index == 3 else 1.0))  # which overflows
        optimizer.step()
        optimizer.zero_grad()
    assert (clip.steps, clip.nonfinite_steps) == (11, 0)
    assert max(clip.history.values()) < 100


def test_checkpoint_continues_the_run_to_the_last_bit(tmp_path):
    def make(accelerator):
        net = make_net()
        net, optimizer, data = accelerator.prepare(net, make_optimizer(net), make_data())
        clip = attach(optimizer)
        accelerator.register_for_checkpointing(clip)
        return net, optimizer, data, clip

    accelerator = Accelerator(cpu=True)
    whole, optimizer, data, clip = make(accelerator)
    run(accelerator, whole, optimizer, data)
    accelerator.save_state(tmp_path / "half")
    run(accelerator, whole, optimizer, data)

    forget()
    accelerator = Accelerator(cpu=True)
    resumed, optimizer, data, again = make(accelerator)
    accelerator.load_state(tmp_path / "half")
    run(accelerator, resumed, optimizer, data)
    assert are_equal(whole, resumed)
    assert again.state_dict() == clip.state_dict()
    assert clip.steps == 24
