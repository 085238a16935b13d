"""Train with every library that people train with, and write down what came out: `make trainers`.

Each family has a folder here: requirements.txt, and programs of one library each, which begin with `with_`. A program
runs in two processes, of which the second resumes the checkpoint of the first. checks.py says what is checked, and
harness.py beside a program how updates are seen. What fails fails the run; a library that cannot be installed is named.

In a program, what a user adds stands between `# page` and `# end of page`, and the first line of its docstring says
what that is: adapters/TRAINERS.md has both, and is brought up to date at the end.
"""

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(HERE.parent / "programs"))

import matrix  # noqa: E402

RESULTS = ROOT / "bench/results/trainers"
PAGE = ROOT / "adapters/TRAINERS.md"
SECONDS = 600  # for one process

# What is installed for each family, with the versions of constraints.txt.
FAMILIES = {"torch": ".[lightning,transformers]", "jax": ".[jax]", "keras": ".[jax,keras,torch]"}


def install(family):
    """Make or renew the environment of a family; return its Python, and what could not be installed."""
    environment = ROOT / "build/trainers" / family
    python = environment / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    constraints = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    constrained = os.environ | constraints | {"AUTOCLIP_REQUIRE_NATIVE": "1"}
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, FAMILIES[family]], cwd=ROOT, env=constrained, check=True)
    requirements = HERE / family / "requirements.txt"
    if not subprocess.run([*pip, "--no-deps", "-r", requirements], env=constrained, check=False).returncode:
        return python, []
    lines = [line for line in requirements.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    failed = [
        line for line in lines if subprocess.run([*pip, "--no-deps", line], env=constrained, check=False).returncode
    ]
    return python, failed


def title_of(program):
    """The library of a program, and what a user adds: the two halves of its first line."""
    first, _, _ = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8"))).partition("\n\n")
    library, _, what = " ".join(first.split()).partition(": ")
    return library, what.removesuffix(".")


def snippet_of(program):
    """The lines that a user adds."""
    parts = re.findall(
        r"^ *# page\n(.*?)^ *# end of page\n", program.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    text = ""
    for part in parts:
        after_class = "\n\n\n" if text.rpartition("\n")[2].startswith(" ") else "\n"
        text += (after_class if text else "") + textwrap.dedent(part).strip("\n")
    return text.replace(", PERCENTILE", "").replace("PERCENTILE", "")  # as in the paper, where nothing is said


def programs_of(family):
    return sorted((HERE / family).glob("with_*.py"))


def backends_of(program):
    """The backends of Keras on which a program is to be run, if it says so."""
    named = re.search(r"^BACKENDS = (.*)$", program.read_text(encoding="utf-8"), re.MULTILINE)
    return ast.literal_eval(named[1]) if named else [""]


def try_library(python, program):
    """Run a program in two processes, on each backend; return a result for each of its cases."""
    cases = {}
    for backend in backends_of(program):
        own = {"AUTOCLIP_BACKEND": "native", "PYTHONPATH": str(HERE)} | ({"KERAS_BACKEND": backend} if backend else {})
        with tempfile.TemporaryDirectory() as folder:
            for what in ("train", "resume"):
                command = [python, "-W", "ignore", program, what, folder]
                title = " ".join(filter(None, (program.stem, backend, what)))
                for result in matrix.run(title, [(command, own)], Path(folder), SECONDS):
                    cases.setdefault((result["library"], result["case"]), {}).update(result)
    assert cases, f"{program.stem} reports nothing"
    return list(cases.values())


# How a program reports that a new process has resumed its checkpoint, and what the table says.
RESUMED = {True: "to the last bit", "history": "the history, by the rule"}


def table_of(parts):
    lines = ["| library | what to add | lines | tried with | updates | resumed |", "|---|---|---|---|---|---|"]
    for family, part in parts.items():
        for program in programs_of(family):
            cases = part["programs"].get(program.stem, [])
            if not cases:
                continue
            library, what = title_of(program)
            versions = list(dict.fromkeys(case["version"] for case in cases))
            version = f" {versions[0]}" if len(versions) == 1 else ""
            tried = ", ".join(case["case"] for case in cases if case["case"]) or "one training"
            updates = sum(case.get("updates", 0) for case in cases)
            resumed = (
                ", ".join(dict.fromkeys(RESUMED[case["resumed"]] for case in cases if "resumed" in case)) or "as any"
            )
            number = sum(map(bool, snippet_of(program).splitlines()))
            lines.append(f"| {library}{version} | {what} | {number} | {tried} | {updates:,} | {resumed} |")
    return "\n".join(lines)


def write(parts):
    parts = {family: parts[family] for family in FAMILIES if family in parts}
    absent = [line for part in parts.values() for line in part["absent"]]
    page = f"""# Trainers

`make trainers`: a small training with AutoClip on in each library, on CPUs and Python {platform.python_version()}.
What is checked:

- every real update has exactly one record, of the unclipped and unscaled norm, within 1e-6 of the float64 one (in Keras
  1e-5, because the gradient is taken a second time);
- each threshold is, to the last bit, numpy.percentile of the norms so far, in float32 where JAX or Keras hold it (in
  Keras on JAX to one unit in the last place);
- the gradients that AutoClip leaves to the optimizer have the norm that the rule says;
- the latest norm and threshold are what the library logs;
- a new process that loads the library's own checkpoint goes on as the first one did: to the last bit or, where the
  library does not save all that its training draws on (an environment, an order of examples), from the same history by
  the rule.

{table_of(parts)}

Could not be installed: {", ".join(absent) or "none"}.
"""
    matrix.write(RESULTS, parts, page)
    for part in parts.values():
        for case in part["programs"].get("with_others", []):
            if "shown" in case:
                (RESULTS / "thresholds.md").write_text(thresholds_of(case["shown"]), encoding="utf-8")


def thresholds_of(shown):
    """The thresholds of several clippers on the same gradients, side by side."""
    steps, *rows = shown.items()
    lines = [f"| {' | '.join([steps[0], *map(str, steps[1])])} |", "|---|" + "---:|" * len(steps[1])]
    for name, numbers in rows:
        words = ["none" if number is None else f"{number:.6g}" for number in numbers]
        lines.append(f"| {' | '.join([name, *words])} |")
    return "# Thresholds of several clippers on the same gradients\n\n" + "\n".join(lines) + "\n"


def refreshed(page):
    """Return the page with the snippets and the tables of today."""

    def snippet(found):
        return f"<!-- {found[1]} -->\n```python\n{snippet_of(ROOT / found[1])}\n```\n"

    page = re.sub(r"<!-- (tests/trainers/\S+) -->\n```python\n.*?```\n", snippet, page, flags=re.DOTALL)
    for file in ("trainers.md", "thresholds.md"):
        mark = f"<!-- {RESULTS.relative_to(ROOT)}/{file} -->\n"
        table = "".join(re.findall(r"^\|.*\n", (RESULTS / file).read_text(encoding="utf-8"), re.MULTILINE))
        page = re.sub(rf"{mark}(\|.*\n)*", lambda _, text=mark + table: text, page)
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [program.stem.removeprefix("with_") for family in FAMILIES for program in programs_of(family)]
    parser.add_argument("names", nargs="*", help=f"of {' '.join([*FAMILIES, *names])}; all if none. Others stay")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - {*FAMILIES, *names}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    failed = []
    for family in FAMILIES:
        programs = [
            program
            for program in programs_of(family)
            if not chosen or family in chosen or program.stem.removeprefix("with_") in chosen
        ]
        if not programs:
            continue
        python, absent = install(family)
        tried = {}
        for program in programs:
            try:
                tried[program.stem] = try_library(python, program)
            except AssertionError as error:
                print(error)
                failed.append(program.stem)
        known = matrix.known(RESULTS)
        others = known.get(family, {"programs": {}})["programs"]
        write(known | {family: {"programs": others | tried, "absent": absent}})
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
