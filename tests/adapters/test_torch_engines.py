"""Engines that keep gradients, or parts of them, to themselves: DeepSpeed's is clipped inside, all else is refused.

DeepSpeed is not installed here. A stand-in has the private names that it uses, in the order in which it uses them.
"""

import inspect
import warnings
from math import inf, nan

import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach, deepspeed, gradients
from autoclip_torch.agreement import Agreement
from autoclip_torch.gradients import Gradients
from torch import nn

from autoclip_core import AutoClipError, AutoClipTypeError, AutoClipValueError, NonFiniteNormError

NORMS = [3.0, 1.0, 4.0, 1.5, 9.0, 2.5, 6.0]


class ZeroOptimizer:
    """As DeepSpeed's: of each group of parameters this rank has a part, and steps it by itself."""

    clip_grad_in_checkpoint = None

    def __init__(self, inner, clip_grad=0.0, loss_scale=1.0, dtype=torch.float32):
        self.optimizer = inner
        self.clip_grad = clip_grad
        self.loss_scale = loss_scale
        self.dtype = dtype
        self.overflow = False
        self.bit16_groups = self.fp16_groups = [list(group["params"]) for group in inner.param_groups]
        for param in (param for group in self.bit16_groups for param in group):
            param._hp_mapping = object()
        self.applied = []  # the factor of the gradient of each group

    def step(self, norm):
        self.overflow = not np.isfinite(norm)
        if self.overflow:
            self._global_grad_norm = inf
            return
        scaled = torch.tensor(norm, dtype=torch.float32) * self.loss_scale
        self._global_grad_norm = scaled / self.loss_scale
        for _ in self.bit16_groups:
            combined = torch.tensor(self.loss_scale)
            if self.clip_grad > 0.0:
                clip = ((scaled / self.loss_scale) + 1e-6) / self.clip_grad
                combined = torch.clamp(clip, min=1.0) * self.loss_scale
            self.applied.append(float(self.loss_scale / combined))

    def state_dict(self):
        return {"clip_grad": self.clip_grad}

    def load_state_dict(self, state):
        self.clip_grad = state["clip_grad"]


class DeepSpeedEngine(nn.Module):
    def __init__(self, optimizer, gradient_clipping=0.0):
        super().__init__()
        self.optimizer = optimizer
        self.clipping = gradient_clipping

    def gradient_clipping(self):
        return self.clipping


def as_deepspeed(name, base=ZeroOptimizer, **own):
    return type(name, (base,), {"__module__": "deepspeed.runtime.stand_in", **own})


KINDS = [as_deepspeed("DeepSpeedZeroOptimizer"), as_deepspeed("DeepSpeedZeroOptimizer_Stage3")]


def make_params():
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]


def make_engine(kind=KINDS[0], groups=2, gradient_clipping=0.0, engine=DeepSpeedEngine, **options):
    params = make_params()
    inner = torch.optim.SGD([{"params": [param]} for param in params] if groups == 2 else params, lr=0.1)
    return engine(kind(inner, **options), gradient_clipping)


def expected(norms, percentile):
    """The threshold and the scale of each step, by numpy."""
    seen = np.float64(np.float32(norms))
    thresholds = [float(np.percentile(seen[: step + 1], percentile)) for step in range(len(seen))]
    return thresholds, [min(threshold / norm, 1.0) for threshold, norm in zip(thresholds, seen, strict=True)]


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_deepspeed_clips_by_the_cores_scale_whatever_its_epsilon(kind, groups, loss_scale, scale):
    engine = make_engine(kind, groups, loss_scale=loss_scale)
    clip = deepspeed.attach(engine, 30.0)
    thresholds, scales = expected([scale * norm for norm in NORMS], 30.0)
    for norm, threshold in zip(NORMS, thresholds, strict=True):
        engine.optimizer.step(scale * norm)
        assert clip.threshold == threshold
        assert clip.log()["clip_threshold"] == threshold
    assert engine.optimizer.applied == pytest.approx([each for each in scales for _ in range(groups)], rel=1e-6)
    assert 0 < clip.clipped_steps < clip.steps == len(NORMS)


def test_clip_of_a_deepspeed_engine_has_what_any_other_has():
    engine = make_engine()
    clip = deepspeed.attach(engine, 30.0, window=4, warmup=2, max_threshold=5.0)
    for norm in NORMS[:5]:
        engine.optimizer.step(norm)
    assert set(clip.log()) == {"grad_norm", "clip_threshold", "clip_scale", "clipped", "clipped_share"}
    assert clip.history.values().tolist() == sorted(NORMS[1:5])
    again = make_engine()
    resumed = deepspeed.attach(again, 99.0, window=4, warmup=2, max_threshold=5.0)
    resumed.load_state_dict(clip.state_dict())
    for each in (engine, again):
        each.optimizer.applied.clear()
        for norm in NORMS[5:]:
            each.optimizer.step(norm)
    assert engine.optimizer.applied == again.optimizer.applied
    assert resumed.state_dict() == clip.state_dict()
    clip.percentile = 0.0
    engine.optimizer.step(8.0)
    assert clip.threshold == min([*NORMS, 8.0][-4:])
    assert "of 2 parameters" in repr(clip)


def test_detached_engine_is_as_it_was():
    engine = make_engine()
    optimizer, kind, own = engine.optimizer, type(engine.optimizer), set(vars(engine.optimizer))
    clip = deepspeed.attach(engine, 0.0)
    assert isinstance(optimizer, kind)
    with pytest.raises(AutoClipError, match="attached already"):
        deepspeed.attach(engine)
    optimizer.step(1.0)
    clip.detach()
    assert type(optimizer) is kind
    assert set(vars(optimizer)) == own | {"_global_grad_norm"}
    optimizer.applied.clear()
    optimizer.step(5.0)
    assert optimizer.applied == [1.0, 1.0]
    assert clip.steps == 1
    with pytest.raises(AutoClipError, match="keeps the gradients to itself"):
        clip.step()
    deepspeed.attach(engine)


def test_checkpoint_of_deepspeed_neither_takes_a_threshold_nor_brings_one():
    engine = make_engine()
    deepspeed.attach(engine, 0.0)
    for norm in (1.0, 5.0):
        engine.optimizer.step(norm)
    assert engine.optimizer.state_dict() == {"clip_grad": 0.0}
    engine.optimizer.load_state_dict({"clip_grad": 1e-3})
    engine.optimizer.applied.clear()
    engine.optimizer.step(5.0)
    assert engine.optimizer.applied == pytest.approx([0.2, 0.2], rel=1e-6)


@pytest.mark.parametrize("norm", [nan, inf])
def test_update_that_deepspeed_leaves_out_is_counted(norm):
    engine = make_engine()
    clip = deepspeed.attach(engine)
    engine.optimizer.step(1.0)
    with pytest.warns(RuntimeWarning, match="The gradient norm is"):
        engine.optimizer.step(norm)
    engine.optimizer.step(norm)
    assert (clip.steps, clip.nonfinite_steps, len(clip.history)) == (3, 2, 1)
    engine = make_engine()
    clip = deepspeed.attach(engine, nonfinite="raise")
    with pytest.raises(NonFiniteNormError):
        engine.optimizer.step(norm)
    with pytest.raises(AutoClipValueError, match='"skip" or "raise"'):
        deepspeed.attach(make_engine(), nonfinite="pass")


def test_overflow_under_a_loss_scale_is_no_step():
    engine = make_engine(loss_scale=2.0**16)
    clip = deepspeed.attach(engine, nonfinite="raise")
    engine.optimizer.step(inf)
    assert clip.steps == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_engine(gradient_clipping=1.0), '"gradient_clipping": 0.0'),
        (lambda: make_engine(clip_grad=1.0).optimizer, '"gradient_clipping": 0.0'),
        (lambda: make_engine(as_deepspeed("ZenFlowZeroOptimizer")), "its ZenFlowZeroOptimizer"),
        (lambda: make_engine(as_deepspeed("DeepSpeedZeroOptimizer", zenflow=True)), "ZenFlow"),
        (lambda: make_engine(as_deepspeed("DeepSpeedZeroOptimizer", has_moe_layers=True)), "mixtures of experts"),
        (lambda: make_engine(as_deepspeed("DeepSpeedZeroOptimizer", compute_grad_norm=False)), "compute_grad_norm"),
        (lambda: make_engine(as_deepspeed("FP16_UnfusedOptimizer"), loss_scale=8.0), "float16 without ZeRO"),
        (
            lambda: make_engine(as_deepspeed("DeepSpeedZeroOptimizer", torch_autocast_gradscaler=object())),
            "torch_autocast",
        ),
        (
            lambda: make_engine(
                as_deepspeed("DeepSpeedZeroOptimizer", check_grad_overflow=False), dtype=torch.bfloat16
            ),
            "check_grad_overflow",
        ),
        (lambda: make_engine(engine=type("PipelineEngine", (DeepSpeedEngine,), {})), "a pipeline engine"),
        (lambda: make_engine(engine=type("Engine", (DeepSpeedEngine,), {"has_moe_layers": True})), "mixtures"),
    ],
)
def test_engine_that_is_not_known_to_work_is_refused(make, says):
    engine = make()
    with pytest.raises(AutoClipError, match=says):
        deepspeed.attach(engine)
    optimizer = getattr(engine, "optimizer", engine)
    assert "clip_grad" in vars(optimizer if isinstance(optimizer, ZeroOptimizer) else engine)


def test_version_that_does_not_play_its_part_is_noticed():
    def silent(self, norm):
        """Clip by something that is no longer called clip_grad."""

    def early(self, norm):
        self.applied.append(self.clip_grad)

    for step, says in ((silent, "without reading clip_grad"), (early, "where its norm is None")):
        engine = make_engine(as_deepspeed("DeepSpeedZeroOptimizer", step=step))
        deepspeed.attach(engine)
        with pytest.raises(AutoClipError, match=says):
            engine.optimizer.step(1.0)
    engine = make_engine()
    del engine.optimizer.clip_grad
    with pytest.raises(AutoClipError, match="without a clip_grad"):
        deepspeed.attach(engine)


def test_engine_without_zero_has_an_optimizer_of_torch():
    model = nn.Linear(2, 1)
    engine = DeepSpeedEngine(torch.optim.SGD(model.parameters(), lr=0.1))
    clip = deepspeed.attach(engine)
    model(torch.ones(1, 2)).sum().backward()
    engine.optimizer.step()
    assert clip.steps == 1
    with pytest.raises(AutoClipValueError, match="gradient_clipping"):
        deepspeed.attach(DeepSpeedEngine(torch.optim.SGD(model.parameters()), gradient_clipping=1.0))


class Wrapper:
    """As Accelerate or Fabric wrap an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [lambda engine: engine, lambda engine: engine.optimizer])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_attach_finds_the_engine(wrap, times):
    engine = make_engine()
    source = wrap(engine)
    for _ in range(times):
        source = Wrapper(source)
    for options in ({"scope": "group"}, {"mode": "deferred"}):
        with pytest.raises(AutoClipValueError, match="leave out scope, mode and process_group"):
            attach(source, **options)
    clip = attach(source, 0.0, warmup=1)
    for norm in (1.0, 5.0):
        engine.optimizer.step(norm)
    assert engine.optimizer.applied[2:] == pytest.approx([0.2, 0.2], rel=1e-6)
    assert clip.clipped_steps == 1
    with pytest.raises(AutoClipTypeError, match=r"deepspeed\.attach\(engine\)"):
        AutoClip(source)


def test_accelerates_wrapper_of_an_engine_without_zero_is_refused():
    class DeepSpeedOptimizerWrapper(Wrapper, torch.optim.SGD):
        def __init__(self, optimizer):
            torch.optim.SGD.__init__(self, make_params(), lr=0.1)
            Wrapper.__init__(self, optimizer)

    with pytest.raises(AutoClipError, match=r"deepspeed\.attach\(model\)"):
        attach(DeepSpeedOptimizerWrapper(torch.optim.SGD(make_params(), lr=0.1)))


def test_what_is_no_engine_is_refused_by_deepspeeds_attach():
    for source in (torch.optim.SGD(make_params(), lr=0.1), nn.Linear(1, 1), None):
        with pytest.raises(AutoClipTypeError, match=r"deepspeed\.initialize"):
            deepspeed.attach(source)


# Parameters that an engine has taken, known by its marks.


def mark_zero(param):
    param._hp_mapping = object()


def mark_zero3(param):
    param.ds_id = 0


def mark_fsdp1(param):
    param._fsdp_flattened = True


MARKS = [(mark_zero, r"deepspeed\.attach"), (mark_zero3, r"deepspeed\.attach"), (mark_fsdp1, "process_group=model")]


@pytest.mark.parametrize(("mark", "says"), MARKS)
def test_marked_parameters_are_refused(mark, says):
    params = make_params()
    mark(params[1])
    for source in (params, torch.optim.SGD(params, lr=0.1), nn.ParameterList(params)):
        with pytest.raises(AutoClipError, match=says):
            AutoClip(source)
    with pytest.raises(AutoClipError, match=says):
        attach(torch.optim.SGD(params, lr=0.1))


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(("mark", "says"), MARKS)
def test_engine_that_takes_the_parameters_later_is_noticed_at_the_step(mark, says, by_hand):
    """As DeepSpeed does: the optimizer goes on with parts that carry no mark, the model's parameters do."""
    params = make_params()
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = torch.optim.SGD([frozen, *params], lr=0.1)
    clip = AutoClip([frozen, *params]) if by_hand else attach(optimizer)
    for param in params:
        mark(param)
    parts = [nn.Parameter(param.detach()[:1].clone()) for param in params]
    optimizer.param_groups[0]["params"] = parts
    for part in parts:
        part.grad = torch.ones_like(part)
    for _ in range(2):  # whoever goes on after an error is told again
        with pytest.raises(AutoClipError, match=says):
            clip.step() if by_hand else optimizer.step()
    assert all(bool((part == 1.0).all()) for part in parts)
    assert len(clip.history) == 0


def test_new_parameters_of_an_optimizer_are_looked_at():
    # As when FSDP1 wraps the model after attach.
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer)
    optimizer.param_groups[0]["params"] = parts = make_params()
    for part in parts:
        mark_fsdp1(part)
        part.grad = torch.ones_like(part)
    for _ in range(2):
        with pytest.raises(AutoClipError, match="process_group=model"):
            optimizer.step()


def test_engine_that_has_let_go_is_none():
    params = make_params()
    for param in params:
        param._hp_mapping = None
        param.grad = torch.ones_like(param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoClip(params).step()


# What ranks ask each other; that they do is tested with several processes.


def test_ranks_compare_often_at_first_and_rarely_later():
    agreement = Agreement(True)
    due = [step for step in range(1, 5000) if agreement.is_due()]
    assert due == [*(2**power for power in range(10)), 1024, 2048, 3072, 4096]


def test_copies_of_one_gradient_are_suspected_where_there_is_a_norm(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)

    def suspects(squares):
        param = nn.Parameter(torch.zeros(1))
        clip = AutoClip(param)
        param.grad = torch.ones(1)
        clip._pipeline._may_be_copies = True
        monkeypatch.setattr(Gradients, "joint", torch.tensor(squares, dtype=torch.float64))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clip.step()
        lines, first = inspect.getsourcelines(suspects)
        assert all(warning.filename == __file__ for warning in caught)
        assert all(first <= warning.lineno < first + len(lines) for warning in caught)
        return [str(warning.message) for warning in caught], clip._pipeline._may_be_copies

    for none in ((0.0, 0.0), (inf, inf), (nan, nan)):
        assert suspects(none) == ([], True)
    assert suspects((8.0, 3.0)) == ([], False)
    (said,), asks_again = suspects((8.0, 4.0))
    assert said.startswith("All 2 ranks of process_group have a gradient of the same norm, 2.")
    assert not asks_again


def test_rank_takes_part_in_every_step_though_none_of_its_gradients_is_a_dtensor(monkeypatch):
    """The other ranks may have some, and its gradients are like those of the step before."""

    class Spread(torch.Tensor):
        device_mesh = placements = None

    asked = []
    monkeypatch.setattr("torch.distributed.tensor.DTensor", Spread)
    monkeypatch.setattr(gradients, "_shards", lambda *_: ("ranks",))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _, group: asked.append(group))
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).as_subclass(Spread))]
    clip = AutoClip(params)
    for step in range(3):
        params[0].grad = torch.full((2,), 1.0 + step)
        clip.step()
    assert asked == ["ranks"] * 3
