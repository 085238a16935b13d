"""AutoClipOptimizer on one Keras backend: test_keras.py runs this file once for each, in a process of its own."""

import doctest
import json
import re
import sys
from contextlib import nullcontext
from functools import partial

import keras
import numpy as np
import pytest
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer
from keras import ops

from autoclip_core import (
    AutoClip,
    AutoClipTypeError,
    AutoClipValueError,
    BackendError,
    ClipStep,
    NormHistory,
    SnapshotError,
    StateError,
)

from . import test_golden
from .contract import ByStep, CompiledContract, Way, WindowContract

BACKEND = keras.config.backend()
RATE = 0.05

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow backend")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="of the PyTorch backend")
not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="a compiled program of JAX cannot call")
not_on_torch = pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it, or needs further packages")

# Keras's variables do not know numpy's newest keyword; PyTorch's compiler uses what PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def make_data(batches=24, size=8):
    """Batches whose gradients differ in size by orders of magnitude."""
    random = np.random.default_rng(3)
    x = random.normal(size=(batches, size, 4)) * random.lognormal(0, 1, (batches, 1, 1))
    y = x @ random.normal(size=(4, 1)) + random.normal(size=(batches, size, 1))
    return x.reshape(-1, 4).astype(np.float32), y.reshape(-1, 1).astype(np.float32)


X, Y = make_data()
KERNEL = np.linspace(-1, 1, 4).reshape(4, 1)


def make_model(optimizer, **options):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.set_weights([KERNEL, np.zeros(1)])
    model.compile(optimizer, loss="mse", **options)
    return model


def make_optimizer(inner=None, **options):
    return AutoClipOptimizer(inner or keras.optimizers.SGD(RATE), 30.0, **options)


def fit(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)


def reference(epochs=1, *, accumulate=1, per_tensor=False, percentiles=(), **options):
    """The same training in float64, by hand, with the core's AutoClip: the weights, and the last step.

    `percentiles` has one for each epoch.
    """
    clip = AutoClip(30.0, **options)
    kernel, bias = KERNEL.copy(), np.zeros(1)
    batches = list(zip(X.astype(float).reshape(-1, 8, 4), Y.astype(float).reshape(-1, 8, 1), strict=True)) * epochs
    sums = [0.0, 0.0]
    for number, (x, y) in enumerate(batches, start=1):
        if percentiles:
            clip.percentile = percentiles[(number - 1) * 8 // len(X)]
        error = x @ kernel + bias - y
        sums = [sums[0] + 2 * x.T @ error / 8, sums[1] + 2 * error.mean(0)]
        if number % accumulate:
            continue
        grads = [total / accumulate for total in sums]
        norms = [np.linalg.norm(grad) for grad in grads]
        step = clip.observe(float(np.hypot(*norms)))
        scales = [min(step.threshold / norm, 1) for norm in norms] if per_tensor else [step.scale] * 2
        kernel, bias = kernel - RATE * scales[0] * grads[0], bias - RATE * scales[1] * grads[1]
        sums = [0.0, 0.0]
    return [kernel, bias], clip, step


def assert_like_reference(model, expected, rtol=1e-4):
    (kernel, bias), clip, step = expected
    np.testing.assert_allclose(model.get_weights()[0], kernel, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(model.get_weights()[1], bias, rtol=rtol, atol=rtol)
    metrics = numbers(model.optimizer)
    assert metrics["grad_norm"] == pytest.approx(step.norm, rel=rtol)
    assert metrics["clip_threshold"] == pytest.approx(step.threshold, rel=rtol)
    assert metrics["clip_scale"] == pytest.approx(step.scale, rel=rtol)
    assert metrics["clipped"] == step.clipped
    assert (metrics["steps"], metrics["clipped_steps"]) == (clip.steps, clip.clipped_steps)


def numbers(optimizer):
    return {name: ops.convert_to_numpy(value).item() for name, value in optimizer.metrics().items()}


def state_of(model):
    values = [*model.weights, *model.optimizer.variables]
    return [ops.convert_to_numpy(value) for value in values]


def assert_same_state(one, other):
    for a, b in zip(state_of(one), state_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


# Training.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run_eagerly": True},
        {"jit_compile": True},
        pytest.param({"steps_per_execution": 5}, marks=not_on_torch),
    ],
    ids=str,
)
def test_fit_is_that_of_a_loop_by_hand(options):
    model = make_model(make_optimizer(), **options)
    fit(model, epochs=2)
    assert_like_reference(model, reference(epochs=2))


@on_torch
def test_steps_per_execution_are_refused_by_keras():
    with pytest.raises(ValueError, match="steps_per_execution"):
        fit(make_model(make_optimizer(), steps_per_execution=5))


def test_clipping_is_not_per_tensor():
    model = make_model(make_optimizer())
    fit(model)
    whole, per_tensor = reference()[0], reference(per_tensor=True)[0]
    assert np.abs(whole[0] - per_tensor[0]).max() > 0.01
    np.testing.assert_allclose(model.get_weights()[0], whole[0], rtol=1e-4, atol=1e-4)


def test_variables_are_the_optimizers_own():
    for options in ({}, {"gradient_accumulation_steps": 2}):
        model = make_model(make_optimizer(keras.optimizers.Adam(RATE), **options))
        fit(model)
        variables = model.optimizer.variables
        assert len({id(variable) for variable in variables}) == len(variables)
        assert not {id(variable) for variable in model.weights} & {id(variable) for variable in variables}


def test_train_on_batch_is_a_step():
    model = make_model(make_optimizer(window=10))
    for start in range(0, len(X), 8):
        model.train_on_batch(X[start : start + 8], Y[start : start + 8])
    assert_like_reference(model, reference(window=10))


def test_options_are_those_of_the_core():
    model = make_model(make_optimizer(warmup=5, max_threshold=3.0))
    fit(model)
    assert_like_reference(model, reference(warmup=5, max_threshold=3.0))


def test_percentile_may_change_during_training(tmp_path):
    percentiles = [30.0, 70.7, 5.0]
    optimizer = make_optimizer()

    def change(epoch, logs):
        optimizer.percentile = percentiles[epoch]

    model = make_model(optimizer)
    fit(model, epochs=3, callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=change)])
    assert_like_reference(model, reference(epochs=3, percentiles=percentiles))
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").optimizer.percentile == 5.0
    with pytest.raises(AutoClipValueError, match="percentile must be from 0 to 100, but 101"):
        optimizer.percentile = 101


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_accumulated_batches_are_one_step(options):
    model = make_model(make_optimizer(gradient_accumulation_steps=4), **options)
    fit(model, epochs=2)
    assert_like_reference(model, reference(epochs=2, accumulate=4))
    assert int(model.optimizer.iterations) == numbers(model.optimizer)["steps"] == 12


def test_mixed_precision_lets_unscaled_finite_norms_in():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model(make_optimizer())
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.optimizer.initial_scale = 2.0**20
    logs = fit(model, callbacks=[AutoClipLogger()]).history
    assert ops.convert_to_numpy(model.optimizer.dynamic_scale) < 2.0**20
    metrics = numbers(model.optimizer.inner_optimizer)
    assert 0 < metrics["steps"] < 24
    assert metrics["nonfinite_steps"] == 0
    assert 0.1 < metrics["grad_norm"] < 100
    assert logs["grad_norm"] == [metrics["grad_norm"]]
    assert logs["clipped"] == [metrics["clipped_steps"] / metrics["steps"]]


def test_schedules_reach_the_inner_optimizer():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.1, 0.01])
    model = make_model(make_optimizer(keras.optimizers.SGD(schedule)))
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)
    fit(model)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    assert int(model.optimizer.iterations) == 24

    model = make_model(make_optimizer(keras.optimizers.Adam(0.125)))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    logs = fit(model, epochs=4, callbacks=[plateau]).history
    assert float(model.optimizer.inner_optimizer.learning_rate) < 0.125
    assert logs["learning_rate"][0] == 0.125
    model.optimizer.learning_rate = 0.25
    assert float(model.optimizer.inner_optimizer.learning_rate) == 0.25


def test_inner_optimizer_acts_as_it_does_alone():
    models = []
    for wrap in (partial(AutoClipOptimizer, percentile=100.0), lambda inner: inner):
        optimizer = wrap(keras.optimizers.SGD(RATE, use_ema=True, weight_decay=0.01))
        optimizer.ema_momentum = 0.5
        optimizer.weight_decay = 0.1
        optimizer.learning_rate = RATE / 2
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        models.append(make_model(optimizer))
        fit(models[-1], callbacks=[keras.callbacks.SwapEMAWeights()])
    for mine, stock in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(mine, stock, rtol=1e-6)
    mine, stock = (model.optimizer for model in models)
    names = [[re.sub(r"_?\d+", "", variable.name) for variable in optimizer.variables] for optimizer in (mine, stock)]
    assert names[0][-len(names[1]) :] == names[1]
    mine.set_weights([np.ones(variable.shape) for variable in mine.variables])
    assert all((ops.convert_to_numpy(variable) == 1).all() for variable in mine.variables)


# The members of a Keras optimizer: options of the inner one with a value to give them; options that it may not have;
# and methods of Keras that do the same for any optimizer, or use only the other members.
OPTIONS = {
    "weight_decay": 0.5,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 3,
    "learning_rate": 0.5,
}
REFUSED = {"clipnorm": 1.0, "global_clipnorm": 1.0, "clipvalue": 1.0, "loss_scale_factor": 2.0}
METHODS_OF_KERAS = {
    *("add_optimizer_variables", "add_variable", "add_variable_from_reference"),
    *("assign", "assign_add", "assign_sub", "scale_loss", "stateless_apply", "update_step"),
}


@pytest.mark.parametrize("built", [False, True])
def test_every_member_of_a_keras_optimizer_is_handed_on(built):
    inner = keras.optimizers.SGD(RATE)
    optimizer = AutoClipOptimizer(inner, name="clipper")
    variable = keras.Variable([1.0])
    if built:
        optimizer.build([variable])
    for name in (name for name in dir(keras.optimizers.Optimizer(0.1)) if not name.startswith("_")):
        if name in OPTIONS:
            setattr(optimizer, name, OPTIONS[name])
            assert float(getattr(optimizer, name)) == float(getattr(inner, name)) == OPTIONS[name], name
            setattr(inner, name, 2 * OPTIONS[name])
            assert float(getattr(optimizer, name)) == 2 * OPTIONS[name], name
        elif name in REFUSED:
            with pytest.raises(AutoClipValueError, match=f"{name}=|loss scaling goes around it"):
                setattr(optimizer, name, REFUSED[name])
            assert getattr(optimizer, name) is getattr(inner, name) is None
        elif name == "gradient_accumulation_steps":
            with pytest.raises(AutoClipValueError, match="given to AutoClipOptimizer when it is constructed"):
                optimizer.gradient_accumulation_steps = 2
            optimizer.gradient_accumulation_steps = None  # as it is
            assert AutoClipOptimizer(inner, gradient_accumulation_steps=4).gradient_accumulation_steps == 4
        elif name in {"built", "name"}:
            assert (optimizer.built, optimizer.name) == (built, "clipper")
        else:
            assert name in METHODS_OF_KERAS or name in vars(AutoClipOptimizer), f"{name} is new in Keras"
    inner.use_ema = False  # it was not built for averages
    grads = [ops.convert_to_tensor([1.0])]
    assert [int(optimizer.apply_gradients([(grads[0], variable)])) for _ in range(2)] == [1, 2]


def test_variables_are_left_out_of_weight_decay_by_themselves():
    variables = [keras.Variable([1.0]), keras.Variable([1.0])]
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0, weight_decay=0.5))
    optimizer.exclude_from_weight_decay(var_list=variables[:1])
    optimizer.apply([ops.zeros((1,))] * 2, variables)
    assert [ops.convert_to_numpy(variable).item() for variable in variables] == [1.0, 0.5]


def test_loss_scaling_around_the_wrapper_swaps_averages_too():
    inner = keras.optimizers.SGD(RATE, use_ema=True)
    model = make_model(keras.optimizers.LossScaleOptimizer(AutoClipOptimizer(inner)))
    fit(model, callbacks=[keras.callbacks.SwapEMAWeights()])
    assert inner.use_ema


def test_metrics_of_a_running_epoch_are_those_of_the_latest_step():
    optimizer, seen = make_optimizer(), []

    class Callback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for read in (optimizer.metrics, lambda: optimizer.percentile):
                with (
                    pytest.raises(StateError, match=r"model.jax_state_sync\(\)") if BACKEND == "jax" else nullcontext()
                ):
                    read()
            assert self.model.optimizer is optimizer  # Keras then gives the state back
            seen.append((numbers(optimizer)["steps"], optimizer.percentile))

    fit(make_model(optimizer), callbacks=[Callback()])
    assert seen == [(steps, 30.0) for steps in range(1, 25)]


# What is saved.


def test_keras_file_resumes_to_the_bit(tmp_path):
    for inner in (keras.optimizers.Adam(RATE), keras.optimizers.SGD(RATE, momentum=0.9)):
        config = keras.optimizers.serialize(inner)
        through, first = (make_model(make_optimizer(keras.optimizers.deserialize(config), window=20)) for _ in range(2))
        fit(through, epochs=2)
        fit(first)
        first.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
        assert_same_state(first, resumed)
        fit(resumed)
        assert_same_state(through, resumed)


def test_accumulated_gradients_resume_in_the_middle(tmp_path):
    through, first = (make_model(make_optimizer(gradient_accumulation_steps=5)) for _ in range(2))
    fit(through, epochs=2)
    fit(first)
    first.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    fit(resumed)
    assert_same_state(through, resumed)


class Interruption(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def test_interrupted_fit_goes_on(tmp_path):
    through, interrupted, resumed = (make_model(make_optimizer(keras.optimizers.Adam(RATE))) for _ in range(3))
    fit(through, epochs=3)
    backup = partial(keras.callbacks.BackupAndRestore, tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, epochs=3, callbacks=[backup(), Interruption()])
    fit(resumed, epochs=3, callbacks=[backup()])
    assert_same_state(through, resumed)


def test_model_checkpoint_holds_the_history(tmp_path):
    model = make_model(make_optimizer())
    fit(model, epochs=2, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")])
    assert_same_state(model, keras.models.load_model(tmp_path / "2.keras"))
    assert numbers(keras.models.load_model(tmp_path / "1.keras").optimizer)["steps"] == 24


def test_state_of_another_window_is_refused(tmp_path):
    model = make_model(make_optimizer(window=20))
    fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    config = keras.models.load_model(tmp_path / "model.keras").optimizer.get_config()
    assert (config["window"], config["percentile"]) == (20, 30.0)
    store = {}
    model.optimizer.save_own_variables(store)
    other = make_model(make_optimizer(window=30))
    fit(other)
    before = state_of(other)
    with pytest.raises(StateError, match=r"window=20, but this AutoClipOptimizer has window=30"):
        other.optimizer.load_own_variables(store)
    with pytest.raises(StateError, match="keeps its norms in variables"):
        other.optimizer.load_own_variables({**store, "history": np.zeros(3, np.uint8)})
    for a, b in zip(before, state_of(other), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="window=20, but this AutoClipOptimizer has window=30"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_config_makes_an_equal_optimizer():
    optimizer = make_optimizer(
        keras.optimizers.Adam(0.1, beta_1=0.8),
        window=7,
        warmup=3,
        nonfinite="pass",
        max_threshold=2.0,
        gradient_accumulation_steps=2,
        name="clipper",
    )
    config = keras.optimizers.serialize(optimizer)
    given = {"window": 7, "warmup": 3, "nonfinite": "pass", "max_threshold": 2.0, "gradient_accumulation_steps": 2}
    assert given.items() <= json.loads(json.dumps(config))["config"].items()
    again = keras.optimizers.deserialize(config)
    assert keras.optimizers.serialize(again) == config
    assert again.inner_optimizer.get_config()["beta_1"] == 0.8
    # The options act, and are not only written down.
    acting = AutoClipOptimizer.from_config({**config["config"], "gradient_accumulation_steps": None})
    acting.apply([ops.convert_to_tensor([8.0])], [keras.Variable([0.0])])
    assert numbers(acting)["clip_scale"] == 0.25


@not_on_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_model_is_exported_without_its_optimizer(tmp_path):
    model = make_model(make_optimizer())
    fit(model)
    model.export(tmp_path / "exported", verbose=False)
    import tensorflow as tf

    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(X[:3]), model.predict(X[:3], verbose=0), rtol=1e-5)


@pytest.mark.parametrize(("file", "name", "home"), test_golden.golden(f"keras-{BACKEND}"))
def test_state_of_an_earlier_release_goes_on(file, name, home):
    test_golden.check_keras(file, name, home)


@on_tensorflow
@pytest.mark.parametrize("accumulate", [None, 5])
def test_checkpoint_of_tensorflow_holds_all(accumulate, tmp_path):
    import tensorflow as tf

    inner = partial(keras.optimizers.Adam, RATE)
    model, other = (make_model(make_optimizer(inner(), gradient_accumulation_steps=accumulate)) for _ in range(2))
    fit(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "checkpoint")
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path).assert_consumed()
    assert_same_state(model, other)


# The rule.


def step_of(optimizer, variable):
    """A function that applies one gradient of one number, compiled where the backend compiles."""
    optimizer.build([variable])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda grad: optimizer.apply([grad], [variable]))
    if BACKEND == "jax":
        import jax

        compiled = jax.jit(optimizer.stateless_apply)

        def step(grad):
            values, state = compiled([v.value for v in optimizer.variables], [grad], [variable.value])
            for v, value in zip([variable, *optimizer.variables], [*values, *state], strict=True):
                v.assign(value)

        return step
    return lambda grad: optimizer.apply([grad], [variable])


class Clip(ByStep):
    """An optimizer and how its step is taken, as the contract holds them."""

    def __init__(self, way, percentile=10.0, **options):
        if way == "tree":
            options = {"history": NormHistory(), **options}
        self.optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), percentile, **options)
        self.param = keras.Variable([0.0, 0.0])
        self.optimizer.build([self.param])
        self.apply = partial(self.optimizer.apply, trainable_variables=[self.param])
        if way != "eager":
            compiled = step_of(self.optimizer, self.param)
            self.apply = lambda grads: compiled(*grads)

    @property
    def percentile(self):
        return self.optimizer.percentile

    @percentile.setter
    def percentile(self, percentile):
        self.optimizer.percentile = percentile

    def variable(self, name):
        (variable,) = (variable for variable in self.optimizer.variables if variable.name == name)
        return ops.convert_to_numpy(variable)

    def step(self, grad):
        self.param.assign([0.0, 0.0])
        before = self.counts()[1]
        self.apply([ops.convert_to_tensor(grad)])
        found = list(numbers(self.optimizer).values())
        return ClipStep(*found[:4], self.counts()[1] - before), -ops.convert_to_numpy(self.param)

    def counts(self):
        return tuple(self.variable("counts").tolist())

    def norms(self):
        if self.optimizer.history is not None:
            self.optimizer.history.check()
            return self.optimizer.history.values().tolist()
        ascending, ring = self.variable("norms")
        size = min(self.counts()[1], len(ring))
        assert (ascending[size:] == np.finfo(np.float32).max).all()
        assert sorted(ring) == ascending.tolist()
        return ascending[:size].tolist()

    def save(self, folder):
        store = {}
        self.optimizer.save_own_variables(store)
        np.savez(folder / "state.npz", **store)
        with np.load(folder / "state.npz") as saved:
            return dict(saved)

    def load(self, state):
        self.optimizer.load_own_variables(state)


# On JAX there are no histories, and PyTorch compiles no optimizer alone.
WAYS = {
    name: Way(partial(Clip, name), ulps=1, most_steps=250)
    for name in {
        "tensorflow": ("compiled", "eager", "tree"),
        "jax": ("compiled", "eager"),
        "torch": ("eager", "tree"),
    }[BACKEND]
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestContract(CompiledContract):
    pass


WITH_WINDOW = {name: way for name, way in WAYS.items() if name != "tree"}


@pytest.mark.parametrize("way", WITH_WINDOW.values(), ids=WITH_WINDOW)
class TestWindow(WindowContract):
    pass


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_variables_without_a_gradient_do_not_count():
    for options in ({}, {"gradient_accumulation_steps": 2}):
        variables = [keras.Variable([1.0, 1.0]), keras.Variable([5.0])]
        optimizer = AutoClipOptimizer(keras.optimizers.SGD(0.5), **options)
        for _ in range(2):
            optimizer.apply([ops.convert_to_tensor([3.0, 4.0]), None], variables)
        assert numbers(optimizer)["grad_norm"] == 5.0
        assert ops.convert_to_numpy(variables[1]) == 5.0


# The log.


def test_log_has_what_was_decided():
    model = make_model(make_optimizer())
    logs = fit(model, epochs=3, callbacks=[AutoClipLogger()]).history
    for epochs in (1, 2, 3):
        _, clip, step = reference(epochs)
        assert logs["grad_norm"][epochs - 1] == pytest.approx(step.norm, rel=1e-3)
        assert logs["clip_threshold"][epochs - 1] == pytest.approx(step.threshold, rel=1e-3)
        assert logs["clip_scale"][epochs - 1] == pytest.approx(step.scale, rel=1e-3)
        before = reference(epochs - 1)[1].clipped_steps if epochs > 1 else 0
        assert logs["clipped"][epochs - 1] == (clip.clipped_steps - before) / 24


def test_log_needs_an_autoclip_optimizer():
    with pytest.raises(AutoClipValueError, match="compile the model with one, but its optimizer is SGD"):
        fit(make_model("sgd"), callbacks=[AutoClipLogger()])


@on_tensorflow
def test_tensorboard_sees_the_log(tmp_path):
    import tensorflow as tf

    fit(make_model(make_optimizer()), callbacks=[AutoClipLogger(), keras.callbacks.TensorBoard(tmp_path)])
    (file,) = (tmp_path / "train").glob("events*")
    tags = set()
    for record in tf.data.TFRecordDataset([str(file)]):
        tags |= {value.tag for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value}
    assert {f"epoch_{name}" for name in ("grad_norm", "clip_threshold", "clip_scale", "clipped")} <= tags


# The demo.


def test_demo_shows_that_autoclip_does_not_care_about_the_unit_of_the_loss(capsys, monkeypatch):
    from autoclip_tensorflow import demo

    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "30", "--learning-rate", "0.1"])
    demo.main()
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    assert [row[:20].strip() for row in rows] == [name for name in demo.CLIPPING for _ in demo.LOSS_SCALES]
    assert last.endswith(" 2.303.")
    for start in (6, 9):
        thresholds = [float(row.split()[-1]) for row in rows[start : start + 3]]
        assert thresholds == pytest.approx([thresholds[1] * scale for scale in demo.LOSS_SCALES], rel=0.05)
        losses = [float(row[32:44]) for row in rows[start : start + 3]]
        assert losses == pytest.approx([losses[1]] * 3, rel=0.05)
    by_rate = {0.01: 0.4, 0.03: 0.2, 0.1: 0.3, 0.3: 2.3, 1.0: float("nan")}
    monkeypatch.setattr(demo, "train", lambda *_, learning_rate, **__: (by_rate[learning_rate], 0.0, "-"))
    assert demo.choose_learning_rate(None, 30) == 0.03


# The tree.


@not_on_jax
@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, pytest.param({"steps_per_execution": 5}, marks=not_on_torch)],
    ids=str,
)
def test_history_remembers_every_norm(options):
    history = NormHistory()
    model = make_model(make_optimizer(history=history), **options)
    fit(model, epochs=2)
    assert_like_reference(model, reference(epochs=2))
    np.testing.assert_allclose(history.values(), reference(epochs=2)[1].history.values(), rtol=1e-3)


@not_on_jax
def test_history_is_in_the_keras_file(tmp_path):
    histories = [NormHistory(), NormHistory()]
    through, first = (make_model(make_optimizer(history=history)) for history in histories)
    fit(through, epochs=2)
    fit(first)
    first.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    fit(resumed)
    assert_same_state(through, resumed)
    np.testing.assert_array_equal(resumed.optimizer.history.values(), histories[0].values())
    # Into a model that is compiled and has run, too.
    first.load_weights(tmp_path / "model.keras")
    fit(first)
    fit(first)
    first.load_weights(tmp_path / "model.keras")
    fit(first)
    assert_same_state(through, first)


@on_tensorflow
def test_history_is_not_for_jit_compile_and_the_error_says_what_is():
    model = make_model(make_optimizer(history=NormHistory()), jit_compile=True)
    with pytest.raises(Exception, match="history_is_for_this_process_without_jit_compile_so_give_window_instead"):
        fit(model)


@on_torch
def test_operations_of_keras_do_without_the_kernel(monkeypatch):
    from autoclip_tensorflow import dense

    monkeypatch.setattr(dense, "_library", lambda: None)
    model = make_model(make_optimizer(window=10))
    fit(model)
    assert_like_reference(model, reference(window=10))
    with pytest.raises(BackendError, match="for PyTorch with the variables on the CPU and a compiled kernel"):
        fit(make_model(make_optimizer(history=NormHistory())))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="which has an op")
def test_kernel_that_cannot_be_opened_is_done_without(monkeypatch, tmp_path):
    from autoclip_tensorflow import dense

    monkeypatch.setattr(dense, "kernel_library", lambda: str(tmp_path / "absent.so"))
    assert dense._library.__wrapped__() is None


def test_operations_do_where_the_kernel_is_not_compiled(run_python, other_backend):
    code = """
import os, warnings
os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"] = "3", "0"
warnings.simplefilter("ignore")
import keras
from autoclip_core import BackendError, NormHistory
from autoclip_tensorflow import AutoClipOptimizer
optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), 50.0)
variable = keras.Variable([0.0])
for grad in (1.0, 2.0):
    optimizer.apply([keras.ops.convert_to_tensor([grad])], [variable])
print(float(optimizer.metrics()["clip_threshold"]), float(variable[0]))
try:
    AutoClipOptimizer(keras.optimizers.SGD(1.0), history=NormHistory())
except BackendError as error:
    print("no history")
"""
    assert run_python(code, AUTOCLIP_BACKEND="numba") == "1.5 -2.5\nno history\n"


@on_torch
def test_state_without_its_history_is_refused():
    history = NormHistory()
    model = make_model(make_optimizer(history=history))
    fit(model)
    before = numbers(model.optimizer)
    history.clear()
    with pytest.raises(StateError, match="restore both from one checkpoint"):
        fit(model)
    assert (numbers(model.optimizer), len(history)) == (before, 0)


@pytest.mark.skipif(BACKEND != "jax", reason="there it can be")
def test_history_is_refused_where_it_cannot_be_reached():
    with pytest.raises(BackendError, match=f"this is its {BACKEND} backend; leave it out"):
        AutoClipOptimizer(keras.optimizers.SGD(), history=NormHistory())


# Sparse gradients.


@on_tensorflow
@pytest.mark.parametrize("accumulate", [None, 2])
def test_rows_named_twice_add_up(accumulate):
    import tensorflow as tf

    variable = keras.Variable(np.ones((5, 1), np.float32))
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), gradient_accumulation_steps=accumulate)
    grad = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([3, 0, 3]), tf.constant([5, 1]))
    for _ in range(accumulate or 1):
        optimizer.apply([grad], [variable])
    assert numbers(optimizer)["grad_norm"] == pytest.approx(np.hypot(5, 2))
    np.testing.assert_allclose(ops.convert_to_numpy(variable)[:, 0], [-1, 1, 1, -4, 1])


# Bad input.


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        (lambda: "adam", AutoClipTypeError, "wraps a Keras optimizer, such as .* but 'adam' was given"),
        (
            type("Adam", (), {"__module__": "tf_keras.src.optimizers.adam"}),
            AutoClipTypeError,
            "Adam of tf_keras, which is Keras 2, was given; use keras.optimizers.Adam",
        ),
        (
            type("Own", (type("Adam", (), {"__module__": "tf_keras.src.optimizers.adam"}),), {}),
            AutoClipTypeError,
            "Own of tf_keras, which is Keras 2, was given",
        ),
        (make_optimizer, AutoClipValueError, "wrapped in an AutoClipOptimizer already"),
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            AutoClipValueError,
            "loss scaling goes around it",
        ),
        (lambda: keras.optimizers.SGD(loss_scale_factor=2.0), AutoClipValueError, "loss scaling goes around it"),
        (lambda: keras.optimizers.SGD(clipnorm=1.0), AutoClipValueError, "has clipnorm=1.0 and would clip again"),
        (lambda: keras.optimizers.SGD(global_clipnorm=1.0), AutoClipValueError, "has global_clipnorm=1.0"),
        (lambda: keras.optimizers.SGD(clipvalue=1.0), AutoClipValueError, "has clipvalue=1.0"),
        (
            lambda: keras.optimizers.SGD(gradient_accumulation_steps=4),
            AutoClipValueError,
            "give gradient_accumulation_steps=4 to AutoClipOptimizer instead",
        ),
    ],
)
def test_bad_inner_optimizers_are_refused(inner, error, message):
    with pytest.raises(error, match=message):
        AutoClipOptimizer(inner())


@pytest.mark.parametrize(
    ("option", "value"), [("clipnorm", 1.0), ("gradient_accumulation_steps", 2), ("loss_scale_factor", 2.0)]
)
def test_options_that_the_inner_optimizer_is_given_later_are_refused(option, value):
    optimizer, variable = make_optimizer(), keras.Variable([1.0, 2.0])
    optimizer.apply([keras.ops.ones(2)], [variable])
    before = keras.ops.convert_to_numpy(variable)
    setattr(optimizer.inner_optimizer, option, value)
    with pytest.raises(AutoClipValueError, match=r"inner|unscaled"):
        optimizer.apply([keras.ops.ones(2)], [variable])
    assert numbers(optimizer)["steps"] == 1
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), before)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_accumulation_is_for_one_replica(monkeypatch, replicas):
    monkeypatch.setattr("autoclip_tensorflow.optimizer.count_replicas", lambda: replicas)
    optimizer, plain = (make_optimizer(gradient_accumulation_steps=steps) for steps in (2, None))
    plain.build([keras.Variable([1.0])])
    with nullcontext() if replicas == 1 else pytest.raises(AutoClipValueError, match=f"but there are {replicas}"):
        optimizer.build([keras.Variable([1.0])])


def test_accumulation_over_less_than_two_batches_is_refused():
    AutoClipOptimizer(keras.optimizers.SGD(), gradient_accumulation_steps=np.int64(2))
    for steps in (1, 0, -2, 2.5, 2**31):
        with pytest.raises(AutoClipValueError, match=f"at least 2, or None, but {steps} was given"):
            AutoClipOptimizer(keras.optimizers.SGD(), gradient_accumulation_steps=steps)


@on_tensorflow
def test_examples_of_the_docstrings_run():
    results = doctest.testmod(sys.modules["autoclip_tensorflow.optimizer"])
    assert results.failed == 0 < results.attempted


@pytest.mark.skipif(BACKEND == "tensorflow", reason="there it is needed")
def test_optimizer_does_not_import_tensorflow(run_python):
    code = """
import sys, warnings
sys.modules["tensorflow"] = None
warnings.simplefilter("ignore")
import keras
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer
optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0))
optimizer.apply([keras.ops.ones((4,))], [keras.Variable([0.0] * 4)])
print(float(optimizer.metrics()["grad_norm"]))
"""
    assert run_python(code) == "2.0\n"


# Several devices.


@on_tensorflow
def test_accumulation_on_several_replicas_is_refused(run_python):
    code = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"] = "3", "0"
import keras, numpy as np, tensorflow as tf
from autoclip_tensorflow import AutoClipOptimizer
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(AutoClipOptimizer(keras.optimizers.SGD(0.01), gradient_accumulation_steps=2), loss="mse")
try:
    model.fit(np.ones((8, 4)), np.ones(8), verbose=0)
except ValueError as error:
    print(error)
"""
    assert "gradient_accumulation_steps=2 is for one replica, but there are 2" in run_python(code)


@on_tensorflow
def test_replicas_take_the_steps_of_one_device(run_python):
    code = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"] = "3", "0"
import keras, numpy as np, tensorflow as tf
from autoclip_core import NormHistory
from autoclip_tensorflow import AutoClipOptimizer
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategies = [tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()]
random = np.random.default_rng(1)
x = random.normal(size=(160, 4)) * random.lognormal(size=(160, 1))
for tree in (False, True):
    models = []
    for strategy in strategies:
        with strategy.scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            model.set_weights([np.ones((4, 1)), np.zeros(1)])
            options = {"history": NormHistory()} if tree else {}
            model.compile(AutoClipOptimizer(keras.optimizers.SGD(0.01, momentum=0.9), 30.0, **options), loss="mse")
        batches = tf.data.Dataset.from_tensor_slices((x, x.sum(axis=1) + 1)).batch(8)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        model.fit(batches.with_options(options), epochs=2, verbose=0, shuffle=False)
        models.append(model)
    many, one = models
    for a, b in zip(many.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    for name, value in one.optimizer.metrics().items():
        np.testing.assert_allclose(many.optimizer.metrics()[name], value, rtol=1e-4)
    assert int(one.optimizer.metrics()["steps"]) == 40
    assert not tree or len(many.optimizer.history) == 40
print("agreed")
"""
    assert run_python(code) == "agreed\n"


# What went unnoticed once.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_gradients_are_scaled_with_all_digits_of_the_scale(dtype):
    def step(grad):
        variable.assign(ops.zeros((500,), dtype))
        optimizer.apply([grad], [variable])
        return ops.convert_to_numpy(ops.cast(-variable, "float32"))

    variable = keras.Variable(np.zeros(500), dtype=dtype)
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), 0.0)
    grad = ops.cast(ops.linspace(0.1, 1.0, 500), dtype)
    step(grad)
    clipped, scale = step(3 * grad), optimizer.metrics()["clip_scale"]
    exact, rough = ops.cast(3 * grad, "float32") * scale, 3 * grad * ops.cast(scale, dtype)
    exact, rough = (ops.convert_to_numpy(ops.cast(ops.cast(each, dtype), "float32")) for each in (exact, rough))
    np.testing.assert_array_equal(clipped, exact)
    assert (clipped != rough).any()


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.skipif(BACKEND == "jax", reason="it has no float64 unless told so")
def test_wide_gradients_keep_their_digits(accumulate):
    variable = keras.Variable([0.0], dtype="float64")
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), 100.0, gradient_accumulation_steps=accumulate)
    for _ in range(accumulate or 1):
        optimizer.apply([ops.full((1,), 1.0 + 1e-12, "float64")], [variable])
    assert ops.convert_to_numpy(variable) == -(1.0 + 1e-12)


def test_half_precision_norm_beyond_its_range_is_finite():
    variable = keras.Variable([0.0] * 100, dtype="float16")
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(0.0))
    optimizer.apply([ops.full((100,), 60000.0, "float16")], [variable])
    assert numbers(optimizer)["grad_norm"] == pytest.approx(6e5, rel=1e-3)


@pytest.mark.parametrize("accumulate", [None, 2])
def test_gradients_and_variables_may_come_one_by_one(accumulate):
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), gradient_accumulation_steps=accumulate)
    for _ in range(accumulate or 1):
        optimizer.apply((ops.full((1,), size) for size in (3.0, 4.0)), iter(variables))
    assert numbers(optimizer)["grad_norm"] == 5.0
    assert [ops.convert_to_numpy(variable).item() for variable in variables] == [-3.0, -4.0]


def test_accumulated_gradients_find_their_variables_in_any_order():
    first, second = variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), 100.0, gradient_accumulation_steps=2)
    for sizes, order in (((1.0, 10.0), variables), ((30.0, 3.0), [second, first])):
        optimizer.apply([ops.full((1,), size) for size in sizes], order)
    assert [ops.convert_to_numpy(variable).item() for variable in variables] == [-2.0, -20.0]


def test_batch_that_is_not_finite_drops_its_step_and_no_other():
    variable = keras.Variable([0.0])
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), 100.0, gradient_accumulation_steps=2)
    for size in (np.nan, 1.0, 2.0, 4.0):
        optimizer.apply([ops.full((1,), size)], [variable])
    assert ops.convert_to_numpy(variable) == -3.0
    assert (numbers(optimizer)["steps"], numbers(optimizer)["nonfinite_steps"]) == (2, 1)


@not_on_jax
def test_history_has_one_norm_for_all_batches_of_a_step():
    history, variable = NormHistory(), keras.Variable([0.0])
    step = step_of(make_optimizer(history=history, gradient_accumulation_steps=2), variable)
    for size in (1.0, 3.0, 4.0, 6.0, 9.0):
        step(ops.full((1,), size))
    assert history.values().tolist() == [2.0, 5.0]


def test_accumulated_gradients_need_no_variables_named():
    variable = keras.Variable([1.0])
    optimizer = AutoClipOptimizer(keras.optimizers.SGD(1.0), gradient_accumulation_steps=2)
    optimizer.build([variable])
    for _ in range(2):
        optimizer.apply([ops.ones((1,))])
    assert ops.convert_to_numpy(variable).tolist() == [0.0]


def after_a_step(inner, size, home):
    """An optimizer that has taken a step, and what it saves."""
    optimizer = AutoClipOptimizer(inner, **({"history": NormHistory()} if home == "history" else {}))
    optimizer.apply([ops.ones((size,))], [keras.Variable([1.0] * size)])
    return optimizer, saved(optimizer)


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


@pytest.mark.parametrize("home", ["window", pytest.param("history", marks=not_on_jax)])
def test_state_that_does_not_fit_changes_nothing(home):
    optimizer, store = after_a_step(keras.optimizers.SGD(1.0, momentum=0.9), 2, home)
    optimizer.apply([ops.ones((2,))])
    before = saved(optimizer)
    momentum = str(len(optimizer.variables) - 1)
    with pytest.raises(StateError, match=r"has shape \(3,\) for .*momentum.*, whose shape here is \(2,\)"):
        optimizer.load_own_variables({**store, momentum: np.ones(3)})
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.load_own_variables(after_a_step(keras.optimizers.Adam(), 2, home)[1])
    if home == "history":
        with pytest.raises(SnapshotError):
            optimizer.load_own_variables({**store, "history": store["history"][:-1]})
    np.testing.assert_equal(saved(optimizer), before)


def test_custom_inner_optimizer_is_found_by_its_name():
    class Own(keras.optimizers.SGD):
        pass

    config = AutoClipOptimizer(Own(1.0)).get_config()
    assert type(AutoClipOptimizer.from_config(config, {"Own": Own}).inner_optimizer) is Own


def make_line():
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


@on_torch
def test_clipped_share_is_of_the_fit_that_is_running():
    model = make_line()
    model.compile(AutoClipOptimizer(keras.optimizers.SGD(0.0), 50.0), loss="mse")
    x = np.linspace(1, 9, 16, dtype=np.float32).reshape(-1, 1)
    shares, counts = [], [0]
    for data in (x[::-1], x):
        log = AutoClipLogger()
        found = model.fit(data, data * 9, batch_size=2, verbose=0, shuffle=False, callbacks=[log])
        shares += found.history["clipped"]
        counts.append(int(numbers(model.optimizer)["clipped_steps"]))
    assert shares == [(counts[1] - counts[0]) / 8, (counts[2] - counts[1]) / 8]
    assert shares[0] != shares[1]


@on_torch
def test_epoch_without_a_step_has_clipped_nothing():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_line()
        model.compile(AutoClipOptimizer(keras.optimizers.SGD(1e-3), 0.0), loss="mse")
        model.optimizer.initial_scale = 2.0**120  # every gradient overflows
        x = np.full((4, 1), 1000.0, np.float32)
        found = model.fit(x, x, batch_size=4, verbose=0, callbacks=[AutoClipLogger()])
    finally:
        keras.config.set_dtype_policy("float32")
    assert found.history["clipped"] == [0.0]
