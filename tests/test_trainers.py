"""The page of the trainers says what tests/trainers runs, and its table is that of the latest run.

Small libraries train here as well; `make trainers` has the others.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests/trainers"))

import run  # noqa: E402

PAGE = run.PAGE.read_text(encoding="utf-8")
PROGRAMS = [program for family in run.FAMILIES for program in run.programs_of(family)]
SMALL = [
    program for program in PROGRAMS if program.stem in {"with_haiku", "with_ignite", "with_schedulefree", "with_skorch"}
]
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)


def test_page_has_the_snippets_and_the_table_of_today():
    assert run.refreshed(PAGE) == PAGE
    stale = PAGE.replace("attach(base)", "attach(all)").replace("| library | what", "| what | library")
    assert stale != PAGE
    assert run.refreshed(stale) == PAGE


@every_program
def test_program_shows_few_lines_and_says_what_they_are(program):
    library, what = run.title_of(program)
    assert library
    assert what
    assert 1 <= sum(map(bool, run.snippet_of(program).splitlines())) <= 8


@every_program
def test_page_shows_the_lines_of_each_program(program):
    assert f"<!-- {program.relative_to(ROOT)} -->\n```python\n" in PAGE


def test_results_are_of_these_programs():
    known = run.matrix.known(run.RESULTS)
    tried = {f"{family}/{name}": cases for family, part in known.items() for name, cases in part["programs"].items()}
    assert set(tried) == {f"{program.parent.name}/{program.stem}" for program in PROGRAMS}
    # Each was resumed, by a second process, but for those that have nothing to resume.
    assert all("version" in case for cases in tried.values() for case in cases)


def test_versions_are_pinned():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    for file in (ROOT / "tests/trainers").glob("*/requirements.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or "==" in line or line.lower().replace("_", "-") in pinned, f"{file}: {line}"


def test_small_libraries_train_and_resume():
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(lambda program: run.try_library(sys.executable, program), SMALL))
    known = run.matrix.known(run.RESULTS)
    for program, cases in zip(SMALL, tried, strict=True):
        kept = known[program.parent.name]["programs"][program.stem]
        assert [case["case"] for case in cases] == [case["case"] for case in kept], program
