"""Small faults in the adapter that once went unnoticed, each with the test that notices it.

They came in kinds: numbers that round alike, an object that has run before, guards tried from one side, two features
together, what stands after an error.
"""

from math import nan

import pytest
import torch
from autoclip_torch import AutoClip, attach, gradients, pipeline
from autoclip_torch.deferred import Crossing
from torch import nn

from autoclip_core import NonFiniteNormError

MODES = ("immediate", "deferred")
every_mode = pytest.mark.parametrize("mode", MODES)


def make_params(count=1, **options):
    return [nn.Parameter(torch.zeros(1, **options)) for _ in range(count)]


def give(params, *norms):
    for param, norm in zip(params, norms, strict=True):
        param.grad = None if norm is None else torch.full_like(param, norm)


# Numbers that do not round alike.


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_scaled_with_all_digits_of_the_scale(mode, dtype):
    random = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(1000, dtype=dtype))
    clip = AutoClip([param], 0.0, mode=mode)
    for size in (1.0, 3.0):
        param.grad = (torch.randn(1000, generator=random) * size).to(dtype)
        before = param.grad.float()
        step = clip.step()
    scale = torch.as_tensor(step.scale).float()
    expected = (before * scale).to(dtype)
    assert torch.equal(param.grad, expected)
    assert not torch.equal(expected, (before * scale.to(dtype).float()).to(dtype))  # which a rounded scale would give


@every_mode
def test_half_gradients_that_were_clipped_are_recognized(mode):
    random = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    clip = AutoClip([param], 50.0, mode=mode)
    for _ in range(20):
        size = torch.rand((), generator=random).exp()
        param.grad = (torch.randn(3, generator=random) * size).bfloat16()
        clip.step()
        clip.step()
    assert clip.steps == 20


def test_norm_of_gradients_of_two_dtypes_has_the_range_of_the_wider():
    narrow, wide = make_params(), make_params(dtype=torch.float64)
    give([*narrow, *wide], 3.0, 4e150)
    assert AutoClip([*narrow, *wide]).step().norm == 4e150


def test_norm_of_gradients_that_are_not_contiguous():
    param = nn.Parameter(torch.zeros(64, 64, 4, 4))
    param.grad = torch.ones(64, 64, 4, 4).to(memory_format=torch.channels_last)
    assert AutoClip([param]).step().norm == 256.0


# An object that has run before.


@every_mode
def test_loading_replaces_what_has_run(mode):
    (param,) = make_params()
    clip = AutoClip([param], 50.0, mode=mode)

    def step(norm):
        give([param], norm)
        return float(clip.step().threshold)

    for norm in (1.0, 2.0, 3.0):
        step(norm)
    state = clip.state_dict()
    first = [step(norm) for norm in (10.0, 20.0)]
    clip.load_state_dict(state)
    assert [step(norm) for norm in (10.0, 20.0)] == first
    assert clip.history.values().tolist() == [1.0, 2.0, 3.0, 10.0, 20.0]


def test_log_after_loading_is_not_of_the_run_before():
    (param,) = make_params()
    clip = AutoClip([param], 0.0)
    for norm in (1.0, 2.0):
        give([param], norm)
        clip.step()
    clip.load_state_dict(clip.state_dict())
    assert clip.log() == {}


# Groups, and gradients that are absent.


def test_steps_count_though_a_group_never_has_a_gradient():
    params = make_params(2)
    clip = AutoClip([("a", params[0]), ("b", params[1])], 0.0, scope="parameter")
    for norm in (1.0, 2.0):
        give(params, norm, None)
        clip.step()
    assert clip.steps == 2
    assert clip.log()["clipped_share"] == 0.5


def test_groups_of_several_dtypes_may_lack_gradients():
    (a, c), (b,) = make_params(2), make_params(dtype=torch.float64)
    clip = AutoClip([("a", a), ("b", b), ("c", c)], scope="parameter")
    give([a, b, c], 1.0, 1.0, None)
    assert clip.step().keys() == {"a", "b"}


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_deferred_step_without_a_gradient_changes_nothing():
    step = AutoClip(make_params(), mode="deferred").step()
    assert (step.norm.item(), step.scale.item(), step.clipped.item(), step.recorded.item()) == (0.0, 1.0, False, False)


def test_name_of_a_tensor_that_is_given_twice_is_its_first():
    (param,) = make_params()
    assert list(AutoClip([("first", param), ("second", param)], scope="parameter").thresholds) == ["first"]


def test_parameters_that_take_the_place_of_others_are_clipped():
    before, after = make_params(2)
    optimizer = torch.optim.SGD([before], lr=1.0)
    clip = attach(optimizer, 0.0)
    give([before], 1.0)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = after  # as a resize of embeddings does
    give([after], 4.0)
    optimizer.step()
    assert (after.item(), clip.steps) == (-1.0, 2)


# Fused, and something else.


@every_mode
def test_fused_optimizer_of_several_norms(mode):
    ends = []
    for fused in (True, False):
        params = make_params(2)
        optimizer = torch.optim.SGD(params, lr=1.0, fused=fused)
        attach(optimizer, 0.0, scope="parameter", mode=mode)
        for norms in ((1.0, 1.0), (4.0, 1.0), (1.0, 5.0)):
            give(params, *norms)
            optimizer.step()
        ends.append([param.item() for param in params])
    assert ends == [[-3.0, -3.0]] * 2


@every_mode
def test_fused_optimizer_of_which_one_group_is_not_fused(mode):
    a, b = make_params(2)
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "fused": False}], lr=1.0, fused=True)
    attach(optimizer, 0.0, mode=mode)
    for norm in (1.0, 4.0):
        give([a, b], norm, norm)
        optimizer.step()
    assert (a.item(), b.item()) == pytest.approx((-2.0, -2.0))


@every_mode
def test_fused_optimizer_that_steps_twice_on_the_same_gradients(mode):
    (param,) = make_params()
    optimizer = torch.optim.SGD([param], lr=0.1, fused=True)
    clip = attach(optimizer, 0.0, mode=mode)
    for norm in (1.0, 4.0):
        give([param], norm)
        optimizer.step()
        optimizer.step()
    assert clip.steps == 2


# What stands after an error.


def fail(*_):
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_gradients_are_given_back_by_detach_after_a_step_that_failed():
    (param,) = make_params()
    optimizer = torch.optim.SGD([param], lr=1.0)
    clip = attach(optimizer)
    handle = optimizer.register_step_pre_hook(fail)
    give([param], nan)
    grad = param.grad
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    clip.detach()
    assert param.grad is grad


def test_scale_that_a_failed_step_left_behind_is_not_taken_for_a_gradscalers():
    (param,) = make_params()
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    clip = attach(optimizer, 0.0)

    def step(norm):
        give([param], norm)
        optimizer.step()

    step(1.0)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        step(4.0)
    handle.remove()
    step(8.0)
    assert clip.history.values().tolist() == [1.0, 4.0, 8.0]
    assert param.item() == -2.0


def test_repeat_whose_step_failed_is_not_what_the_next_step_leaves(monkeypatch):
    def fail(*_):
        raise MemoryError

    (param,) = make_params()
    clip = AutoClip([param], 50.0, mode="deferred")
    give([param], 2.0)
    clip.step()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "apply", fail)
        with pytest.raises(MemoryError):
            clip.step()
    give([param], 3.0)
    clip.step()
    clip.step()
    assert clip.steps == 2


# Norms that are on their way.


@pytest.fixture
def late(monkeypatch):
    """Norms arrive when somebody waits for them."""
    monkeypatch.setattr(Crossing, "has_arrived", lambda _: False)


@pytest.mark.usefixtures("late")
def test_model_that_leaves_its_accelerator_keeps_the_norms_on_their_way(monkeypatch):
    (param,) = make_params()
    clip = AutoClip([param], 50.0)
    found = []
    for number, norm in enumerate((4.0, 2.0, 3.0, 10.0)):
        monkeypatch.setattr(pipeline, "_DEFERRED_BY_ITSELF", {"cpu"} if number < 2 else set())
        give([param], norm)
        found.append(float(clip.step().threshold))
    assert found == [4.0, 3.0, 3.0, 3.5]


def test_deferred_steps_follow_the_gradients_to_another_device():
    (param,) = make_params()
    clip = AutoClip([param], 50.0, mode="deferred")
    for norm in (1.0, 2.0):
        give([param], norm)
        clip.step()
    clip._pipeline._deferred.device = torch.device("meta")  # in place of the one that they have left
    give([param], 3.0)
    assert clip.step().threshold.item() == 2.0


@pytest.mark.usefixtures("late")
def test_percentile_outlives_a_late_norm_that_is_an_error():
    (param,) = make_params()
    clip = AutoClip([param], 10.0, mode="deferred", nonfinite="raise")
    give([param], nan)
    clip.step()
    clip.percentile = 90.0
    assert (clip.nonfinite_steps, clip.percentile, clip._pipeline.clips["global"].percentile) == (1, 90.0, 90.0)
    with pytest.raises(NonFiniteNormError):
        clip.step()


def test_late_norm_is_read_when_it_has_arrived():
    waited = []

    class Event:
        def synchronize(self):
            waited.append(True)

    crossing = Crossing(None)
    crossing.send(torch.ones(1))
    crossing._event = Event()
    assert crossing.wait() == [1.0]
    assert waited == [True]


def test_deferred_step_beside_a_gradscaler_reads_nothing(monkeypatch):
    (param,) = make_params()
    optimizer = torch.optim.AdamW([param], fused=True)
    clip = attach(optimizer, mode="deferred")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    give([param], 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda _: pytest.fail("the host reads a value"))
        optimizer.step()
    assert clip.history.values().tolist() == [0.25]


@pytest.mark.filterwarnings("ignore:The gradient norm")
def test_own_verdict_counts_beside_a_gradscalers(monkeypatch):
    """Finite elements with a norm that is none: the scaler finds nothing, and the update is left out all the same."""
    (param,) = make_params()
    optimizer = torch.optim.AdamW([param], fused=True)
    clip = attach(optimizer, mode="deferred")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(gradients.Gradients, "norms", lambda *_: torch.tensor([float("inf")]))
    give([param], 4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert (param.item(), clip.nonfinite_steps) == (0.0, 1)


def test_optimizer_inside_of_two_wrappers_is_found():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self, closure=None):
            return self.optimizer.step(closure)

    (param,) = make_params()
    optimizer = torch.optim.SGD([param], lr=1.0)
    clip = attach(Wrapper(Wrapper(optimizer)))
    give([param], 1.0)
    optimizer.step()
    assert clip.steps == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_tensor_that_an_optimizer_lists_twice_has_its_first_place():
    one, two = make_params(2)
    optimizer = torch.optim.SGD([one, two, one], lr=0.1)
    assert list(AutoClip(optimizer, scope="parameter").thresholds) == ["0.0", "0.1"]


def test_large_gradient_with_gaps_is_measured_and_clipped():
    param = nn.Parameter(torch.zeros(600, 300))
    clip = AutoClip([param], 0.0)
    for number in (1.0, 2.0):
        wide = torch.randn(600, 600).mul(number)
        param.grad = wide[:, ::2]
        norm = param.grad.double().norm().item()
        assert clip.step().norm == pytest.approx(norm, rel=3e-5)  # of torch in float32
    assert wide[:, ::2].norm().item() == pytest.approx(clip.threshold, rel=1e-5)
