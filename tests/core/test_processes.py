"""Copies, forks, other processes, and the end of the interpreter."""

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from autoclip_core import NormHistory

from .reference import assert_same_bits, make_norms


@pytest.mark.parametrize("window", [None, 50, 1000])
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history)), lambda history: copy.copy(copy.copy(history))],
    ids=["copy", "deepcopy", "pickle", "copy of a copy"],
)
def test_duplicate_is_equal_and_independent(duplicate, window):
    history = NormHistory(window)
    history.extend(make_norms("log-normal", 900))
    before = history.to_bytes()
    twin = duplicate(history)
    assert twin.to_bytes() == before
    assert (twin.window, twin.backend) == (window, history.backend)
    twin.observe_many(make_norms("drifting", 900), [10.0])
    assert history.to_bytes() == before
    after = twin.to_bytes()
    history.clear()
    assert twin.to_bytes() == after
    del history
    twin.check()
    assert twin.to_bytes() == after


def test_duplicates_of_a_structure_share_what_it_shares():
    history = NormHistory()
    history.push(1.0)
    one, two = copy.deepcopy([history, history])
    one.push(2.0)
    assert len(two) == 2
    assert len(history) == 1


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_history_goes_to_another_process_and_back(method):
    history = NormHistory(3000)
    history.extend(make_norms("log-normal", 5000))
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert pool.submit(NormHistory.to_bytes, history).result(60) == history.to_bytes()
        assert_same_bits(pool.submit(NormHistory.percentile, history, 10.0).result(60), history.percentile(10.0))
        twin = pool.submit(copy.copy, history).result(60)
    assert twin.to_bytes() == history.to_bytes()
    twin.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_history_works_on_both_sides_of_a_fork_while_threads_use_it(run_python):
    # As a DataLoader does it. A lock that another thread holds at that moment must not stay locked in the child.
    run_python(
        """
import os, signal, threading
from autoclip_core import NormHistory

history, other = NormHistory(), NormHistory(100)
history.extend(range(1, 5000))
stop = threading.Event()

def use():
    while not stop.is_set():
        history.observe(5.0, 10.0)
        other.extend([1.0, 2.0, 3.0] * 50)
        NormHistory().push(1.0)

threads = [threading.Thread(target=use) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs is killed, and its status tells
        code = 1
        try:
            size = len(history)
            history.push(1.0)
            assert history.observe(0.5, 0.0) == 0.5
            assert len(history) == size + 2
            history.check()
            other.push(3.0)
            other.check()
            new = NormHistory()
            new.push(1.0)
            del new
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
history.check()
assert history.select(0) == 1.0, "what the children pushed is theirs"
""",
        "-W",
        "ignore::DeprecationWarning",
    )


@pytest.mark.parametrize(
    "code",
    [
        "history = NormHistory(); history.extend(range(10000))",
        "clips = [AutoClip(window=i + 1) for i in range(200)]; [clip.observe(1.0) for clip in clips]",
        "class Node: pass\nnode = Node(); node.self = node; node.history = NormHistory(); node.history.push(1.0)",
        "history = NormHistory(); atexit.register(lambda: (history.push(2.0), history.check()))",
        "class Late:\n    def __init__(self): self.history = NormHistory()\n"
        "    def __del__(self): self.history.push(1.0)\nlate = Late(); sys.late = late",
        "history = NormHistory()\ndef use():\n    while True: history.observe(1.0, 10.0)\n"
        "for _ in range(4): threading.Thread(target=use, daemon=True).start()\ntime.sleep(0.2)",
        "sys.modules['kept'] = NormHistory(); observe = NormHistory().observe",
        "history = NormHistory(); history.push(1.0); del sys.modules['autoclip_core']; sys.exit(0)",
    ],
    ids=["global", "many", "cycle", "atexit", "finalizer", "daemon threads", "modules", "exit"],
)
def test_interpreter_ends_quietly_with_live_histories(code, run_python):
    header = "import atexit, sys, threading, time\nfrom autoclip_core import AutoClip, NormHistory\n"
    assert run_python(header + code, "-X", "dev") == ""
