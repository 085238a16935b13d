"""AutoClip for GradientTape loops takes every step as the core does: eagerly, in graphs, by XLA, and in the tree."""

import doctest
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from autoclip_core import AutoClip as Core
from autoclip_core import BackendError, ClipStep, NormHistory

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
tf = pytest.importorskip("tensorflow")
from autoclip_tensorflow import AutoClip, graph  # noqa: E402

from .contract import ByStep, CompiledContract, Way, WindowContract  # noqa: E402

LARGEST = np.finfo(np.float32).max
ROOT = Path(__file__).resolve().parent.parent.parent
# TensorFlow greets on the standard error.
QUIETLY = "import os; os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'; os.environ['TF_ENABLE_ONEDNN_OPTS'] = '0'\n"
MODES = ("eager", "graph", "XLA", "tree", "eager tree")


def make(mode, percentile=10.0, **options):
    """An AutoClip, and the function that calls it."""
    if "tree" in mode:
        options = {"history": NormHistory(), **options}
    clip = AutoClip(percentile, **options)
    return clip, clip if "eager" in mode else tf.function(clip, jit_compile=mode == "XLA", reduce_retracing=True)


def numbers(clip):
    return {name: value.numpy().item() for name, value in clip.metrics().items()}


# The contract.


class Clip(ByStep):
    """An AutoClip and how it is called, as the contract holds them."""

    def __init__(self, mode, percentile=10.0, **options):
        self.mode, self.options = mode, options
        self.clip, _ = make(mode, percentile, **options)
        self.one = self.take if "eager" in mode else tf.function(self.take, jit_compile=mode == "XLA")

    @property
    def percentile(self):
        return self.clip.percentile

    @percentile.setter
    def percentile(self, percentile):
        self.clip.percentile = percentile

    def variable(self, name):
        (variable,) = (variable for variable in self.clip.variables if variable.name == f"{name}:0")
        return variable

    def take(self, grad):
        before = self.variable("counts")[1]
        (update,) = self.clip([grad])
        measured = self.clip.metrics()
        fields = [*list(measured.values())[:4], self.variable("counts")[1] - before]
        return ClipStep(*(tf.cast(field, tf.float32) for field in fields)), update

    def step(self, grad):
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), self.one(tf.constant(grad)))

    def run(self, grads):
        if "eager" in self.mode:
            return super().run(grads)

        def run(grads):
            zero = tf.zeros(())
            return tf.scan(lambda _, grad: self.take(grad), grads, (ClipStep(*[zero] * 5), tf.zeros(2)))

        found = tf.function(run, jit_compile=self.mode == "XLA")(tf.constant(np.array(grads)))
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), found)

    def counts(self):
        return tuple(self.variable("counts").numpy().tolist())

    def norms(self):
        if "tree" in self.mode:
            self.clip.history.check()
            return self.clip.history.values().tolist()
        ascending, ring = self.variable("norms").numpy()
        size = min(self.counts()[1], len(ring))
        assert (ascending[size:] == np.finfo(np.float32).max).all()
        assert sorted(ring) == ascending.tolist()
        return ascending[:size].tolist()

    def save(self, folder):
        path = tf.train.Checkpoint(clip=self.clip).save(folder / "checkpoint")
        return path, self.clip.history.to_bytes() if "tree" in self.mode else None

    def load(self, state):
        path, history = state
        if history is not None:  # which a graph knows by its id
            self.__init__(self.mode, self.percentile, **self.options | {"history": NormHistory.from_bytes(history)})
        tf.train.Checkpoint(clip=self.clip).restore(path).assert_consumed()


WAYS = {
    mode: Way(
        partial(Clip, mode),
        ulps=int(mode == "XLA"),
        most_steps=300 if "eager" in mode else 4_000,
        loads_at_once=False,
    )
    for mode in MODES
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestContract(CompiledContract):
    pass


WITH_WINDOW = {mode: way for mode, way in WAYS.items() if "tree" not in mode}


@pytest.mark.parametrize("way", WITH_WINDOW.values(), ids=WITH_WINDOW)
class TestWindow(WindowContract):
    pass


# The rule.


def test_operations_of_tensorflow_do_without_the_kernel(monkeypatch, trace):
    monkeypatch.setattr(graph, "_OBSTACLE", "the sky is falling")
    clip, call = make("graph", window=20)
    core = Core(window=20)
    for norm in trace[:60]:
        call([tf.constant([norm])])
        assert numbers(clip)["clip_threshold"] == pytest.approx(np.float32(core.observe(norm).threshold), rel=2.0**-23)


# Gradients.


@pytest.mark.parametrize("mode", ["eager", "graph", "XLA"])
def test_structure_types_and_missing_gradients_are_kept(mode):
    clip, call = make(mode, 0.0)
    grads = {
        "half": tf.constant([3.0], tf.float16),
        "brain": (tf.constant([[4.0]], tf.bfloat16), None),
        "wide": [tf.constant(0.0, tf.float64)],
        "empty": tf.zeros((0, 3)),
    }
    call(grads)
    assert numbers(clip)["grad_norm"] == 5.0
    clipped = call(tf.nest.map_structure(lambda grad: None if grad is None else 2 * grad, grads))
    for before, after in zip(tf.nest.flatten(grads), tf.nest.flatten(clipped), strict=True):
        if before is not None:
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
            np.testing.assert_array_equal(before, after)
    assert clipped["brain"][1] is None


def test_norm_of_half_precision_does_not_overflow():
    clip = AutoClip()
    clip([tf.fill((100,), tf.constant(60_000.0, tf.float16))])
    assert numbers(clip)["grad_norm"] == pytest.approx(6e5, rel=1e-3)


@pytest.mark.parametrize("mode", ["eager", "graph", "XLA"])
def test_rows_named_twice_add_up(mode):
    clip, _ = make(mode)

    def step(values):
        clip([tf.constant([0.0, 1.0])])
        (grad,) = clip([tf.IndexedSlices(values, tf.constant([3, 0, 3]), tf.constant([5, 1]))])
        return grad.values, grad.indices, grad.dense_shape

    values, indices, shape = tf.function(step, jit_compile=mode == "XLA")(tf.constant([[1.0], [2.0], [4.0]]))
    metrics = numbers(clip)
    assert metrics["grad_norm"] == pytest.approx(np.hypot(5, 2))
    np.testing.assert_allclose(values[:, 0], np.array([1, 2, 4]) * metrics["clip_scale"], rtol=1e-6)
    assert (indices.numpy().tolist(), shape.numpy().tolist()) == ([3, 0, 3], [5, 1])


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_half_gradients_are_scaled_with_all_digits_of_the_scale(dtype):
    clip = AutoClip(0.0)
    grad = tf.cast(tf.linspace(0.1, 1.0, 500), dtype)
    clip([grad])
    (clipped,) = clip([3 * grad])
    scale = clip.metrics()["clip_scale"]
    np.testing.assert_array_equal(clipped, tf.cast(tf.cast(3 * grad, tf.float32) * scale, dtype))
    assert tf.reduce_any(clipped != 3 * grad * tf.cast(scale, dtype))


def test_rows_of_half_precision_add_up_without_overflow():
    clip = AutoClip()
    rows = tf.fill((100, 1), tf.constant(60_000.0, tf.float16))
    clip([tf.IndexedSlices(rows, tf.zeros(100, tf.int32), tf.constant([5, 1]))])
    assert numbers(clip)["grad_norm"] == pytest.approx(6e6, rel=1e-3)


def test_wide_gradients_keep_their_digits():
    clip = AutoClip(0.0)
    clip([tf.constant([1.0], tf.float64)])
    grad = tf.constant([3.0 + 1e-12], tf.float64)
    (clipped,) = clip([grad])
    assert clipped.numpy()[0] == grad.numpy()[0] * np.float64(np.float32(numbers(clip)["clip_scale"]))


def test_variables_are_not_trained():
    assert not AutoClip().trainable_variables


def test_module_has_the_name_that_it_is_given():
    assert AutoClip(name="clipper").name == "clipper"


def test_window_is_that_of_what_was_saved_with_the_default():
    assert [variable.shape for variable in AutoClip().variables if variable.shape.rank == 2] == [(2, 16_384)]


def test_history_is_not_kept_by_the_steps_that_used_it():
    history = NormHistory()
    clip = AutoClip(history=history)
    clip([tf.constant([1.0])])
    kept = weakref.ref(history)
    del history, clip
    gc.collect()
    assert kept() is None


def test_clipping_is_of_the_global_norm():
    clip, grads = AutoClip(0.0), [tf.constant([1.0, 0.0]), tf.constant([[30.0]]), tf.constant(40.0)]
    clip([tf.constant(10.0)])
    clipped = clip(grads)
    scale = 10 / np.sqrt(1 + 30**2 + 40**2)
    for before, after in zip(grads, clipped, strict=True):
        np.testing.assert_allclose(after, before * scale, rtol=1e-6)
    # What earlier TensorFlow versions of AutoClip did: the first tensor is below the threshold, and stays as it is.
    assert tf.clip_by_norm(grads[0], 10.0)[0] == 1.0


def test_ragged_variables_and_later_ones_are_welcome():
    clip = AutoClip()
    ragged = tf.ragged.constant([[3.0], [0.0, 4.0]])
    clip(ragged.flat_values)
    clip([tf.constant([3.0]), tf.constant([4.0, 0.0])])
    clip([])
    assert numbers(clip)["steps"] == 3
    assert numbers(clip)["grad_norm"] == 0.0


# Saved.


def test_history_resumes_beside_the_checkpoint(trace, tmp_path):
    grads = [[tf.constant([norm])] for norm in trace[:60]]
    clip, call = make("tree")
    for grad in grads[:30]:
        call(grad)
    path = tf.train.Checkpoint(clip=clip).save(tmp_path / "checkpoint")
    snapshot = clip.history.to_bytes()
    for history in (NormHistory.from_bytes(snapshot), NormHistory()):
        resumed, call_resumed = make("tree", history=history)
        tf.train.Checkpoint(clip=resumed).restore(path).assert_consumed()
        if len(history) == 0:
            with pytest.raises(tf.errors.FailedPreconditionError, match="restore both from one checkpoint"):
                call_resumed(grads[30])
    resumed, call_resumed = make("tree", history=NormHistory.from_bytes(snapshot))
    tf.train.Checkpoint(clip=resumed).restore(path)
    for grad in grads[30:]:
        call(grad)
        call_resumed(grad)
        assert numbers(clip) == numbers(resumed)


# The tree.


def test_history_is_shared_with_the_process():
    history = NormHistory()
    history.extend([1.0, 2.0, 3.0])
    clip, call = make("tree", 50.0, history=history)
    call([tf.constant([4.0])])
    assert numbers(clip)["clip_threshold"] == 2.5
    assert history.values().tolist() == [1, 2, 3, 4]
    assert clip.history is history


def test_tree_is_not_for_xla_and_the_error_says_what_is():
    clip = AutoClip(history=NormHistory())
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="history_is_for_this_process_without_jit_compile_so_give_window_instead"
    ):
        tf.function(clip, jit_compile=True)([tf.constant([1.0])])


def test_tree_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setattr(graph, "_OBSTACLE", "the sky is falling")
    with pytest.raises(BackendError, match=r"the sky is falling.*variables keep the last `window` norms"):
        AutoClip(history=NormHistory())


def test_tree_is_refused_where_tensorflow_lacks_a_function(monkeypatch):
    def register(find):
        return None if find(b"TF_LaterThanThis") else b"TF_LaterThanThis"

    monkeypatch.setattr(graph.ctypes, "CDLL", lambda path: SimpleNamespace(autoclip_tensorflow_register=register))
    monkeypatch.setattr(graph, "_OBSTACLE", graph._register())
    with pytest.raises(BackendError, match=r"TF_LaterThanThis.*variables keep the last `window` norms"):
        AutoClip(history=NormHistory())


def test_tree_is_refused_where_tensorflow_has_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(tf.sysconfig, "get_lib", lambda: str(tmp_path))
    monkeypatch.setattr(graph, "_OBSTACLE", graph._register())
    with pytest.raises(BackendError, match=r"no libtensorflow_framework in .*variables keep the last `window` norms"):
        AutoClip(history=NormHistory())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": np.ones(2, np.float32)}, "an input has a wrong size"),
        ({"recorded_steps": np.zeros(3, np.int32)}, "an input has a wrong size"),
        ({"norms": np.zeros((2, 0), np.float32)}, "no place for norms"),
        ({"norms": np.zeros((2, 1, 1), np.float32)}, "no place for norms"),
        ({"percentile": np.array([101, *[0] * 11], np.int32)}, "from 0 to 100"),
        ({"history": np.int64(2**40)}, "There is no history with this id"),
    ],
    ids=str,
)
def test_op_refuses_what_it_cannot_use(change, message):
    inputs = {
        "norms": np.full((2, 3), LARGEST),
        "recorded_steps": np.int32(0),
        "norm": np.float32(1.0),
        "percentile": np.zeros(12, np.int32),
        "history": np.int64(0),
    }

    @tf.function
    def call(inputs):
        return tf.compat.v1.get_default_graph().create_op("AutoClipObserve", list(inputs.values())).outputs

    norms, threshold = call(tf.nest.map_structure(tf.constant, inputs))
    assert (norms.numpy().tolist(), threshold) == ([[1, LARGEST, LARGEST]] * 2, 1)
    with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.FailedPreconditionError), match=message):
        call(tf.nest.map_structure(tf.constant, inputs | change))


def test_kernel_knows_tensorflow_by_its_headers(tmp_path, absent):
    if shutil.which("cc") is None:
        absent("needs a C compiler")
    source = (ROOT / "csrc/tensorflow/op.c").read_text(encoding="utf-8")
    numbers = re.findall(r"\b(TF_[A-Z_\d]+) = (\d+)", source)
    assert len(numbers) == 4
    code = "".join(  # which the headers name as C++ does
        f"typedef struct {name} {name};\n"
        for name in ("TF_OpDefinitionBuilder", "TF_ShapeInferenceContext", "TF_ShapeHandle", "TF_DimensionHandle")
    )
    code += """
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <tensorflow/c/kernels.h>
#include <tensorflow/c/ops.h>
#include "functions.h"
#define SAME(result, name, parameters) static result(*check_##name) parameters = name;
TF_FUNCTIONS(SAME)
"""
    code += "".join(f'_Static_assert({name} == {value}, "{name}");\n' for name, value in numbers)
    code += '_Static_assert(sizeof(TF_DataType) == sizeof(int) && sizeof(TF_Code) == sizeof(int), "enums");\n'
    flags = ["-std=c11", "-fsyntax-only", "-Werror", f"-I{tf.sysconfig.get_include()}", f"-I{ROOT / 'csrc/tensorflow'}"]

    def compile_it(text):
        (tmp_path / "check.c").write_text(text, encoding="utf-8")
        return subprocess.run(["cc", *flags, "check.c"], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = compile_it(code)
    assert done.returncode == 0, done.stderr
    assert compile_it(code + "static void (*wrong)(void) = TF_TensorData;").returncode != 0


# Where it is differentiated.


def outer_gradient(mode, nested, start, clip):
    """The derivative of a loss after a step with a clipped gradient, by the weights before it, and the gradient."""
    weights = tf.Variable(start)

    def train():
        with nested(weights) as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(weights**3)
            (grad,) = clip([inner.gradient(loss, weights)])
            loss = tf.reduce_sum((weights - 0.1 * grad) ** 2)
        return (outer.jvp(loss) if nested is not tape else outer.gradient(loss, weights)), grad

    found = (train if "eager" in mode else tf.function(train, jit_compile=mode == "XLA"))()
    return [tensor.numpy() for tensor in found]


def tape(weights):
    return tf.GradientTape(persistent=True)


def forward(weights):
    return tf.autodiff.ForwardAccumulator(weights, tf.constant([1.0, 0.0]))


@pytest.mark.parametrize("mode", MODES)
def test_threshold_is_a_constant_where_a_step_is_differentiated(mode):
    start = [3.0, -2.0]
    clip, _ = make(mode, 50.0)
    clip([tf.constant([1.0, 0.0])])
    derivative, grad = outer_gradient(mode, tape, start, clip)
    threshold = numbers(clip)["clip_threshold"]
    assert threshold == pytest.approx(np.linalg.norm(grad), rel=1e-6)

    def loss(weights):
        grad = 3 * weights**2
        return np.sum((weights - 0.1 * threshold / np.linalg.norm(grad) * grad) ** 2)

    expected = [(loss(start + step) - loss(start - step)) / 2e-6 for step in 1e-6 * np.eye(2)]
    np.testing.assert_allclose(derivative, expected, rtol=1e-4)
    # A zero gradient has a norm that has no derivative.
    derivative, grad = outer_gradient(mode, tape, [0.0, 0.0], clip)
    np.testing.assert_array_equal([derivative, grad], 0.0)
    assert numbers(clip)["steps"] == 3


@pytest.mark.parametrize("mode", ["eager", "eager tree", "graph"])
def test_forward_derivative_takes_the_threshold_as_a_constant_too(mode):
    clips = [make(mode, 50.0)[0] for _ in range(2)]
    for clip in clips:
        clip([tf.constant([1.0, 0.0])])
    along, _ = outer_gradient(mode, forward, [3.0, -2.0], clips[0])
    derivative, _ = outer_gradient(mode, tape, [3.0, -2.0], clips[1])
    assert along == pytest.approx(derivative[0], rel=1e-5)


# Switches.


def check_numerics():
    tf.debugging.enable_check_numerics()
    return tf.debugging.disable_check_numerics


def dump_debug_info(folder):
    tf.debugging.experimental.enable_dump_debug_info(str(folder), tensor_debug_mode="FULL_HEALTH")
    return tf.debugging.experimental.disable_dump_debug_info


def run_functions_eagerly():
    tf.config.run_functions_eagerly(True)
    return partial(tf.config.run_functions_eagerly, False)


def compile_clusters():
    tf.config.optimizer.set_jit(True)
    return partial(tf.config.optimizer.set_jit, False)


SWITCHES = [check_numerics, dump_debug_info, run_functions_eagerly, compile_clusters]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
def test_steps_are_the_same_under_every_switch(switch, tmp_path):
    norms = [0.0, 3.0, 1.0, 9.0, 2.0]
    core = Core(50.0)
    expected = [core.observe(norm).threshold for norm in norms][1:]
    graph._graph.cache_clear()
    switch_off = switch(*([tmp_path] if switch is dump_debug_info else []))
    try:
        for mode in MODES:
            if mode == "XLA" and switch in (check_numerics, dump_debug_info):
                continue  # there TensorFlow's own functions do not compile
            clip, call = make(mode, 50.0)
            call([tf.constant([norms[0]])])
            found = []
            for norm in norms[1:]:
                call([tf.constant([norm])])
                found.append(numbers(clip)["clip_threshold"])
            assert found == expected, mode
            assert tf.function(clip.metrics)()["clip_threshold"] == expected[-1]
    finally:
        switch_off()
        graph._graph.cache_clear()


# Another process.


class Training(tf.Module):
    """A step that can be saved as a program."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    @tf.function(input_signature=[tf.TensorSpec([2])])
    def step(self, grad):
        self.clip([grad])
        return self.clip.metrics()["clip_threshold"]


def test_programs_run_in_a_process_that_imports_the_package_only(run_python, tmp_path):
    for home, clip in (("window", AutoClip(50.0, window=8)), ("tree", AutoClip(50.0, history=NormHistory()))):
        training = Training(clip)
        training.step(tf.constant([3.0, 4.0]))
        tf.saved_model.save(training, str(tmp_path / home))
    code = """
import sys
import threading

# By two threads at once.
threads = [threading.Thread(target=__import__, args=("autoclip_tensorflow",)) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import tensorflow as tf
program = tf.saved_model.load("window")
print(*[float(program.step(tf.constant([0.0, norm]))) for norm in (6.0, 1.0)])
program = tf.saved_model.load("tree")
try:
    program.step(tf.constant([0.0, 6.0]))
except tf.errors.FailedPreconditionError as error:
    print("There is no history with this id" in str(error))

from autoclip_core import NormHistory
from autoclip_tensorflow import AutoClip
tf.config.experimental.enable_op_determinism()
tf.random.set_seed(1)
for clip in (AutoClip(50.0), AutoClip(50.0, history=NormHistory())):
    for call in (clip, tf.function(clip)):
        call([tf.constant([3.0])])
    print(float(clip.metrics()["clip_threshold"]), int(clip.metrics()["steps"]))
"""
    assert run_python(QUIETLY + code) == "5.5 5.0\nTrue\n3.0 2\n3.0 2\n"


def test_parameter_server_that_imports_the_package_takes_steps(run_python):
    serve = """
import json, sys
import autoclip_tensorflow, tensorflow as tf
cluster = tf.train.ClusterSpec(json.loads(sys.argv[1]))
servers = [tf.distribute.Server(cluster, job, 0, protocol="grpc") for job in ("worker", "ps")]
print("ready", flush=True)
sys.stdin.read()
"""
    code = f"""
import json, socket, subprocess, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
cluster = {{job: [f"127.0.0.1:{{each.getsockname()[1]}}"] for job, each in zip(("worker", "ps"), sockets)}}
for each in sockets: each.close()
command = [sys.executable, "-P", "-c", {QUIETLY + serve!r}, json.dumps(cluster)]
server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
import tensorflow as tf
from autoclip_core import BackendError, NormHistory
from autoclip_tensorflow import AutoClip
server.stdout.readline()
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec(cluster), rpc_layer="grpc")
strategy = tf.distribute.ParameterServerStrategy(resolver)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
with strategy.scope():
    clip = AutoClip(50.0, window=8)
    try: AutoClip(history=NormHistory())
    except BackendError as error: print(error)
step = tf.function(lambda norm: strategy.run(lambda: clip([norm[None]])[0]))
for norm in (5.0, 6.0, 1.0):
    update = coordinator.schedule(step, args=(tf.constant(norm),))
    coordinator.join()
print(float(clip.metrics()["clip_threshold"]), float(update.fetch()[0]), flush=True)
server.kill()
import os; os._exit(0)  # else TensorFlow tells of the server that is gone
"""
    refused, found = run_python(QUIETLY + code, timeout=300).splitlines()
    assert "under a ParameterServerStrategy other processes take the steps; leave it out" in refused
    assert found == "5.0 1.0"


# Several devices.


def test_replicas_see_the_norm_of_the_reduced_gradient(run_python):
    code = """
import numpy as np, tensorflow as tf, warnings
from autoclip_core import NormHistory
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from autoclip_tensorflow import AutoClip
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
norms = np.random.default_rng(0).lognormal(size=30).astype(np.float32)
for history in (None, NormHistory()):
    with strategy.scope():
        clip = AutoClip(history=history)
    alone = AutoClip()

    @tf.function
    def step(norm):
        def replica():
            # Of the two replicas one has 3 times the gradient, the other -2 times.
            share = 3.0 - 5.0 * tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
            (grad,) = clip([norm[None] * share])
            return tf.distribute.get_replica_context().all_reduce("SUM", grad)
        return strategy.run(replica)

    for norm in norms:
        reduced = strategy.experimental_local_results(step(tf.constant(norm)))
        (expected,) = alone([tf.constant([norm])])
        for grad in reduced:
            np.testing.assert_allclose(grad, expected, rtol=1e-5)
        for name, value in clip.metrics().items():
            np.testing.assert_allclose(value, alone.metrics()[name], rtol=1e-5)
    if history is not None:
        assert len(history) == 30
    tf.function(lambda: strategy.run(lambda: clip([None])))()  # nothing to add up
    assert int(clip.metrics()["steps"]) == 31
print("agreed")
"""
    assert run_python(QUIETLY + code) == "agreed\n"


def test_workers_see_the_norm_of_the_reduced_gradient(tmp_path):
    code = """
import json, os, sys, warnings
import numpy as np, tensorflow as tf
from autoclip_core import NormHistory
strategy = tf.distribute.MultiWorkerMirroredStrategy()
from autoclip_tensorflow import AutoClip
norms = np.random.default_rng(0).lognormal(size=30).astype(np.float32)
share = [3.0, -2.0][int(sys.argv[1])]
for history in (None, NormHistory()):
    with strategy.scope():
        clip = AutoClip(history=history)

    @tf.function
    def step(norm):
        def replica():
            (grad,) = clip([norm[None] * share])
            return tf.distribute.get_replica_context().all_reduce("SUM", grad)
        return strategy.run(replica)

    sums = [float(step(tf.constant(norm))[0]) for norm in norms]
    assert history is None or len(history) == 30
    print(json.dumps([sums, {name: float(value) for name, value in clip.metrics().items()}]))
"""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{taken.getsockname()[1]}" for taken in (one, other)]
    workers = []
    for index in range(2):
        config = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
        command = [sys.executable, "-P", "-c", code, str(index)]
        environment = os.environ | {"TF_CONFIG": config}
        workers.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    alone = AutoClip()
    norms = np.random.default_rng(0).lognormal(size=30).astype(np.float32)
    expected = [float(alone([tf.constant([norm])])[0][0]) for norm in norms]
    for line in outputs[0][0].splitlines()[-2:]:
        sums, metrics = json.loads(line)
        np.testing.assert_allclose(sums, expected, rtol=1e-5)
        for name, value in numbers(alone).items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-5)


# Bad input.


def test_examples_of_the_docstrings_run():
    results = doctest.testmod(sys.modules["autoclip_tensorflow.clip"])
    assert results.failed == 0 < results.attempted


def test_package_has_the_names_it_lists():
    import autoclip_tensorflow

    assert autoclip_tensorflow.__all__ == ["AutoClip", "AutoClipLogger", "AutoClipOptimizer"]
    with pytest.raises(AttributeError, match="no attribute 'Autoclip'"):
        _ = autoclip_tensorflow.Autoclip
