"""On an accelerator nobody waits, all devices agree, and the thresholds are those of the host to the last bit.

There need be none: devices are simulated, with their asynchrony (simulated_device.py). Where there is one, it goes
through the same tests, as far as they do not set its speed or its defects: `pytest -m device`.
"""

import gc
import math
from contextlib import nullcontext
from math import inf, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach, batches, decision, kernel
from torch import nn

from autoclip_core import AutoClipError, AutoClipValueError

from .real_device import IS_THERE, RealMachine
from .simulated_device import HostWaitsError, simulated_device

SHAPES = [(3, 4), (4,), (5,)]
ignore_nonfinite = pytest.mark.filterwarnings("ignore:The gradient norm")


REAL = pytest.param(
    "real", marks=[pytest.mark.device, pytest.mark.skipif(not IS_THERE, reason="there is no CUDA or XPU device")]
)


@pytest.fixture(params=["simulated", REAL])
def machine(request, monkeypatch):
    if request.param == "simulated":
        with simulated_device(monkeypatch) as made:
            yield made
    else:
        made = RealMachine()
        with made.never_waiting():
            yield made


def gradients_of_a_run(count, dtype=torch.float32, seed=0):
    """Gradients whose norms drift over decades, with NaN, infinity and zeros in between."""
    chance = np.random.default_rng(seed)
    for step in range(count):
        grads = [torch.tensor(chance.normal(size=s) * math.exp(chance.normal() - 7 * step / count)) for s in SHAPES]
        if step % 9 == 4:
            grads[0].view(-1)[0] = (nan, inf)[step % 2]
        if step % 9 == 7:
            grads = [torch.zeros(shape) for shape in SHAPES]
        yield [grad.to(dtype) for grad in grads]


def norm_of(grads):
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, dtype=wide))).item()


def parameters(machine, shapes=SHAPES, dtype=torch.float32, index=0):
    return [nn.Parameter(machine.put(torch.zeros(shape, dtype=dtype), index)) for shape in shapes]


def on_two_devices(machine):
    if isinstance(machine, RealMachine) and torch.accelerator.device_count() < 2:
        pytest.skip("there is one device only")
    return [*parameters(machine, [(3,)], index=0), *parameters(machine, [(4,)], index=1)]


def give(machine, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = machine.put(grad, param.device.index) if param.device.type != "cpu" else grad.clone()


# Exact, however late


# 0: the device does nothing until somebody waits for it; 0.8: it falls behind; 2: it keeps up.
@ignore_nonfinite
@pytest.mark.parametrize("speed", [0.0, 0.8, 2.0])
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 6}, {"warmup": 9, "max_threshold": 6.0}], ids=str)
def test_thresholds_are_exact_however_late_norms_arrive(speed, options, monkeypatch):
    with simulated_device(monkeypatch, speed) as machine:
        params = parameters(machine)
        clip, steps = AutoClip(params, 37.0, **options), []
        for number, grads in enumerate(gradients_of_a_run(30)):
            give(machine, params, grads)
            steps.append((clip.step(), [param.grad for param in params], grads))
            clip.log()
            if number < min(4, options.get("window", 4)):
                assert machine.waits_for_events == 0
            if number == 20:
                state = clip.state_dict()  # takes in what is on its way
                clip = AutoClip(params, 37.0, **options)
                clip.load_state_dict(state)
        norms = []
        for step, after, grads in steps:
            own = norm_of(grads)
            if 0.0 < own < inf:
                norms.append(own)
            threshold = min(np.percentile(norms[-options.get("window", 99) :], 37.0), options.get("max_threshold", inf))
            limit = threshold if len(norms) > options.get("warmup", 0) else options["max_threshold"]
            scale = 0.0 if not math.isfinite(own) else limit / own if own > limit else 1.0
            assert [machine.get(field).item() for field in step[1:]] == [threshold, scale, 0 < scale < 1, 0 < own < inf]
            for left, grad in zip(after, grads, strict=True):
                expected = grad * torch.tensor(scale, dtype=torch.float32) if scale else torch.zeros_like(grad)
                assert torch.equal(machine.get(left), expected)
        assert clip.steps == 30
        assert machine.waits == 0


@ignore_nonfinite
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 6}, {"warmup": 9, "max_threshold": 6.0}, {"nonfinite": "pass"}], ids=str
)
def test_decisions_in_one_launch_are_the_same(options, scope, machine, monkeypatch):
    def run(record_at):
        monkeypatch.setattr(decision, "_RECORD_AT", record_at)
        params, steps = parameters(machine), []
        clip = AutoClip(params, 37.0, scope=scope, **options)
        for number, grads in enumerate(gradients_of_a_run(40)):
            if number == 20:
                clip.percentile = 80.0
            give(machine, params, grads)
            result = clip.step()
            steps.append([result] if scope == "global" else [*result.values()])
        recorded = clip._pipeline._deferred._decisions._recorded
        return [[machine.get(field).item() for step in each for field in step] for each in steps], recorded

    one_by_one, none = run(10**9)
    at_once, recorded = run(3)
    assert not none
    assert recorded
    np.testing.assert_array_equal(at_once, one_by_one)


@pytest.mark.parametrize("fails_at", ["capture_begin", "capture_end"])
def test_what_cannot_be_recorded_is_launched_one_by_one(fails_at, monkeypatch):
    with simulated_device(monkeypatch) as machine:
        tries = []

        def fail(*args, **kwargs):
            tries.append(args)
            machine.capturing, machine.recording = False, None
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda.CUDAGraph, fails_at, fail)
        params, norms = parameters(machine), []
        clip = AutoClip(params, 50.0)
        for number in range(40):
            give(machine, params, [torch.full(shape, number + 1.0) for shape in SHAPES])
            norms.append(norm_of([torch.full(shape, number + 1.0) for shape in SHAPES]))
            assert machine.get(clip.step().threshold).item() == np.percentile(norms, 50.0)
        calls = clip._pipeline._deferred._decisions._calls.values()
        assert len(tries) == sum(count >= decision._RECORD_AT for count in calls) > 0
        assert gc.isenabled()


@ignore_nonfinite
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": True, "capturable": True}),
        ("Adagrad", {"fused": True}),
    ],
    ids=str,
)
def test_optimizers_do_what_they_do_on_a_cpu(name, options, scope, monkeypatch):
    def train(machine):
        params = [nn.Parameter(machine.put(torch.ones(s)) if machine else torch.ones(s)) for s in SHAPES]
        here = options if machine else {key: value for key, value in options.items() if key != "capturable"}
        optimizer = getattr(torch.optim, name)(params, lr=0.1, **here)
        clip = attach(optimizer, 50.0, scope=scope, mode="auto" if machine else "deferred")
        for grads in gradients_of_a_run(12):
            give(machine, params, grads)
            optimizer.step()
        return [machine.get(param) if machine else param.detach() for param in params], clip.state_dict()

    with simulated_device(monkeypatch) as machine:
        ours, state = train(machine)
    monkeypatch.setattr(kernel, "is_usable", lambda: False)  # it rounds less than torch does
    expected, expected_state = train(None)
    assert state == expected_state
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_another_stream_after_a_wait(machine):
    params = parameters(machine, [(3,)])
    clip = AutoClip(params, 50.0)
    for step in range(12):
        with machine.side_stream() if step % 2 else nullcontext():
            give(machine, params, [torch.full((3,), step + 1.0)])
            result = clip.step()
    norms = [norm_of([torch.full((3,), step + 1.0)]) for step in range(12)]
    assert machine.get(result.threshold).item() == np.percentile(norms, 50.0)


def test_what_a_step_returns_may_be_changed(monkeypatch):
    with simulated_device(monkeypatch, 0.0) as machine:
        params = parameters(machine, [(1,)])
        clip, thresholds = AutoClip(params, 50.0), []
        for value in (1.0, 2.0, 3.0, 4.0):
            give(machine, params, [torch.tensor([value])])
            step = clip.step()
            thresholds.append(step.threshold.clone())
            for field in step[:3]:
                field.mul_(4)
        assert [machine.get(threshold).item() for threshold in thresholds] == [1.0, 1.5, 2.0, 2.5]
        assert clip.history.values().tolist() == [1.0, 2.0, 3.0, 4.0]


def test_pinned_memory_does_not_pile_up(monkeypatch):
    with simulated_device(monkeypatch) as machine:
        params = parameters(machine)
        clip, most = AutoClip(params, scope="parameter"), 0
        for grads in gradients_of_a_run(60, seed=1):
            give(machine, params, [torch.nan_to_num(grad, posinf=1.0) for grad in grads])
            clip.step()
            most = max(most, machine.pinned_blocks)
        assert 0 < most <= 2 * 4  # of each step that may be on its way: its table, its norms
        assert clip.steps == 60
        machine.get(params[0])
        del clip
        assert machine.pinned_blocks == 0


# Devices


@pytest.mark.parametrize("default", ["the machine's", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_default_device_is_not_where_the_host_computes(default, dtype, scope, machine):
    params = parameters(machine, dtype=dtype)
    clip = AutoClip(params, 0.0, scope=scope)
    for size in (1.0, 8.0):
        give(machine, params, [torch.full(shape, size, dtype=dtype) for shape in SHAPES])
        if size > 1.0:
            params[1].grad = None
        with torch.device("meta" if default == "meta" else machine.kind):
            clip.step()
    assert torch.equal(machine.get(params[0].grad), torch.ones(SHAPES[0], dtype=dtype)) == (scope == "parameter")
    assert machine.get(params[0].grad).max() < 2.0
    assert clip.steps == 2


@pytest.mark.parametrize("default", ["the machine's", "meta"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_default_device_does_not_reach_into_steps_on_a_cpu(default, fused, mode, machine):
    param = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([param], lr=1.0, fused=fused)
    attach(optimizer, 0.0, mode=mode)
    for size in (1.0, 8.0):
        param.grad = torch.full((3,), size)
        with torch.device("meta" if default == "meta" else machine.kind):
            optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -2.0))


@pytest.mark.parametrize("index", [0, 1])
def test_gradscaler_may_be_on_another_device_than_the_first_gradient(index, machine):
    params = on_two_devices(machine)
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    clip = attach(optimizer, 50.0)
    for step in range(8):
        give(machine, params, [torch.full(param.shape, 1024.0 * (step + 1)) for param in params])
        before = [machine.get(param).clone() for param in params]
        optimizer.grad_scale = machine.put(torch.tensor(1024.0), index)
        # What is found on two devices is added up.
        optimizer.found_inf = machine.put(torch.tensor(2.0 * (step == 5)), index)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        same = [torch.equal(machine.get(param), old) for param, old in zip(params, before, strict=True)]
        assert same == [step == 5] * 2
    assert clip.steps == 7
    assert clip.history.values()[0] == pytest.approx(7**0.5, rel=1e-7)


def test_gradients_of_the_host_are_not_scaled_before_the_scale_is_there(monkeypatch):
    with simulated_device(monkeypatch, 0.0, patient=True) as machine:
        on_device, on_host = [*parameters(machine, [(2,)]), nn.Parameter(torch.zeros(3))]
        clip = AutoClip([on_device, on_host], 0.0, mode="deferred")
        for size in (1.0, 8.0):
            give(machine, [on_device, on_host], [torch.full((2,), size), torch.full((3,), size)])
            clip.step()
            torch.testing.assert_close(on_host.grad, torch.ones(3))
            torch.testing.assert_close(machine.get(on_device.grad), torch.ones(2))


@pytest.mark.parametrize("first", [0, 1])
def test_auto_is_immediate_where_some_gradients_are_of_the_host(first, monkeypatch):
    with simulated_device(monkeypatch, patient=True) as machine:
        params = [*parameters(machine, [(2,)]), nn.Parameter(torch.zeros(3))]
        clip = AutoClip([params[first], params[1 - first]], 0.0)
        for size in (1.0, 8.0):
            give(machine, params, [torch.full((2,), size), torch.full((3,), size)])
            step = clip.step()
        assert isinstance(step.scale, float)
        assert torch.equal(machine.get(params[0].grad), torch.ones(2))
        assert torch.equal(params[1].grad, torch.ones(3))


def test_first_gradient_may_be_now_on_one_device_and_now_on_another(machine):
    params = on_two_devices(machine)
    clip, norms = AutoClip(params, 30.0), []
    for number in range(12):
        grads = [torch.full(param.shape, number + 1.0) for param in params]
        give(machine, params, grads)
        if number % 3 == 1:
            params[0].grad = None
        if number % 3 == 1 and number > 6:
            give(machine, params[:1], grads[:1])
            params[1].grad = None
        expected = norm_of([grad for param, grad in zip(params, grads, strict=True) if param.grad is not None])
        step = clip.step()
        norms.append(machine.get(step.norm).item())
        assert norms[-1] == pytest.approx(expected, rel=1e-6)
        assert machine.get(step.threshold).item() == np.percentile(norms, 30.0)


def test_another_first_gradient_is_nothing_to_wait_for(monkeypatch):
    with simulated_device(monkeypatch, 0.0) as machine:
        params = [*on_two_devices(machine), *parameters(machine, [(2,)])]
        clip = AutoClip(params)
        for first in (0, 1, 0):
            give(machine, params, [torch.ones(param.shape) for param in params])
            params[0].grad = None if first else params[0].grad
            clip.step()
        assert machine.waits_for_events == 0


@pytest.mark.parametrize("fused", [False, True])
def test_without_float64_the_host_decides(fused, monkeypatch):
    with simulated_device(monkeypatch, patient=True, has_float64=False) as machine:
        params = parameters(machine, [(3,)])
        optimizer = torch.optim.SGD(params, lr=1.0, fused=fused)
        clip = attach(optimizer, 0.0)
        for size in (1.0, 8.0):
            give(machine, params, [torch.full((3,), 1024.0 * size if fused else size)])
            if fused:
                optimizer.grad_scale = machine.put(torch.tensor(1024.0))
            optimizer.step()
        torch.testing.assert_close(machine.get(params[0]), torch.full((3,), -2.0))
        assert clip.clipped_steps == 1
        give(machine, params, [torch.ones(3)])
        with pytest.raises(AutoClipValueError, match="float64"):
            AutoClip(params, mode="deferred").step()
        assert torch.equal(machine.get(params[0].grad), torch.ones(3))


def test_xpu_without_float64_says_so(monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=False))
    with simulated_device(monkeypatch, kind="xpu", patient=True) as machine:
        params = parameters(machine, [(4,)])
        give(machine, params, [torch.ones(4)])
        assert AutoClip(params).step().norm == 2.0
        with pytest.raises(AutoClipValueError, match="xpu lacks"):
            AutoClip(params, mode="deferred").step()


def test_without_float64_norms_of_several_devices_are_added_up(monkeypatch):
    with simulated_device(monkeypatch, patient=True, has_float64=False) as machine:
        params = [*parameters(machine, [(3,)], index=0), *parameters(machine, [(1,)], index=1)]
        give(machine, params, [torch.ones(3), torch.ones(1)])
        assert AutoClip(params).step().norm == 2.0


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_without_pinned_memory_the_host_decides(scope, monkeypatch):
    with simulated_device(monkeypatch, kind="mtia", patient=True, has_float64=False) as machine:

        def no_pinned_memory(tensor):
            raise RuntimeError("Cannot access accelerator device when none is available.")

        monkeypatch.setattr(torch.Tensor, "pin_memory", no_pinned_memory)
        params = [*parameters(machine, [(2,)] * 3), nn.Parameter(torch.zeros(2))]
        clip = AutoClip([(str(at), param) for at, param in enumerate(params)], 0.0, scope=scope)
        for size in (1.0, 8.0):
            give(machine, params, [torch.full((2,), size)] * 4)
            params[1].grad = None
            clip.step()
        for param in (params[0], params[2], params[3]):
            torch.testing.assert_close(machine.get(param.grad), torch.ones(2))


def test_memory_that_is_short_does_not_tell_what_a_device_has(monkeypatch):
    with simulated_device(monkeypatch) as machine:
        params = parameters(machine)
        give(machine, params, [torch.ones(shape) for shape in SHAPES])
        with monkeypatch.context() as patch:

            def out_of_memory(*args, **kwargs):
                raise torch.OutOfMemoryError

            patch.setattr(torch, "ones", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                AutoClip(params).step()
        assert isinstance(AutoClip(params).step().scale, torch.Tensor)


def test_watch_over_updates_waits_for_no_device(monkeypatch):
    with simulated_device(monkeypatch) as machine:
        params = parameters(machine)
        optimizer = torch.optim.SGD(params, lr=0.1)
        clip = attach(optimizer)
        monkeypatch.setattr(nn, "Parameter", type(params[0]))  # of a device they are parameters like all others
        for _ in range(8):
            clip._attachment._watch._after_backward(params[0])
            clip.log()
        assert machine.waits == 0


def test_other_accelerators_are_deferred_if_told_so(monkeypatch):
    with simulated_device(monkeypatch, kind="mtia") as machine:
        params = parameters(machine)
        clip = AutoClip(params, mode="deferred")
        for grads in gradients_of_a_run(4):
            give(machine, params, grads)
            step = clip.step()
        assert machine.get(step.norm).item() == norm_of(grads)
        with pytest.raises(HostWaitsError):
            AutoClip(params).step()
    with simulated_device(monkeypatch, kind="mtia") as machine, monkeypatch.context() as patch:
        params = parameters(machine)
        give(machine, params, grads)

        def no_events(device):
            raise RuntimeError("there are none")

        patch.setattr(torch, "Event", no_events)
        with pytest.raises(AutoClipError, match='mtia; use "immediate"'):
            AutoClip(params, mode="deferred").step()


def test_immediate_mode_does_wait(machine):
    params = parameters(machine)
    give(machine, params, [torch.ones(shape) for shape in SHAPES])
    with pytest.raises((HostWaitsError, RuntimeError), match=r"tolist|synchroniz"):
        AutoClip(params, mode="immediate").step()


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_captured_step_is_refused(mode, attached, pending, machine):
    params = parameters(machine)
    optimizer = torch.optim.AdamW(params, capturable=True, foreach=True)
    clip = attach(optimizer, mode=mode) if attached else AutoClip(params, mode=mode)
    step = optimizer.step if attached else clip.step
    for number in range(pending * (mode == "deferred")):  # what is on its way is not asked for either
        give(machine, params, [torch.full(shape, number + 1.0) for shape in SHAPES])
        step()
    steps = clip.steps
    give(machine, params, [torch.ones(shape) for shape in SHAPES])
    with machine.counting() as launched, machine.capture():
        pass
    empty = launched.copy()
    with machine.counting() as launched, machine.capture(), pytest.raises(AutoClipError, match="forward and back"):
        step()
    assert launched == empty
    assert clip.steps == steps
    if mode == "deferred":  # and all goes on
        step()
        assert clip.steps == steps + 1


def test_deterministic_algorithms_do_not_stop_a_window(machine):
    params = parameters(machine)
    clip = AutoClip(params, window=3)
    torch.use_deterministic_algorithms(True)
    try:
        for grads in gradients_of_a_run(4):
            give(machine, params, grads)
            clip.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert clip.steps == 4


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scaled_by_more_than_three_digits(dtype, machine):
    params = parameters(machine, [(4000,)], dtype)
    clip, chance, errors = AutoClip(params, 0.0), torch.Generator().manual_seed(0), []
    for size in (1.0, *(1.1 + 5 * torch.rand(20, generator=chance)).tolist()):
        grad = (torch.randn(4000, generator=chance) * size).to(dtype)
        give(machine, params, [grad])
        step = clip.step()
        scale, left = machine.get(step.scale), machine.get(params[0].grad)
        assert dtype != torch.float16 or torch.equal(left, (grad.float() * scale.float()).to(dtype))
        errors.append(left.double().norm() / machine.get(step.threshold) - 1)
    assert clip.clipped_steps == 20
    # Elements are rounded up or down. A factor of three digits makes it 1.6e-3.
    assert torch.stack(errors[1:]).square().mean().sqrt() < 5e-4


def test_two_factors_of_bfloat16_make_one_of_four_digits(machine):
    chance = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.cat([torch.ones(1), chance])
    scales = torch.cat([scales, scales * 2.0**-60, torch.zeros(1)])
    first, second = batches._factors(machine.put(scales), torch.device(machine.kind, 0), torch.bfloat16)
    product = machine.get(first).double() * machine.get(second).double()
    assert (product - scales).abs().max() > 0
    assert ((product - scales).abs() <= 4e-4 * scales).all()
    assert product[0] == 1.0


# Launches


def launches_of(machine, step, params, dtype=torch.float32, warm=5):
    """How many launches a step makes, at most, once it has gone on for a while."""
    most = 0
    for number in range(warm + 3):
        give(machine, params, [torch.full(param.shape, number + 1.0, dtype=dtype) for param in params])
        with machine.counting() as launched:
            step()
        assert not {"lerp", "addcmul", "addcdiv"} & launched.keys()
        if number >= warm:
            most = max(most, launched.total())
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_launches_of_a_step(window, dtype, machine):
    params = parameters(machine, [(2,)] * 100, dtype)
    assert launches_of(machine, AutoClip(params, window=window).step, params, dtype) <= 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorded_decision_is_one_launch(dtype, monkeypatch):
    with simulated_device(monkeypatch, 2.0) as machine:
        params = parameters(machine, [(2,)] * 100, dtype)
        assert launches_of(machine, AutoClip(params).step, params, dtype, warm=60) <= 20
        optimizer = torch.optim.AdamW(params, fused=True)
        alone = launches_of(machine, optimizer.step, params, dtype)
        attach(optimizer)
        assert launches_of(machine, optimizer.step, params, dtype, warm=60) <= alone + 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_several_groups(dtype, machine):
    params = parameters(machine, [(2,)] * 100, dtype)
    one = launches_of(machine, AutoClip(params).step, params, dtype)
    for count in (2, 10):
        named = [(f"{index * count // 100}", param) for index, param in enumerate(params)]
        clip = AutoClip([(f"{name}.{at}", param) for at, (name, param) in enumerate(named)], scope=lambda name: name[0])
        assert len(clip.histories) == count
        assert launches_of(machine, clip.step, params, dtype) <= one + 3 * count


@pytest.mark.parametrize("window", [None, 5])
def test_launches_inside_a_fused_optimizer(window, machine):
    params = parameters(machine, [(2,)] * 100)
    optimizer = torch.optim.AdamW(params, fused=True)
    alone = launches_of(machine, optimizer.step, params)
    attach(optimizer, window=window)
    assert launches_of(machine, optimizer.step, params) <= alone + 34
