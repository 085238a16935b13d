"""bench.regret: trainings side by side are those that torch makes one at a time; clippers do what their authors say."""

import itertools
import math
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from autoclip_torch import attach

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind what is installed; importing bench takes it out again

import bench.regret  # noqa: E402
from bench.regret import study  # noqa: E402
from bench.regret.clippers import MAKERS, NONE, Size  # noqa: E402
from bench.regret.report import lost_in  # noqa: E402
from bench.regret.study import Cell, Result  # noqa: E402
from bench.regret.tasks import CLEAN, SPOILED, TASKS, TWINS  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda weights, rate: torch.optim.SGD(weights, lr=rate, momentum=study.MOMENTUM),
    "Adam": lambda weights, rate: torch.optim.Adam(weights, lr=rate),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_alone(task, cell):
    """The test loss of one training as a user of torch writes it."""
    problem = task.make(cell.seed, task.spoiled)
    optimizer = OPTIMIZERS[task.optimizer](problem.network.parameters(), cell.rate)
    if cell.clipper.startswith("p ="):
        attach(optimizer, float(cell.clipper.removeprefix("p =")))
    for step in range(task.steps):
        batch = next(problem.batches)
        optimizer.param_groups[0]["lr"] = cell.rate * (1 - step / task.steps)
        optimizer.zero_grad()
        problem.loss(problem.network(*batch.inputs), batch.targets).backward()
        if cell.clipper.startswith("fixed"):
            threshold = float(cell.clipper.removeprefix("fixed"))
            torch.nn.utils.clip_grad_norm_(problem.network.parameters(), threshold)
        optimizer.step()
    with torch.no_grad():
        return problem.loss(problem.network(*problem.test.inputs), problem.test.targets).item()


@pytest.mark.parametrize("task", [task for task in TASKS if not task.twin_of], ids=lambda task: task.name)
def test_trainings_side_by_side_are_those_of_torch(task):
    task = replace(task, steps=4, spoiled=0.5 if task.spoiled else 0.0)
    steep = "regression" in task.about
    rate = 3e-4 if steep and task.optimizer == "SGD" else 0.1 if task.optimizer == "SGD" else 0.01
    cells = [Cell(task.name, clipper, rate, 1) for clipper in (NONE, "fixed 0.1", "p = 10")]
    results = study.train(task, 1, cells)
    losses = [results[cell].test for cell in cells]
    assert losses == pytest.approx([train_alone(task, cell) for cell in cells], rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=3e-5)  # clipping shows


def factors(clipper, *steps):
    """The factors of the last of several steps, each given as the norms of the tensors of one training."""
    made = MAKERS[clipper](Size(1, len(steps[0]), len(steps)))
    for norms in steps:
        found = np.broadcast_to(made.factors(np.array([norms], dtype=float)), (1, len(norms)))
        made.step += 1
    return found[0].tolist()


AROUND_TWO = [[1.0], [3.0]] * 12 + [[2.0]]  # 25 norms of mean 2
DEVIATION = math.sqrt(24 / 25)
NEAR = 2.0 + DEVIATION * 2.5 / ((12.0 - 2.0) / (DEVIATION + 1e-6) / 2.5)


@pytest.mark.parametrize(
    ("clipper", "steps", "expected"),
    [
        ("none", [[3.0, 4.0]], [1.0, 1.0]),
        ("fixed 1", [[3.0, 4.0]], [0.2, 0.2]),
        ("fixed 10", [[3.0, 4.0]], [1.0, 1.0]),
        ("p = 50", [[3.0, 4.0], [6.0, 8.0]], [0.75, 0.75]),
        ("p = 10, per tensor", [[1.0, 1.0], [1.0, 11.0]], [1.0, 2 / 11]),
        ("p = 10, window 100", [[9.0]] + [[1.0]] * 100, [1.0]),
        ("p = 90, current norm left out", [[1.0]] * 5 + [[4.0]], [0.25]),
        ("p = 90, current norm left out", [[7.0]], [1.0]),
        ("p from 90 to 10", [[1.0], [2.0]], [0.75]),
        ("p from 10 to 90", [[1.0], [2.0]], [0.75]),
        ("p from 90 to 10", [[0.0]] * 9 + [[1.0], [2.0]], [(1 + 0.1 + 8 / 110) / 2]),
        ("autoclip of PyPI", [[float(k), 1.0] for k in range(1, 11)] + [[91.0, 1.0]], [0.1, 1.0]),
        ("ZClip, no cap", [*AROUND_TWO[:24], [100.0]], [1.0]),
        ("ZClip, no cap", [*AROUND_TWO, [4.0]], [1.0]),
        ("ZClip, no cap", [*AROUND_TWO, [12.0]], [NEAR / 12.0]),
        ("ZClip", [*AROUND_TWO, [12.0]], [1.0 / 12.0]),
        ("AdaGC", [[3.0, 4.0]], [0.2, 0.2]),
        ("AdaGC", [[0.3, 0.4]] * 100 + [[3.0, 0.4]], [0.105, 1.0]),
        ("AdaGC", [[0.3, 0.4]] * 99 + [[0.2, 0.4], [3.0, 0.4]], [0.07, 1.0]),
    ],
)
def test_clipper_does_what_its_authors_say(clipper, steps, expected):
    assert factors(clipper, *steps) == pytest.approx(expected, rel=1e-6)


def test_agc_clips_units_by_their_weights_and_spares_the_last_layer():
    weights = [
        torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]),
        torch.tensor([[3.0, 4.0]]),
        torch.ones(1, 1, 2),
        torch.ones(1, 1),
    ]
    gradients = [
        torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]),
        torch.tensor([[0.6, 0.8]]),
        torch.ones(1, 1, 2),
        torch.ones(1, 1),
    ]
    clipped = MAKERS["AGC"](Size(1, 4, 1)).clip(gradients, weights, np.ones((1, 4)))
    assert clipped.tolist() == [True]
    assert gradients[0].flatten().tolist() == pytest.approx([0.0, 0.05, 1e-5, 0.0])
    assert gradients[1].flatten().tolist() == pytest.approx([0.03, 0.04])
    assert all((tensor == 1.0).all() for tensor in gradients[2:])


@pytest.mark.filterwarnings("ignore:The gradient norm is")
def test_autoclip_drops_an_update_that_is_not_finite():
    gradients = [torch.tensor([[math.nan], [2.0]])]
    clipper = MAKERS["p = 10"](Size(2, 1, 1))
    assert clipper.clip(gradients, gradients, np.array([[math.nan], [2.0]])).tolist() == [True, False]
    assert gradients[0].flatten().tolist() == [0.0, 2.0]


def test_study_goes_on_where_it_was(tmp_path, monkeypatch):
    tasks = [replace(TASKS[0], steps=1)]
    path = tmp_path / "regret.csv"
    whole = study.complete(path, tasks, [NONE, "p = 99"], 2)
    assert len(whole) == 2 * 14 * 2
    kept = dict(list(study.read(path).items())[:-3])
    study.write(path, kept)
    trained = []
    train = study.train

    def counted(task, seed, cells):
        trained.extend(cells)
        return train(task, seed, cells)

    monkeypatch.setattr(study, "train", counted)
    again = study.complete(path, tasks, [NONE, "p = 99"], 2)
    assert trained == list(whole)[-3:]
    assert list(again) == list(study.read(path)) == list(whole)
    assert [again[cell].test for cell in whole] == pytest.approx([whole[cell].test for cell in whole], rel=1e-4)


def test_progress_lost_counts_from_the_best_to_the_trivial():
    task, twin = SPOILED[0], TWINS[0]

    def result(validation, test):
        return Result(validation, test, 10.0, *[0.0] * 4)

    results = {
        Cell(twin.name, NONE, 1.0, 0): result(1.0, 1.0),
        Cell(twin.name, NONE, 3.0, 0): result(2.0, 2.0),
        Cell(task.name, NONE, 1.0, 0): result(math.inf, math.inf),
        Cell(task.name, NONE, 3.0, 0): result(9.0, 9.0),
        Cell(task.name, NONE, 1.0, 1): result(math.inf, math.inf),
        Cell(task.name, NONE, 3.0, 1): result(9.0, 9.0),
        Cell(task.name, NONE, 1.0, 2): result(0.0, 0.0),  # of a seed that is not complete
        Cell(task.name, "p = 10", 1.0, 0): result(5.0, 4.0),
        Cell(task.name, "p = 10", 1.0, 1): result(5.0, 6.0),
        Cell(task.name, "p = 10", 3.0, 0): result(2.0, 3.0),
        Cell(task.name, "p = 10", 3.0, 1): result(4.0, 1.0),
    }
    lost = lost_in(results, task)
    assert lost[NONE] == pytest.approx((1.0, 7 / 8))
    assert lost["p = 10"] == pytest.approx((3 / 8, 0.0))


def test_report_is_that_of_the_trainings(tmp_path, monkeypatch):
    committed = ROOT / "bench/results/regret"
    shutil.copy(committed / "regret.csv", tmp_path)
    monkeypatch.setattr(sys, "argv", ["python -m bench regret", "--report", "--output", str(tmp_path)])
    bench.regret.main()
    pages = [(folder / "regret.md").read_text("utf-8") for folder in (committed, tmp_path)]
    one, other = (page.partition("| machine |")[0] for page in pages)
    assert one == other
    for picture in ("regret.png", "own_rate.png"):
        assert matplotlib.image.imread(tmp_path / picture).std() > 0.05


# --- What the pages say -----------------------------------------------------------------------------------------------


def rows_under(title):
    """A table of the report: the cells of each row by its name."""
    page = (ROOT / "bench/results/regret/regret.md").read_text("utf-8")
    lines = page.partition(f"{title}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---")) + 1
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {name: others for name, *others in cells}


def mean(cell):
    return float(cell.partition(" / ")[0])


def worst(cell):
    return float(cell.partition(" / ")[2])


def test_claims_of_the_pages_are_rows_of_the_report():
    rows = rows_under("## In short")
    percentiles = [f"p = {p}" for p in (10, 25, 50, 75, 90)]
    fixed = [name for name in rows if name.startswith("fixed")]
    clean_here, clean_own, bad_here, bad_own, ruined = range(5)
    assert {rows[name][ruined] for name in percentiles} == {"0 of 14"}
    assert rows["p = 1"][ruined] == "1 of 14"
    assert len(fixed) == 7
    assert all(not rows[name][ruined].startswith("0 ") for name in fixed)
    assert rows["none"][ruined] == "4 of 14"
    assert worst(rows["none"][clean_here]) < 50.0 < mean(rows["none"][bad_here])  # so it is the four with bad batches
    assert all(mean(rows[name][bad_here]) < 12.0 for name in percentiles)
    assert mean(rows["p = 99"][bad_here]) > 50.0
    best = [min(mean(rows[name][column]) for name in percentiles) for column in range(4)]
    assert [mean(rows["fixed 1"][column]) for column in (clean_own, bad_own)] == [3.7, 1.4]
    assert [best[clean_own], best[bad_own]] == [6.3, 4.2]
    assert all(mean(rows["p = 50"][column]) <= best[column] + 2.0 for column in range(4))
    assert max(mean(rows[f"p = {p}"][bad_here]) for p in (10, 25, 50)) < mean(rows["p = 90"][bad_here])
    assert mean(rows["p = 90"][bad_here]) < best[bad_here] + 4.0
    assert 0.8 * mean(rows["none"][clean_here]) < best[clean_here] < 1.1 * mean(rows["none"][clean_here])

    rates = rows_under("### Its own rate")["p = 10"]
    of_sgd = [float(rate) for rate, task in zip(rates, CLEAN + SPOILED, strict=True) if task.optimizer == "SGD"]
    assert statistics.median(of_sgd) == 3.0

    optimizers = rows_under("### By optimizer, clean batches")
    sgd_here, sgd_own, adam_here, adam_own = map(mean, optimizers["p = 10"])
    assert sgd_here > 2.0 * sgd_own
    assert adam_here < adam_own + 2.0
    assert max(mean(optimizers[name][0]) for name in ("p = 75", "p = 90")) < 1.2 * mean(optimizers["none"][0])

    others = rows_under("### Others, as their authors publish them")
    assert others["ZClip, no cap"][ruined] == "0 of 14"
    assert not any(others[name][ruined].startswith("0 ") for name in ("ZClip", "AdaGC", "AGC"))

    variants = rows_under("### What the paper leaves open")
    means = {name: [mean(cell) for cell in row[:4]] for name, row in variants.items()}
    for name in means.keys() - {"none"}:
        plain = map(min, means["p = 10"], means["p = 90"])
        assert all(value > better - 2.0 for value, better in zip(means[name], plain, strict=True))
    for percentile in ("p = 10", "p = 90"):
        for window in (100, 300):
            assert means[f"{percentile}, window {window}"] == pytest.approx(means[percentile], abs=2.0)

    drifts = {name: [float(cell) for cell in row] for name, row in rows_under("### Norms that drift").items()}
    falling, rising, fitted = (
        {name: (row[start], row[start + 2]) for name, row in drifts.items()} for start in (0, 3, 6)
    )
    for p in (10, 90):
        windows = [f"p = {p}{window}" for window in (", window 300", ", window 1000", ", window 3000", "")]
        for task in (falling, rising, fitted):
            away = [abs(task[name][1] - (100 - p)) for name in windows]
            assert away[0] == min(away)
            assert away[0] < away[-1]
            if p == 10:
                assert all(task[name][0] == pytest.approx(task["p = 10"][0], abs=1.0) for name in windows)
    for window in (300, 1000):
        gain = [task["p = 90"][0] - task[f"p = 90, window {window}"][0] for task in (falling, rising)]
        assert gain[0] > 2.0
        assert gain[1] < 1.0

    medians = [float(row[2].replace(",", "")) for row in rows_under("## The scales").values() if row[2] != "inf"]
    assert max(medians) / min(medians) > 5e3
