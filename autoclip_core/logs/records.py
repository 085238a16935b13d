"""JSON: a record per line, or a document."""

from __future__ import annotations

import json
import re
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

from autoclip_core.errors import AutoClipValueError
from autoclip_core.logs.found import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autoclip_core.logs.found import Found

# Whole numbers of any size are norms as well.
_decoder = json.JSONDecoder(parse_int=float)
_BETWEEN = re.compile(r"[\s,]*")
_NOT_JSON = (ValueError, RecursionError)


def read(lines: Iterator[tuple[int, str]], found: Found) -> None:
    """Read records line by line if the first line is one and not the last, else a document."""
    first, second = next(lines), next(lines, None)
    rest = chain([first], [second] if second else [], lines)
    if second and _is_json(first[1]):
        _read_lines(rest, found)
    else:
        _read_document(list(rest), found)


def _read_lines(lines: Iterable[tuple[int, str]], found: Found) -> None:
    bad: tuple[int, str] | None = None  # it may be the last
    for number, line in lines:
        if bad:
            found.skip(f"line {bad[0]:,}, which is not JSON but {shown(bad[1].strip())}")
            bad = None
        try:
            _gather(_decoder.decode(line), found, "line", number)
        except _NOT_JSON:
            contents, end, _ = _documents(line)  # several in one line
            if line[end:].strip():
                bad = number, line
            for content in contents:
                _gather(content, found, "line", number)
    if bad:
        found.notes.append(
            f"{found.source} was read up to line {bad[0]:,}, the last, which is cut: {shown(bad[1].strip()[-40:])}."
        )


def _read_document(lines: list[tuple[int, str]], found: Found) -> None:
    text = "".join(line for _, line in lines)
    contents, end, why = _documents(text)
    if why and len(lines) > 1 and 2 * sum(_is_json(line) for _, line in lines) >= len(lines):
        _read_lines(lines, found)  # of which the first is damaged
        return
    if why:
        contents += _documents(_closed(text[end : why.pos]))[0]
        number, _ = lines[min(text.count("\n", 0, why.pos), len(lines) - 1)]
        found.notes.append(f"{found.source} was read up to line {number:,}, where it is no JSON: {why.msg}.")
    try:
        for content in contents:
            _gather_document(content, found)
    except RecursionError:
        raise AutoClipValueError(f"{found.source} is nested too deeply.") from None
    if why and not any(series.norms for series in found.named.values() if series):
        raise AutoClipValueError(found.notes[-1])


def _documents(text: str) -> tuple[list[Any], int, json.JSONDecodeError | None]:
    """Decode as many documents as stand in a row: what they hold, where they end, and what is wrong there."""
    contents: list[Any] = []
    at = 0
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        try:
            content, at = _decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return contents, at, error
        except _NOT_JSON:
            return contents, at, json.JSONDecodeError("Nested too deeply", text, at)
        contents.append(content)
    return contents, at, None


def _is_json(line: str) -> bool:
    try:
        _decoder.decode(line)
    except _NOT_JSON:
        return False
    return True


def _closed(text: str) -> str:
    """Close the brackets of JSON that was cut, behind its last whole value."""
    closing: list[str] = []
    end = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|["\[\]{},]', text):
        kind = token[0]
        if kind == '"':
            break
        if kind in "[{":
            closing.append("]" if kind == "[" else "}")
        elif kind in "]}" and closing:
            closing.pop()
        elif kind != ",":  # a string
            continue
        end = token.start() if kind == "," else token.end()
    return text[:end] + "".join(reversed(closing))


def _gather_document(content: Any, found: Found, prefix: str = "") -> None:
    """Take in a whole document: lists of numbers under a name, lists of records, and records in records."""
    if _is_numbered(content) and not any(map(_is_numbered, content.values())):  # as pandas writes rows
        content = list(content.values())
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "log_history":  # the Trainer's state
                _gather_document(value, found)
            elif isinstance(value, (dict, list)):
                _gather_document(value, found, f"{prefix}{key}.")
            else:
                _gather({key: value}, found, "record", 1, prefix)
    elif isinstance(content, list):
        name = prefix[:-1] or "norm"
        for number, item in enumerate(content, 1):
            if isinstance(item, (dict, list)):
                _gather(item, found, "record", number, prefix)
            elif series := found.under(name):
                series.add(item, "item", number)


def _is_numbered(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(map(str.isdecimal, content))


def _gather(row: Any, found: Found, where: str, number: int, prefix: str = "") -> None:
    """Take in one record, however deep; keys of records inside it are joined to theirs by a dot."""
    waiting = deque([(prefix, row)])
    while waiting:
        before, inner = waiting.popleft()
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, value in items:
            if isinstance(value, (dict, list)):
                waiting.append((f"{before}{key}.", value))
            elif series := found.under(f"{before}{key}"):
                series.add(value, where, number)
