"""Benchmarks and reports, run from the repository root against the installed packages: `python -m bench NAME`.

`python -m` puts the current folder first on the path, where the source tree would hide what is installed: taken out
here, before anything is measured.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
