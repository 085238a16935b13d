"""`python -m bench` lists the reports; `python -m bench NAME [options]` makes one."""

import ast
import importlib
import sys
from pathlib import Path

NOT_REPORTS = {"__init__", "__main__", "common", "keras"}  # the last is a part of tensorflow


def reports() -> dict[str, str]:
    """Every module of this package that makes a report, with the first line of its docstring; imports none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_REPORTS and not path.stem.startswith("test_"):
            found[path.stem] = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
    return found


def main() -> int:
    found = reports()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in found:
        sys.argv[:2] = [f"python -m bench {name}"]
        importlib.import_module(f"bench.{name}").main()
        return 0
    if name not in ("", "-h", "--help"):
        print(f"There is no report called {name!r}. There are:\n", file=sys.stderr)
    width = max(map(len, found), default=0)
    for report, line in found.items():
        print(f"  {report:{width}}  {line}")
    return 0 if name in ("", "-h", "--help") else 2


if __name__ == "__main__":
    raise SystemExit(main())
