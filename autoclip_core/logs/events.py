"""Numbers in TensorBoard's event files, read without TensorBoard.

An event file is a row of records: the length (8 bytes), its checksum (4), that many bytes, their checksum (4), all in
little endian. The bytes are a protocol buffer, of which only numbers with a name are wanted here. The two checksums are
why this is read by hand: TensorBoard stops at the first damaged byte and keeps silent, while a damaged record can be
told from a damaged length, and the records after it be found.
"""

from __future__ import annotations

import struct
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autoclip_core.logs.found import Found, Series

_LENGTH = 12  # bytes of a length and its checksum
_FAR = 1 << 18  # how far the next record is looked for
# A record this long that holds no number is an image or a graph. Its checksum would take a second per 10 MB.
_LONG = 1 << 16


class _Event(NamedTuple):
    """One record of a file.

    step: as the run counted; None: the record is damaged and tells nothing.
    numbers: pairs of name and number.
    restarts: the run was started again here, and what it had logged at this step or later is void.
    """

    step: int | None
    numbers: list[tuple[str, float]]
    restarts: bool = False


def is_events(head: bytes) -> bool:
    """Tell by its first bytes whether a file holds events."""
    return len(head) >= _LENGTH and _is_length(head[:_LENGTH])


def read(files: Iterable[tuple[str, BinaryIO]], found: Found) -> None:
    """Read the event files of one run, each with its name, in their order."""
    steps: dict[str, array[int]] = {}
    for path, stream in files:
        for number, event in enumerate(_records(stream), 1):
            if event.step is None:
                found.skip(f"record {number:,} of {path}, which is cut or damaged")
                continue
            if event.restarts:
                for name, logged in steps.items():
                    if series := found.under(name):
                        _forget_from(event.step, logged, series)
            for name, value in event.numbers:
                if series := found.under(name):
                    series.norms.append(value)
                    steps.setdefault(name, array("q")).append(event.step)
    for name in found.chosen():
        logged = steps.get(name, array("q"))
        back = [(a, b) for a, b in pairwise(logged) if b < a]
        if back:
            found.notes.append(
                f"{found.source}: the step of {name!r} goes back, first from {back[0][0]:,} to {back[0][1]:,}: a run "
                f"that was resumed, or several in one folder. All {len(logged):,} are read, in the order of the files."
            )


def _forget_from(step: int, steps: array[int], series: Series) -> None:
    kept = [at for at, logged in enumerate(steps) if logged < step]
    steps[:] = array("q", [steps[at] for at in kept])
    series.norms = array("d", [series.norms[at] for at in kept])


def _records(file: BinaryIO) -> Iterator[_Event]:
    """Read the events of a file, up to its end or the place from which no further record is found.

    A damaged record, a cut one and a stretch of foreign bytes yield one event each whose step is None.
    """
    while start := file.read(_LENGTH):
        foreign = 0
        while not _is_length(start) and foreign < _FAR and (byte := file.read(1)):
            start = start[1:] + byte
            foreign += 1
        if foreign or len(start) < _LENGTH:
            yield _Event(None, [])
        if not _is_length(start):
            return
        data = _read(file, int.from_bytes(start[:8], "little"))
        checksum = file.read(4)
        try:
            event = _parse(data)
        except (ValueError, struct.error):
            event = _Event(None, [])
        if len(checksum) < 4 or ((event.numbers or len(data) < _LONG) and _checksum(data) != checksum):
            event = _Event(None, [])
        yield event


def _read(file: BinaryIO, size: int) -> bytes:
    """Read size bytes or up to the end, without believing the size."""
    parts = []
    while size and (part := file.read(min(size, _FAR))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _is_length(start: bytes) -> bool:
    # No record is empty or has 4 GB: to say so first makes the search for the next record ten times faster.
    return start[4:8] == bytes(4) != start[:4] and _checksum(start[:8]) == start[8:]


# --- The checksum: CRC-32C, turned and shifted by a constant so that checksums of checksums are no fixed points -------


def _table() -> list[int]:
    table = []
    for byte in range(256):
        rest = byte
        for _ in range(8):
            rest = (rest >> 1) ^ (0x82F63B78 if rest & 1 else 0)
        table.append(rest)
    return table


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    rest = 0xFFFFFFFF
    for byte in data:
        rest = _TABLE[(rest ^ byte) & 0xFF] ^ (rest >> 8)
    rest ^= 0xFFFFFFFF
    return (((rest >> 15 | rest << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


# --- The protocol buffer ----------------------------------------------------------------------------------------------

# Series of the fields, and of the types of a tensor.
_STEP, _SUMMARY, _SESSION = 2, 5, 7
_STATUS, _START = 1, 1
_VALUE, _TAG, _SIMPLE, _TENSOR = 1, 1, 2, 8
_TYPE, _CONTENT = 1, 4
_NUMBERS: dict[object, tuple[str, int]] = {
    1: ("<f", 5),
    2: ("<d", 6),
}  # float32 and float64: their layout, and the field of their values


def _parse(data: bytes) -> _Event:
    step, values, restarts = 0, [], False
    for field, content in _fields(data):
        if field == _STEP and isinstance(content, int):
            step = (content + (1 << 63)) % (1 << 64) - (1 << 63)
        elif field == _SUMMARY and isinstance(content, bytes):
            values += [found for part, value in _fields(content) if part == _VALUE for found in _number(value)]
        elif field == _SESSION and isinstance(content, bytes):
            restarts = (_STATUS, _START) in _fields(content)
    return _Event(step, values, restarts)


def _number(value: int | bytes) -> list[tuple[str, float]]:
    """Return the name and the number of one value of a summary; nothing for an image, a histogram, a text."""
    fields = dict(_fields(value))
    layout, number = "<f", fields.get(_SIMPLE)
    if _TENSOR in fields:
        tensor = dict(_fields(fields[_TENSOR]))
        layout, place = _NUMBERS.get(tensor.get(_TYPE), ("", 0))
        number = tensor.get(place, tensor.get(_CONTENT))
    tag = fields.get(_TAG)
    if not isinstance(tag, bytes) or not isinstance(number, bytes) or not 0 < len(number) == struct.calcsize(layout):
        return []
    return [(tag.decode("utf-8", "replace"), *struct.unpack(layout, number))]


def _fields(data: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the numbers of the fields with what they hold: an int for a varint, else bytes."""
    if not isinstance(data, bytes):
        raise ValueError("A message was expected.")  # noqa: TRY004 - damage, and caught as such
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            content, at = _varint(data, at)
            yield key >> 3, content
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"No field is of kind {kind}.")
        if at + size > len(data):
            raise ValueError("A field is longer than its message.")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("A number does not end.")
