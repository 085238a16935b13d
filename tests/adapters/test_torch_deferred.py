"""Thresholds found on the device: the same bits as those that the host finds, however late the norms arrive.

A CPU has no copies that take time. Here their arrival is delayed by a seam, `Crossing.has_arrived`, so that all states
of an accelerator are met. Devices, simulated and real, are in test_torch_device.py.
"""

import copy
from math import inf, isfinite, isnan, nan

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach
from autoclip_torch.deferred import MOST_PENDING, Crossing
from torch import nn

from autoclip_core import AutoClipError, NonFiniteNormError

FIELDS = ("norm", "threshold", "scale", "clipped", "recorded")


@pytest.fixture
def late(monkeypatch):
    """Norms that arrive now and then, so that up to four are pending."""
    chance = np.random.default_rng(7)
    monkeypatch.setattr(Crossing, "has_arrived", lambda self: chance.random() < 0.3)


def norms_of_a_run(count, seed=0):
    """Norms that drift over decades, with zeros and non-finite ones in between, many of them equal."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(size=count) - np.linspace(0, 7, count)).astype(np.float32)
    norms[generator.random(count) < 0.3] = 0.25
    for value, share in ((nan, 0.02), (inf, 0.02), (0.0, 0.02)):
        norms[generator.random(count) < share] = value
    return norms.tolist()


def run(norms, makers):
    """Give clips of one parameter each the same gradients; yield the number, the clips, their steps, the parameters."""
    params = [nn.Parameter(torch.zeros(1)) for _ in makers]
    clips = [make(param) for make, param in zip(makers, params, strict=True)]
    for number, norm in enumerate(norms):
        for param in params:
            param.grad = torch.tensor([norm])
        steps = [clip.step() for clip in clips]
        yield number, clips, steps, params


def as_numbers(step):
    return tuple(field.item() if isinstance(field, torch.Tensor) else field for field in step)


def assert_same_steps(deferred, immediate):
    for name, left, right in zip(FIELDS, as_numbers(deferred), as_numbers(immediate), strict=True):
        assert left == right or (isnan(left) and isnan(right)), name


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 10.0},
        {"percentile": 37.5, "window": 100},
        {"percentile": 90.0, "window": 3},
        {"percentile": 50.0, "window": 1},
        {"percentile": 50.0, "warmup": 40, "max_threshold": 0.3},
        {"percentile": 0.0},
        {"percentile": 100.0, "nonfinite": "pass"},
    ],
    ids=str,
)
def test_deferred_steps_are_those_of_the_host(options, late):
    count = 3_000 if len(options) <= 2 and options["percentile"] < 50 else 1_000
    makers = [lambda p: AutoClip([p], mode="deferred", **options), lambda p: AutoClip([p], mode="immediate", **options)]
    most = 0
    for _, clips, steps, params in run(norms_of_a_run(count), makers):
        assert_same_steps(*steps)
        assert torch.equal(params[0].grad.nan_to_num(), params[1].grad.nan_to_num())
        most = max(most, len(clips[0]._pipeline._deferred._pending))
    deferred, immediate = clips
    assert most == min(MOST_PENDING, options.get("window", MOST_PENDING))
    assert deferred.waits > 0
    assert deferred.history.to_bytes() == immediate.history.to_bytes()
    assert deferred.state_dict() == immediate.state_dict()


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("window", [None, 50])
def test_deferred_run_resumes_in_the_middle(late, window):
    norms = norms_of_a_run(600, seed=3)

    def make(param):
        return AutoClip([param], 25.0, mode="deferred", window=window)

    whole = [as_numbers(steps[0]) for _, _, steps, _ in run(norms, [make])]
    for _, clips, _, _ in run(norms[:301], [make]):
        state = clips[0].state_dict()  # also takes in what is pending, at every step

    def resume(param):
        clip = make(param)
        clip.load_state_dict(state)
        return clip

    rest = [as_numbers(steps[0]) for _, _, steps, _ in run(norms[301:], [resume])]
    np.testing.assert_array_equal(np.array(rest, dtype=float), np.array(whole[301:], dtype=float))


def test_percentile_may_change_while_norms_are_on_their_way(late):
    makers = [lambda p: AutoClip([p], mode="deferred"), lambda p: AutoClip([p], mode="immediate")]
    norms = np.random.default_rng(1).lognormal(size=300).astype(np.float32).tolist()
    for number, clips, (late_step, step), _ in run(norms, makers):
        assert_same_steps(late_step, step)
        for clip in clips:
            clip.percentile = number % 101
    assert clips[0].state_dict() == clips[1].state_dict()


def test_every_read_takes_in_what_is_pending(late):
    reads = [
        lambda clip: len(clip.history),
        lambda clip: clip.threshold,
        lambda clip: clip.steps,
        lambda clip: clip.clipped_steps,
        lambda clip: clip.nonfinite_steps,
        lambda clip: clip.histories["global"].values().tolist(),
        lambda clip: clip.thresholds,
        repr,
    ]
    norms = [float(norm) for norm in np.random.default_rng(2).lognormal(size=20)]
    makers = [lambda p: AutoClip([p], mode="deferred"), lambda p: AutoClip([p], mode="immediate")]
    for number, (deferred, immediate), _, _ in run(norms, makers):
        read = reads[number % len(reads)]
        assert read(deferred) == read(immediate)


def test_fields_are_tensors_and_log_is_numbers_that_have_arrived(monkeypatch):
    arrived = False
    monkeypatch.setattr(Crossing, "has_arrived", lambda self: arrived)
    for _, (clip,), (step,), _ in run([2.0, 4.0], [lambda p: AutoClip([p], 50.0, mode="deferred")]):
        assert all(isinstance(field, torch.Tensor) and field.shape == () for field in step)
        assert clip.log() == {}
    arrived = True
    assert clip.log() == {
        "grad_norm": 4.0,
        "clip_threshold": 3.0,
        "clip_scale": 0.75,
        "clipped": 1.0,
        "clipped_share": 0.5,
    }


def test_auto_is_immediate_on_a_cpu():
    for _, _, (step,), _ in run([2.0], [lambda p: AutoClip([p])]):
        assert isinstance(step.norm, float)


# Groups


def make_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("scope", ["global", "parameter", lambda name: name[0]])
@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
def test_deferred_groups_do_what_the_host_does(scope, nonfinite, late):
    models = [make_layers(), make_layers()]
    clips = [
        AutoClip(model, 40.0, scope=scope, mode=mode, nonfinite=nonfinite)
        for model, mode in zip(models, ("deferred", "immediate"), strict=True)
    ]
    for number in range(120):
        generator = torch.Generator().manual_seed(number)
        grads = [torch.randn(param.shape, generator=generator) for param in models[0].parameters()]
        if number % 10 == 3:
            grads[number // 10 % len(grads)].view(-1)[0] = nan
        absent = number // 7 % (len(grads) + 1)  # that many have a gradient of zero, or none
        for model in models:
            for index, (param, grad) in enumerate(zip(model.parameters(), grads, strict=True)):
                param.grad = None if index == absent else grad.clone()
        late_steps, steps = [clip.step() for clip in clips]
        if scope == "global":
            late_steps, steps = {"global": late_steps}, {"global": steps}
        assert late_steps.keys() == steps.keys()
        for name, step in steps.items():
            assert_same_steps(late_steps[name], step)
        for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None)
            if left.grad is not None:
                torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=0, equal_nan=True)
    assert clips[0].state_dict() == clips[1].state_dict()


# Non-finite norms that the host does not know of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_skip_leaves_zeros_whatever_was_there(dtype):
    param = nn.Parameter(torch.zeros(4, dtype=dtype))
    clip = AutoClip([param], mode="deferred")
    param.grad = torch.tensor([nan, inf, -inf, 1.0], dtype=dtype)
    assert clip.step().scale.item() == 0.0
    assert torch.equal(param.grad, torch.zeros(4, dtype=dtype))
    with pytest.warns(RuntimeWarning, match="dropped"):
        assert clip.nonfinite_steps == 1


def test_raise_comes_with_a_later_step_and_spares_the_parameters():
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=0.1)
    clip = attach(optimizer, mode="deferred", nonfinite="raise")
    for norm in (1.0, nan):
        param.grad = torch.tensor([norm])
        optimizer.step()
    before = param.item()
    assert isfinite(before)
    param.grad = torch.tensor([1.0])
    with pytest.raises(NonFiniteNormError, match="step 2"):
        optimizer.step()
    assert (param.item(), clip.steps) == (before, 2)
    optimizer.step()
    assert clip.steps == 3


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_fused_optimizer_leaves_everything_alone_when_a_step_is_skipped(name, mode):
    param = nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([param], lr=0.1, weight_decay=0.1, fused=True)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip(f"this torch cannot tell its fused {name} to leave a step out")
    clip = attach(optimizer, mode=mode)
    param.grad = torch.ones(3)
    optimizer.step()
    before, state = param.detach().clone(), {k: v.clone() for k, v in optimizer.state[param].items() if v is not None}
    param.grad = torch.tensor([1.0, nan, 1.0])
    optimizer.step()
    assert clip.nonfinite_steps == 1
    assert torch.equal(param, before)
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in state.items())
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_gradscaler_skips_are_not_seen(mode):
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    clip = attach(optimizer, 50.0, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for norm in (1.0, inf, 4.0, 2.0):
        param.grad = torch.tensor([0.0, norm]) * scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    assert (clip.steps, clip.nonfinite_steps) == (3, 0)
    assert clip.history.values().tolist() == [1.0, 2.0, 4.0]


def never_arrive(monkeypatch):
    monkeypatch.setattr(Crossing, "has_arrived", lambda self: False)


READS = {
    "repr": repr,
    "log": lambda clip: clip.log(),
    "state_dict": lambda clip: clip.state_dict(),
    "history": lambda clip: clip.history,
    "steps": lambda clip: clip.steps,
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_error_waits_for_the_next_step_and_is_raised_once(read, monkeypatch):
    never_arrive(monkeypatch)
    param = nn.Parameter(torch.zeros(1))
    clip = AutoClip([param], 0.0, mode="deferred", nonfinite="raise")
    for norm in (1.0, nan, nan, 2.0):
        param.grad = torch.tensor([norm])
        clip.step()
    for _ in range(2):
        read(clip)
    clip.threshold  # noqa: B018 - takes in what was on its way
    param.grad = torch.tensor([4.0])
    with pytest.raises(NonFiniteNormError, match="step 2"):
        clip.step()
    assert param.grad.item() == 4.0
    assert clip.step().scale.item() == 0.25  # the gradient is still there
    assert (clip.steps, clip.nonfinite_steps) == (5, 2)
    assert clip.history.values().tolist() == [1.0, 2.0, 4.0]


def test_loading_a_state_forgets_an_error_that_waits(monkeypatch):
    never_arrive(monkeypatch)
    param = nn.Parameter(torch.zeros(1))
    clip = AutoClip([param], mode="deferred", nonfinite="raise")
    param.grad = torch.tensor([1.0])
    clip.step()
    good = clip.state_dict()
    param.grad = torch.tensor([nan])
    clip.step()
    clip.load_state_dict(good)
    param.grad = torch.tensor([2.0])
    clip.step()
    assert clip.history.values().tolist() == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_dropped_steps_count_the_same_in_every_mode(scope):
    def run(make, mode):
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = make(params)
        clip = attach(optimizer, mode=mode, scope=scope)
        for value in (1.0, nan, 3.0, inf, 2.0):
            for param in params:
                param.grad = torch.full((2,), value)
            for _ in range(3):
                optimizer.step()
        return clip.steps, clip.nonfinite_steps, clip.state_dict()

    plain = run(lambda params: torch.optim.SGD(params, lr=0.1), "immediate")
    assert plain[:2] == (5, 2 if scope == "global" else 4)
    for fused, mode in ((False, "deferred"), (True, "immediate"), (True, "deferred")):
        assert run(lambda params, fused=fused: torch.optim.SGD(params, lr=0.1, fused=fused), mode) == plain


@pytest.mark.filterwarnings("ignore:The gradient norm")
@pytest.mark.parametrize("window", [None, 3])
def test_owner_of_a_step_may_change_its_tensors(late, window):
    makers = [
        lambda p: AutoClip([p], 30.0, mode="deferred", window=window),
        lambda p: AutoClip([p], 30.0, mode="immediate", window=window),
    ]
    for number, clips, (late_step, step), _ in run(norms_of_a_run(300), makers):
        assert_same_steps(late_step, step)
        for field in late_step:
            field.zero_()  # as torch.distributed.all_reduce writes
        if number % 20 == 0:
            assert clips[0].state_dict() == clips[1].state_dict()


def test_deferred_needs_float64():
    with pytest.raises(AutoClipError, match="float64"):
        AutoClip([nn.Parameter(torch.zeros(1))], mode="deferred")._pipeline.decide(
            type("Gradients", (), {"device": torch.device("mps")}), torch.zeros(1)
        )
