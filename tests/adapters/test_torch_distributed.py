"""Trainings spread over real processes are those of one process on the whole batch, in every layout of PyTorch.

The ranks of a world start once, go through everything in torch_ranks.py, and leave results here to be judged: every
rank must have the history and the thresholds of every other to the last bit, and those of the one process but for the
order in which float32 sums are taken.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import torch_ranks as ranks
from .torch_ranks import LAYOUTS, STEPS, WAYS_OF_CHECKPOINTS, ways_of

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

ROUNDING = {"rtol": 1e-4, "atol": 1e-6}
SPREAD = [
    pytest.param(world, f"{kind.__name__} {way}", way, id=f"{kind.__name__}-{world}-{way}")
    for world, kinds in LAYOUTS.items()
    for kind in kinds
    for way in ways_of(kind)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Call it with a world's size and a scenario: what each rank returned. A world goes on from the one before it."""
    folder = tmp_path_factory.mktemp("ranks")
    of_world = {}

    def run(world):
        command = [sys.executable, "-P", Path(ranks.__file__)]
        started = [subprocess.Popen([*command, str(rank), str(world), folder], cwd=folder) for rank in range(world)]
        try:
            codes = [process.wait(timeout=1800) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert codes == [0] * world
        of_world[world] = [torch.load(folder / f"results-{world}-{rank}.pt") for rank in range(world)]

    def get(world, scenario):
        for needed in (2, 4, 1):
            if needed not in of_world:
                run(needed)
            if needed == world:
                break
        returned = [of_rank[scenario] for of_rank in of_world[world]]
        assert not any(isinstance(result, str) for result in returned), returned[0]
        return returned

    return get


@pytest.fixture(scope="module")
def alone():
    """Call it with a way: the training in one process."""
    known = {}
    return lambda way: known.get(way) or known.setdefault(way, ranks.train(way=way))


def assert_all_ranks_agree(returned):
    for result in returned[1:]:
        for key in ("decided", "histories"):
            assert len(result[key]) == len(returned[0][key])
            assert all(map(torch.equal, result[key], returned[0][key])), key
        assert result["counts"] == returned[0]["counts"]


def assert_same_but_for_rounding(result, expected):
    for key in ("decided", "histories"):
        assert len(result[key]) == len(expected[key])
        for values, others in zip(result[key], expected[key], strict=True):
            torch.testing.assert_close(values, others, **ROUNDING)
    for key in ("params", "grads"):
        assert result[key]
        for name, value in result[key].items():
            torch.testing.assert_close(value, expected[key][name], **ROUNDING)


@pytest.mark.parametrize(("world", "scenario", "way"), SPREAD)
def test_spread_training_is_that_of_one_process(results, alone, world, scenario, way):
    returned, expected = results(world, scenario), alone(way)
    assert_all_ranks_agree(returned)
    assert returned[0]["counts"] == expected["counts"] == (STEPS, 1)
    for result in returned:
        assert_same_but_for_rounding(result, expected)
    known = {name for result in returned for name in result["params"]}
    assert known == set(expected["params"])


def test_spread_training_clips_some_steps_and_not_others(alone):
    # So that the test above compares something.
    for way in ranks.WAYS:
        if way.by == "step":
            clipped = torch.cat([step[:, 3] for step in alone(way)["decided"]])
            assert 0 < clipped.sum() < len(clipped)


# How many numbers there are in each collective with one group: 2 for all parameters that are sharded alike.
COLLECTIVES = {
    "DDP": [],
    "ZeRO": [],
    "FSDP2": [2],
    "HSDP": [2],
    "TensorParallel": [2],  # behind the partial sums of a norm layer
    "Mixed": [2],
    "Pipeline": [2],
    "FSDP1": [2],
    "FSDP2AndTensorParallel": [4, 2],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_step_takes_one_small_collective_per_mesh_dimension(results, world):
    counts = results(world, "collectives")
    assert counts[1:] == counts[:-1]
    for scenario, (sizes, total) in counts[0].items():
        layout, way = scenario.split()
        groups = 2 if way.startswith("group") else 1
        partial_sums = [16] if layout == "TensorParallel" else []
        assert sizes == partial_sums + [groups * size for size in COLLECTIVES[layout]], scenario
        assert total == len(sizes), scenario


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize(("kind", "scope"), [("sharded", "global"), ("sharded", "parameter"), ("plain", "global")])
def test_rank_without_gradients_takes_part(results, kind, scope, mode):
    returned = results(2, f"without_gradients {kind} {scope}-{mode}-step")
    assert returned[0] == returned[1]
    # Both ranks have two elements each of (1, 2), then (2, 3) and rank 1 the first only, then (3, 4) and rank 1 none.
    squares = [(4, 16), (16, 18), (18, 32)]
    norms = (
        [[sum(both) ** 0.5 for both in squares]]
        if scope == "global"
        else [[both[index] ** 0.5 for both in squares] for index in (0, 1)]
    )
    assert returned[0]["histories"] == [pytest.approx(sorted(of_group), rel=1e-7) for of_group in norms]
    assert returned[0]["steps"] == 3  # the second step() on the same gradients counts on no rank


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_step_that_fails_on_one_rank_and_is_made_again_counts_once_on_all(results, mode):
    squares = [4 * ((10 - step) ** 2 + (11 - step) ** 2) for step in range(4)]
    expected = 4, [pytest.approx(square**0.5, rel=1e-7) for square in sorted(squares)]
    assert results(2, f"failed_step {mode}") == [expected] * 2


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
def test_gradients_that_are_placed_unlike_their_parameters_are_clipped(results, mode):
    grad = torch.arange(16.0).view(4, 4)
    norm = (3 * grad.square().sum()).sqrt().item()
    for result in results(2, f"placed_elsewhere {mode}"):
        assert result["norms"] == pytest.approx([norm, 2 * norm], rel=1e-6)
        for clipped in result["grads"]:
            torch.testing.assert_close(clipped, grad)
        assert result["stay"] == [True] * 3


def test_optimizer_that_overlaps_with_backward_is_refused(results):
    for messages in results(2, "overlap"):
        assert ["overlap_with_ddp=True" in message for message in messages] == [True]


def test_no_rank_takes_a_part_for_the_whole(results):
    expected = [
        "process_group=model.process_group",
        "process_group=model.process_group",
        "The ranks [0, 1] of process_group share the same DTensors",
        "All 2 ranks of process_group have a gradient of the same norm",
        "in step 1 the norm is",
        "in step 1 the norm is",
        "in step 1 the threshold is",
    ]
    for messages in results(2, "parts_for_the_whole"):
        refused, right = messages[: len(expected)], messages[len(expected) :]
        for message, part in zip(refused, expected, strict=True):
            assert part in message
        assert right == [""] * 4


@pytest.mark.parametrize("way", WAYS_OF_CHECKPOINTS, ids=str)
def test_checkpoint_goes_on_with_another_number_of_ranks(results, alone, way):
    expected = alone(way)
    before = 0
    for world in (2, 4, 1):
        returned = results(world, f"checkpoint {way}")
        assert_all_ranks_agree(returned)
        for decided, other in zip(returned[0]["decided"], expected["decided"][before:], strict=False):
            torch.testing.assert_close(decided, other, **ROUNDING)
        before += len(returned[0]["decided"])
    assert before == STEPS
    assert_same_but_for_rounding({**returned[0], "decided": []}, {**expected, "decided": []})
    assert returned[0]["counts"] == expected["counts"]
