"""Memory that runs out changes nothing, and memory that was used is given back."""

import sys

import pytest

from autoclip_core import NormHistory

from .reference import assert_same_bits, make_norms

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process as Linux has it")


def test_memory_error_leaves_everything_as_it_was(run_python):
    code = """
import resource
from contextlib import contextmanager

import numpy as np

from autoclip_core import AutoClip, NormHistory

@contextmanager
def little_memory(megabytes):
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def refused(call, *arguments):
    try:
        with little_memory(4):
            call(*arguments)
    except MemoryError:
        return
    raise SystemExit(f"{call.__name__} found memory where there was none")

random = np.random.default_rng(0)
many = random.lognormal(size=4_000_000)
for window in (None, 3_000_000):
    history, other = NormHistory(window), NormHistory()
    history.extend(many[:2_000_000])
    other.extend(many[:2_000_000])
    history.observe(1.0, 10.0)
    before = history.to_bytes()
    refused(history.extend, many)
    refused(history.observe_many, many, np.array([10.0]))
    refused(history.__copy__)
    refused(history.to_bytes)
    refused(history.values)
    refused(NormHistory.from_bytes, before)
    if window is None:
        refused(history.merge, other)
    assert history.to_bytes() == before
    history.check()

def push_until_it_fails(push):
    done = 0
    with little_memory(4):
        try:
            for norm in norms:
                push(norm)
                done += 1
        except MemoryError:
            return done
    raise SystemExit("a push never failed")

norms = many.tolist()
for window in (None, 3_500_000):
    history = NormHistory(window)
    done = push_until_it_fails(history.push)
    history.check()
    assert np.array_equal(history.values(), np.sort(many[:done]))
    history.push(norms[done])
    assert len(history) == done + 1

    clip = AutoClip(window=window)
    done = push_until_it_fails(clip.observe)
    state = clip.state_dict()
    assert clip.steps == state["recorded_steps"] == len(clip.history) == done
    clip.observe(norms[done])
    assert clip.steps == len(clip.history) == done + 1
"""
    # Large blocks go back to the system at once, so that none of them is there for the call that should find none.
    run_python(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def test_memory_of_histories_that_are_gone_is_given_back(run_python):
    code = """
import resource

from autoclip_core import NormHistory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def come_and_go(times):
    for i in range(times):
        history = NormHistory(5000 if i % 2 else None)
        history.extend(norms)
        twin = history.__copy__()
        del history, twin

norms = [float(i) for i in range(10_000)]
come_and_go(20)
before = resident()
come_and_go(500)
grown = (resident() - before) / 2**20
assert grown < 10, f"{grown} MiB more after 1000 histories"
"""
    run_python(code)


@pytest.mark.parametrize("which", ["backend", "other_backend"])
def test_memory_that_was_overwritten_is_reported_by_check(which, request, run_python):
    code = """
import re
import struct

from autoclip_core import BrokenHistoryError, NormHistory

norms = [1.25e77, 2.5e77, 5e77]
history = NormHistory(backend=BACKEND)
history.extend(norms)
history.check()
sought, wrong = struct.pack("3d", *norms), struct.pack("3d", *reversed(norms))
with open("/proc/self/maps") as maps, open("/proc/self/mem", "r+b", buffering=0) as memory:
    places = []
    for line in maps:
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if " rw-p " in line:
            memory.seek(start)
            try:
                content = memory.read(end - start)
            except OSError:  # the guard pages of a thread's stack
                continue
            places += [start + match.start() for match in re.finditer(re.escape(sought), content)]
    for place in places:
        memory.seek(place)
        if memory.read(len(sought)) == sought:  # and not what was a copy made by the search
            memory.seek(place)
            memory.write(wrong)
try:
    history.check()
except BrokenHistoryError as error:
    print(error)
"""
    said = run_python(code.replace("BACKEND", repr(request.getfixturevalue(which))))
    reason = "broken: norms stand in ascending order"
    assert said == f"The history is damaged ({reason}): memory was overwritten, or there is a bug.\n"


@pytest.mark.usefixtures("other_backend")
@pytest.mark.parametrize("window", [None, 4000])
def test_numba_backend_has_promised_itself_the_memory_that_it_may_need(window, monkeypatch):
    from autoclip_core import _numba as numba

    history, other = (NormHistory(window, backend=name) for name in ("numba", "native"))
    history.extend(make_norms("log-normal", 500))
    other.extend(make_norms("log-normal", 500))
    reserve, calls = numba.History._reserve, []

    def reserve_once(self, more):
        calls.append(more)
        if len(calls) > 1:
            raise MemoryError
        reserve(self, more)

    monkeypatch.setattr(numba.History, "_reserve", reserve_once)
    many = make_norms("saw-tooth", 5000)
    assert_same_bits(history.observe_many(many, [10.0]), other.observe_many(many, [10.0]))
    assert calls == [5000, 1], "memory did not run short, or was asked for again"
    history.check()
    assert history.to_bytes() == other.to_bytes()
