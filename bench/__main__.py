"""`python -m bench` lists the reports; `python -m bench NAME [options]` makes one."""

import ast
import importlib
import sys
from pathlib import Path

NOT_REPORTS = {"__init__", "__main__", "common", "keras"}  # the last is a part of tensorflow


def reports() -> dict[str, str]:
    """Every module or folder here that makes a report, with the first line of its docstring; imports none of them."""
    folder = Path(__file__).parent
    files = {path.stem: path for path in folder.glob("*.py")} | {
        path.parent.name: path
        for path in folder.glob("*/__init__.py")
        if not path.with_name("__main__.py").exists()  # a program of its own
    }
    return {
        name: (ast.get_docstring(ast.parse(files[name].read_text("utf-8"))) or "").partition("\n")[0]
        for name in sorted(files)
        if name not in NOT_REPORTS and not name.startswith("test_")
    }


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
