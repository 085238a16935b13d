"""Every line and every branch of the kernel is reached by its tests, but for those of register.toml.

    cmake --preset coverage && cmake --build --preset coverage && ctest --preset coverage
    python tests/programs/c_coverage.py build/coverage

A line of the register that is reached after all, or that is not there any more, is an error too.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Lines with branches that are not reached.
EXCLUDED = [
    line
    for line in tomllib.loads((Path(__file__).parent / "register.toml").read_text("utf-8"))["line"]
    if "branches" in line
]


def measure(build):
    """How many lines and branches count, and what was not reached: (file, text) -> branches, or all of a line."""
    command = ["gcovr", "--root", ROOT, "--filter", f"{ROOT}/csrc/(src|arrays|tensorflow|xla)/", "--json", "-", build]
    files = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["files"]
    lines = branches = 0
    missed = {}
    for file in files:
        name = file["file"]
        source = (ROOT / name).read_text(encoding="utf-8").splitlines()
        for line in file["lines"]:
            if line["gcovr/noncode"]:
                continue
            lines += 1
            branches += len(line["branches"])
            idle = sum(branch["count"] == 0 for branch in line["branches"])
            if not line["count"]:
                idle = "all"
            if idle:
                missed[name, source[line["line_number"] - 1].strip()] = idle
    return lines, branches, missed


def main():
    lines, branches, missed = measure(sys.argv[1])
    excluded = 0
    errors = []
    for line in EXCLUDED:
        found = [key for key in missed if key[0] == line["file"] and key[1].startswith(line["begins"])]
        if [missed.pop(key) for key in found] != [line["branches"]]:
            errors.append(f"excluded without need, or not as often: {line}")
        excluded += line["branches"]
    errors += [f"not reached ({count}): {file}: {text}" for (file, text), count in missed.items()]
    print(f"{lines} lines and {branches - excluded} branches of the kernel, {excluded} branches excluded by name.")
    print("\n".join(errors) or "All are reached.")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
