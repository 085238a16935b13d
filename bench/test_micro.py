"""Micro-benchmarks of the Python interfaces, both backends: `pytest bench`, `pytest-benchmark compare` between runs.

What they isolate: the cost of one call from Python on a history of 100,000 norms, memory warm. Every case runs a
thousand calls per round, so a time in microseconds reads as nanoseconds per call; rounds are few and fixed, so that the
history stays the size that it is said to be. No speed is asserted.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from autoclip_core import AutoClip, NormHistory

SIZE = 100_000
CALLS = 1_000
ROUNDS = 20

Norms = list[float]


def lognormal(count: int, seed: int) -> Norms:
    return list(map(float, np.random.default_rng(seed).lognormal(sigma=0.5, size=count)))


@pytest.fixture(params=["native", "numba"])
def history(request: pytest.FixtureRequest) -> NormHistory:
    if request.param == "numba":
        pytest.importorskip("numba")
    made = NormHistory(backend=request.param)
    for norm in lognormal(SIZE, 1):
        made.push(norm)
    return made


@pytest.fixture
def rounds(benchmark: Any, history: NormHistory, request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Runs a function of a thousand fresh norms, round after round; the backends stand side by side."""
    benchmark.group = request.function.__name__
    benchmark.extra_info["backend"] = history.backend
    seeds = iter(range(2, 1000))

    def run(thousand_calls: Callable[[Norms], object]) -> None:
        def setup() -> tuple[tuple[Norms], dict[str, Any]]:
            return (lognormal(CALLS, next(seeds)),), {}

        benchmark.pedantic(thousand_calls, setup=setup, rounds=ROUNDS, warmup_rounds=3)

    return run


def test_push(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    push = history.push

    def thousand_calls(norms: Norms) -> None:
        for norm in norms:
            push(norm)

    rounds(thousand_calls)


def test_observe(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    observe = history.observe

    def thousand_calls(norms: Norms) -> None:
        for norm in norms:
            observe(norm, 10.0)

    rounds(thousand_calls)


def test_observe_many_in_one_call(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    rounds(lambda norms: history.observe_many(norms, [10.0]))


def test_percentile_unchanged(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    percentile = history.percentile

    def thousand_calls(norms: Norms) -> None:
        for _ in norms:
            percentile(10.0)

    rounds(thousand_calls)


def test_percentile_random(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    percentile = history.percentile

    def thousand_calls(norms: Norms) -> None:
        for norm in norms:
            percentile(norm % 1.0 * 100.0)

    rounds(thousand_calls)


def test_extend_in_one_call(history: NormHistory, rounds: Callable[[Any], None]) -> None:
    rounds(history.extend)


def test_auto_clip_observe(
    history: NormHistory, rounds: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOCLIP_BACKEND", history.backend)
    clip = AutoClip(10.0)
    clip.history.extend(history.values())
    assert clip.history.backend == history.backend
    observe = clip.observe

    def thousand_calls(norms: Norms) -> None:
        for norm in norms:
            observe(norm)

    rounds(thousand_calls)
