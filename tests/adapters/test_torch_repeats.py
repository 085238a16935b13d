"""Gradients that a step has left are known again, and no others are taken for them, however they came to be."""

import pytest
import torch
from autoclip_torch import AutoClip, attach
from torch import nn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_mode = pytest.mark.parametrize("mode", ["immediate", "deferred"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_params(shapes, dtype=torch.float32):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def write(params, values):
    """Write gradients so that no version changes, as a replayed CUDA graph does."""
    for param, value in zip(params, values, strict=True):
        version = param.grad._version
        param.grad.data.copy_(value)
        assert param.grad._version == version


@every_mode
@every_dtype
@pytest.mark.parametrize("at", [0, 4])
def test_first_gradient_that_is_written_behind_torchs_back_is_new(at, dtype, mode):
    """Torch has known of all writes before, and the norm is what it was."""
    params = make_params([(70,)] * 5, dtype)
    clip = AutoClip(params, 100.0, mode=mode)  # nothing is clipped
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn(70, generator=random).sign().to(dtype)
        clip.step()
    write(params, [-param.grad if number == at else param.grad for number, param in enumerate(params)])
    clip.step()
    assert clip.steps == 6


@every_mode
@every_dtype
def test_one_row_that_is_not_contiguous_is_known_again(dtype, mode):
    (param,) = make_params([(1, 3, 2)], dtype)
    param.grad = torch.ones(1, 2, 3, dtype=dtype).transpose(1, 2)
    clip = AutoClip(param, mode=mode)
    for _ in range(2):
        clip.step()
    assert clip.steps == 1


@every_mode
def test_what_was_not_scaled_is_known_by_its_norm_to_the_last_bit(mode):
    """Of a gradient whose memory has gaps some elements are compared: a change elsewhere is told by the norm alone."""
    (param,) = make_params([(1000,)])
    param.grad = torch.ones(2000)[::2]
    optimizer = torch.optim.SGD([param], lr=0.0)
    clip = attach(optimizer, 100.0, mode=mode)
    optimizer.step()
    optimizer.step()
    assert clip.steps == 1
    param.grad.data[500] *= 1.004  # the norm by four millionths: less than a scaled one could be off
    optimizer.step()
    assert clip.steps == 2


SLOW = [(dtype, rate) for dtype in DTYPES for rate in (0.998, 1.002)]
SLOW += [(dtype, rate) for dtype in (torch.float32, torch.float64) for rate in (1 - 5e-6, 1 + 5e-6)]


@every_mode
@pytest.mark.parametrize(("dtype", "rate"), SLOW)
def test_gradients_that_change_slowly_behind_torchs_back_are_new(dtype, rate, mode):
    params = make_params([(300,), (5, 40)], dtype)
    clip = AutoClip(params, 50.0, mode=mode)
    random = torch.Generator().manual_seed(0)
    directions = [torch.randn(param.shape, generator=random, dtype=torch.float64) for param in params]
    for number in range(60):
        write(params, [direction * rate**number for direction in directions])
        clip.step()
    assert clip.steps == 60


@every_mode
@every_dtype
@pytest.mark.parametrize("percentile", [0.0, 10.0, 100.0])
def test_independent_gradients_written_behind_torchs_back_are_new(percentile, dtype, mode):
    params = make_params([(50,), (3, 4), ()], dtype)
    clip = AutoClip(params, percentile, mode=mode)
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        write(params, [torch.randn(param.shape, generator=random).sign() for param in params])  # of one norm, all
        clip.step()
    assert clip.steps == 100


@every_mode
def test_one_large_gradient_after_a_drift_is_clipped_to_what_was_seen(mode):
    (param,) = make_params([(4096,)])
    clip = AutoClip([param], mode=mode)
    for number in range(200):
        write([param], [torch.full((4096,), 0.995**number)])
        clip.step()
    write([param], [torch.full((4096,), 1000.0)])
    clip.step()
    assert param.grad.norm().item() < 64 * 0.995**170


@every_mode
@every_dtype
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("at", [1, 3])
def test_new_gradient_of_a_later_tensor_alone_is_seen(at, replaced, dtype, mode):
    params = make_params([(8,)] * 5, dtype)
    clip = AutoClip(params, 0.0, mode=mode)
    for factor in (1.0, 3.0):  # the second one is clipped
        for param in params:
            param.grad = torch.full_like(param, factor)
        clip.step()
    assert clip.steps == 2
    new = -params[at].grad
    if replaced:
        params[at].grad = new
    else:
        params[at].grad.copy_(new)
    clip.step()
    assert clip.steps == 3


@every_mode
@every_dtype
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 5), (0, 4), ()], ids=str)
def test_gradients_that_nobody_has_touched_are_known_again(shape, dtype, mode):
    params = make_params([(8, 3), shape], dtype)
    clip = AutoClip(params, 30.0, mode=mode)
    random = torch.Generator().manual_seed(0)
    for number in range(10):
        for param in params:
            param.grad = torch.randn(param.shape, generator=random, dtype=torch.float64).mul(1 + number % 3).to(dtype)
            if param.dim() == 4:
                param.grad = param.grad.to(memory_format=torch.channels_last)
        for _ in range(3):
            clip.step()
    assert clip.steps == 10


@every_mode
@pytest.mark.parametrize("written", [None, *range(4)])
def test_gradients_of_several_dtypes_are_known_again_or_new_together(written, mode):
    params = [nn.Parameter(torch.zeros(8, 3, dtype=dtype)) for dtype in DTYPES]
    clip = AutoClip(params, 30.0, mode=mode)
    for number in range(10):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + number % 3)
        clip.step()
        if written is not None:
            write([params[written]], [-params[written].grad])
        clip.step()
    assert clip.steps == (10 if written is None else 20)


@every_mode
def test_gradients_are_known_again_when_their_memory_is_another(mode):
    """Whoever gives a tensor other memory leaves none behind that could be read."""
    (param,) = make_params([(100_000,)])
    clip = AutoClip([param], mode=mode)
    for number in range(3):
        param.grad.data = torch.full((100_000,), 1.0 + number)
        clip.step()
        param.grad.data = param.grad.clone()
        clip.step()
    assert clip.steps >= 3


@every_mode
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer_whose_gradients_change_behind_torchs_back_are_new(fused, make, mode):
    params = make_params([(20,), (3, 3)])
    optimizer = make(params, lr=0.1, fused=fused)
    clip = attach(optimizer, 50.0, mode=mode)
    random = torch.Generator().manual_seed(0)
    for number in range(20):
        write(params, [torch.randn(param.shape, generator=random).sign() * (1 + number % 3) for param in params])
        optimizer.step()
        optimizer.step()  # on the same gradients
    assert clip.steps == 20
