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
    [copy.copy, copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history))],
    ids=["copy", "deepcopy", "pickle"],
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
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")  # where other tests have loaded JAX
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


ENDINGS = {
    "global": """
history = NormHistory()
history.extend(range(10_000))
""",
    "many": """
clips = [AutoClip(window=i + 1) for i in range(200)]
for clip in clips:
    clip.observe(1.0)
""",
    "cycle": """
class Node: pass
node = Node()
node.itself = node
node.history = NormHistory()
node.history.push(1.0)
""",
    "atexit": """
history = NormHistory()
atexit.register(lambda: (history.push(2.0), history.check()))
""",
    "finalizer": """
class Late:
    def __init__(self):
        self.history = NormHistory()
    def __del__(self):
        self.history.push(1.0)
sys.late = Late()
""",
    "daemon threads": """
history = NormHistory()
def use():
    while True:
        history.observe(1.0, 10.0)
for _ in range(4):
    threading.Thread(target=use, daemon=True).start()
time.sleep(0.2)
""",
    "only a method": """
observe = NormHistory().observe
observe(1.0, 10.0)
""",
    "modules gone": """
history = NormHistory()
history.push(1.0)
for name in [name for name in sys.modules if name.startswith("autoclip_core")]:
    del sys.modules[name]
sys.exit(0)
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_interpreter_ends_quietly_with_live_histories(ending, run_python):
    header = "import atexit, sys, threading, time\nfrom autoclip_core import AutoClip, NormHistory\n"
    assert run_python(header + ENDINGS[ending], "-X", "dev") == ""
