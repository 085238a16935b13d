"""Run the programs and commands of the tutorial in order; keep its pictures, and the whole as a notebook.

python -m bench.tutorial [--out bench]
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoclip_core.__main__ import main as autoclip

PAGE = Path(__file__).parent / "README.md"
BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$\n?|^!\[[^\n]*\n", re.DOTALL | re.MULTILINE)
IMPORTED = "train.py"  # by the other programs: in the notebook it is written to a file


def run(language: str, code: str) -> tuple[str, list[Path]]:
    """Run a block in this folder; return what it prints and the pictures that it makes."""
    before, printed = set(Path().glob("*.png")), io.StringIO()
    with contextlib.redirect_stdout(printed):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", code)[1]
            Path(name).write_text(code, encoding="utf-8")
            runpy.run_path(name)  # as if it were alone: it sees no names of the others
        else:
            program, *arguments = shlex.split(code)
            assert (program, autoclip(arguments)) == ("autoclip", 0)
    return printed.getvalue(), sorted(set(Path().glob("*.png")) - before)


def cells() -> Iterator[dict[str, Any]]:
    """Run the page. Its text and programs become cells; what it shows of them is replaced by what they did."""
    page, end, count = PAGE.read_text(encoding="utf-8"), 0, 0
    for match in [*BLOCK.finditer(page), None]:
        text = page[end : match.start() if match else None].strip("\n")
        if text:
            yield {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}
        end = match.end() if match else end
        language, code = match.groups() if match else (None, None)
        if language in {"python", "sh"}:
            count += 1
            printed, pictures = run(language, code)
            before = "!" if language == "sh" else f"%%writefile {IMPORTED}\n" if f"# {IMPORTED}\n" in code else ""
            outputs: list[dict[str, Any]] = []
            if printed:
                lines = printed.splitlines(keepends=True)
                outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
            for picture in pictures:
                data = {"image/png": base64.b64encode(picture.read_bytes()).decode()}
                outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
            source = (before + code).rstrip("\n").splitlines(keepends=True)
            yield {
                "cell_type": "code",
                "execution_count": count,
                "metadata": {},
                "outputs": outputs,
                "source": source,
            }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tutorial", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench"))
    out = parser.parse_args().out.resolve()
    os.environ |= {"MPLBACKEND": "agg", "COLUMNS": "100"}
    warnings.simplefilter("error")
    pictures, notebook = out / "results/tutorial", out / "tutorial/tutorial.ipynb"
    for folder in (pictures, notebook.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.path.insert(0, folder)
        content = {
            "cells": [{**cell, "id": f"cell-{number}"} for number, cell in enumerate(cells())],
            "metadata": {
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        for picture in Path().glob("*.png"):
            shutil.copy(picture, pictures)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            print(*output.get("text", []), sep="", end="")


main()
