"""A sample of the mutants; `make soak` judges 220, and 150 of the adapters.

Nine of ten die in the long run. So small a sample cannot count them: that half of it survives happens once in 600
draws, and means that the tests do not judge.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs/mutation.py"


def count_dead(lines):
    [(dead, judged)] = re.findall(r"^all: (\d+) of (\d+) killed", "\n".join(lines), re.MULTILINE)
    return int(dead), int(judged)


def test_mutants_of_a_sample_die(backend, absent):
    pytest.importorskip("resource", reason="the time of the processor is counted as POSIX does")
    if shutil.which("cc") is None:
        absent("needs a C compiler")
    if backend != "native":
        pytest.skip("mutants choose the backend themselves")
    from .programs.mutation import campaign, report

    lines = list(report(*campaign(10, seed=3)))
    print("\n".join(lines))
    dead, judged = count_dead(lines)
    assert judged >= 8
    assert dead > judged / 2


def test_mutants_of_a_sample_of_the_adapters_die(backend):
    """In a process of their own, which has not imported an adapter yet; of one file, whose tests take a second."""
    pytest.importorskip("resource", reason="the time of the processor is counted as POSIX does")
    pytest.importorskip("torch")
    if backend != "native":
        pytest.skip("mutants choose the backend themselves")
    command = [sys.executable, "-P", PROGRAM, "--count", "4", "--under", "adapters/autoclip_torch/engines"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    dead, judged = count_dead(done.stdout.splitlines())
    assert judged == 4
    assert dead > judged / 2
