"""Text: in which encoding, in lines or a document."""

from __future__ import annotations

import codecs
import re
from functools import partial
from io import TextIOWrapper
from itertools import count
from typing import TYPE_CHECKING, BinaryIO, TextIO

from autoclip_core.errors import AutoClipValueError
from autoclip_core.logs import records, tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autoclip_core.logs.found import Found

_LONGEST = 1 << 28  # characters of a line
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JSON = re.compile(r"""\s*(\{\s*(["}]|$)|\[\s*(["{\[\]tfnNI]|$|-?[\d.]+(e[-+]?\d+)?\s*([,\]]|$)))""", re.IGNORECASE)
_NOT_TEXT = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\ufffd]")


def is_text(head: bytes) -> bool:
    """Tell by its first bytes whether a file is text."""
    start, _ = _decoded(head)
    return not head or 10 * len(_NOT_TEXT.findall(start)) < len(start)


def read(stream: BinaryIO, head: bytes, found: Found) -> None:
    """Read JSON, or a table, or what was printed."""
    if not is_text(head):
        raise AutoClipValueError(f"{found.source} is neither text nor an array; save the norms as CSV, JSON or .npy.")
    start, encoding = _decoded(head)
    # One kind of line end: the others may stand inside a cell, as progress bars do.
    newline = "\n" if "\n" in start or "\r" not in start else "\r"
    lines = _lines(TextIOWrapper(stream, encoding, "replace", newline), found)
    if _JSON.match(start):
        records.read(lines, found)
    else:
        tables.read(lines, found)


def _decoded(head: bytes) -> tuple[str, str]:
    """Return the first characters, and their encoding."""
    encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), "utf-8")
    start = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    return start.rstrip("\0"), encoding  # zeros are what a crash of the machine leaves at the end


def _lines(file: TextIO, found: Found) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    for number, line in zip(count(1), iter(partial(file.readline, _LONGEST), ""), strict=False):
        if len(line) == _LONGEST:
            raise AutoClipValueError(
                f"{found.source} is no log: line {number:,} has more than {_LONGEST:,} characters."
            )
        if not line.isspace():
            yield number, line
