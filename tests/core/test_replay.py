"""A replay is what AutoClip would have done, and the norms are found in what loggers leave behind."""

import json
import sys
import warnings
from math import inf, nan

import numpy as np
import pytest

from autoclip_core import AutoClip, AutoClipValueError
from autoclip_core.replay import PERCENTILES, read_norms, replay

from .reference import assert_same_bits


@pytest.fixture
def norms():
    random = np.random.default_rng(5)
    norms = random.lognormal(size=2000) * np.geomspace(1, 1e-4, 2000)
    norms[random.random(2000) < 0.01] = 0.0
    norms[random.random(2000) < 0.01] = nan
    norms[random.random(2000) < 0.01] = inf
    return norms


@pytest.mark.parametrize("first", [None, nan, 0.0])
def test_replay_is_what_the_clipper_would_have_done(norms, first):
    if first is not None:
        norms[:3] = first
    results = replay(norms, [0.0, 10.0, 62.5], [None, 100])
    assert [(result.percentile, result.window) for result in results] == [
        (percentile, window) for window in (None, 100) for percentile in (0.0, 10.0, 62.5)
    ]
    for result in results:
        clip = AutoClip(result.percentile, window=result.window)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            steps = [clip.observe(norm) for norm in norms.tolist()]
        assert_same_bits(result.thresholds, [step.threshold for step in steps])
        assert_same_bits(result.scales, [step.scale for step in steps])
        assert result.clipped.tolist() == [step.clipped for step in steps]
        assert result.clipped.any()


def test_fixed_thresholds_do_not_move(norms):
    *_, result = replay(norms, [50.0], fixed=[0.01, 0.1])
    finite = np.isfinite(norms)
    assert (result.percentile, result.window) == (None, None)
    assert set(result.thresholds) == {0.1}
    assert result.clipped.tolist() == (finite & (norms > 0.1)).tolist()
    assert_same_bits(result.scales[result.clipped], 0.1 / norms[result.clipped])


def test_summary_describes_the_clipped_steps():
    [result] = replay([1.0, 2.0, 4.0, 8.0], [0.0])
    assert result.summary() == {
        "percentile": 0.0,
        "window": None,
        "final_threshold": 1.0,
        "median_threshold": 1.0,
        "clipped_share": 0.75,
        "median_scale": 0.25,
        "hard_scale": np.percentile([0.125, 0.25, 0.5], 5),
    }
    [result] = replay([nan, nan], [50.0])
    assert result.summary()["median_threshold"] is result.summary()["median_scale"] is None


@pytest.mark.parametrize(
    ("norms", "says"), [([], r"\(0,\)"), ([[1.0]], r"\(1, 1\)"), ([1.0, -2.0], r"norms\[1\]"), (1.0, r"\(\)")]
)
def test_norms_that_are_none_are_refused(norms, says):
    with pytest.raises(AutoClipValueError, match=says):
        replay(norms)


def test_percentile_that_is_none_is_refused(norms):
    with pytest.raises(AutoClipValueError, match="101"):
        replay(norms, [101.0])
    with pytest.raises(AutoClipValueError, match=r"above 0, but -1\.0"):
        replay(norms, fixed=[-1.0])
    with pytest.raises(AutoClipValueError, match="window"):
        replay(norms, windows=[0])


LIGHTNING = "epoch,grad_norm,step,val_loss\n0,2.5,0,\n0,,0,0.7\n0,nan,1,\n1,0.5,2,\n"
FILES = {
    "metrics.csv": (LIGHTNING, "grad_norm", [2.5, nan, 0.5]),
    "spaces.csv": ("step, Grad_Norm \n0, 1.5\n1, inf\n", " Grad_Norm ", [1.5, inf]),
    "tabs.csv": ("step\tgrad_norm\n0\t1.5\n1\t2.5\n", "grad_norm", [1.5, 2.5]),
    "semicolons.csv": ("\n\nstep;grad_norm\n0;1.5\n", "grad_norm", [1.5]),
    "signed.csv": ("\ufeffgrad_norm,step\n1.5,0\n", "grad_norm", [1.5]),
    "alone.csv": ("1.5\n2.5\n\n3.5\n", "norm", [1.5, 2.5, 3.5]),
    "named.csv": ("norm\n1.5\n2.5\n", "norm", [1.5, 2.5]),
    "likely.csv": ("step,train_GradNorm_total\n0,1.5\n", "train_GradNorm_total", [1.5]),
    "log.jsonl": ('{"step": 0, "grad_norm": 1.5}\n\n{"val": 3}\n{"grad_norm": NaN}\n', "grad_norm", [1.5, nan]),
    "one.jsonl": ('{"loss": 1, "grad_norm": 1.5}\n', "grad_norm", [1.5]),
    "lines.json": ('{"grad_norm": 1.5}\n{"grad_norm": 2.5}\n', "grad_norm", [1.5, 2.5]),
    "nulls.jsonl": ('{"grad_norm": null}\n{"grad_norm": 2}\n{"grad_norm": "3.5"}\n', "grad_norm", [2.0, 3.5]),
    "remarks_between.jsonl": ('{"grad_norm": 1.5}\n\n"resumed"\n{"grad_norm": 2.5}\n', "grad_norm", [1.5, 2.5]),
    "list.json": ("[1.5, 2, 3.5]", "norm", [1.5, 2.0, 3.5]),
    "records.json": ('[{"grad_norm": 1.5},\n {"loss": 2}]', "grad_norm", [1.5]),
    "trainer_state.json": (
        json.dumps({"epoch": 1, "log_history": [{"grad_norm": 1.5, "loss": 1}, {"eval_loss": 2}]}, indent=2),
        "grad_norm",
        [1.5],
    ),
    "trainer_state_in_one_line.json": (
        json.dumps({"epoch": 1, "log_history": [{"grad_norm": 1.5}, {"grad_norm": 2.5}]}),
        "grad_norm",
        [1.5, 2.5],
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_norms_are_found_in_the_files_of_loggers(file, tmp_path):
    text, name, expected = FILES[file]
    (tmp_path / file).write_text(text, encoding="utf-8")
    norms, found = read_norms(tmp_path / file)
    assert found == name
    assert_same_bits(norms, expected)


def test_column_may_be_named(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("grad_norm,other\n1,2\n3,4\n", encoding="utf-8")
    assert read_norms(path, "other")[0].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", ["float64", "float32", "int32"])
def test_norms_are_read_from_arrays(dtype, tmp_path):
    for shape in ((4,), (4, 1), (1, 4)):
        np.save(tmp_path / "norms.npy", np.array([1, 2, 3, 4], dtype).reshape(shape))
        norms, name = read_norms(tmp_path / "norms.npy")
        assert (norms.dtype, norms.tolist(), name) == (np.float64, [1.0, 2.0, 3.0, 4.0], "norms")


@pytest.mark.parametrize("array", [np.ones((3, 2)), np.array(["a"]), np.array(1.0)])
def test_arrays_of_other_things_are_refused(array, tmp_path):
    np.save(tmp_path / "norms.npy", array)
    with pytest.raises(AutoClipValueError, match="not one norm per step"):
        read_norms(tmp_path / "norms.npy")


@pytest.mark.parametrize("as_tensors", [False, True])
def test_norms_are_read_from_tensorboard(as_tensors, tmp_path, absent):
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError:
        absent("tensorboard is not installed")
    writer = EventFileWriter(str(tmp_path))
    for step, norm in enumerate([1.5, 2.5, 0.5]):
        value = (
            Summary.Value(tag="train/grad_norm", tensor=make_tensor_proto(np.float32(norm)))
            if as_tensors
            else Summary.Value(tag="train/grad_norm", simple_value=norm)
        )
        loss = Summary.Value(tag="loss", simple_value=9.0)
        writer.add_event(Event(step=step, wall_time=step, summary=Summary(value=[value, loss])))
    writer.close()
    [file] = tmp_path.iterdir()
    for path in (tmp_path, file):
        norms, name = read_norms(path)
        assert (norms.tolist(), name) == ([1.5, 2.5, 0.5], "train/grad_norm")


def test_tensorboard_that_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    (tmp_path / "events.out.tfevents.1").touch()
    with pytest.raises(AutoClipValueError, match="pip install tensorboard"):
        read_norms(tmp_path)


def test_folder_without_events_names_what_it_holds(tmp_path):
    with pytest.raises(AutoClipValueError, match=r"without TensorBoard events\.$"):
        read_norms(tmp_path)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0/metrics.csv").write_text(LIGHTNING, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=r"did you mean .*metrics.csv\?"):
        read_norms(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "step,loss\n1,2\n", "'step', 'loss'"),
        ("a.csv", "grad_norm_a,grad_norm_b,loss\n1,2,3\n", "'grad_norm_a', 'grad_norm_b'"),
        ("a.csv", "grad_norm\n", "has no numbers"),
        ("a.csv", "grad_norm\n1\nx\n", "not a number everywhere.*'x'"),
        ("a.jsonl", '{"grad_norm": 1}\n{"grad_\n', "line 2"),
        ("a.json", "[1, 2", "not JSON"),
        ("a.json", '{\n "log_history": 3}', "no list"),
        ("a.json", "{", "line 1"),
        ("a.json", '["x"]', "no named numbers"),
        ("a.csv", "PK\0", "not text"),
        ("a.npy", "not an array", "not a .npy file"),
    ],
)
def test_files_without_norms_are_refused(file, text, says, tmp_path):
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=says) as caught:
        read_norms(tmp_path / file)
    assert file in str(caught.value)


def test_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(LIGHTNING, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=r"no 'loss'; it has 'epoch', 'grad_norm', 'step', 'val_loss'"):
        read_norms(path, "loss")


def test_default_percentiles_are_those_of_the_paper():
    assert PERCENTILES == (1.0, 10.0, 25.0, 50.0, 90.0)
