"""Eight threads on one history: every call is one step, whole or not at all. `make soak` gives them a minute."""

import os
import sys
import threading
import time
from math import inf

import numpy as np
import pytest

from autoclip_core import NormHistory

from .reference import assert_same_bits

THREADS = 8


@pytest.fixture(autouse=True)
def restless():
    """Let Python change threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_together(*tasks, patience=120):
    """Run the tasks at once, each in a thread; the first error in any of them is raised here."""
    gate = threading.Barrier(len(tasks))
    errors = []

    def run(task):
        try:
            gate.wait(patience)
            task()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"


def norms_of(thread, start, count):
    """So many norms from a start on that tell which thread pushed them, from small to large."""
    return np.arange(start, start + count) * THREADS + thread + 1.0


def test_history_of_eight_threads_holds_what_all_of_them_pushed():
    history = NormHistory()
    end = time.monotonic() + float(os.environ.get("AUTOCLIP_THREAD_SECONDS", "2"))
    counts = [0] * THREADS

    def work(thread):
        size, look, first = 0, 8, thread + 1.0
        while time.monotonic() < end:
            count = counts[thread]
            norms = norms_of(thread, count, 8).tolist()
            history.push(norms[0])
            assert first >= history.observe(norms[1], 0.0) >= 1.0
            history.extend(norms[2:5])
            lowest, highest = history.observe_many(norms[5:], [0.0, 100.0])[-1]
            assert 1.0 <= lowest <= first
            assert norms[7] <= highest
            counts[thread] += 8

            # No answer is torn: each is right for some moment between this thread's own steps.
            assert history.percentile(100.0) >= norms[7]
            assert history.select(count) <= norms[0]
            assert history.rank(norms[7]) >= count + 7
            assert size < len(history)
            size = len(history)
            if counts[thread] >= look:  # rarely: this costs as much as the history is long
                look *= 2
                values = history.values()
                assert len(values) >= size
                assert (np.diff(values) > 0).all()
                assert (values % 1.0 == 0.0).all()
                assert np.isin(norms_of(thread, 0, counts[thread]), values).all()
                saved = NormHistory.from_bytes(history.to_bytes())
                assert len(saved) >= size
                saved.check()
                history.check()

    run_together(*(lambda thread=thread: work(thread) for thread in range(THREADS)))
    assert min(counts) > 0
    everything = np.concatenate([norms_of(thread, 0, count) for thread, count in enumerate(counts)])
    assert_same_bits(history.values(), np.sort(everything))
    history.check()
    print(f"{len(everything):,} norms of {THREADS} threads")


def test_window_of_eight_threads_holds_norms_that_they_pushed():
    history = NormHistory(100)

    def work(thread):
        for norm in norms_of(thread, 0, 5000).tolist():
            history.observe(norm, 50.0)
            assert 1 <= len(history) <= 100

    run_together(*(lambda thread=thread: work(thread) for thread in range(THREADS)))
    values = history.values()
    assert len(values) == 100
    assert len(np.unique(values)) == 100
    # What a thread pushed last is what is left of it.
    for thread in range(THREADS):
        mine = values[(values - 1) % THREADS == thread]
        assert_same_bits(mine, norms_of(thread, 0, 5000)[5000 - len(mine) :])
    history.check()


def test_threads_with_a_history_each_get_their_own_answers():
    def work(norm):
        history = NormHistory()
        for i in range(10_000):
            assert history.observe(norm, 10.0) == norm
            assert history.percentile(75.0) == norm
            assert history.select(i) == norm
            assert history.rank(inf) == len(history) == i + 1

    run_together(*(lambda norm=float(thread): work(norm) for thread in range(THREADS)))


def test_many_norms_enter_at_once():
    history = NormHistory()
    together = 100
    done = threading.Event()

    def write():
        try:
            for _ in range(300):
                history.extend([1.0] * together)
                history.observe_many([2.0] * together, [10.0])
        finally:
            done.set()

    def read():
        while not done.is_set():
            assert len(history) % together == 0
            assert history.rank(inf) % together == 0
            assert history.rank(2.0) % together == 0
            assert len(history.values()) % together == 0
            assert len(NormHistory.from_bytes(history.to_bytes())) % together == 0

    run_together(write, *[read] * (THREADS - 1))
    assert len(history) == 600 * together


def test_histories_merge_into_each_other_from_several_threads():
    one, two = NormHistory(), NormHistory()

    def work(into, other):
        for i in range(3000):
            into.push(1.0)
            into.merge(other)
            if i % 3 == 0 or len(into) > 1000:  # two that take each other in grow like Fibonacci's numbers
                into.clear()

    run_together(*[lambda: work(one, two), lambda: work(two, one)] * (THREADS // 2))
    for history in (one, two):
        history.check()
        assert (history.values() == 1.0).all()


def test_history_is_cleared_copied_and_read_at_once():
    history = NormHistory()

    def work(thread):
        for i in range(300):
            history.extend([1.0, 2.0, 3.0])
            twin = history.__copy__()
            assert len(twin) % 3 == 0
            twin.check()
            if thread == 0 and i % 10 == 0:
                history.clear()
            try:
                assert history.percentile(50.0) == 2.0
                assert 1.0 <= history.select(0) <= 3.0
            except (ValueError, IndexError) as error:
                assert "empty" in str(error) or "rank 0" in str(error)  # noqa: PT017

    run_together(*(lambda thread=thread: work(thread) for thread in range(THREADS)))
    history.check()


def test_histories_come_and_go_in_several_threads():
    def work(thread):
        kept = []
        for i in range(1500):
            history = NormHistory(3 if i % 2 else None)
            history.extend([thread, i])
            if i % 10 == 0:
                kept.append((history, sorted([thread, i])))
        for history, norms in kept:
            assert history.values().tolist() == norms

    run_together(*(lambda thread=thread: work(thread) for thread in range(THREADS)))
