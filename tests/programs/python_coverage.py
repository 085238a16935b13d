"""The tests reach at least 95 % of the lines of each Python package; its branches are counted beside them.

    python -P tests/programs/python_coverage.py           runs the tests, some twenty minutes, then counts
    python -P tests/programs/python_coverage.py --count   counts again what was reached last time

What may not change:

- What counts is the installed package, as in every test, in all processes that the tests start, on both backends.
- Numba's functions run compiled, where no one sees them; a test that does without the compiler reaches them all
  (tests/core/test_backend.py).
- No line is excluded, not even those that need a GPU; every line that no test reaches is named. (What only type
  checkers read does not count, as coverage.py has it.)
- Tests outside of tests/core and tests/adapters are left out: they build, read or kill the packages, or train for long,
  and would reach nothing more. So is a test that forks while threads run: a lock of coverage.py's own may stay locked
  in the child, which then hangs now and then (of 25 runs without coverage.py none did).
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "build/python-coverage"
LEAST = 0.95

PACKAGES = {
    "autoclip_core": "autoclip_core",
    "autoclip_jax": "adapters/autoclip_jax",
    "autoclip_tensorflow": "adapters/autoclip_tensorflow",
    "autoclip_torch": "adapters/autoclip_torch",
}

# By backend.
RUNS = {"numba": ["tests/core"], "native": ["tests/core", "tests/adapters"]}

SPOILED = (
    "tests/core/test_processes.py::test_history_works_on_both_sides_of_a_fork_while_threads_use_it",
    "tests/core/test_backend.py::test_numba_backend_works_where_the_disk_is_full",
)


def check_installed():
    """What is installed must be these sources: their lines are named."""
    for package, folder in PACKAGES.items():
        installed = Path(find_spec(package).origin).parent
        names = [str(file.relative_to(ROOT / folder)) for file in (ROOT / folder).rglob("*.py")]
        if filecmp.cmpfiles(ROOT / folder, installed, names, shallow=False)[0] != names:
            sys.exit(f"{installed} is not what {ROOT / folder} is; install it again.")


def run_tests():
    shutil.rmtree(DATA, ignore_errors=True)
    # Of a cache that is there already Numba would not run the Python code that helps to compile.
    environment = os.environ | {"COVERAGE_FILE": str(DATA / "data"), "NUMBA_CACHE_DIR": str(DATA / "numba")}
    for backend, folders in RUNS.items():
        # Hypothesis draws the same each time, or the figures would not be the same.
        options = ["--hypothesis-seed=0", *(f"--deselect={test}" for test in SPOILED), *folders]
        command = [sys.executable, "-P", "-m", "coverage", "run", "-m", "pytest", *options]
        subprocess.run(command, cwd=ROOT, env=environment | {"AUTOCLIP_BACKEND": backend}, check=True)
    combine = [sys.executable, "-P", "-m", "coverage", "combine", "--quiet"]
    subprocess.run(combine, cwd=ROOT, env=environment, check=True)


def read_report():
    """What was reached in each file, by its path from the root: what `coverage json` says of "files"."""
    command = [sys.executable, "-P", "-m", "coverage", "json", f"--data-file={DATA / 'data'}", "--quiet", "-o", "-"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["files"]


def measure():
    """By package, the lines, those that were reached, the branches, those that were reached; and what was missed."""
    report = read_report()
    totals, missed = {}, []
    for package, folder in PACKAGES.items():
        counts = [0] * 4
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            found = report[name]  # a file that was never measured is an error
            keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
            counts = [count + found["summary"][key] for count, key in zip(counts, keys, strict=True)]
            lines = set(found["missing_lines"])
            source = file.read_text(encoding="utf-8").splitlines()
            missed += [f"{name}:{line}: {source[line - 1].strip()}" for line in sorted(lines)]
            missed += [
                f"{name}:{start}: {source[start - 1].strip()} (never to {'the end' if end < 0 else f'line {end}'})"
                for start, end in found["missing_branches"]
                if start not in lines
            ]
        totals[package] = counts
    return totals, missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="only count what was reached last time")
    options = parser.parse_args()
    check_installed()
    if not options.count:
        run_tests()
    totals, missed = measure()
    print("Not reached:", *missed, sep="\n")
    print()
    for package, (lines, reached, branches, taken) in totals.items():
        print(
            f"{package:20}{reached:6} of {lines:5} lines, {reached / lines:6.1%}, "
            f"{taken:6} of {branches:5} branches, {taken / branches:6.1%}"
        )
    lacking = [package for package, (lines, reached, *_) in totals.items() if reached < LEAST * lines]
    if lacking:
        print(f"Below {LEAST:.0%} of the lines: {', '.join(lacking)}.")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
