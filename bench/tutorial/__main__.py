"""Run the programs and commands of the tutorial, in order and in one folder, and keep its pictures.

python -m bench.tutorial [--out bench/results/tutorial]
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent / "README.md"


def run(folder: str) -> Iterator[str]:
    """Run each block of the page; yield what each prints."""
    environment = {**os.environ, "MPLBACKEND": "agg"}
    for language, code in re.findall(
        r"^```(python|sh)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", code)[1]
            Path(folder, name).write_text(code, encoding="utf-8")
            command = [sys.executable, "-W", "error", name]
        else:
            program, *arguments = shlex.split(code)
            command = [sys.executable, "-P", "-m", {"autoclip": "autoclip_core"}[program], *arguments]
        yield subprocess.run(command, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tutorial", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/tutorial"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for printed in run(folder):
            print(printed, end="")
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, out)


main()
