"""`attach` under Fabric, in place of `fabric.clip_gradients`: parameters as those of a plain loop, to the last bit."""

import pytest
import torch
from autoclip_torch import attach
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn


def make_data():
    return torch.randn(12, 8, 5, generator=torch.Generator().manual_seed(1))


def make(*, fused=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    return net, torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)


def loss_of(net, batch):
    return (net(batch).float() - 3.0).square().mean() * batch.std().exp()


def run(net, optimizer, backward, accumulate=1):
    for index, batch in enumerate(make_data(), 1):
        backward(loss_of(net, batch) / accumulate)
        if index % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def are_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("first", ["attach", "setup"])
def test_attach_clips_what_fabric_steps(first, accumulate, fused):
    fabric = Fabric(accelerator="cpu")
    net, optimizer = make(fused=fused)
    if first == "attach":
        clip = attach(optimizer)
    net, optimizer = fabric.setup(net, optimizer)
    if first == "setup":
        clip = attach(optimizer)
    run(net, optimizer, fabric.backward, accumulate)

    plain, optimizer = make(fused=fused)
    expected = attach(optimizer)
    run(plain, optimizer, torch.Tensor.backward, accumulate)
    assert are_equal(net, plain)
    assert clip.history.values().tolist() == expected.history.values().tolist()
    assert 0 < clip.clipped_steps < clip.steps == 12 // accumulate


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_measured_unscaled(precision, fused):
    # For 16-mixed, on a CPU, Fabric wants to be given the plugin.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20) if precision == "16-mixed" else None
    fabric = Fabric(accelerator="cpu", plugins=[MixedPrecision(precision, "cpu", scaler)])
    net, optimizer = fabric.setup(*make(fused=fused))
    clip = attach(optimizer)
    run(net, optimizer, fabric.backward)
    assert (0 < clip.steps < 12) == (precision == "16-mixed")  # at first the scale is too large for float16
    assert clip.nonfinite_steps == 0
    assert 1 < max(clip.history.values()) < 100


def test_checkpoint_continues_the_run_to_the_last_bit(tmp_path):
    fabric = Fabric(accelerator="cpu")
    whole, optimizer = fabric.setup(*make())
    clip = attach(optimizer)
    run(whole, optimizer, fabric.backward)
    fabric.save(tmp_path / "half.ckpt", {"net": whole, "optimizer": optimizer, "clip": clip})
    run(whole, optimizer, fabric.backward)

    resumed, optimizer = fabric.setup(*make())
    again = attach(optimizer)
    fabric.load(tmp_path / "half.ckpt", {"net": resumed, "optimizer": optimizer, "clip": again})
    run(resumed, optimizer, fabric.backward)
    assert are_equal(whole, resumed)
    assert again.state_dict() == clip.state_dict()
    assert clip.steps == 24
