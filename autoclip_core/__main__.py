"""`autoclip` on the command line: what would have been clipped, what is installed, what a snapshot holds.

Results go to standard output, one sentence on what went wrong to standard error, with exit code 1 (2 for arguments that
cannot be understood). Tables that are too wide for the terminal become one block per row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
from io import BytesIO
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autoclip_core import __version__, _backend
from autoclip_core.errors import AutoClipError
from autoclip_core.history import NormHistory
from autoclip_core.replay import PERCENTILES, Replay, read_norms, replay

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

# What each adapter needs. (TensorFlow brings Keras, and Keras alone is enough.)
_ADAPTERS = {"autoclip_torch": ("torch",), "autoclip_jax": ("jax", "optax"), "autoclip_tensorflow": ("keras",)}
_ALSO = (
    *("tensorflow", "tensorflow-cpu", "numpy", "numba", "lightning", "transformers", "accelerate", "matplotlib"),
    "tensorboard",
)
_BARS = "▏▎▍▌▋▊▉█"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `autoclip ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AutoClipError, OSError) as error:
        print(f"autoclip: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autoclip", description="Gradient clipping that chooses its own threshold.")
    parser.add_argument("--version", action="version", version=f"autoclip-core {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Any, about: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    command = add(
        "replay",
        _replay,
        "show what AutoClip would have done in an earlier run",
        "  autoclip replay metrics.csv\n"
        "  autoclip replay runs/exp1 --column train/grad_norm   (a folder of TensorBoard events)\n"
        "  autoclip replay norms.npy -p 5 -p 10 -w 1000 --plot norms.png\n",
    )
    command.add_argument(
        "file", type=Path, help="norms: CSV, JSON, JSON lines, .npy, or TensorBoard's events (a file or a run's folder)"
    )
    command.add_argument("-c", "--column", help="the name of the norms (default: guessed)")
    command.add_argument(
        "-p",
        "--percentile",
        type=float,
        action="append",
        help=f"from 0 to 100, may be repeated (default: {', '.join(f'{p:g}' for p in PERCENTILES)})",
    )
    command.add_argument(
        "-w", "--window", type=int, action="append", help="also remember only the last WINDOW norms; may be repeated"
    )
    command.add_argument("--fixed", type=float, default=1.0, help="a fixed threshold to compare with (default: 1)")
    command.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw norms, threshold and clipped steps (at 10, or the first -p)"
    )

    add("info", _info, "show what is installed, for a bug report", "  autoclip info\n  autoclip info --json\n")

    command = add(
        "inspect",
        _inspect,
        "show what a saved history holds, and whether it is sound",
        "  autoclip inspect history.ach   (written in Python: open(..., 'wb').write(clip.history.to_bytes()))\n"
        "  autoclip inspect history.ach --json\n",
    )
    command.add_argument("snapshot", type=Path, help="a file written from NormHistory.to_bytes()")
    return parser


# --- replay -----------------------------------------------------------------------------------------------------------


def _replay(options: argparse.Namespace) -> None:
    # TensorBoard reads without TensorFlow as well: this is how it is told to leave out seconds of loading.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    norms, name = read_norms(options.file, options.column)
    percentiles = options.percentile or list(PERCENTILES)
    results = replay(norms, percentiles, [None, *(options.window or [])], fixed=[options.fixed])
    if options.plot is not None:
        _plot(norms, results, options.plot)
    facts = _facts_of(norms)
    rows = [result.summary() for result in results]
    if options.json:
        _print_json({"file": str(options.file), "column": name, **facts, "settings": rows})
        return
    print(
        f"{name} in {options.file}: {facts['steps']:,} steps, {_number(facts['lowest'])} to {_number(facts['highest'])}"
    )
    left_out = [f"{facts[what]:,} {what}" for what in ("zero", "nonfinite") if facts[what]]
    if left_out:
        print(f"not remembered: {', '.join(left_out)}")
    print()
    header = ["setting", "history", "final", "median", "clipped", "scale", "hardest"]
    _print_table(header, [_row(result, row, options.fixed) for result, row in zip(results, rows, strict=True)])
    legend = (
        "final, median: of the threshold. scale: the median factor of the clipped gradients; hardest: one in twenty of "
        "them is scaled by less."
    )
    print("\n" + textwrap.fill(legend, _columns()))


def _row(result: Replay, row: dict[str, Any], fixed: float) -> list[str]:
    return [
        f"fixed {fixed:g}" if result.percentile is None else f"p = {result.percentile:g}",
        "" if result.percentile is None else "whole" if result.window is None else f"last {result.window:,}",
        _number(row["final_threshold"]),
        _number(row["median_threshold"]),
        f"{row['clipped_share']:.1%}",
        _number(row["median_scale"]),
        _number(row["hard_scale"]),
    ]


def _facts_of(norms: NDArray[np.float64]) -> dict[str, Any]:
    import numpy as np

    finite = np.isfinite(norms)
    counted = norms[finite & (norms > 0.0)]
    return {
        "steps": len(norms),
        "zero": int((norms == 0.0).sum()),
        "nonfinite": int((~finite).sum()),
        "lowest": float(counted.min()) if len(counted) else None,
        "highest": float(counted.max()) if len(counted) else None,
    }


def _plot(norms: NDArray[np.float64], results: list[Replay], path: Path) -> None:
    from autoclip_core.plot import plot_norms

    whole = {result.percentile: result for result in results if result.window is None}
    result = whole.get(10.0, results[0])
    label = f"threshold, p = {result.percentile:g}"
    figure = plot_norms(norms, result.thresholds, result.clipped, label=label).figure
    picture = BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=path.suffix[1:] or "png")
    except ValueError as error:  # a format that matplotlib does not know
        raise AutoClipError(f"{path} cannot be drawn: {error}.") from None
    part = path.resolve().with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(picture.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk before it has its name
    part.replace(path.resolve())


# --- info -------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> None:
    try:
        chosen = f"{_backend.find_backend(None).name} ({_backend.why()})"
    except AutoClipError as error:
        chosen = f"none: {error}"
    facts = {
        "autoclip-core": __version__,
        "backend": chosen,
        **{f"backend {name}": build for name, build in _backend.backends().items()},
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{adapter: _adapter(adapter, needed) for adapter, needed in _ADAPTERS.items()},
        **{name: _version(name) or "not installed" for name in _ALSO},
    }
    if options.json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _adapter(adapter: str, needed: Sequence[str]) -> str:
    from importlib.util import find_spec

    if find_spec(adapter) is None:
        return "not installed"
    found = {name: _version(name) for name in needed}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "usable, " + ", ".join(f"{name} {version}" for name, version in found.items())


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- inspect ----------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> None:
    import numpy as np

    snapshot = options.snapshot.read_bytes()
    history = NormHistory.from_bytes(snapshot)
    history.check()
    norms = history.values()
    percentiles = [0.0, *PERCENTILES, 99.0, 100.0]
    thresholds = [history.percentile(p) for p in percentiles] if len(norms) else []
    counts, edges = _histogram(norms)
    if options.json:
        _print_json(
            {
                "file": str(options.snapshot),
                "bytes": len(snapshot),
                "norms": len(norms),
                "window": history.window,
                "sound": True,
                "percentiles": {f"{p:g}": value for p, value in zip(percentiles, thresholds, strict=False)},
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            }
        )
        return
    kept = "the whole history" if history.window is None else f"a window of {history.window:,}"
    print(f"{options.snapshot}: sound, {len(norms):,} norms, {kept}, {len(snapshot):,} bytes")
    if not len(norms):
        return
    print()
    _print_table(["percentile", "norm"], [[f"{p:g}", _number(v)] for p, v in zip(percentiles, thresholds, strict=True)])
    print()
    labels = [_number(edge) for edge in edges[:-1]]
    room = max(10, min(60, _columns() - max(map(len, labels)) - len(f"{counts.max():,}") - 4))
    for label, count in zip(labels, counts.tolist(), strict=True):
        print(f"{label:>{max(map(len, labels))}} {_bar(count / np.max(counts), room)} {count:,}")


def _histogram(norms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bins of equal width on a logarithmic axis where all norms are above 0, else on a linear one."""
    import numpy as np

    if not len(norms):
        return np.zeros(0, np.int64), np.zeros(1)
    low, high = norms[0], norms[-1]
    if low == high:
        return np.array([len(norms)]), np.array([low, high])
    edges = np.geomspace(low, high, 13) if low > 0.0 else np.linspace(low, high, 13)
    return np.histogram(norms, edges)[0], edges


def _bar(share: float, room: int) -> str:
    eighths = max(int(share * room * 8 + 0.5), 1 if share > 0.0 else 0)
    bar = _BARS[-1] * (eighths // 8) + (_BARS[eighths % 8 - 1] if eighths % 8 else "")
    try:
        bar.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * ((eighths + 7) // 8)
    return bar


# --- Output -----------------------------------------------------------------------------------------------------------


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _print_json(content: Any) -> None:
    def plain(value: Any) -> Any:  # JSON has no NaN and no infinity
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and not isfinite(value) else value

    print(json.dumps(plain(content), indent=2, allow_nan=False))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > _columns():
        wide = max(map(len, header))
        blocks = [
            "\n".join(f"{name:{wide}}  {cell}" for name, cell in zip(header, row, strict=True) if cell) for row in rows
        ]
        print("\n\n".join(blocks))
        return
    for row in [header, *rows]:
        cells = [
            f"{row[0]:{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
