"""`autoclip` as a user types it: in a process of its own, with its exit codes, streams and terminals."""

import gzip
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from math import nextafter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import autoclip_core
from autoclip_core import NormHistory
from autoclip_core.__main__ import main


def autoclip(*arguments, columns=120, cwd=None, stdin=None, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-m", "autoclip_core", *map(str, arguments)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8", **environment},
    )


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """The same within this process, where nothing depends on streams and the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: Done(main([*map(str, arguments)]), *capsys.readouterr())


@pytest.fixture
def norms(tmp_path):
    path = tmp_path / "metrics.csv"
    values = [*np.random.default_rng(1).lognormal(size=500).tolist(), 0.0, float("nan")]
    path.write_text(
        "step,grad_norm\n" + "".join(f"{i},{value!r}\n" for i, value in enumerate(values)), encoding="utf-8"
    )
    return path


def test_replay_prints_one_row_per_setting(norms):
    done = autoclip("replay", norms, "-w", 50)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"grad_norm in {norms}: 502 steps, ")
    assert lines[1] == "not remembered: 1 zero, 1 nonfinite"
    first = [line.split()[0] for line in lines[3 : lines.index("", 3)]]
    assert first == ["setting", *["p"] * 10, "fixed"]
    assert sum("last 50" in line for line in lines) == sum("whole" in line for line in lines) == 5
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("columns", [60, 80])
def test_table_fits_a_small_terminal(columns, norms):
    done = autoclip("replay", norms.name, "-w", 500, columns=columns, cwd=norms.parent)
    assert done.stdout.splitlines()[3].split()[:2] == ["setting", "history"]
    assert max(map(len, done.stdout.splitlines())) <= columns


def test_replay_prints_json(norms):
    done = autoclip("replay", norms, "-p", 0, "-p", 10, "--fixed", 0.5, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert (content["steps"], content["zero"], content["nonfinite"], content["column"]) == (502, 1, 1, "grad_norm")
    assert [row["percentile"] for row in content["settings"]] == [0.0, 10.0, None]
    values = np.array([float(line.split(",")[1]) for line in norms.read_text("utf-8").splitlines()[1:501]])
    assert content["settings"][1]["final_threshold"] == np.percentile(values, 10)
    assert content["settings"][2]["clipped_share"] == pytest.approx((values > 0.5).sum() / 502)


@pytest.mark.parametrize(
    ("norms", "says"),
    [("1\n2\n", ""), ("1\n0\n0\n", "not remembered: 2 zero"), ("inf\n2\n", "not remembered: 1 nonfinite")],
)
def test_replay_says_what_was_not_remembered(norms, says, tmp_path):
    (tmp_path / "norms.csv").write_text(norms, encoding="utf-8")
    assert autoclip("replay", tmp_path / "norms.csv").stdout.splitlines()[1] == says


def test_infinity_is_a_string_in_json(tmp_path):
    path = tmp_path / "norms.csv"
    path.write_text("nan\n0.0\n", encoding="utf-8")
    done = autoclip("replay", path, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["settings"][0]["final_threshold"] == "inf"


def test_narrow_terminals_get_one_block_per_row(norms):
    done = autoclip("replay", norms, "-p", 10, columns=40)
    assert done.returncode == 0
    table = done.stdout.split("\n\n")[1:-2]
    assert [block.split("\n")[0].split("  ")[-1].strip() for block in table] == ["p = 10", "fixed 1"]
    assert all(len(line) <= 40 for block in table for line in block.split("\n"))


def test_replay_prints_to_the_letter(tmp_path):
    (tmp_path / "n.csv").write_text("grad_norm\n1\n2\n4\n8\n0\nnan\n16\n3\n1.5\n1000\n", encoding="utf-8")
    command = ["replay", "n.csv", "-p", 0, "-p", 50, "-w", 3, "--fixed", 2]
    table = """\
grad_norm in n.csv: 10 steps, 1 to 1000
not remembered: 1 zero, 1 nonfinite

setting  history  final  median  clipped  scale  hardest
p = 0      whole      1       1    70.0%   0.25  0.01945
p = 50     whole    3.5       3    50.0%  0.375   0.0528
p = 0     last 3    1.5    1.75    50.0%   0.25   0.0512
p = 50    last 3      3     3.5    50.0%    0.5   0.1024
fixed 2               2       2    50.0%   0.25   0.0266

final, median: of the threshold. scale: the median
"""
    assert autoclip(*command, columns=56, cwd=tmp_path).stdout.startswith(table)
    blocks = """
setting  p = 50
history  last 3
final    3
median   3.5
clipped  50.0%
scale    0.5
hardest  0.1024

setting  fixed 2
final    2
"""
    assert blocks in autoclip(*command, columns=55, cwd=tmp_path).stdout


def test_replay_advises_and_names_the_page(tmp_path, run_main):
    (tmp_path / "n.csv").write_text("a,b\n" + "1,1\n" * 100 + "1,50\n" + "1,1\n" * 100, encoding="utf-8")
    done = run_main("replay", str(tmp_path / "n.csv"), "-c", "a", "-c", "b")
    _, page, line = done.stdout.rstrip("\n").rsplit("\n", 2)
    assert line.startswith("- b, heavy tail: ")
    file, _, section = page.rpartition(": ")[2].removesuffix("?").partition(", ")
    assert f"## {section}?" in (Path(__file__).parents[2] / file).read_text("utf-8")
    done = run_main("replay", str(tmp_path / "n.csv"), "-c", "b", "--json")
    assert [advice.partition(":")[0] for advice in json.loads(done.stdout)["advice"]] == ["heavy tail"]
    assert "README" not in run_main("replay", str(tmp_path / "n.csv"), "-c", "a").stdout


def test_replay_draws(norms, tmp_path, absent):
    try:
        import matplotlib.image
    except ImportError:
        absent("matplotlib is not installed")
    done = autoclip("replay", norms, "--plot", tmp_path / "norms.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert matplotlib.image.imread(tmp_path / "norms.png").std() > 0.05
    done = autoclip("replay", norms, "--plot", tmp_path / "norms.xyz")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.glob("*norms.*")] == ["norms.png"], "a part of a picture is left"


def test_replay_shows_columns_side_by_side(tmp_path, absent, run_main):
    (tmp_path / "n.csv").write_text("grad_norm.a,grad_norm.b $x\n1,8\n2,4\n4,\n8,2\n", encoding="utf-8")
    command = ["replay", "n.csv", "-p", 0, "--fixed", 2, "-c", "grad_norm.a", "-c", "grad_norm.b $x"]
    table = """\
grad_norm.a in n.csv: 4 steps, 1 to 8
grad_norm.b $x in n.csv: 3 steps, 2 to 8

norms           setting  history  final  median  clipped  scale  hardest
grad_norm.a     p = 0      whole      1       1    75.0%   0.25   0.1375
grad_norm.a     fixed 2               2       2    50.0%  0.375   0.2625
grad_norm.b $x  p = 0      whole      2       4     0.0%      -        -
grad_norm.b $x  fixed 2               2       2    66.7%  0.375   0.2625
"""
    code, printed, said = run_main(*command)
    assert (code, printed.partition("\n\nfinal")[0] + "\n", said) == (0, table, "")
    content = json.loads(run_main(*command, "--json").stdout)
    assert [(part["column"], part["steps"], len(part["settings"])) for part in content["columns"]] == [
        ("grad_norm.a", 4, 2),
        ("grad_norm.b $x", 3, 2),
    ]
    try:
        import matplotlib.image
    except ImportError:
        absent("matplotlib is not installed")
    assert run_main(*command, "--plot", "two.PNG").code == 0
    height, width, _ = matplotlib.image.imread(tmp_path / "two.PNG").shape
    assert height == 1050
    assert width == 1200


def test_replay_tells_what_it_could_not_read(tmp_path, run_main):
    (tmp_path / "n.jsonl").write_text('{"grad_norm": 1}\n{"gra{"grad_norm": 2}\n{"gr', encoding="utf-8")
    done = run_main("replay", "n.jsonl", "--json")
    content = json.loads(done.stdout)
    assert (done.code, content["steps"], content["skipped"], len(content["notes"])) == (0, 1, 1, 2)
    assert done.stderr == "".join(f"autoclip: {note}\n" for note in content["notes"])
    done = run_main("replay", "n.jsonl")
    assert (done.code, done.stdout.splitlines()[0]) == (0, "grad_norm in n.jsonl: 1 steps, 1 to 1")
    assert done.stderr.count("\n") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_replay_reads_what_comes_through_a_pipe(norms):
    [expected] = [json.loads(autoclip("replay", norms, "--json").stdout)]
    with gzip.open(norms.with_suffix(".gz"), "wb") as file:
        file.write(norms.read_bytes())
    for given, name in [("-", "-"), ("/dev/stdin", "/dev/stdin")]:
        for file in (norms, norms.with_suffix(".gz")):
            with subprocess.Popen(["cat", file], stdout=subprocess.PIPE) as pipe:
                done = autoclip("replay", given, "--json", stdin=pipe.stdout)
            assert json.loads(done.stdout) == expected | {"file": name}


def test_names_that_cannot_be_shown_are_shown_by_their_codes(tmp_path):
    (tmp_path / "n.jsonl").write_text('{"∇grad_norm\\ud800": 1}\n{"∇grad_norm\\ud800": 2}\n', encoding="utf-8")
    for encoding in ("ascii", "utf-8"):
        done = autoclip("replay", "n.jsonl", cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("\\u2207grad_norm\\ud800 in" if encoding == "ascii" else "∇grad_norm\\ud800 in")
        done = autoclip("replay", "n.jsonl", "-c", "∇", cwd=tmp_path, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_names_cannot_steer_the_terminal(tmp_path, run_main):
    (tmp_path / "n.csv").write_text("\x1b[31mgrad_norm\x07,step\n1,2\nx,3\n", encoding="utf-8")
    for arguments in (["n.csv"], ["n.csv", "-c", "step", "-c", "\x1b[31mgrad_norm\x07"], ["n.csv", "-c", "\x1b"]):
        done = run_main("replay", *arguments)
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
        assert r"\x1b[31mgrad_norm\x07" in done.stdout + done.stderr.replace(r"\\", "\\")


@pytest.mark.skipif(sys.platform == "win32", reason="asks a shell of Unix")
@pytest.mark.parametrize(
    ("streams", "code", "says"),
    [
        ("info >&-", 1, "autoclip: there is no standard output to write to.\n"),
        ("replay n.csv >&-", 1, "autoclip: there is no standard output to write to.\n"),
        ("--help >&-", 1, "autoclip: there is no standard output to write to.\n"),
        ("replay - <&-", 1, "autoclip: There is no standard input to read.\n"),
        ("replay absent 2>&-", 1, ""),
        ("info >&- 2>&-", 1, ""),
        ("absent 2>&-", 2, ""),
    ],
)
def test_closed_streams_are_no_error_of_the_program(streams, code, says, norms):
    norms.rename(norms.with_name("n.csv"))
    command = f"exec '{sys.executable}' -P -m autoclip_core {streams}"
    done = subprocess.run(["sh", "-c", command], cwd=norms.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, says)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")  # noqa: PTH110
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_told(unbuffered, norms, tmp_path):
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        done = autoclip("replay", norms, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr.startswith("autoclip: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_plot_leaves_nothing_behind_where_it_fails(norms, tmp_path, absent, run_main):
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        absent("matplotlib is not installed")
    before = sorted(tmp_path.rglob("*"))
    table = run_main("replay", norms, "-p", 1).stdout
    for picture, says in [
        (tmp_path, "is a folder"),
        (tmp_path / "no/norms.png", "norms.png cannot be written: No such file"),
        (norms / "norms.png", "norms.png cannot be written: Not a directory"),
        (tmp_path / "a.xyz", "drawn"),
    ]:
        done = run_main("replay", norms, "-p", 1, "--plot", picture)
        assert (done.code, done.stdout, done.stderr.count("\n")) == (1, table, 1)
        assert says in done.stderr
    done = autoclip("replay", norms, "-p", 1, "--plot", tmp_path / "a.png", MPLBACKEND="broken")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "MPLBACKEND" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # A display is not asked for.
    done = autoclip("replay", norms, "-p", 1, "--plot", tmp_path / "a.png", MPLBACKEND="module://absent")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_picture_that_needs_another_program_is_refused(norms, tmp_path, absent, run_main, monkeypatch):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        absent("matplotlib is not installed")

    def savefig(*arguments, **options):
        raise RuntimeError("'xelatex' not found")

    monkeypatch.setattr(Figure, "savefig", savefig)
    done = run_main("replay", norms, "--plot", tmp_path / "a.pgf")
    assert (done.code, done.stderr) == (1, f"autoclip: {tmp_path / 'a.pgf'} cannot be drawn: 'xelatex' not found.\n")


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_the_table_needs_no_matplotlib(json, norms, tmp_path, run_main, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    alone = run_main("replay", norms, *json)
    done = run_main("replay", norms, "--plot", tmp_path / "norms.png", *json)
    assert (alone.code, done.code, done.stdout) == (0, 1, alone.stdout)
    assert alone.stdout
    assert 'pip install "autoclip-core[plot]"' in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ZeroDivisionError("of a kind"), 3, "ZeroDivisionError in line .*: of a kind. This is an error of autoclip"),
        (RecursionError("too\ndeep"), 3, "too deep"),
        (MemoryError(), 1, "more memory than there is"),
        (OSError(5, "Input/output error"), 1, "Input/output error"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_the_unexpected_becomes_one_sentence_and_a_code(error, code, says, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(autoclip_core.__main__, "read_log", fail)
    assert main(["replay", "any"]) == code
    printed, said = capsys.readouterr()
    assert printed == ""
    assert re.search(says, said)
    assert said.count("\n") == (1 if says else 0)


def test_info_tells_what_is_installed():
    done = autoclip("info")
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split(None, 1) for line in done.stdout.splitlines() if not line.startswith("backend "))
    assert facts["autoclip-core"] == autoclip_core.__version__
    assert facts["numpy"] == np.__version__
    content = json.loads(autoclip("info", "--json").stdout)
    assert content["backend"].startswith(NormHistory().backend)
    assert content["backend native"].startswith("ABI 1, ")
    assert content["backend numba"].startswith("numba ")
    assert content.keys() >= {"Python", "autoclip_torch", "autoclip_jax", "tensorboard"}
    assert autoclip("--version").stdout == f"autoclip-core {autoclip_core.__version__}\n"


def test_info_tells_who_chose_the_backend(backend):
    assert "by AUTOCLIP_BACKEND" in autoclip("info", AUTOCLIP_BACKEND=backend).stdout
    assert "the first that loads" in autoclip("info", AUTOCLIP_BACKEND="").stdout
    assert 'must be "native"' in autoclip("info", AUTOCLIP_BACKEND="cuda").stdout


def test_info_tells_how_to_get_a_backend_that_is_missing(run_python):
    code = """
import sys
sys.modules["numba"] = None
from autoclip_core.__main__ import main
main(["info"])
"""
    assert 'pip install "autoclip-core[numba]"' in run_python(code)


def test_info_tells_what_is_missing(monkeypatch, capsys):
    def version(name, installed=metadata.version):
        if name in ("jax", "optax", "torch"):
            raise metadata.PackageNotFoundError
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "autoclip_tensorflow", None)  # as where the sources are imported
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["autoclip_torch"] == "torch not installed"
    assert facts["autoclip_jax"] == "jax and optax not installed"
    assert facts["autoclip_tensorflow"] == "not installed"


@pytest.mark.parametrize("window", [None, 300])
def test_inspect_shows_what_a_snapshot_holds(window, tmp_path):
    history = NormHistory(window)
    history.extend(np.random.default_rng(1).lognormal(size=500))
    path = tmp_path / "history.ach"
    path.write_bytes(history.to_bytes())
    done = autoclip("inspect", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"sound, {len(history)} norms, {'a window of 300' if window else 'the whole history'}" in done.stdout
    assert "█" in done.stdout
    content = json.loads(autoclip("inspect", path, "--json").stdout)
    assert content["percentiles"]["10"] == history.percentile(10.0)
    assert (content["norms"], content["window"], content["sound"]) == (len(history), window, True)
    assert sum(content["histogram"]["counts"]) == len(history)
    ascii_only = autoclip("inspect", path, PYTHONIOENCODING="ascii").stdout
    assert ascii_only.isascii()
    assert "###" in ascii_only


def test_inspect_reads_standard_input(tmp_path):
    history = NormHistory()
    history.extend([1.0, 2.0])
    path = tmp_path / "\x1b[31m.ach"
    path.write_bytes(history.to_bytes())
    assert (
        autoclip("inspect", path)
        .stdout.splitlines()[0]
        .endswith("\\x1b[31m.ach: sound, 2 norms, the whole history, 88 bytes")
    )
    with path.open("rb") as file:
        assert autoclip("inspect", "-", stdin=file).stdout.startswith("standard input: sound, 2 norms")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs a file without end")  # noqa: PTH110
def test_inspect_reads_no_more_than_the_first_bytes_of_what_is_no_snapshot():
    done = autoclip("inspect", "/dev/zero")
    assert (done.returncode, done.stderr) == (
        1,
        "autoclip: /dev/zero is not a snapshot; one is written from NormHistory.to_bytes().\n",
    )


def test_inspect_prints_to_the_letter(tmp_path):
    history = NormHistory()
    history.extend([0.001] * 40 + [0.002, 0.01, 0.02, 0.05] + [0.1] * 7 + [0.3] * 20 + [1.0] * 3)
    (tmp_path / "h.ach").write_bytes(history.to_bytes())
    head = """\
h.ach: sound, 74 norms, the whole history, 664 bytes

percentile   norm
0           0.001
1           0.001
10          0.001
25          0.001
50          0.001
90            0.3
99              1
100             1

"""
    bars = """\
   0.001 ██████████████████████████████ 40
0.001778 ▊ 1
0.003162  0
0.005623  0
    0.01 ▊ 1
 0.01778 ▊ 1
 0.03162 ▊ 1
 0.05623  0
     0.1 █████▎ 7
  0.1778 ███████████████ 20
  0.3162  0
  0.5623 ██▎ 3
"""
    for columns, room in {44: 30, 20: 10, 200: 60}.items():
        printed = autoclip("inspect", "h.ach", columns=columns, cwd=tmp_path).stdout
        assert printed.startswith(f"{head}   0.001 {'█' * room} 40\n")
        assert columns != 44 or printed == head + bars
    ascii_only = autoclip("inspect", "h.ach", columns=44, cwd=tmp_path, PYTHONIOENCODING="ascii").stdout
    assert f"     0.1 {'#' * 6} 7\n" in ascii_only
    assert f"   0.001 {'#' * 30} 40\n" in ascii_only


LARGEST = sys.float_info.max
ULPS = [1.0, nextafter(1.0, 2.0), nextafter(nextafter(1.0, 2.0), 2.0)]


@pytest.mark.parametrize(
    "norms",
    [
        *([], [2.0], [2.0] * 9, [-1.0, 0.0, 1.0]),
        *(ULPS, [-norm for norm in ULPS], [-LARGEST, LARGEST], [1.7e308, LARGEST], [5e-324, LARGEST], [0.0, 5e-324]),
    ],
)
def test_inspect_shows_every_history(norms, tmp_path, run_main):
    history = NormHistory()
    history.extend(norms)
    path = tmp_path / "history.ach"
    path.write_bytes(history.to_bytes())
    done = run_main("inspect", path)
    assert (done.code, done.stderr) == (0, "")
    done = run_main("inspect", path, "--json")
    assert (done.code, done.stderr) == (0, "")
    histogram = json.loads(done.stdout)["histogram"]
    assert sum(histogram["counts"]) == len(norms)
    if norms:
        assert (histogram["edges"][0], histogram["edges"][-1]) == (min(norms), max(norms))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "absent.csv"], "absent.csv"),
        (["replay", "broken.csv"], "broken.csv"),
        (["replay", "metrics.csv", "-p", "101"], "101"),
        (["replay", "metrics.csv", "-w", "0"], "window"),
        (["replay", "metrics.csv", "--fixed", "0"], "above 0"),
        (["replay", "metrics.csv", "-c", "loss"], "it has 'step', 'grad_norm'"),
        (["inspect", "broken.csv"], "snapshot"),
        (["inspect", "absent.ach"], "absent.ach"),
    ],
)
def test_errors_are_one_sentence_and_a_code(arguments, says, norms, tmp_path):
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    done = autoclip(arguments[0], tmp_path / arguments[1], *arguments[2:])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("autoclip: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_arguments_that_are_none_are_explained():
    for arguments in ([], ["clip"], ["replay"]):
        done = autoclip(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "usage" in done.stderr
    for arguments in (["--help"], ["replay", "--help"], ["info", "--help"], ["inspect", "--help"]):
        done = autoclip(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert arguments == ["--help"] or "examples:" in done.stdout


def test_a_closed_pipe_ends_it_in_silence(norms):
    done = subprocess.run(  # noqa: S602 - a pipe is what is tried
        f"'{sys.executable}' -P -m autoclip_core replay '{norms}' --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_program_is_installed():
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "autoclip"), "info"],  # noqa: PTH118, PTH120
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("autoclip-core")
