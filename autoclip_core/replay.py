"""What AutoClip would have done in a run of which only the gradient norms are known.

This answers the question that users have before they switch it on: which percentile, which window? `read_norms` finds
the norms in what loggers leave behind; `replay` gives them to the rule, all percentiles at once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autoclip_core import arrays
from autoclip_core.errors import AutoClipValueError
from autoclip_core.history import NormHistory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

PERCENTILES = (1.0, 10.0, 25.0, 50.0, 90.0)

# What loggers call it, from the most to the least certain: our own name first, then any name with both words.
_NAMES = ("grad_norm", "train/grad_norm", "gradient_norm", "grad_2.0_norm_total", "total_grad_norm", "norm")


class Replay(NamedTuple):
    """One setting, over the whole run.

    percentile: None for a fixed threshold.
    window: None for the whole history.
    thresholds: the threshold at each step, shape (steps,).
    scales: the factor for each gradient, shape (steps,); 0.0 where a norm was not finite.
    clipped: which steps it would have clipped, shape (steps,).
    """

    percentile: float | None
    window: int | None
    thresholds: NDArray[np.float64]
    scales: NDArray[np.float64]
    clipped: NDArray[np.bool_]

    def summary(self) -> dict[str, float | int | None]:
        """Return the numbers by which settings are compared; None where nothing was clipped.

        `clipped_share` is of all steps; the scales are those of the clipped ones: their median, and the one that a
        twentieth of them fall below.
        """
        import numpy as np

        hard, median = (
            np.percentile(self.scales[self.clipped], [5, 50]).tolist() if self.clipped.any() else (None, None)
        )
        finite = self.thresholds[np.isfinite(self.thresholds)]
        return {
            "percentile": self.percentile,
            "window": self.window,
            "final_threshold": self.thresholds[-1].item(),
            "median_threshold": float(np.median(finite)) if len(finite) else None,
            "clipped_share": float(self.clipped.mean()),
            "median_scale": median,
            "hard_scale": hard,
        }


def replay(
    norms: ArrayLike,
    percentiles: Sequence[float] = PERCENTILES,
    windows: Iterable[int | None] = (None,),
    *,
    fixed: Iterable[float] = (),
) -> list[Replay]:
    """Run the rule over norms, shape (steps,), of which zeros and non-finite ones are not remembered.

    Args:
        norms: in the order in which they came, unclipped.
        percentiles: each from 0 to 100.
        windows: each a number of norms, or None for the whole history.
        fixed: thresholds that do not move, each above 0, for comparison.

    Returns:
        One result per window and percentile, in this order, then one per fixed threshold.

    Raises:
        AutoClipTypeError, AutoClipValueError: there are no norms, or an argument cannot be used.

    O(steps * windows * percentiles * log(steps)).

    >>> [result] = replay([1.0, 3.0, 2.0, 4.0], percentiles=[50.0])
    >>> result.thresholds
    array([1. , 2. , 2. , 2.5])
    >>> result.clipped
    array([False,  True, False,  True])
    """
    import numpy as np

    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 1 or not len(norms):
        raise AutoClipValueError(f"norms must be one-dimensional and not empty, but their shape is {norms.shape}.")
    if (norms < 0.0).any():
        raise AutoClipValueError(f"A norm cannot be negative, but norms[{int((norms < 0.0).argmax())}] is.")
    recorded = arrays.norm_to_remember(np, norms) < np.inf
    recorded_steps = np.cumsum(recorded)
    results = []

    def add(percentile: float | None, window: int | None, thresholds: NDArray[np.float64]) -> None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            thresholds, scales, clipped = arrays.decide(np, norms, thresholds, recorded_steps)
        results.append(Replay(percentile, window, thresholds, scales, clipped))

    for window in windows:
        found = NormHistory(window).observe_many(norms[recorded], percentiles)
        # What is not remembered leaves the threshold where it was: at infinity before the first norm.
        found = np.vstack([np.full(len(percentiles), np.inf), found])[recorded_steps]
        for at, percentile in enumerate(percentiles):
            add(float(percentile), window, np.ascontiguousarray(found[:, at]))
    for threshold in fixed:
        if not threshold > 0.0:
            raise AutoClipValueError(f"A fixed threshold must be above 0, but {threshold!r} was given.")
        add(None, None, np.full(len(norms), float(threshold)))
    return results


def read_norms(path: str | Path, column: str | None = None) -> tuple[NDArray[np.float64], str]:
    """Read the gradient norms that a run has left behind.

    Args:
        path: a .npy file; a CSV file (of Lightning's logger, for one), separated by commas, semicolons or tabs; JSON
            lines; a JSON file, a list of numbers or what the Hugging Face Trainer writes (`trainer_state.json`); or
            TensorBoard's events, one file or the folder of a run.
        column: the name of the numbers; None guesses it.

    Returns:
        The norms, shape (steps,), and their name. Rows without the number are left out; "nan" and "inf" are numbers.

    Raises:
        AutoClipValueError: there are no norms; the message says which names there are.
        OSError: the file cannot be read.
    """
    import numpy as np

    path = Path(path)
    if path.is_dir() or "tfevents" in path.name:
        return _read_tensorboard(path, column)
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError):  # what numpy says is about pickles
            raise AutoClipValueError(f"{path} is not a .npy file of numbers.") from None
        if array.dtype.kind not in "fiu" or array.size not in array.shape:
            raise AutoClipValueError(f"{path} holds {array.dtype} of shape {array.shape}, not one norm per step.")
        return _as_norms(path, array.reshape(-1), path.stem)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:  # some programs sign their UTF-8
        start = file.read(4096)
        if "\0" in start:
            raise AutoClipValueError(f"{path} is not text; an array is read from a .npy file.")
        first = start.lstrip()[:1]
        file.seek(0)
        if first == "[" or (first == "{" and path.suffix == ".json"):
            return _read_json(path, file.read(), column)
        if first == "{":
            return _from_rows(path, _json_lines(path, file), column)
        return _read_csv(path, file, column)


def _read_csv(path: Path, file: Any, column: str | None) -> tuple[NDArray[np.float64], str]:
    top = next((line for line in file if line.strip()), "")
    if not top:
        raise AutoClipValueError(f"{path} is empty.")
    rows = csv.reader(chain([top], file), delimiter=max(",;\t", key=top.count))
    header = next(rows)
    if len(header) == 1 and _is_number(header[0]) and column is None:  # numbers alone, one per line
        return _as_norms(path, (row[0] for row in chain([header], rows) if row), "norm")
    name = _choose(path, header, column)
    at = header.index(name)
    return _as_norms(path, (row[at] for row in rows if len(row) > at and row[at].strip()), name)


def _read_json(path: Path, text: str, column: str | None) -> tuple[NDArray[np.float64], str]:
    try:
        content = json.loads(text)
    except ValueError:
        if text.lstrip()[0] == "{":  # JSON lines under another name
            return _from_rows(path, _json_lines(path, text.splitlines()), column)
        raise AutoClipValueError(f"{path} is not JSON.") from None
    if isinstance(content, Mapping):  # the Trainer's state
        content = content.get("log_history", [content])
    if not isinstance(content, list):
        raise AutoClipValueError(f"{path} holds no list of numbers or records.")
    if all(isinstance(item, int | float) for item in content):
        return _as_norms(path, content, "norm")
    return _from_rows(path, (row for row in content if isinstance(row, Mapping)), column)


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise AutoClipValueError(f"{path} is not JSON lines: line {number} is {line.strip()[:60]!r}.") from None
            if isinstance(row, Mapping):
                yield row


def _from_rows(path: Path, rows: Iterable[Mapping[str, Any]], column: str | None) -> tuple[NDArray[np.float64], str]:
    kept = list(rows)
    name = _choose(path, list(dict.fromkeys(key for row in kept for key in row)), column)
    return _as_norms(path, (row[name] for row in kept if row.get(name) is not None), name)


def _read_tensorboard(path: Path, column: str | None) -> tuple[NDArray[np.float64], str]:
    if path.is_dir() and not any(path.glob("*tfevents*")):
        runs = (path.rglob(name) for name in ("*tfevents*", "metrics.csv", "trainer_state.json"))
        found = next(chain.from_iterable(runs), None)
        raise AutoClipValueError(
            f"{path} is a folder without TensorBoard events" + (f"; did you mean {found}?" if found else ".")
        )
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise AutoClipValueError(
            f"{path} holds TensorBoard's events, which take TensorBoard to read: pip install tensorboard ({error})."
        ) from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    name = _choose(path, [*tags["scalars"], *tags["tensors"]], column)
    if name in tags["scalars"]:
        return _as_norms(path, (event.value for event in events.Scalars(name)), name)
    from tensorboard.util.tensor_util import make_ndarray

    return _as_norms(path, (make_ndarray(event.tensor_proto).item() for event in events.Tensors(name)), name)


def _choose(path: Path, names: Sequence[str], column: str | None) -> str:
    if column is not None:
        if column in names:
            return column
        raise AutoClipValueError(f"{path} has no {column!r}; it has {_listed(names)}.")
    lower = {name.strip().lower(): name for name in reversed(names)}
    for known in _NAMES:
        if known in lower:
            return lower[known]
    likely = [name for name in names if "grad" in name.lower() and "norm" in name.lower()]
    if len(likely) == 1:
        return likely[0]
    if not names:
        raise AutoClipValueError(f"{path} holds no named numbers.")
    raise AutoClipValueError(
        f"Which are the gradient norms in {path}: {_listed(likely or names)}? Name them (--column NAME)."
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def _as_norms(path: Path, values: Iterable[Any], name: str) -> tuple[NDArray[np.float64], str]:
    import numpy as np

    try:
        norms = np.fromiter(map(_as_float, values), np.float64)
    except (TypeError, ValueError) as error:
        raise AutoClipValueError(f"{name!r} in {path} is not a number everywhere: {error}.") from None
    if not len(norms):
        raise AutoClipValueError(f"{name!r} in {path} has no numbers.")
    return norms, name


def _as_float(value: Any) -> float:
    return nan if value is None else float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
