"""The demo, on a text of its own and with very few steps: what it writes agrees with what it prints."""

import csv
import sys
from itertools import product
from math import inf

import pytest
import torch
from autoclip_torch import demo
from torch import nn

TEXT = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer.\n" for n in range(1500))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_demo_writes_figure_data_and_table(text, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    demo.main([str(text), "--out", str(out), "--steps", "4"])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "results.csv", "steps.csv"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(path) in printed for path in out.iterdir())

    header, *results = read(out / "results.csv")
    assert [row[:2] for row in results] == [list(pair) for pair in product(demo.ARMS, demo.LOSS_SCALES)]
    for row in [header, *results]:
        assert all(cell in printed for cell in row)

    header, *steps = read(out / "steps.csv")
    assert [row[:3] for row in steps] == [
        [arm, scale, str(number)] for arm, scale in product(demo.ARMS, demo.LOSS_SCALES) for number in range(1, 5)
    ]
    for arm, scale, number, norm, threshold, clipped, loss in steps:
        assert clipped == str(int(float(norm) > float(threshold)))
        assert 0.0 < float(loss) < 10.0
        if number == "1":
            # One start for all: before the first update only the unit differs.
            assert float(norm) == pytest.approx(float(steps[4][3]) * demo.LOSS_SCALES[scale], rel=1e-4)
            assert arm != "AutoClip p=10" or norm == threshold


@pytest.mark.parametrize("norm", [0.5, 1.5])
def test_demo_reports_what_each_arm_did(norm):
    for arm, threshold in zip(demo.ARMS, (norm, demo.FIXED_THRESHOLD, inf), strict=True):
        model = nn.Linear(1, 1)
        model.weight.grad = torch.full((1, 1), norm)
        assert demo.ARMS[arm](model)() == (norm, threshold, norm > threshold)
        assert model.weight.grad.item() == pytest.approx(min(norm, threshold))


def test_demo_learns(text):
    from tqdm import tqdm

    data = demo.encode(demo.read_text(text))
    with tqdm(disable=True) as progress:
        run = demo.train(demo.Network(data.characters), "AutoClip p=10", "1", data, 30, progress)
    assert run.loss < run.steps[-1].loss + 0.5 < run.steps[0].loss - 1.0


def test_demo_reads_a_folder_in_the_order_of_its_names(tmp_path, capsys):
    (tmp_path / "b.txt").write_text("b" * 30_000)
    (tmp_path / "a.txt").write_text("a" * 30_000)
    (tmp_path / "c.bin").write_bytes(b"\xff" * 100)
    assert demo.read_text(tmp_path) == "a" * 30_000 + "b" * 30_000
    assert "60,000 characters" in capsys.readouterr().out


def test_demo_finds_text_on_every_machine():
    text = demo.read_text(None)
    assert demo.MAX_CHARACTERS >= len(text) > 1_000_000
    assert text == demo.read_text(None)


def test_demo_validates_on_text_it_was_not_trained_on():
    data = demo.encode("a" * 95_000 + "b" * 5_000)
    assert data.training.unique().tolist() == [1]
    assert data.validation.unique().tolist() == [0]
    assert data.training.shape == (demo.STREAMS, 95_000 // demo.STREAMS)


def make_runs(*losses):
    pairs = product(demo.ARMS, demo.LOSS_SCALES)
    step = demo.Step(norm=1.0, threshold=1.0, clipped=False, loss=3.0)
    return [demo.Run(arm, scale, [step], loss) for (arm, scale), loss in zip(pairs, losses, strict=True)]


def test_demo_says_what_the_figures_say():
    better = " ".join(demo.interpret(make_runs(2.0, 2.01, 2.0, 2.0, 2.2, 2.1, 2.4, 2.4, 2.4)))
    assert "AutoClip's rows are 0.010 bits apart, those of the fixed threshold 0.200" in better
    assert "So one setting of AutoClip serves all three scales" in better
    worse = " ".join(demo.interpret(make_runs(2.0, 2.3, 2.0, 2.0, 2.01, 1.9, 2.4, 2.4, 2.4)))
    assert "does not tell the two apart" in worse
    assert "fixed threshold 1 at loss scale 1e4" in worse


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.txt"], "There is no text at absent.txt"),
        (["short.txt"], "There are 12 characters"),
        (["short.txt", "--steps", "0"], "--steps"),
        (["short.txt", "--steps", "many"], "--steps"),
        (["--out", "short.txt"], "short.txt"),
    ],
)
def test_demo_refuses_what_it_cannot_use(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("only a line\n")
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code != 0
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tqdm", "matplotlib.figure"])
def test_demo_names_the_extra_that_is_missing(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path)])
    assert 'pip install "autoclip-core[demo]"' in capsys.readouterr().err
