"""What programs of all families share: the checks of what AutoClip did, and a training in two processes.

A program is run in two processes. The first trains, and saves the library's own checkpoint on the way. The second one
resumes it: what it clips has to be, to the last bit, what the first one has clipped after saving.

A harness has a `watch`, which sees each update beside AutoClip:

- `take()` returns the updates since the last call, as lists of Update, a list for each history;
- `saved` has the number of updates in each of them when the checkpoint was made, where a training cannot be replayed;
- `dtype` is that of the thresholds;
- `rounding` is the largest error that a norm may have, relative, and `units` that of a threshold, in its last place.
"""

import hashlib
import json
import logging
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autoclip_core import AutoClipError

PERCENTILE = 30.0
STEPS, HALF = 16, 8
ROUNDING = 1e-6  # of a float32 norm, relative; what bfloat16 gradients lose is not looked at here


class Update(NamedTuple):
    norm: float  # of the gradients, in float64, before AutoClip sees them
    remembered: float  # the norm that AutoClip says it was
    threshold: float
    left: float  # the norm of the gradients after AutoClip
    has_moved: bool = True  # a parameter


def check(updates, earlier=(), dtype=float, rounding=ROUNDING, units=0):
    """Return the largest relative error of a norm; AssertionError if an update is not clipped once, by the rule."""
    norms, error = list(earlier), 0.0
    for number, update in enumerate(updates):
        norms.append(update.remembered)
        threshold = dtype(np.percentile(norms, PERCENTILE))
        is_near = abs(update.threshold - float(threshold)) <= units * np.spacing(threshold)
        assert is_near, f"update {number}: threshold {update.threshold}, and not {threshold}"
        error = max(error, abs(update.remembered - update.norm) / update.norm)
        assert error < rounding, f"update {number}: remembered {update.remembered} of a gradient of {update.norm}"
        left = min(update.norm, threshold)
        assert abs(update.left - left) < 10 * rounding * left, f"update {number}: left {update.left}, and not {left}"
        assert update.has_moved, f"update {number}: no parameter has moved"
    return error


class Trained(NamedTuple):
    """What a program says of its training."""

    updates: int  # as the library counts them in this process
    params: list[Any]  # arrays, at the end
    logged: dict[str, float] = {}  # the latest numbers that AutoClip gave the library to log  # noqa: RUF012


def result(library, case="", *, package=None, **more):
    """Print a result for run.py."""
    print("RESULT", json.dumps({"library": library, "case": case, "version": version(package or library), **more}))


def play(watch, library, train, case="", *, package=None, replays=True):
    """Train in the first process, resume in the second; check and report.

    Args:
        watch: the harness's.
        library: the row of the table.
        train: from a folder for checkpoints, and whether to resume from there, to what was Trained.
        case: what is special.
        package: whose version counts, if not the library's.
        replays: whether the library resumes all that makes the batches. If not (an environment that is not saved), the
            history alone has to go on, by the rule.
    """
    what, folder = sys.argv[1], Path(sys.argv[2]) / (case or "usual").replace(" ", "-").replace("/", "-")
    folder.mkdir(exist_ok=True)
    warnings.filterwarnings("error", module="autoclip")
    logging.disable(logging.WARNING)
    kind = {name: getattr(watch, name) for name in ("dtype", "rounding", "units")}
    trained = train(folder, resume=what == "resume")
    streams = watch.take()
    assert trained.updates == sum(map(len, streams)) > 0, f"{trained.updates} updates, seen {list(map(len, streams))}"
    digest = hashlib.sha256(b"".join(np.asarray(param).tobytes() for param in trained.params)).hexdigest()
    record = {"streams": streams, "saved": watch.saved, "digest": digest}
    if what == "train":
        (folder / "trained.json").write_text(json.dumps(record))
        error = max(check(updates, **kind) for updates in streams)
    else:
        before = json.loads((folder / "trained.json").read_text())
        earlier = [[Update(*update) for update in updates] for updates in before["streams"]]
        error = 0.0
        for number, (updates, all_before) in enumerate(zip(streams, earlier, strict=True)):
            saved = len(all_before) - len(updates) if replays else before["saved"][number]
            assert saved > 0, "nothing was resumed"
            if replays:
                assert updates == all_before[saved:], "resumed, it does not clip as before to the last bit"
            remembered = [update.remembered for update in all_before[:saved]]
            error = max(error, check(updates, remembered, **kind))
        assert not replays or digest == before["digest"], "resumed, the parameters are others"
    last = {stream[-1] for stream in streams}
    if trained.logged:
        pairs = [(update.remembered, update.threshold) for update in last]
        numbers = [float(trained.logged[name]) for name in ("grad_norm", "clip_threshold")]  # of some in float32
        assert any(np.allclose(numbers, pair, rtol=1e-6, atol=0.0) for pair in pairs), (numbers, pairs)
    clipped = sum(update.remembered > update.threshold for updates in streams for update in updates)
    assert clipped, "nothing was clipped, so nothing was tried"
    found = {"updates": trained.updates, "clipped": clipped, "error": error, "logs": bool(trained.logged)}
    result(library, case, package=package, **(found if what == "train" else {"resumed": replays or "history"}))


@contextmanager
def refused(words):
    """What stands below is refused, in these words among others."""
    try:
        yield
    except AutoClipError as error:
        if words not in str(error):
            raise
    else:
        raise AssertionError(f"not refused, and that in words like {words!r}")
