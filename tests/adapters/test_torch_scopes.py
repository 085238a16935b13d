"""Groups with a norm, a history and a threshold of their own: each does what an AutoClip of its own would do."""

import copy
from math import inf, nan

import pytest
import torch
from autoclip_torch import AutoClip, attach
from torch import nn

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError, NonFiniteNormError, StateError


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def fill(model, number, poisoned=()):
    """The same gradients for the same number, of different sizes per parameter."""
    generator = torch.Generator().manual_seed(number)
    for index, param in enumerate(model.parameters()):
        param.grad = torch.randn(param.shape, generator=generator) * 10.0**index
        if index in poisoned:
            param.grad.view(-1)[0] = nan


def grads_of(model):
    return [param.grad.clone() for param in model.parameters()]


def layer_of(name):
    return f"layer {name[0]}"


def two_groups(model):
    return torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2:].parameters()}], lr=0.1)


SCOPES = {
    "group": (two_groups, "group", {"0": [0, 1], "1": [2, 3, 4, 5]}),
    "parameter": (
        lambda model: model,
        "parameter",
        {
            name: [index]
            for index, name in enumerate(["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"])
        },
    ),
    "parameter of an optimizer": (
        two_groups,
        "parameter",
        {"0.0": [0], "0.1": [1], "1.0": [2], "1.1": [3], "1.2": [4], "1.3": [5]},
    ),
    "parameter of an optimizer that knows names": (
        lambda model: torch.optim.SGD(model[0].named_parameters(), lr=0.1),
        "parameter",
        {"weight": [0], "bias": [1]},
    ),
    "pairs": (lambda model: list(model[2].named_parameters()), "parameter", {"weight": [2], "bias": [3]}),
    "tensors": (lambda model: model[2].parameters(), "parameter", {"0": [2], "1": [3]}),
    "function": (lambda model: model, layer_of, {"layer 0": [0, 1], "layer 2": [2, 3], "layer 4": [4, 5]}),
}


@pytest.mark.parametrize(("source", "scope", "groups"), SCOPES.values(), ids=SCOPES)
def test_each_group_has_the_clipper_that_it_would_have_alone(source, scope, groups):
    model, alone = make_model(), make_model()
    clip = AutoClip(source(model), 40.0, scope=scope)
    params = list(alone.parameters())
    clips = {name: AutoClip([params[index] for index in indices], 40.0) for name, indices in groups.items()}
    for number in range(30):
        fill(model, number)
        fill(alone, number)
        assert clip.step() == {name: single.step() for name, single in clips.items()}
        assert all(map(torch.equal, grads_of(model), grads_of(alone)))
    assert 0 < clip.clipped_steps == sum(single.clipped_steps for single in clips.values())
    assert clip.steps == 30
    assert clip.thresholds == {name: single.threshold for name, single in clips.items()}
    for name, history in clip.histories.items():
        assert history.to_bytes() == clips[name].history.to_bytes()


def test_global_scope_is_one_group_of_all():
    model = make_model()
    clip = AutoClip(model)
    fill(model, 0)
    clip.step()
    assert clip.histories.keys() == clip.thresholds.keys() == {"global"}
    assert clip.thresholds["global"] == clip.threshold
    assert len(clip.histories["global"]) == len(clip.history) == 1


def test_groups_without_a_gradient_are_left_out():
    model = make_model()
    clip = AutoClip(model, scope=layer_of)
    fill(model, 0)
    for param in model[2].parameters():
        param.grad = None
    assert clip.step().keys() == {"layer 0", "layer 4"}
    assert {name: len(history) for name, history in clip.histories.items()} == {
        "layer 0": 1,
        "layer 2": 0,
        "layer 4": 1,
    }
    for param in model.parameters():
        param.grad = None
    with pytest.warns(RuntimeWarning, match="No parameter has a gradient"):
        assert clip.step() == {}


@pytest.mark.parametrize("attached", [False, True])
def test_one_group_without_a_finite_norm_drops_the_whole_update(attached):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clip = attach(optimizer, scope="parameter") if attached else AutoClip(optimizer, scope="parameter")
    fill(model, 0)
    optimizer.step() if attached else clip.step()
    before = [param.detach().clone() for param in model.parameters()]
    fill(model, 1, poisoned=[3])
    with pytest.warns(RuntimeWarning, match="dropped"):
        optimizer.step() if attached else clip.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(grad.any() for grad in grads_of(model))
    assert (clip.nonfinite_steps, clip.steps) == (1, 2)


def test_raise_names_the_group_and_records_nothing():
    model = make_model()
    clip = AutoClip(model, scope="parameter", nonfinite="raise")
    fill(model, 0)
    clip.step()
    fill(model, 1, poisoned=[3])
    before = grads_of(model)
    with pytest.raises(NonFiniteNormError) as caught:
        clip.step()
    assert "2.bias" in caught.value.__notes__[0]
    assert {len(history) for history in clip.histories.values()} == {1}
    assert all(
        torch.equal(left.nan_to_num(), right.nan_to_num()) for left, right in zip(before, grads_of(model), strict=True)
    )


def test_groups_added_later_have_histories_of_their_own():
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    clip = attach(optimizer, scope="group")
    fill(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    fill(model, 1)
    optimizer.step()
    assert {name: len(history) for name, history in clip.histories.items()} == {"0": 2, "1": 1}


def test_log_names_the_groups():
    model = make_model()
    clip = AutoClip(model, 0.0, scope=layer_of)
    assert clip.log() == {}
    for number in range(3):
        fill(model, number)
        steps = clip.step()
    log = clip.log()
    assert len(log) == 4 * 3 + 1
    for name, step in steps.items():
        assert log[f"grad_norm/{name}"] == step.norm
        assert log[f"clip_threshold/{name}"] == step.threshold
        assert log[f"clip_scale/{name}"] == step.scale
        assert log[f"clipped/{name}"] == step.clipped
    assert log["clipped_share"] == pytest.approx(clip.clipped_steps / 9)
    assert {type(value) for value in log.values()} == {float}


def test_share_clipped_is_that_of_the_last_hundred_steps():
    param = nn.Parameter(torch.zeros(1))
    clip = AutoClip([param], 0.0)
    for number in range(250):  # of the first 200 only the first is not clipped, of the last 50 none is
        param.grad = torch.tensor([1.0 + number if number < 200 else 1.0 / number])
        clip.step()
    assert clip.log()["clipped_share"] == 0.5


def test_what_only_one_history_has_points_to_the_others():
    clip = AutoClip(make_model(), scope="parameter")
    for name in ("history", "threshold"):
        with pytest.raises(AutoClipError, match=f"each group has its own {name}"):
            getattr(clip, name)
    assert "6 groups" in repr(clip)


def test_percentile_is_that_of_all_groups():
    model = make_model()
    clip = AutoClip(model, scope="parameter")
    fill(model, 0)
    clip.step()
    clip.percentile = 77.0
    fill(model, 1)
    steps = clip.step()
    for name, history in clip.histories.items():
        assert steps[name].threshold == history.percentile(77.0)
    with pytest.raises(AutoClipValueError):
        clip.percentile = 101.0
    assert clip.percentile == 77.0


@pytest.mark.parametrize("scope", ["parameter", "group", layer_of])
def test_state_of_groups_resumes(scope):
    runs = []
    for _ in range(2):
        model = make_model()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        runs.append((model, optimizer, attach(optimizer, 40.0, scope=scope, window=20)))
    for number in range(60):
        if number == 30:
            for left, right in zip(*runs, strict=True):
                right.load_state_dict(copy.deepcopy(left.state_dict()))
        for model, optimizer, _ in runs if number >= 30 else runs[:1]:
            fill(model, number)
            optimizer.step()
    assert all(map(torch.equal, runs[0][0].parameters(), runs[1][0].parameters()))
    assert runs[0][2].state_dict() == runs[1][2].state_dict()


def test_state_of_other_groups_is_refused():
    model = make_model()
    state = AutoClip(model, scope="parameter").state_dict()
    for other, says in (
        (AutoClip(model), "scope='parameter'.*scope='global'"),
        (AutoClip(model, scope=layer_of), "scope='parameter'.*scope='function'"),
        (AutoClip(model[0], scope="parameter"), "lacks 2 of the groups, among them 'bias'"),
        (AutoClip(list(model.named_parameters())[:5], scope="parameter"), "has besides 1 of the groups.*'4.bias'"),
    ):
        before = other.state_dict()
        with pytest.raises(StateError, match=says):
            other.load_state_dict(state)
        assert other.state_dict() == before


@pytest.mark.parametrize(
    ("scope", "error", "says"),
    [
        ("layer", AutoClipValueError, "'layer' was given"),
        (None, AutoClipValueError, "None was given"),
        ("group", AutoClipValueError, "parameter groups of an optimizer"),
        (lambda name: 3, AutoClipTypeError, "'0.weight' it gave 3"),
    ],
)
def test_scopes_that_cannot_be_used_are_refused(scope, error, says):
    with pytest.raises(error, match=says):
        AutoClip(make_model(), scope=scope)


def test_process_group_needs_the_global_scope():
    with pytest.raises(AutoClipValueError, match="global"):
        AutoClip(make_model(), scope="parameter", process_group=object())


def test_mode_that_is_none_is_refused():
    with pytest.raises(AutoClipValueError, match="'late' was given"):
        AutoClip(make_model(), mode="late")


# The same gradients a second time


def test_second_step_on_the_same_gradients_is_not_recorded():
    for scope in ("global", "parameter"):
        model = make_model()
        clip = AutoClip(model, 30.0, scope=scope)
        for number in range(10):
            fill(model, number)
            clip.step()
            before = grads_of(model)
            again = clip.step()
            for step in [again] if scope == "global" else again.values():
                assert (step.scale, step.clipped, step.recorded) == (1.0, False, False)
                assert step.threshold < inf
            assert all(map(torch.equal, before, grads_of(model)))
        assert clip.steps == 10
        assert {len(history) for history in clip.histories.values()} == {10}


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_second_step_of_an_attached_optimizer_is_not_recorded(options, mode):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **options)
    clip = attach(optimizer, 30.0, mode=mode)
    for number in range(10):
        fill(model, number)
        optimizer.step()
        optimizer.step()
    assert (clip.steps, len(clip.history)) == (10, 10)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_new_gradients_of_the_same_norm_are_recorded(set_to_none):
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clip = attach(optimizer)
    for _ in range(10):  # a linear loss has one gradient
        optimizer.zero_grad(set_to_none)
        weight.sum().backward()
        optimizer.step()
    assert len(clip.history) == 10


def test_gradients_written_behind_the_back_of_autograd_are_recorded():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    clip = AutoClip([weight])
    clip.step()
    version = weight.grad._version
    weight.grad.data.mul_(7.0)  # as a replayed CUDA graph does
    assert weight.grad._version == version
    assert clip.step().recorded


# Scaling inside a fused optimizer


FUSED = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, fused=True),
}


def ulp(value):
    return torch.nextafter(abs(value), torch.tensor(inf)) - abs(value)


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_fused_optimizer_scales_by_itself(make, mode, monkeypatch):
    folded, by_hand = make_model(), make_model()
    optimizer, hand = make(folded.parameters()), make(by_hand.parameters())
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("this torch cannot tell it to scale")
    clip, other = attach(optimizer, 0.0, mode=mode), AutoClip(by_hand, 0.0)
    clipped = 0
    for number in range(20):
        fill(folded, number)
        fill(by_hand, number)
        clipped += other.step().clipped
        with monkeypatch.context() as patch:
            if number:  # nothing but the optimizer touches the gradients; in the first step it may lack its momentum
                patch.setattr(torch, "_foreach_mul_", None)
            optimizer.step()
        hand.step()
        # A quotient by a rounded reciprocal instead of a product: one unit in the last place of a gradient, and of a
        # parameter what follows from that, a few units where its update brings it near zero.
        for left, right in zip(grads_of(folded), grads_of(by_hand), strict=True):
            assert (abs(left - right) <= ulp(right)).all()
        for left, right in zip(folded.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
            left.data.copy_(right)
        optimizer.load_state_dict(copy.deepcopy(hand.state_dict()))
    assert clipped > 10
    assert clip.clipped_steps == clipped
    assert not hasattr(optimizer, "grad_scale")


def test_state_of_parameters_without_names_loads_where_the_optimizer_knows_them():
    model = make_model()
    fill(model, 0)
    without, with_names = (
        AutoClip(torch.optim.SGD(params, lr=0.1), scope="parameter")
        for params in (model.parameters(), model.named_parameters())
    )
    without.step()
    with_names.load_state_dict(without.state_dict())
    for (name, history), saved in zip(with_names.histories.items(), without.histories.values(), strict=True):
        assert history.values().tolist() == saved.values().tolist() != [], name
    assert list(with_names.histories) == [name for name, _ in model.named_parameters()]


def test_fused_optimizer_that_failed_keeps_no_scale():
    model = make_model()
    optimizer = FUSED["adamw"](model.parameters())
    clip = attach(optimizer, 0.0)
    for number in range(3):
        fill(model, number)
        optimizer.step()
    betas, optimizer.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"], None
    fill(model, 3)
    for param in model.parameters():
        param.grad *= 100.0
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.grad_scale.item() > 1.0  # it was lent, and the hook that takes it back was not reached
    optimizer.param_groups[0]["betas"] = betas
    fill(model, 3)
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")
    # Of the two last norms one is a hundredth of the other: nothing else has scaled it.
    *_, last = sorted(clip.history.values().tolist())
    assert any(norm == pytest.approx(last / 100.0) for norm in clip.history.values().tolist())


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_fused_optimizer_unscales_and_clips_in_one(mode):
    models = [make_model(), make_model()]
    optimizers = [FUSED["sgd"](model.parameters()) for model in models]
    clip = attach(optimizers[0], 30.0, mode=mode)
    other = attach(optimizers[1], 30.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    for number in range(20):
        for model in models:
            fill(model, number)
        for param in models[0].parameters():
            param.grad = scaler.scale(param.grad)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))
    torch.testing.assert_close(clip.history.values(), other.history.values(), rtol=1e-6, atol=0.0)
    assert clip.clipped_steps > 5
