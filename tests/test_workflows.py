"""The hosted workflows hold no logic of their own: each step is one line that runs here as well."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
TOOLS = {"pip", "pytest", "cibuildwheel"}

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def steps_of(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def expect_runnable(line):
    assert "\n" not in line.strip(), "more than one line is logic, which belongs into the Makefile or .ci"
    assert not set("&|;`$") & set(line), f"{line!r} is more than one command"
    first, *words = line.split()
    if first != "python":
        assert (ROOT / first).is_file(), f"there is no {first}"
        return
    tool = words[words.index("-m") + 1]
    assert tool in TOOLS, f"{tool} is not what this project uses"
    assert [word for word in words if word.startswith("tests/") and not (ROOT / word).exists()] == []


def test_there_are_workflows_and_a_form():
    assert [path.name for path in WORKFLOWS] == ["tests.yml", "wheels.yml"]
    assert FORMS


@every_workflow
def test_each_step_is_one_command(path):
    for step in steps_of(path):
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            expect_runnable(step["run"])


@every_workflow
def test_workflow_may_read_and_no_more(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())


@pytest.mark.parametrize(
    "line",
    [
        "make test\nmake bench",
        ".ci/run && true",
        ".ci/no_such_script",
        "python -m twine upload",
        "python -P -m pytest tests/no_such_folder",
    ],
)
def test_what_does_not_run_here_is_refused(line):
    with pytest.raises(AssertionError):
        expect_runnable(line)


def test_forms_ask_for_what_is_installed():
    for path in FORMS:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"]
        assert form["description"]
        assert any("autoclip info" in part["attributes"]["label"] for part in form["body"])


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["preferred-citation"]["identifiers"] == [{"type": "other", "value": "arXiv:2007.14469"}]
    assert len(citation["preferred-citation"]["authors"]) == 4


def test_commits_are_checked_as_ci_checks_them():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make static"]
