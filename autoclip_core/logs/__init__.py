"""The gradient norms in what a run has left behind: text, arrays, events.

A file is judged by its content and not by its name, and read once from front to back, so that a pipe does as well.
Only numbers that are wanted are kept, 8 bytes each. What cannot be read is skipped, counted and told, and so is an end
before the end: killed runs, full disks and copies of half a file are what logs are made of.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from autoclip_core.errors import AutoClipValueError
from autoclip_core.logs import binary, events, text
from autoclip_core.logs.found import Found, Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Log", "read_log", "read_norms"]

_HEAD = 1 << 16  # bytes by which a file is judged
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def read_log(source: str | Path | BinaryIO, columns: Sequence[str] = ()) -> list[Log]:
    """Read the gradient norms that a run has left behind.

    Args:
        source: a file, the folder of a run with TensorBoard's events, or a binary file that is open. A file may be CSV
            (separated by commas, semicolons, tabs or spaces; Lightning's, wandb's); JSON lines; a JSON document: a list
            of numbers or records, the Trainer's `trainer_state.json`, Keras's `History.history`; what a trainer
            printed, each number behind its name; .npy; .npz; parquet, where pyarrow or pandas is installed;
            TensorBoard's events. It may be packed by gzip, bzip2 or xz.
        columns: the names of the numbers; nested keys are joined by dots, columns without a name are numbered from 0.
            Empty: the one name that is likely.

    Returns:
        One log per column.

    Raises:
        AutoClipValueError: there are no norms; the message says which names there are.
        OSError: the file cannot be read.
    """
    if not isinstance(source, str | Path):
        name = str(getattr(source, "name", "the log"))
        found = Found("standard input" if name == "<stdin>" else name, columns)
        _read_file(source, found)
        return found.logs()
    if source == "":  # to Path the present folder
        raise AutoClipValueError("The name of the log is empty.")
    found = Found(str(source), columns)
    if Path(source).is_dir():
        _read_folder(Path(source), found)
    else:
        with Path(source).open("rb") as file:
            _read_file(file, found)
    return found.logs()


def read_norms(path: str | Path | BinaryIO, column: str | None = None) -> tuple[NDArray[np.float64], str]:
    """Read one log, as `read_log` does, and warn where it was not read as a whole.

    Args:
        path: the source of `read_log`.
        column: the name of the numbers; None guesses it.

    Returns:
        The norms, shape (steps,), and their name. Rows without the number are left out; "nan" and "inf" are numbers.

    Raises:
        AutoClipValueError: there are no norms; the message says which names there are.
        OSError: the file cannot be read.
    """
    [log] = read_log(path, [] if column is None else [column])
    for note in log.notes:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return log.norms, log.name


def _read_file(file: BinaryIO, found: Found) -> None:
    with _unpacked(file, found.source, found) as (stream, head):
        name = Path(found.source).name
        if head.startswith(b"\x93NUMPY"):
            binary.read_array(stream, name.partition(".")[0], found)
        elif head.startswith(b"PK\x03\x04"):
            binary.read_archive(_seekable(file, stream, head), found)
        elif head.startswith(b"PAR1"):
            binary.read_parquet(_seekable(file, stream, head), found)
        elif events.is_events(head) or ("tfevents" in name and not text.is_text(head)):
            events.read([(found.source, stream)], found)
        elif head[257:262] == b"ustar":
            raise AutoClipValueError(f"{found.source} is a tar archive; unpack it first.")
        else:
            text.read(stream, head, found)


def _seekable(file: BinaryIO, stream: BinaryIO, head: bytes) -> BinaryIO:
    """Return the file itself if it can go back to its start and is not packed, else its content."""
    if file.seekable():
        at = file.tell()
        file.seek(0)
        same = file.read(4) == head[:4]
        file.seek(0 if same else at)
        if same:
            return file
    return io.BytesIO(stream.read())


def _read_folder(folder: Path, found: Found) -> None:
    paths = sorted(path for path in folder.glob("*tfevents*") if path.is_file())
    logs = ("*tfevents*", "metrics.csv", "trainer_state.json")
    others = (path for name in logs for path in folder.rglob(name) if path not in paths)
    if not paths:
        other = next(others, None)
        raise AutoClipValueError(
            f"{folder} is a folder without TensorBoard events" + (f"; did you mean {other}?" if other else ".")
        )

    def files() -> Iterator[tuple[str, BinaryIO]]:
        for path in paths:
            with path.open("rb") as file, _unpacked(file, str(path), found) as (stream, _):
                yield str(path), stream

    try:
        events.read(files(), found)
    except AutoClipValueError as error:
        if found.named or (other := next(others, None)) is None:
            raise
        raise AutoClipValueError(f"{error} Did you mean {other}?") from None


@contextmanager
def _unpacked(file: BinaryIO, name: str, found: Found) -> Iterator[tuple[BinaryIO, bytes]]:
    """Yield the content of a file and its first bytes; afterwards tell whether the packing was damaged."""
    stream = _Stream(b"", file)
    plain = io.BufferedReader(stream, _HEAD)
    head = plain.read(_HEAD)
    unpack = next((unpack for magic, unpack in _PACKED.items() if head.startswith(magic)), None)
    if unpack is not None:
        stream = _Stream(b"", unpack(io.BufferedReader(_Stream(head, plain), _HEAD)))
        plain = io.BufferedReader(stream, _HEAD)
        head = plain.read(_HEAD)
    try:
        yield io.BufferedReader(_Stream(head, plain), _HEAD), head
    except AutoClipValueError as error:
        if stream.damage:
            raise AutoClipValueError(f"{error} It is packed, and cut or damaged: {stream.damage}.") from None
        raise
    if stream.damage:
        found.notes.append(f"{name} was read up to where its packing is cut or damaged: {stream.damage}.")


class _Stream(io.RawIOBase):
    """A head that was read already, then the rest, up to the place where its packing is damaged."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.head, self.rest = head, rest
        self.damage = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        try:
            data = data or self.rest.read1(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            self.damage = str(error)
        except OSError as error:
            if error.errno is not None:  # of the disk; damage has no number
                raise
            self.damage = str(error)
        buffer[: len(data)] = data
        return len(data)
