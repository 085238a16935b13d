"""What type checkers say to a user: every public name, with the type that it is meant to have.

Nothing here runs: `make static` checks it with mypy in strict mode.
"""

from collections.abc import Iterator
from typing import Any, assert_type

import autoclip_jax
import autoclip_tensorflow
import autoclip_torch
import autoclip_torch.deepspeed
import autoclip_torch.fastai
import autoclip_torch.skorch
import autoclip_torch.stable_baselines3
import numpy as np
import optax
import torch
from autoclip_torch.lightning import AutoClipCallback
from autoclip_torch.transformers import AutoClipMixin
from jax import Array
from numpy.typing import NDArray
from transformers import Trainer, TrainingArguments

import autoclip_core
from autoclip_core import arrays, plot
from autoclip_core.clip import AutoClip, ClipStep
from autoclip_core.history import NormHistory
from autoclip_core.replay import PERCENTILES, Log, Replay, advise, each_replay, read_log, read_norms, replay


def histories() -> None:
    history = autoclip_core.NormHistory(window=1000, backend="native")
    history.push(1.0)
    history.extend([1.0, 2.0])
    history.extend(np.ones(3))
    history.merge(NormHistory())
    assert_type(history.observe(1.0, 10.0), float)
    assert_type(history.observe_many([1.0], [10.0, 90.0]), NDArray[np.float64])
    assert_type(history.percentile(10.0), float)
    assert_type(history.select(0), float)
    assert_type(history.rank(1.0), int)
    assert_type(history.order_statistics(0, 2), NDArray[np.float64])
    assert_type(history.oldest(1), NDArray[np.float64])
    assert_type(history.values(), NDArray[np.float64])
    assert_type(NormHistory.from_bytes(history.to_bytes()), NormHistory)
    assert_type((history.window, history.backend, history.nbytes), tuple[int | None, str, int])
    assert_type((history.shared_id, len(history)), tuple[int, int])
    history.check()
    history.clear()
    autoclip_core.check_full_history(history, None)
    assert_type(autoclip_core.kernel_library(), str)
    assert_type(autoclip_core.kernel_functions(), Any)
    assert_type(autoclip_core.kernel_error(1), Exception)


def rule() -> None:
    clip = autoclip_core.AutoClip(10.0, window=None, warmup=0, nonfinite="skip", max_threshold=None)
    step = clip.observe(1.0)
    assert_type(step, autoclip_core.ClipStep)
    norm, threshold, scale, clipped, recorded = step
    assert_type((norm, threshold, scale), tuple[float, float, float])
    assert_type((clipped, recorded), tuple[bool, bool])
    clip.percentile = 25.0
    assert_type((clip.percentile, clip.threshold), tuple[float, float])
    assert_type((clip.steps, clip.recorded_steps, clip.clipped_steps, clip.nonfinite_steps), tuple[int, int, int, int])
    assert_type(clip.history, NormHistory)
    AutoClip().load_state_dict(clip.state_dict())


def errors() -> tuple[type[autoclip_core.AutoClipError], ...]:
    return (
        autoclip_core.AutoClipTypeError,
        autoclip_core.AutoClipValueError,
        autoclip_core.BackendError,
        autoclip_core.BrokenHistoryError,
        autoclip_core.EmptyHistoryError,
        autoclip_core.NonFiniteNormError,
        autoclip_core.RankError,
        autoclip_core.SnapshotError,
        autoclip_core.StateError,
    )


def earlier_run(path: str) -> None:
    norms, name = read_norms(path)
    assert_type(name, str)
    for result in replay(norms, percentiles=PERCENTILES, windows=[None, 1000], fixed=[1.0]):
        assert_type(result, Replay)
        assert_type(result.summary(), dict[str, float | int | None])
        assert_type(advise(norms, result), list[str])
        plot.plot_norms(norms, result.thresholds, result.clipped)
    assert_type(each_replay(norms), Iterator[Replay])
    assert_type(read_log(path), list[Log])
    plot.plot_distribution(norms)
    plot.plot_thresholds(NormHistory(), 10.0)


def own_adapter(xp: Any, norm: Any, clip: AutoClip) -> None:
    arrays.check_options(10.0, 8, None, 0, "skip", None, min(8, arrays.MAX_WINDOW))
    digits = arrays.percentile_digits(xp, 10.0)
    assert_type(arrays.percentile_of_digits(digits), float)

    def enter(norms: Any, recorded_steps: Any, norm: Any) -> tuple[Any, Any]:
        return arrays.observe_window(xp, norms, recorded_steps, norm, digits)

    _, counts, last, _ = arrays.take_step(xp, enter, **arrays.initial_state(xp, 8), norm=norm)
    assert_type(arrays.metrics(xp, counts, last), dict[str, Any])
    arrays.number_of(xp, last[arrays.GRAD_NORM] + last[arrays.CLIP_THRESHOLD])
    assert_type((arrays.CLIP_SCALE, arrays.OUTCOME), tuple[int, int])
    assert_type((arrays.STEPS, arrays.RECORDED_STEPS), tuple[int, int])
    assert_type((arrays.CLIPPED_STEPS, arrays.NONFINITE_STEPS), tuple[int, int])

    ascending, ring = arrays.remember(xp, xp.ones(8), xp.ones(8), 0, arrays.norm_to_remember(xp, norm))
    arrays.observe(xp, ascending, ring, 1, norm, digits)
    arrays.decide(xp, norm, arrays.percentile_of(xp, ascending, 1, digits), 1)
    arrays.root(xp, norm)
    table = arrays.deferred_table(clip, 1, 10.0)
    _, limit, _ = arrays.deferred_threshold(xp, table, xp.ones(1))
    arrays.deferred_scale(xp, norm, limit)


def torch_loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    clip = autoclip_torch.AutoClip(model, 10.0, mode="deferred", check_ranks=True)
    assert_type(clip.step(), autoclip_torch.ClipStep)
    grouped = autoclip_torch.AutoClip(optimizer, scope="group", window=1000)
    assert_type(grouped.step(), dict[str, ClipStep])
    by_name = autoclip_torch.AutoClip(model, scope=lambda name: name.partition(".")[0])
    assert_type(by_name.step(), dict[str, ClipStep])
    clip.percentile = 25.0
    assert_type((clip.percentile, clip.threshold, clip.thresholds), tuple[float, float, dict[str, float]])
    assert_type((clip.history, clip.histories), tuple[NormHistory, dict[str, NormHistory]])
    assert_type((clip.steps, clip.clipped_steps, clip.nonfinite_steps, clip.waits), tuple[int, int, int, int])
    assert_type(clip.log(), dict[str, float])
    clip.load_state_dict(clip.state_dict())


def kept(clip: autoclip_torch.AutoClip) -> autoclip_torch.AutoClip:  # the name alone is that of the global scope
    return clip


def torch_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, engine: Any) -> None:
    kept(autoclip_torch.attach(optimizer, warmup=100, nonfinite="raise", max_threshold=1.0))
    clip = autoclip_torch.attach(optimizer, scope="parameter", names=model)
    clip.detach()
    assert_type(clip.step(), dict[str, ClipStep])
    assert autoclip_torch.attached(optimizer) is clip
    kept(autoclip_torch.deepspeed.attach(engine))
    assert autoclip_torch.deepspeed.attached(engine) is not None
    AutoClipCallback(10.0, scope="parameter", max_threshold=1.0)


def callbacks() -> None:
    agents = autoclip_torch.stable_baselines3.AutoClipCallback(10.0, window=1000)
    assert_type(agents.clip.steps, int)
    assert_type(agents.clips["actor"].threshold, float)
    net = autoclip_torch.skorch.AutoClipCallback(10.0, scope="parameter")
    net.load_state_dict(net.state_dict())
    learner = autoclip_torch.fastai.AutoClipCallback(10.0, scope="global", warmup=100)
    learner.load_state_dict(learner.state_dict())
    assert_type(learner.numbers, dict[str, list[float]])
    for clip in (net.clip, learner.clip):
        if clip is not None:
            assert_type(clip.threshold, float)


class AutoClipTrainer(AutoClipMixin, Trainer):
    pass


def huggingface(model: torch.nn.Module) -> None:
    trainer = AutoClipTrainer(model, TrainingArguments("output"), autoclip={"percentile": 10.0})
    if trainer.clip is not None:
        assert_type(trainer.clip.steps, int)


def compiled(params: optax.Params, state: Any) -> None:
    transformation = autoclip_jax.autoclip(10.0, window=1000)
    assert_type(transformation, optax.GradientTransformationExtraArgs)
    optax.chain(transformation, optax.adam(1e-3))
    assert_type(autoclip_jax.metrics(state), dict[str, Array])
    assert_type(autoclip_jax.load_history(autoclip_jax.save_history(NormHistory(), state)), NormHistory)
    assert_type(autoclip_jax.backend(), str)
    if isinstance(state, autoclip_jax.AutoClipState):
        assert_type((state.steps, state.grad_norm, state.clipped), tuple[Array, Array, Array])


def tensorflow(gradients: list[float], keras_optimizer: Any) -> None:
    clip = autoclip_tensorflow.AutoClip(10.0)
    assert_type(clip(gradients), list[float])
    autoclip_tensorflow.AutoClipOptimizer(keras_optimizer, percentile=10.0)
    autoclip_tensorflow.AutoClipLogger()
