"""`autoclip` on the command line: what would have been clipped, what is installed, what a snapshot holds.

Results go to standard output, sentences on what went wrong to standard error. The exit code is 0 for a result, also for
that of a log of which a part could not be read; 1 where there is none, or not the picture; 2 for arguments that cannot
be understood; 3 for an error of this program itself. Tables too wide for the terminal become one block per row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
import traceback
from contextlib import redirect_stderr, suppress
from io import BytesIO, StringIO, TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from autoclip_core import __version__, _backend
from autoclip_core.errors import AutoClipError
from autoclip_core.history import NormHistory
from autoclip_core.plot import bin_edges
from autoclip_core.replay import PERCENTILES, Log, Replay, advise, each_replay, read_log

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
_LEFT = {"norms", "setting", "percentile"}  # columns that begin at the left
_ADVICE = "What these norms suggest; why: autoclip_core/README.md, Which percentile?"
_BARS = "▏▎▍▌▋▊▉█"
_SNAPSHOT = b"\x89ACH"  # as autoclip.h draws it: a file that does not begin so is not read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    if sys.stderr is None:  # argparse does not ask
        with redirect_stderr(StringIO()):
            return main(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name that the terminal cannot show is shown by its codes
            stream.reconfigure(errors="backslashreplace")
    code = _run(arguments)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # Python would try again at its end, and fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0 and not isinstance(error, BrokenPipeError):  # `autoclip ... | head` has seen enough
            code = _complain(f"standard output: {error}")
    return code


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command; every error becomes a sentence and an exit code here."""
    if sys.stdout is None:
        return _complain("there is no standard output to write to.")
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
    except SystemExit as end:  # argparse has said what there is to say
        return int(end.code or 0)
    except BrokenPipeError:
        return 0
    except (AutoClipError, OSError) as error:
        return _complain(str(error))
    except MemoryError:
        return _complain("this takes more memory than there is.")
    except KeyboardInterrupt:
        return 130  # as the shell has it for programs that Ctrl-C ends
    except Exception as error:  # noqa: BLE001 - whatever else it is, a user gets a sentence
        *_, place = traceback.extract_tb(error.__traceback__)
        what = f"{type(error).__name__} in line {place.lineno} of {Path(place.filename).name}: {error}"
        return _complain(f"{what}. This is an error of autoclip; please report it.", 3)
    return 0


def _complain(sentence: str, code: int = 1) -> int:
    print("autoclip:", _printable(" ".join(sentence.split())), file=sys.stderr)
    return code


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
        "  autoclip replay norms.npy -p 5 -p 10 -w 1000 --plot norms.png\n"
        "  zcat log.jsonl.gz | autoclip replay - -c generator.grad_norm -c critic.grad_norm\n",
    )
    command.add_argument(
        "file",
        help="norms: CSV, JSON, JSON lines, what a trainer printed, .npy, .npz, parquet, TensorBoard's events (a file "
        "or a run's folder), also packed by gzip; - for standard input",
    )
    command.add_argument(
        "-c",
        "--column",
        action="append",
        help="the name of the norms, with dots for keys inside keys; may be repeated (default: guessed)",
    )
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
    command.add_argument("file", help="a file written from NormHistory.to_bytes(); - for standard input")
    return parser


# --- replay -----------------------------------------------------------------------------------------------------------


def _replay(options: argparse.Namespace) -> None:
    logs = read_log(_standard_input() if options.file == "-" else options.file, options.column or [])
    percentiles = options.percentile or list(PERCENTILES)
    windows = [None, *(options.window or [])]
    draw_at = 10.0 if 10.0 in percentiles else percentiles[0]
    contents, rows, panels = [], [], []
    for log in logs:
        summaries, advice = [], []
        for result in each_replay(log.norms, percentiles, windows, fixed=[options.fixed]):
            summaries.append(result.summary())
            rows.append([_printable(log.name), *_row(result, summaries[-1], options.fixed)])
            if (result.percentile, result.window) == (draw_at, None):
                advice = advise(log.norms, result)
                if options.plot is not None:
                    panels.append((log, result))
        contents.append(
            {
                "column": log.name,
                **_facts_of(log.norms),
                "skipped": log.skipped,
                "notes": log.notes,
                "settings": summaries,
                "advice": advice,
            }
        )
    try:
        if options.plot is not None:
            _plot(panels, options.plot)
    finally:  # a picture that cannot be drawn takes nothing from the table
        for note in dict.fromkeys(note for log in logs for note in log.notes):
            _complain(note)
        if options.json:
            _print_json({"file": options.file, **(contents[0] if len(contents) == 1 else {"columns": contents})})
        else:
            _print_replay(_source(options.file), contents, rows)


def _print_replay(source: str, contents: list[dict[str, Any]], rows: list[list[str]]) -> None:
    for facts in contents:
        span = f"{_number(facts['lowest'])} to {_number(facts['highest'])}"
        print(_printable(f"{facts['column']} in {source}: {facts['steps']:,} steps, {span}"))
        left_out = [f"{facts[what]:,} {what}" for what in ("zero", "nonfinite") if facts[what]]
        if left_out:
            print(f"not remembered: {', '.join(left_out)}")
    print()
    header = ["norms", "setting", "history", "final", "median", "clipped", "scale", "hardest"]
    first = 1 if len(contents) == 1 else 0
    _print_table(header[first:], [row[first:] for row in rows])
    legend = (
        "final, median: of the threshold. scale: the median factor of the clipped gradients; hardest: one in twenty of "
        "them is scaled by less."
    )
    print("\n" + textwrap.fill(legend, _columns()))
    suggested = [(facts["column"], line) for facts in contents for line in facts["advice"]]
    if suggested:
        print("\n" + textwrap.fill(_ADVICE, _columns()))
    for column, line in suggested:
        of = f"{_printable(column)}, " if len(contents) > 1 else ""
        print(textwrap.fill(f"- {of}{line}", _columns(), subsequent_indent="  "))


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


def _plot(panels: Sequence[tuple[Log, Replay]], path: Path) -> None:
    from autoclip_core.plot import panels_to_save, plot_norms

    if path.is_dir():
        raise AutoClipError(f"{path} is a folder; name the picture.")
    for axes, (log, result) in zip(panels_to_save(len(panels)), panels, strict=True):
        label = f"threshold, p = {result.percentile:g}"
        plot_norms(log.norms, result.thresholds, result.clipped, label=label, axes=axes)
        if len(panels) > 1:
            axes.set_title(_printable(log.name), parse_math=False)
    picture = BytesIO()
    try:
        axes.figure.savefig(picture, dpi=150, format=path.suffix[1:].lower() or "png")
    except (ValueError, RuntimeError) as error:  # a format that matplotlib does not know, or needs a program for
        raise AutoClipError(f"{path} cannot be drawn: {error}.") from None
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_bytes(picture.getbuffer())
        return
    path = path.resolve()
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(picture.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # on the disk before it has its name
        part.replace(path)
    except OSError as error:
        raise AutoClipError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            part.unlink()


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

    with _standard_input() if options.file == "-" else Path(options.file).open("rb") as file:
        snapshot = file.read(len(_SNAPSHOT))
        if snapshot != _SNAPSHOT:
            raise AutoClipError(
                f"{_source(options.file)} is not a snapshot; one is written from NormHistory.to_bytes()."
            )
        snapshot += file.read()
    history = NormHistory.from_bytes(snapshot)
    history.check()
    norms = history.values()
    percentiles = [0.0, *PERCENTILES, 99.0, 100.0]
    thresholds = [history.percentile(p) for p in percentiles] if len(norms) else []
    counts, edges = _histogram(norms)
    if options.json:
        _print_json(
            {
                "file": options.file,
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
    print(_printable(f"{_source(options.file)}: sound, {len(norms):,} norms, {kept}, {len(snapshot):,} bytes"))
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
    edges = bin_edges(norms[0], norms[-1], 12)
    return np.histogram(norms, edges)[0], edges


def _bar(share: float, room: int) -> str:
    eighths = max(int(share * room * 8 + 0.5), 1 if share > 0.0 else 0)
    bar = _BARS[-1] * (eighths // 8) + (_BARS[eighths % 8 - 1] if eighths % 8 else "")
    try:
        bar.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * ((eighths + 7) // 8)
    return bar


# --- Input ------------------------------------------------------------------------------------------------------------


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise AutoClipError("There is no standard input to read.")
    return sys.stdin.buffer


def _source(file: str) -> str:
    return "standard input" if file == "-" else file


# --- Output -----------------------------------------------------------------------------------------------------------


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _printable(text: str) -> str:
    """Show by its code what would move the cursor or change colours, as it may stand in the names of a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
            f"{cell:{'<' if name in _LEFT else '>'}{width}}"
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
