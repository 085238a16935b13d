"""The demo, with few steps: what it writes agrees with what it prints, and it says what its figures say."""

import csv
import math
import sys
from itertools import product

import pytest
import torch
from autoclip_torch import demo
from torch import nn
from tqdm import tqdm


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_demo_writes_figure_data_and_table(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    demo.main(["--out", str(out), "--steps", "12", "--seeds", "2"])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "results.csv", "steps.csv"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(path) in printed for path in out.iterdir())

    header, *results = read(out / "results.csv")
    assert [row[:2] for row in results] == [list(pair) for pair in product(demo.ARMS, demo.LOSS_SCALES)]
    for row in [header, *results]:
        assert all(cell in printed for cell in row)
    for row in results:
        mean, lowest, highest = map(float, row[2:5])
        assert lowest <= mean <= highest

    header, *steps = read(out / "steps.csv")
    numbers = map(str, range(1, 13))
    assert [row[:4] for row in steps] == [
        list(row) for row in product(demo.ARMS, demo.LOSS_SCALES, ["0", "1"], list(numbers))
    ]
    first = {tuple(row[:3]): float(row[4]) for row in steps if row[3] == "1"}
    for (_, scale, seed), norm in first.items():
        # One start for all: before the first update only the unit differs.
        assert norm == pytest.approx(first["no clipping", "1", seed] * demo.LOSS_SCALES[scale], rel=1e-4)


@pytest.fixture(scope="module")
def data():
    return demo.read_digits()


def train(data, arm, **options):
    settings = {"loss_scale": "1", "seed": 0, "learning_rate": 0.1, "spoiled_share": 0.0, "steps": 100, **options}
    return demo.train(arm, data=data, **settings)


def test_demo_learns_clean_digits_in_every_arm(data):
    for arm in demo.ARMS:
        run = train(data, arm, steps=150)
        assert run.test < 0.6 < run.validation[0]
        assert not any(run.spoiled)


def test_demo_spoils_the_share_of_batches_that_it_says(data):
    run = train(data, "AutoClip p=10", spoiled_share=0.2, steps=500)
    assert sum(run.spoiled) == pytest.approx(100, abs=30)
    norms = torch.tensor(run.norms)[:50]
    assert norms[torch.tensor(run.spoiled[:50])].max() > 10 * norms[~torch.tensor(run.spoiled[:50])].max()


def test_demo_shows_what_it_claims(data):
    # Seed 0 has a spoiled batch among its first hundred.
    for scale in demo.LOSS_SCALES:
        spoiled = {"spoiled_share": demo.SPOILED_SHARE, "loss_scale": scale, "steps": 200}
        assert train(data, "no clipping", **spoiled).test > 2.0
        assert train(data, "AutoClip p=10", **spoiled).test < 0.5
    assert train(data, "fixed threshold 1", **{**spoiled, "loss_scale": "1e-4"}).test > 2.0


@pytest.mark.parametrize("norm", [0.5, 1.5])
@pytest.mark.parametrize(
    ("arm", "threshold"),
    [("no clipping", math.inf), ("fixed threshold 1", 1.0), ("AutoClip p=10", None), ("AutoClip p=90", None)],
)
def test_demo_reports_what_each_arm_did(arm, threshold, norm):
    model = nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    model.weight.grad = torch.full((1, 1), norm)
    step = demo.ARMS[arm](torch.optim.SGD(model.parameters(), lr=1.0))
    assert step() == (norm, norm if threshold is None else threshold)
    assert start - model.weight.item() == pytest.approx(min(norm, threshold or norm), rel=1e-5)


def test_demo_judges_on_digits_that_it_neither_learns_nor_chooses_by(data):
    whole = torch.cat([part.images for part in data])
    assert whole.shape == (1797, 64)
    assert len(data.training.labels) > 3 * len(data.validation.labels)
    assert len(whole.unique(dim=0)) > 1790  # a few of scikit-learn's digits are equal


def test_demo_chooses_the_rate_with_the_lowest_validation_loss(data, monkeypatch):
    losses = dict(zip(demo.LEARNING_RATES, (0.3, 0.2, math.nan, 0.1, 0.4), strict=True))
    seen = []

    def fake(arm, loss_scale, seed, data, *, learning_rate, spoiled_share, steps):
        seen.append((arm, loss_scale, spoiled_share))
        return demo.Run(arm, loss_scale, seed, [1.0], [1.0], [False], [losses[learning_rate]], 9.0)

    monkeypatch.setattr(demo, "train", fake)
    with tqdm(disable=True) as progress:
        assert demo.choose_learning_rate(data, range(2), 1, progress) == 0.3
    assert set(seen) == {("no clipping", "1", 0.0)}


def make_runs(losses):
    return [
        demo.Run(arm, scale, 0, [1.0], [2.0], [False], [1.0], loss)
        for (arm, scale), loss in zip(product(demo.ARMS, demo.LOSS_SCALES), losses, strict=True)
    ]


def test_demo_says_what_the_figures_say():
    good = " ".join(demo.interpret(make_runs([2.3] * 3 + [2.3, 0.1, 2.3] + [0.2] * 3 + [0.3, 0.3, math.nan]), 0.1))
    assert "no clipping: learns at no loss scale; test losses from 2.300 to 2.300" in good
    assert "fixed threshold 1: learns at loss scale 1;" in good
    assert "AutoClip p=10: learns at every loss scale" in good
    assert "AutoClip p=90: learns at loss scale 1e-4 and 1;" in good
    assert "The lowest test loss: fixed threshold 1 at loss scale 1, 0.100" in good
    bad = " ".join(demo.interpret(make_runs([0.1] * 6 + [2.3] * 6), 0.1))
    assert "no clipping: learns at every loss scale" in bad
    assert "AutoClip p=10: learns at no loss scale" in bad


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--steps", "0"], "--steps"), (["--steps", "many"], "--steps"), (["--seeds", "0"], "--seeds")],
)
def test_demo_refuses_what_it_cannot_use(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code != 0
    assert says in capsys.readouterr().err


def test_demo_says_that_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "file")])
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tqdm", "matplotlib.figure", "sklearn.datasets"])
def test_demo_names_the_extra_that_is_missing(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path)])
    assert 'pip install "autoclip-core[demo]"' in capsys.readouterr().err
