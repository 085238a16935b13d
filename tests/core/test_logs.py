"""The norms are found in what loggers leave behind, whole or not, and what was not read is told."""

import bz2
import gzip
import io
import json
import lzma
import sys
from contextlib import redirect_stderr, redirect_stdout
from math import inf, nan
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoclip_core import AutoClipValueError
from autoclip_core.__main__ import main
from autoclip_core.logs.events import _checksum
from autoclip_core.replay import read_log, read_norms

from .reference import assert_same_bits

LIGHTNING = "epoch,grad_norm,step,val_loss\n0,2.5,0,\n0,,0,0.7\n0,nan,1,\n1,0.5,2,\n"
TRAINER = {"epoch": 1, "log_history": [{"grad_norm": 1.5, "loss": 1}, {"eval_loss": 2}, {"grad_norm": 2.5}]}

# Text, the name that is found, the norms.
FILES = {
    "metrics.csv": (LIGHTNING, "grad_norm", [2.5, nan, 0.5]),
    "spaces.csv": ("step, Grad_Norm \n0, 1.5\n1, inf\n", "Grad_Norm", [1.5, inf]),
    "tabs.csv": ("step\tgrad_norm\n0\t1.5\n1\t2.5\n", "grad_norm", [1.5, 2.5]),
    "semicolons.csv": ("\n\nstep;grad_norm\n0;1.5\n", "grad_norm", [1.5]),
    "decimal_commas.csv": ("step;grad_norm\n0;1,5\n1;2,5e-3\n2;3\n", "grad_norm", [1.5, 2.5e-3, 3.0]),
    "decimal_commas.tsv": ("step\tgrad_norm\n0\t1,5\n1\t2\n", "grad_norm", [1.5, 2.0]),
    "excel.csv": ("sep=;\r\nstep;grad_norm\r\n0;1,5\r\n", "grad_norm", [1.5]),
    "words.txt": ("step  grad_norm\n0   1.5\n100 2.5\n", "grad_norm", [1.5, 2.5]),
    "savetxt.txt": ("# step grad_norm\n0 1.5\n1 2.5\n", "grad_norm", [1.5, 2.5]),
    "remarks.csv": ("# run 1\n# of 3\nstep,grad_norm\n0,1.5\n", "grad_norm", [1.5]),
    "signed.csv": ("\ufeffgrad_norm,step\n1.5,0\n", "grad_norm", [1.5]),
    "windows.csv": ("step,grad_norm\r\n0,1.5\r\n1,2.5\r\n", "grad_norm", [1.5, 2.5]),
    "twice_converted.csv": ("step,grad_norm\r\r\n0,1.5\r\r\n1,2.5\r\r\n", "grad_norm", [1.5, 2.5]),
    "old_mac.csv": ("step,grad_norm\r0,1.5\r1,2.5\r", "grad_norm", [1.5, 2.5]),
    "progress_bar.csv": ("step,note,grad_norm\n0,10%\r20%,1.5\n1,30%\r40%,2.5\n", "grad_norm", [1.5, 2.5]),
    "alone.csv": ("1.5\n2.5\n\n3.5\n", "norm", [1.5, 2.5, 3.5]),
    "named.csv": ("norm\n1.5\n2.5\n", "norm", [1.5, 2.5]),
    "likely.csv": ("step,train_GradNorm_total\n0,1.5\n", "train_GradNorm_total", [1.5]),
    "missing.csv": ("step,grad_norm\n0,NA\n1,None\n2,null\n3,-\n4,N/A\n5,<NA>\n6,1.5\n", "grad_norm", [1.5]),
    "ends_in_commas.csv": ("step,grad_norm,\n0,1.5,\n1,2.5,,\n", "grad_norm", [1.5, 2.5]),
    "alone_with_commas.csv": ("1.5,\n2.5,\n", "norm", [1.5, 2.5]),
    "objects.csv": (
        "step,grad_norm\n0,np.float64(1.5)\n1,tensor(2.5)\n2,\"tensor(3.5, device='cuda:0')\"\n",
        "grad_norm",
        [1.5, 2.5, 3.5],
    ),
    "settings.csv": ("max_grad_norm,grad_norm_clip,train_grad_norm\n1,1,1.5\n", "train_grad_norm", [1.5]),
    "of_events.tfevents.csv": ("step,grad_norm\n0,1.5\n", "grad_norm", [1.5]),
    "short_rows.csv": ("step,grad_norm,loss\n0,1.5\n1,2.5,3\n", "grad_norm", [1.5, 2.5]),
    "index.csv": (",grad_norm\n0,1.5\n", "grad_norm", [1.5]),
    "quoted.csv": ('"step","grad_norm","note"\n"0","1.5","a, ""b"" c"\n"1","2.5",""\n', "grad_norm", [1.5, 2.5]),
    "lines_in_quotes.csv": ('note,grad_norm\n"a\nb, c\n",1.5\n"""d""\n\ne",2.5\nf,3.5\n', "grad_norm", [1.5, 2.5, 3.5]),
    "inches.csv": ('size,grad_norm\n5",1.5\n7" by 9",2.5\n', "grad_norm", [1.5, 2.5]),
    "large_cell.csv": (f'config,grad_norm\n"{"x" * 200_000}",1.5\n{"y" * 200_000},2.5\n', "grad_norm", [1.5, 2.5]),
    "wandb.csv": (
        '"Step","run-1 - grad_norm","run-1 - grad_norm__MIN","run-1 - grad_norm__MAX"\n"0","1.5","1","2"\n',
        "run-1 - grad_norm",
        [1.5],
    ),
    "log.jsonl": ('{"step": 0, "grad_norm": 1.5}\n\n{"val": 3}\n{"grad_norm": NaN}\n', "grad_norm", [1.5, nan]),
    "one.jsonl": ('{"loss": 1, "grad_norm": 1.5}\n', "grad_norm", [1.5]),
    "lines.json": ('{"grad_norm": 1.5}\n{"grad_norm": 2.5}\n', "grad_norm", [1.5, 2.5]),
    "several_in_a_line.json": ('{"grad_norm": 1.5}{"grad_norm": 2.5}\n{"grad_norm": 3}\n', "grad_norm", [1.5, 2.5, 3]),
    "late_several.json": ('{"grad_norm": 1.5}\n{"grad_norm": 2.5} {"grad_norm": 3}\n', "grad_norm", [1.5, 2.5, 3]),
    "commas_between.json": ('{"grad_norm": 1.5},\n{"grad_norm": 2.5},\n', "grad_norm", [1.5, 2.5]),
    "late_comma.json": ('{"grad_norm": 1.5}\n{"grad_norm": 2.5},\n', "grad_norm", [1.5, 2.5]),
    "several.json": ('{\n"grad_norm": 1.5\n}\n{\n"grad_norm": 2.5\n}\n', "grad_norm", [1.5, 2.5]),
    "nulls.jsonl": ('{"grad_norm": null}\n{"grad_norm": 2}\n{"grad_norm": "3.5"}\n', "grad_norm", [2.0, 3.5]),
    "nested.jsonl": ('{"train": {"grad_norm": 1.5}}\n{"train": {"grad_norm": 2}}\n', "train.grad_norm", [1.5, 2.0]),
    "train_first.jsonl": (
        '{"val": {"grad_norm": 1}, "train": {"grad_norm": 2}}\n{"train": {"grad_norm": 3}}\n',
        "train.grad_norm",
        [2.0, 3.0],
    ),
    "large.jsonl": (f'{{"grad_norm": 1{"0" * 5000}}}\n{{"grad_norm": 1{"0" * 40}}}\n', "grad_norm", [inf, 1e40]),
    "remarks_between.jsonl": ('{"grad_norm": 1.5}\n\n"resumed"\n{"grad_norm": 2.5}\n', "grad_norm", [1.5, 2.5]),
    "list.json": ("[1.5, 2, 3.5]", "norm", [1.5, 2.0, 3.5]),
    "records.json": ('[{"grad_norm": 1.5},\n {"loss": 2}]', "grad_norm", [1.5]),
    "keras.json": ('{"loss": [3, 4], "grad_norm": [1.5, 2.5]}', "grad_norm", [1.5, 2.5]),
    "pandas.json": ('{"loss": {"0": 3}, "grad_norm": {"0": 1.5, "1": 2.5}}', "grad_norm", [1.5, 2.5]),
    "pandas_rows.json": ('{"0": {"grad_norm": 1.5, "a": 1}, "1": {"grad_norm": 2.5}}', "grad_norm", [1.5, 2.5]),
    "pandas_series.json": ('{"0": 1.5, "1": 2.5}', "norm", [1.5, 2.5]),
    "deep.jsonl": (
        f'{{"grad_norm": 1.5}}\n{{"grad_norm": 2.5, "x": {"[" * 900}{"]" * 900}}}\n',
        "grad_norm",
        [1.5, 2.5],
    ),
    "runs.json": ('{"runs": {"a": [{"grad_norm": 1.5}, {"grad_norm": 2.5}]}}', "runs.a.grad_norm", [1.5, 2.5]),
    "trainer_state.json": (json.dumps(TRAINER, indent=2), "grad_norm", [1.5, 2.5]),
    "TRAINER_STATE.JSON.BAK": (json.dumps(TRAINER, indent=2), "grad_norm", [1.5, 2.5]),
    "trainer_state_in_one_line.json": (json.dumps(TRAINER), "grad_norm", [1.5, 2.5]),
    "transformers.log": (
        "Loading\n 5%|  | 1/2\r{'loss': 2.5, 'grad_norm': 1.5}\n{'loss': '2', 'grad_norm': '2.5'}\n{'a': 3}\n",
        "grad_norm",
        [1.5, 2.5],
    ),
    "transformers_alone.log": ("{'loss': 2.5, 'grad_norm': 1.5}\n{'grad_norm': nan}\n", "grad_norm", [1.5, nan]),
    "megatron.log": (
        "> ...\n iteration 1/ 9 | lm loss: 1.1E+01 | grad norm: 1.5 |\n iteration 2/ 9 | grad norm: 2.5E-01 |\n",
        "grad norm",
        [1.5, 0.25],
    ),
    "torchtitan.log": (
        "[rank0]: 2026-01-01 00:00:00,123 - root - INFO - step: 1  loss:  8.1  grad_norm:  1.5  memory: 10GiB(5.9%)\n",
        "grad_norm",
        [1.5],
    ),
    "fairseq.log": ('2026-01-01 | train_inner | {"loss": "10.2", "gnorm": "1.5", "clip": "0"}\n', "gnorm", [1.5]),
    "words_alone.log": ("step 1 grad_norm 1.5 loss 3\nstep 2 grad_norm tensor(2.5) loss 3\n", "grad_norm", [1.5, 2.5]),
    "signs.log": ("step=1,grad_norm=1.5,loss=3\nstep=2,grad_norm=2.5.\n", "grad_norm", [1.5, 2.5]),
    "one_sign.log": ("grad_norm: 1.5\ngrad_norm: None\n", "grad_norm", [1.5]),
    "exact.log": ("param grad norm sum: 9 | grad norm: 1.5 |\ngrad norm -> see below\n", "grad norm", [1.5]),
    "colours.log": ("\x1b[31mstep: 1  \x1b[38;5;1mgrad_norm:  1.5\x1b[0m\n", "grad_norm", [1.5]),
    "table_of_messages.csv": ("grad_norm,note\nNA,grad_norm: 9\n1.5,\n", "grad_norm", [1.5]),
    "settings.log": ("grad norm clipping at 1.0\nmax_grad_norm=1.0\ngrad_norm=1.5\n", "grad_norm", [1.5]),
    "prefixed_json.log": ('DLLL {"a": 1}\nDLLL {"data": {"grad_norm":1.5,"loss":2}}\n', "grad_norm", [1.5]),
    "long_lines.log": ("word " * 50_000 + "x" * 50_000 + "\ngrad_norm=1.5\n", "grad_norm", [1.5]),
    "surrogate.jsonl": ('{"grad_norm\\ud800": 1}\n{"grad_norm\\ud800": 2}\n', "grad_norm\ud800", [1.0, 2.0]),
}

# Text of which a part cannot be read, the norms, and what is said.
PARTS = {
    "unclosed.csv": (
        'note,step,grad_norm\nx,0,1.5\n"oops,1,2.5\nx,2,3.5\n"oops,3,4.5\nx,4,5.5\n',
        [1.5, 2.5, 3.5, 4.5, 5.5],
        r"2 quotes are never closed \(line 3\)",
    ),
    "unclosed_last.csv": ('grad_norm,note\n1.5,x\n2.5,"oops\n', [1.5, 2.5], r"a quote is never closed \(line 3\)"),
    "word.csv": (
        "grad_norm\n1.5\nx\n2.5\ny\n",
        [1.5, 2.5],
        "2 numbers were read and 2 entries skipped.*: line 3 with 'x",
    ),
    "cut.csv": ("step,grad_norm,loss\n0,1.5,3\n1,2", [1.5], "1 entry skipped: line 3, which has 2 of 3 cells"),
    "cut_number.csv": ("step,grad_norm\n0,1.5\n1,2.", [1.5, 2.0], r"line 3 has no end, and '2\.' may be cut"),
    "long_row.csv": (
        "step,note,grad_norm\n0,a,1.5\n1,a,7,2.5\n",
        [1.5],
        "line 3, which has 4 cells where the header has 3",
    ),
    "short_row.csv": ("step,grad_norm\n0,1.5\n1\n", [1.5], "line 3, which has 1 of 2 cells"),
    "zeros_at_the_end.csv": ("step,grad_norm\n0,1.5\n" + "\0" * 4096, [1.5], "1 entry skipped: line 3"),
    "concatenated.csv": (
        "step,grad_norm\n0,1.5\nstep,grad_norm\n0,2.5\ngrad_norm,step\n3.5,9\nstep,loss,grad_norm\n0,9,4.5\n",
        [1.5, 2.5, 3.5, 4.5],
        "the header stands again in line 3 and 2 more",
    ),
    "thousands.csv": ("step;grad_norm\n0;1.234,5\n1;2,5\n", [2.5], r"line 2 with '1\.234,5'"),
    "words.log": ("grad_norm: 1.5\ngrad_norm: x\ngrad_norm: 1,234.5\n", [1.5], "2 entries skipped.*: line 2 with 'x'"),
    "cut.log": ("grad_norm=1.5\ngrad_norm=2.", [1.5, 2.0], "line 2 has no end, and '2' may be cut"),
    "killed.jsonl": (
        '{"grad_norm": 1.5}\n{"grad_norm": 2.5}\n{"grad_no',
        [1.5, 2.5],
        "read up to line 3, the last, .* cut",
    ),
    "resumed.jsonl": (
        '{"grad_norm": 1.5}\n{"grad_{"grad_norm": 2}\n{"grad_norm": 2.5}\n',
        [1.5, 2.5],
        "1 entry skipped: line 2, which is not JSON",
    ),
    "first_line.jsonl": ('{"grad_\n{"grad_norm": 1.5}\n{"grad_norm": 2.5}\n', [1.5, 2.5], "1 entry skipped: line 1"),
    "words.jsonl": (
        '{"grad_norm": 1.5}\n{"grad_norm": "x"}\n{"grad_norm": true}\n',
        [1.5],
        "2 entries skipped.*line 2",
    ),
    "cut_list.json": ("[1.5, 2.5, 3", [1.5, 2.5], "read up to line 1"),
    "cut_state.json": (json.dumps(TRAINER, indent=2)[:-20], [1.5], "read up to line 12"),
    "cut_state_in_one_line.json": (json.dumps(TRAINER)[:-8], [1.5], "read up to line 1"),
    "cut_in_a_name.json": ('{"grad_norm": [1.5, 2.5], "lo[,ss', [1.5, 2.5], "read up to line 1"),
    "damaged_state.json": ('{"log_history": [\n{"grad_norm": 1.5},\n{"grad_norm" 2.5}\n]}', [1.5], "read up to line 3"),
}


def packed(text):
    return text.encode("utf-8", "surrogatepass")


def array_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="session")
def events(tmp_path_factory, absent):
    """Event files as TensorBoard writes them: from steps and norms, at a step of restart, to bytes."""
    # TensorBoard works without TensorFlow as well: this is how it is told to leave out seconds of loading.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError:
        absent("tensorboard is not installed")

    def write(steps, norms, kind=None, restart=None):
        folder = tmp_path_factory.mktemp("events")
        writer = EventFileWriter(str(folder))
        if restart is not None:
            writer.add_event(Event(step=restart, session_log=SessionLog(status=SessionLog.START)))
        for step, norm in zip(steps, norms, strict=True):
            value = {"simple_value": norm} if kind is None else {"tensor": make_tensor_proto(kind(norm))}
            others = [
                Summary.Value(tag="loss", simple_value=9.0),
                Summary.Value(tag="text", tensor=make_tensor_proto("grad_norm")),
                Summary.Value(tag="grad_norm_of_layers", tensor=make_tensor_proto([1.0, 2.0])),
                Summary.Value(tag="grad_norm_image", image=Summary.Image(encoded_image_string=b"\x89PNG")),
            ]
            values = [Summary.Value(tag="train/grad_norm", **value), *others]
            writer.add_event(Event(step=step, wall_time=step, summary=Summary(value=values)))
        writer.close()
        [file] = folder.iterdir()
        return file.read_bytes()

    return write


@pytest.mark.parametrize("file", FILES)
def test_norms_are_found_in_the_files_of_loggers(file, tmp_path):
    text, name, expected = FILES[file]
    (tmp_path / file).write_bytes(packed(text))
    [log] = read_log(tmp_path / file)
    assert (log.name, log.skipped, log.notes) == (name, 0, [])
    assert_same_bits(log.norms, expected)
    norms, found = read_norms(str(tmp_path / file))
    assert found == name
    assert_same_bits(norms, expected)


@pytest.mark.parametrize("file", PARTS)
def test_what_cannot_be_read_is_counted_and_told(file, tmp_path):
    text, expected, says = PARTS[file]
    (tmp_path / file).write_bytes(packed(text))
    [log] = read_log(tmp_path / file)
    assert_same_bits(log.norms, expected)
    [note] = log.notes
    assert note.startswith(str(tmp_path / file))
    with pytest.warns(RuntimeWarning, match=says):
        norms, _ = read_norms(tmp_path / file)
    assert_same_bits(norms, expected)
    assert (log.skipped > 0) == ("skipped" in note)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_norms_are_found_in_any_encoding(encoding, tmp_path):
    for text in ("étape,grad_norm\n0,1.5\n1,2.5\n", '{"étape": 0, "grad_norm": 1.5}\n{"grad_norm": 2.5}\n'):
        (tmp_path / "log").write_bytes(text.encode(encoding))
        assert read_norms(tmp_path / "log")[0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("what", ["csv", "jsonl", "npy", "npz", "events"])
def test_packed_files_are_read_as_far_as_they_go(pack, what, events, tmp_path):
    norms = np.random.default_rng(1).lognormal(size=1500).astype(np.float32).tolist()
    archive = io.BytesIO()
    np.savez(archive, grad_norm=norms)
    content = {
        "csv": lambda: packed("grad_norm,step\n" + "".join(f"{norm!r},{i}\n" for i, norm in enumerate(norms))),
        "jsonl": lambda: packed("".join(f'{{"grad_norm": {norm!r}}}\n' for norm in norms)),
        "npy": lambda: array_file(np.array(norms)),
        "npz": archive.getvalue,
        "events": lambda: events(range(1500), norms),
    }[what]()
    path = tmp_path / "log"
    half = len(content) // 2
    content = pack(content[:half]) + pack(content[half:])  # as where a log was packed in parts
    path.write_bytes(content)
    [log] = read_log(path)
    assert (log.norms.tolist(), log.skipped, log.notes) == (norms, 0, [])
    path.write_bytes(content[:-30])
    if what == "npz" and pack is not lzma.compress:  # both have a table of contents at the end
        with pytest.raises(AutoClipValueError, match="It is packed, and cut or damaged"):
            read_log(path)
        return
    [log] = read_log(path)
    assert norms[: len(log.norms)] == log.norms.tolist()
    assert len(log.norms) > 500
    assert "packing is cut or damaged" in log.notes[-1]


def test_columns_may_be_named(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("grad_norm,other,grad_norm\n1,2,5\n3,4,\n", encoding="utf-8")
    assert read_norms(path, "other")[0].tolist() == read_norms(path, " other ")[0].tolist() == [2.0, 4.0]
    logs = read_log(path, ["other", "grad_norm.1", "other", "grad_norm"])
    assert [(log.name, log.norms.tolist()) for log in logs] == [
        ("other", [2.0, 4.0]),
        ("grad_norm.1", [5.0]),
        ("grad_norm", [1.0, 3.0]),
    ]
    path.write_text('{"a": {"b": [1, {"c": 2}]}}\n{"a": {"b": [3]}}\n', encoding="utf-8")
    assert [log.norms.tolist() for log in read_log(path, ["a.b.0", "a.b.1.c"])] == [[1.0, 3.0], [2.0]]
    path.write_text('{"0": {"0": 5, "1": 6}, "1": {"0": 1.5, "1": 2.5}}', encoding="utf-8")  # pandas's columns
    assert read_norms(path, "1")[0].tolist() == [1.5, 2.5]
    path.write_text("0 1.5 7\n1 2.5 8\n", encoding="utf-8")
    assert read_norms(path, "1")[0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f8", "int32", "longdouble"])
def test_norms_are_read_from_arrays(dtype, tmp_path):
    for shape in ((4,), (4, 1), (1, 4)):
        np.save(tmp_path / "norms.npy", np.array([1, 2, 3, 4], dtype).reshape(shape))
        norms, name = read_norms(tmp_path / "norms.npy")
        assert (norms.dtype, norms.tolist(), name) == (np.float64, [1.0, 2.0, 3.0, 4.0], "norms")


@pytest.mark.parametrize("order", ["C", "F"])
def test_columns_of_arrays_may_be_named(order, tmp_path):
    array = np.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], order=order)
    np.save(tmp_path / "norms.npy", array)
    with pytest.raises(AutoClipValueError, match="'0', '1'"):
        read_log(tmp_path / "norms.npy")
    assert read_norms(tmp_path / "norms.npy", "1")[0].tolist() == [2.0, 4.0, 6.0]
    fields = np.array([(1, 2.0), (3, 4.0)], [("step", "i8"), ("grad_norm", "f4")])
    np.save(tmp_path / "norms.npy", fields)
    assert read_norms(tmp_path / "norms.npy")[0].tolist() == [2.0, 4.0]
    np.savez_compressed(tmp_path / "all.npz", grad_norm=array, weights=np.ones((2, 2, 2)), norm=fields, epoch=3)
    assert read_norms(tmp_path / "all.npz", "grad_norm.1")[0].tolist() == [2.0, 4.0, 6.0]
    np.savez(tmp_path / "one.npz", [1.0, 2.0])
    assert read_norms(tmp_path / "one.npz")[0].tolist() == [1.0, 2.0]


def test_arrays_that_are_cut_are_read_as_far_as_they_go(tmp_path):
    path = tmp_path / "norms.npy"
    path.write_bytes(array_file(np.arange(100.0))[:-30])
    [log] = read_log(path)
    assert log.norms.tolist() == list(range(96))
    assert log.notes == [f"{path} is cut: it holds 96 of 100 numbers."]
    path.write_bytes(array_file(np.arange(3.0)) * 2)
    [log] = read_log(path)
    assert (len(log.norms), log.notes) == (3, [f"{path} goes on after its array; the first is all that was read."])
    path.write_bytes(array_file(np.arange(100.0).reshape(50, 2))[:-30])
    assert read_log(path, ["1"])[0].norms.tolist() == list(range(1, 96, 2))
    path.write_bytes(array_file(np.empty(10)).replace(b"(10,), }" + b" " * 12, b"(1000000000000,), }" + b" "))
    assert len(read_log(path)[0].norms) == 10
    assert "10 of 1,000,000,000,000 numbers" in read_log(path)[0].notes[0]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((3, 2, 2)), "not one norm per step"),
        (np.array(["a"]), "not one norm per step"),
        (np.array([True]), "not one norm per step"),
        (np.array([1j]), "not one norm per step"),
        (np.array(1.0), "not one norm per step"),
        (np.empty(0), "has no numbers"),
    ],
)
def test_arrays_of_other_things_are_refused(array, says, tmp_path):
    np.save(tmp_path / "norms.npy", array)
    with pytest.raises(AutoClipValueError, match=says):
        read_norms(tmp_path / "norms.npy")


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "norms.npy", np.array([1.0, None]), allow_pickle=True)
    with pytest.raises(AutoClipValueError, match="Python objects"):
        read_norms(tmp_path / "norms.npy")


@pytest.mark.parametrize("kind", [None, np.float32, np.float64])
def test_norms_are_read_from_tensorboard(kind, events, tmp_path):
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(events(range(3), [1.5, 2.5, 0.5], kind))
    (tmp_path / "renamed").write_bytes(file.read_bytes())
    for path in (tmp_path, file, tmp_path / "renamed"):
        [log] = read_log(path)
        assert (log.norms.tolist(), log.name, log.notes) == ([1.5, 2.5, 0.5], "train/grad_norm", [])
    with pytest.raises(AutoClipValueError, match=r"no 'x'; it has 'train/grad_norm', 'loss'\.$"):
        read_log(file, ["x"])


def test_events_agree_with_tensorboard(events, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    norms = np.random.default_rng(1).lognormal(size=300)
    (tmp_path / "events.out.tfevents.1").write_bytes(events(range(200), norms[:200]))
    (tmp_path / "events.out.tfevents.2").write_bytes(events(range(150, 250), norms[200:], restart=150))
    accumulator = EventAccumulator(str(tmp_path), {"scalars": 0})
    accumulator.Reload()
    expected = [event.value for event in accumulator.Scalars("train/grad_norm")]
    [log] = read_log(tmp_path)
    assert_same_bits(log.norms, expected)
    assert (len(expected), log.notes) == (250, [])


def test_steps_that_go_back_are_told(events, tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(events(range(60), np.ones(60)))
    (tmp_path / "events.out.tfevents.2").write_bytes(events(range(50, 90), np.ones(40)))
    [log] = read_log(tmp_path)
    assert len(log.norms) == 100
    assert "goes back, first from 59 to 50" in log.notes[0]


def test_damaged_events_are_skipped_one_by_one(events, tmp_path):
    content = events(range(20), np.arange(20.0))
    path = tmp_path / "events.out.tfevents.1"
    for at in range(100, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 0xFF
        path.write_bytes(flipped)
        [log] = read_log(path)
        assert (len(log.norms), log.skipped) == (19, 1), at
        assert "19 numbers were read and 1 entry skipped" in log.notes[0]
    path.write_bytes(content[: len(content) // 2] + b"foreign" * 30 + content[len(content) // 2 :])
    assert (len(read_log(path)[0].norms), read_log(path)[0].skipped) == (19, 2)
    path.write_bytes(content[:-5])
    assert (len(read_log(path)[0].norms), read_log(path)[0].skipped) == (19, 1)
    path.write_bytes(content[:400] + b"\0" * (1 << 19) + content[400:])
    assert read_log(path)[0].skipped == 2


def test_log_without_a_name_is_not_the_present_folder():
    with pytest.raises(AutoClipValueError, match="name of the log is empty"):
        read_log("")


def test_folder_without_events_names_what_it_holds(tmp_path):
    with pytest.raises(AutoClipValueError, match=r"without TensorBoard events\.$"):
        read_norms(tmp_path)
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0/metrics.csv").write_text(LIGHTNING, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=r"did you mean .*metrics.csv\?"):
        read_norms(tmp_path)


def test_folder_whose_numbers_are_further_down_names_them(tmp_path, events):
    # SummaryWriter.add_scalars makes a folder for each number, beside a file that holds none.
    (tmp_path / "norms_generator").mkdir()
    (tmp_path / "norms_generator/events.out.tfevents.2").write_bytes(events([0], [1.5]))
    (tmp_path / "events.out.tfevents.1").write_bytes(events([], []))
    with pytest.raises(AutoClipValueError, match=r"no named numbers\. Did you mean .*norms_generator"):
        read_norms(tmp_path)
    (tmp_path / "norms_generator/events.out.tfevents.2").unlink()
    with pytest.raises(AutoClipValueError, match=r"no named numbers\.$"):
        read_norms(tmp_path)


def test_parquet_is_read_by_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"train": {"grad_norm": 1.5}, "grad_2.0": 3}, {"train": {"grad_norm": None}}, {"train": {"grad_norm": nan}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log")
    assert_same_bits(read_norms(tmp_path / "log")[0], [1.5, nan])
    assert read_norms(tmp_path / "log", "grad_2.0")[0].tolist() == [3.0]
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes()[:-9])
    with pytest.raises(AutoClipValueError, match="parquet that cannot be read"):
        read_norms(tmp_path / "log")


def test_parquet_rounds_large_integers_and_compares_checksums(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "log"
    parquet.write_table(pyarrow.table({"grad_norm": [2**62 + 1, 1]}), path)
    assert read_norms(path)[0].tolist() == [2.0**62, 1.0]
    norms = np.random.default_rng(0).lognormal(size=100)
    options = {"compression": "none", "use_dictionary": False}
    parquet.write_table(pyarrow.table({"grad_norm": norms}), path, write_page_checksum=True, **options)
    assert_same_bits(read_norms(path)[0], norms)
    at = path.read_bytes().index(norms[50].tobytes())
    path.write_bytes(path.read_bytes()[:at] + b"\0" + path.read_bytes()[at + 1 :])
    with pytest.raises(AutoClipValueError, match="parquet that cannot be read"):
        read_norms(path)


def test_parquet_without_a_reader_is_refused_with_the_remedy(tmp_path, monkeypatch):
    for library in ("pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "log").write_bytes(b"PAR1\0\0PAR1")
    with pytest.raises(AutoClipValueError, match=r"pip install pyarrow"):
        read_norms(tmp_path / "log")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("step,loss\n1,2\n", "'step', 'loss'"),
        ("grad_norm_a,grad_norm_b,loss\n1,2,3\n", "'grad_norm_a', 'grad_norm_b'"),
        ("max_grad_norm,loss\n1,2\n", "'max_grad_norm', 'loss'"),
        ("actor grad norm: 1\ncritic grad norm: 2\n", "'actor grad norm', 'critic grad norm'"),
        ("iter 1: loss 2.5, time 9ms\n", "'iter', 'loss'"),
        ("a - grad_norm,b - grad_norm\n1,2\n", "'a - grad_norm', 'b - grad_norm'"),
        ("grad_norm\n", "has no numbers"),
        ("grad_norm\nx\n", "has no numbers; what was skipped: line 2 with 'x'"),
        (",,\n", "no named numbers"),
        ("[", "no JSON"),
        ("[" * 200_000, "Nested too deeply"),
        ('{\n "log_history": 3}', "no named numbers"),
        ("{", "no JSON"),
        ('["x"]', "item 1 with 'x'"),
        ("[true, false]", "item 1 with True"),
        ("\0\1\2\3", "neither text nor an array"),
        ("PK\3\4", "archive that cannot be read"),
        ("metrics.csv".ljust(257) + "ustar\n", "is a tar archive"),
    ],
)
def test_files_without_norms_are_refused(text, says, tmp_path):
    (tmp_path / "a.log").write_text(text, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=says) as caught:
        read_norms(tmp_path / "a.log")
    assert "a.log" in str(caught.value)


def test_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(LIGHTNING, encoding="utf-8")
    with pytest.raises(AutoClipValueError, match=r"no 'loss'; it has 'epoch', 'grad_norm', 'step', 'val_loss'"):
        read_norms(path, "loss")


def test_long_logs_are_streamed(tmp_path, run_python):
    pytest.importorskip("resource", reason="the peak of the memory is measured by it")
    rows = 150_000
    (tmp_path / "log.csv").write_bytes(b"step,grad_norm,note\n" + b"12345,1.5,a note that takes some memory\n" * rows)
    line = b'{"step": 12345, "grad_norm": 1.5, "note": "that takes some memory"}\n'
    (tmp_path / "log.jsonl").write_bytes(line * rows)
    for name in ("log.csv", "log.jsonl"):
        code = f"""
import io, resource
from autoclip_core.replay import read_log
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_log(io.BytesIO(b"grad_norm,step\\n1,2\\n" * 10_000))
before = peak()
[log] = read_log({str(tmp_path / name)!r})
print(len(log.norms), peak() / before)
"""
        steps, growth = run_python(code).split()
        assert int(steps) == rows
        assert float(growth) < 1.3  # the norms; the text itself would double it


# --- Anything at all --------------------------------------------------------------------------------------------------


def record(data):
    """A record of an event file, its checksums right."""
    length = len(data).to_bytes(8, "little")
    return length + _checksum(length) + data + _checksum(data)


WHOLE = [packed(text) for text, *_ in [*FILES.values(), *PARTS.values()] if len(text) < 10_000]
KEPT = [
    *WHOLE,
    *(array_file(array) for array in (np.arange(5.0), np.ones((2, 2), "f4"), np.zeros(2, [("a", "f8")]))),
    *(pack(WHOLE[0]) for pack in (gzip.compress, bz2.compress, lzma.compress)),
    b"PK\3\4" + bytes(40),
    record(b"\x10\1\x2a\x12\x0a\x10\x0a\x09grad_norm\x15\0\0\xc0\x3f") * 3,
]


@st.composite
def damaged_files(draw):
    """A kept file of which parts are cut out, overwritten, repeated."""
    content = bytearray(draw(st.sampled_from(KEPT)))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted(draw(st.integers(0, len(content))) for _ in "ab")
        parts = [b"", bytes(content[start:end]) * 2, b"\0", b"\xff", b'"', b"\n", b"{", b"]", b",", b"9" * 400]
        content[start:end] = draw(st.sampled_from(parts))
    return bytes(content)


cells = st.sampled_from(["grad_norm", "step", "1.5", "-1", "nan", "inf", "1e999", '"', '""', ",", ";", "\n", "\r", " "])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("grad_norm"), inner),
)
any_file = st.one_of(
    st.binary(),
    damaged_files(),
    st.lists(cells | st.text(max_size=5)).map(lambda parts: packed("".join(parts))),
    values.map(lambda value: packed(json.dumps(value))),
    st.lists(values).map(lambda lines: packed("\n".join(map(json.dumps, lines)))),
    st.lists(st.binary()).map(lambda parts: b"".join(map(record, parts))),
)


@given(any_file)
@example(b"[" * 200_000)
@example(packed("grad_norm\n" + "9" * 400 + "\n"))
def test_any_file_gives_norms_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_bytes(content)
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as said:
        code = main(["replay", str(path), "-p", "10", "--json"])
    assert code in {0, 1}, said.getvalue()
    assert all(line.startswith("autoclip: ") for line in said.getvalue().splitlines())
    if code:
        assert (printed.getvalue(), said.getvalue().count("\n")) == ("", 1)
    else:
        facts = json.loads(printed.getvalue())
        assert facts["steps"] > 0
        assert len(facts["notes"]) == said.getvalue().count("\n")


@pytest.mark.parametrize("content", WHOLE)
def test_a_file_cut_anywhere_gives_the_first_norms(content):
    [whole] = read_log(io.BytesIO(content))
    for size in range(len(content)):
        try:
            [part] = read_log(io.BytesIO(content[:size]))
        except AutoClipValueError:
            continue
        if part.name == whole.name and not any("may be cut" in note for note in part.notes):
            assert_same_bits(part.norms, whole.norms[: len(part.norms)])


def test_what_stands_in_a_file_is_shown_in_sixty_characters_at_most():
    from autoclip_core.logs.found import shown

    assert shown("x" * 58) == repr("x" * 58)
    assert shown("x" * 59) == "'" + "x" * 56 + "..."
