"""Series under their names, as the readers find them, and what could not be read."""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from autoclip_core.errors import AutoClipValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

# What loggers call it, from the most to the least certain: our own name first, then any name with both words.
_NAMES = (
    *("grad_norm", "train/grad_norm", "train.grad_norm", "gradient_norm", "grad_2.0_norm_total", "total_grad_norm"),
    *("gnorm", "norm"),
)
# Names with such a word are of a setting, or of other norms.
_NOT_ALL = {"max", "min", "clip", "clipped", "clipping"}
# What repr and str make of numbers that are objects: np.float64(1.5), tensor(1.5, device='cuda:0').
_wrapped = re.compile(r"[\w.]+\(\s*([^\s,()]+)\s*(?:,.*)?\)", re.DOTALL).fullmatch
_MISSING = {"", "-", "na", "n/a", "<na>", "none", "null"}


class Log(NamedTuple):
    """The norms that a log holds under one name.

    Attributes:
        name: the column, key or tag.
        norms: shape (steps,), in the order in which they came. Rows without the number are left out.
        skipped: how many rows could not be read.
        notes: a sentence on each thing that was skipped, missing or odd; none where all was read.
    """

    name: str
    norms: NDArray[np.float64]
    skipped: int
    notes: list[str]


class Series:
    """The numbers under one name."""

    def __init__(self) -> None:
        self.norms: Any = array("d")  # or an array of numpy
        self.skipped = 0
        self.first = ""  # the first that was skipped

    def add(self, value: Any, where: str, at: int) -> None:
        """Keep a number, pass over a cell that is empty, count anything else."""
        if isinstance(value, str):
            value = value.strip()
            if inner := _wrapped(value):
                value = inner[1]
        try:
            self.norms.append(float(None if isinstance(value, bool) else value))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            if value is None or (isinstance(value, str) and is_missing(value)):
                return
            self.skipped += 1
            self.first = self.first or f"{where} {at:,} with {shown(value)}"


class Found:
    """What was found in a log so far: numbers under the names that are wanted, and what is to be told."""

    def __init__(self, source: str, columns: Sequence[str]) -> None:
        self.source = source
        self.columns = list(dict.fromkeys(columns))
        self.named: dict[str, Series | None] = {}
        self.skipped = 0  # rows of which nothing could be read
        self.first = ""
        self.notes: list[str] = []

    def under(self, name: str) -> Series | None:
        """Return where numbers of this name go; None: nobody asks for them."""
        try:
            return self.named[name]
        except KeyError:
            self.named[name] = Series() if self.wants(name) else None
            return self.named[name]

    def wants(self, name: str) -> bool:
        """Tell whether numbers of this name are asked for, or likely."""
        return name in self.columns if self.columns else _certainty(name) is not None

    def skip(self, what: str) -> None:
        """Count a row of which nothing can be read."""
        self.skipped += 1
        self.first = self.first or what

    def may_be_cut(self, line: int, number: str) -> None:
        """Tell of a number that is the last of a file, in a line without an end."""
        self.notes.append(f"{self.source}: line {line:,} has no end, and {shown(number)} may be cut.")

    def chosen(self) -> dict[str, Series]:
        """Return the columns, or the one that is likely."""
        names = list(self.named)
        for column in self.columns:
            if column not in self.named:
                raise AutoClipValueError(f"{self.source} has no {column!r}; it has {_listed(names)}.")
        likely = {name: rank for name in names if (rank := _certainty(name)) is not None}
        best = self.columns or [name for name, rank in likely.items() if rank == min(likely.values())]
        if not names:
            why = f"; what was skipped: {self.first}." if self.first else "."
            raise AutoClipValueError(f"{self.source} holds no named numbers{why}")
        if not self.columns and len(best) != 1:
            raise AutoClipValueError(
                f"Which are the gradient norms in {self.source}: {_listed(best or names)}? Name them (--column NAME)."
            )
        return {name: series for name in best if (series := self.named[name])}

    def logs(self) -> list[Log]:
        """Return what was found under the names that are chosen."""
        import numpy as np

        logs = []
        for name, series in self.chosen().items():
            first = self.first or series.first
            if not len(series.norms):
                why = f"; what was skipped: {first}." if first else f"; it has {_listed(list(self.named))}."
                raise AutoClipValueError(f"{name!r} in {self.source} has no numbers{why}")
            skipped = self.skipped + series.skipped
            notes = list(self.notes)
            if skipped:
                what = "1 entry skipped" if skipped == 1 else f"{skipped:,} entries skipped, the first"
                read = "1 number was" if len(series.norms) == 1 else f"{len(series.norms):,} numbers were"
                notes.insert(0, f"{self.source}: {read} read and {what}: {first}.")
            logs.append(Log(name, np.frombuffer(series.norms), skipped, notes))
        return logs


def shown(value: object) -> str:
    """Return what stands in a file, at a length that fits a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(text: str) -> bool:
    """Tell whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_missing(text: str) -> bool:
    """Tell whether a text says that there is no number."""
    return text.lower() in _MISSING


def _certainty(name: str) -> int | None:
    """Tell how likely a name is that of the norms, 0 for most; None: it is not."""
    plain = name.strip().lower().rpartition(" - ")[2].replace(" ", "_")  # wandb exports "run - name"
    if plain in _NAMES:
        return _NAMES.index(plain)
    likely = "grad" in plain and "norm" in plain and _NOT_ALL.isdisjoint(re.split("[^a-z]", plain))
    return len(_NAMES) if likely else None


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(map(shown, names[:20]))
    return f"{listed} and {len(names) - 20} more" if len(names) > 20 else listed or "nothing"
