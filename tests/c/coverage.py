"""Every line and every branch of the kernel is reached by its tests, but for those named here with a reason.

    cmake --preset coverage && cmake --build --preset coverage && ctest --preset coverage
    python tests/c/coverage.py build/coverage

A line is named by how it begins, so that the list outlives edits elsewhere; one that is reached after all, or that is
not there any more, is an error too.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# The file, the beginning of the line, how many of its branches are not reached, and why.
EXCLUDED = [
    ("history.c", "if (count > history->buffer_capacity)", 1, "reserve() has made room: written for who changes it"),
    ("history.c", "if (new_capacity > SIZE_MAX", 1, "a norm for every byte of the address space"),
    ("history.c", "if (more > UINT64_MAX", 1, "the caller's own array would be larger than the address space"),
    ("history.c", "if (size > SIZE_MAX", 1, "only where addresses have 32 bits, and then at 4 GB of norms"),
    ("history.c", "return from_tree == 0 ||", 1, "the ranks asked for lie within the tree"),
    ("ostree.c", "if (slots > (SIZE_MAX / 2", 1, "nodes for half the address space"),
    ("ostree.c", "*sound = *sound && read(", 1, "the loop above the leaves has stopped"),
    ("shared.c", "if (table.block_count == BLOCKS)", 1, "2^32 histories at once"),
    ("shared.c", "if (reusable)", 1, "2^31 histories in one place, one after the other"),
    ("snapshot.c", "return first == 1 ?", 1, "big-endian machines: `make cross` runs the tests on s390x"),
]


def measure(build):
    """How many lines and branches count, and what was not reached: (file, text) -> branches, or all of a line."""
    command = ["gcovr", "--root", ROOT, "--filter", f"{ROOT}/csrc/src/", "--json", "-", build]
    files = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["files"]
    lines = branches = 0
    missed = {}
    for file in files:
        name = Path(file["file"]).name
        source = (ROOT / "csrc/src" / name).read_text(encoding="utf-8").splitlines()
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
    for file, beginning, count, _ in EXCLUDED:
        found = [key for key in missed if key[0] == file and key[1].startswith(beginning)]
        if [missed.pop(key) for key in found] != [count]:
            errors.append(f"excluded without need, or not as often: {file}: {beginning}")
        excluded += count
    errors += [f"not reached ({count}): {file}: {text}" for (file, text), count in missed.items()]
    print(f"{lines} lines and {branches - excluded} branches of the kernel, {excluded} branches excluded by name.")
    print("\n".join(errors) or "All are reached.")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
