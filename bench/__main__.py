"""`python -m bench` lists the reports; `python -m bench NAME [options]` makes one."""

import ast
import importlib
import sys
from pathlib import Path

# Parts of others; `python -m bench.separation` is a program of its own.
NOT_REPORTS = {"__main__", "bench", "common", "keras", "separation"}


def reports() -> dict[str, str]:
    """Every module or folder here that makes a report, with the first line of its docstring; imports none of them."""
    folder = Path(__file__).parent
    found = {}
    for path in [*folder.glob("*.py"), *folder.glob("*/__init__.py")]:
        name = path.parent.name if path.stem == "__init__" else path.stem
        if name not in NOT_REPORTS and not name.startswith("test_"):
            found[name] = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
    return dict(sorted(found.items()))


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
