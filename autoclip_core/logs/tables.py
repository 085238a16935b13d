"""Tables in text: CSV and its kin."""

from __future__ import annotations

import re
from collections import deque
from itertools import chain, count, islice
from typing import TYPE_CHECKING, cast

from autoclip_core.errors import AutoClipValueError
from autoclip_core.logs import messages
from autoclip_core.logs.found import is_missing, is_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from autoclip_core.logs.found import Found, Series

# A quoted cell with more lines is none, and in a file with more quotes that are never closed they mean nothing.
_INSIDE, _OPEN_QUOTES = 1000, 20
_AHEAD = 1000  # lines by which it is told whether a text that looks odd as a table is one


def read(lines: Iterator[tuple[int, str]], found: Found) -> None:
    """Read a table: a header and rows, or rows of numbers alone; or else numbers behind their names."""
    found.columns = [column.strip() for column in found.columns]
    remark = ""
    top: list[tuple[int, str]] = []
    for number, line in lines:
        if line.startswith("#") and not top:  # numpy marks even the header so
            remark = line.lstrip("# ")
        elif top or not _names_delimiter(line):
            top.append((number, line))
            if len(top) == 2:
                break
    if not top:
        raise AutoClipValueError(f"{found.source} is empty.")
    split = _splitter([line for _, line in top])
    header = [cell.strip() for cell in split(top[0][1])[0]]
    while header and not header[-1]:
        header.pop()
    first = 0  # of the rows
    if not all(map(is_number, header)):
        first = 1
    elif remark and len(split(remark)[0]) == len(header):
        header = split(remark)[0]
    else:
        header = ["norm"] if len(header) == 1 else list(map(str, range(len(header))))
    for at, name in enumerate(header):  # what is there twice gets a number
        if name in header[:at]:
            header[at] = next(new for new in (f"{name}.{i}" for i in count(1)) if new not in header)
    if not _is_table(header, [split(line)[0] for _, line in top[first:]], found):
        top += islice(lines, _AHEAD)
        if messages.stand_in(top, found) or not any(map(found.wants, header)):
            messages.read(chain(top, lines), found)
            if any(found.named.values()):
                return
    for name in header:
        found.under(name)
    chosen = found.chosen()
    places = [(header.index(name), series) for name, series in chosen.items()]
    width = len(header)
    headers = []
    for number, cells, has_end in _rows(chain(top[first:], lines), split, width, [at for at, _ in places], found):
        if len(cells) != width and not (again := _places(cells, chosen)):
            if len(cells) > width and any(map(str.strip, cells[width:])):
                found.skip(f"line {number:,}, which has {len(cells)} cells where the header has {width}")
                continue
            if len(cells) < width and (not has_end or len(cells) <= max(at for at, _ in places)):
                found.skip(f"line {number:,}, which has {len(cells)} of {width} cells")
                continue
        for at, series in places:
            try:
                series.norms.append(float(cells[at]))
            except (ValueError, IndexError):
                if again := _places(cells, chosen):
                    places, width = again, len(cells)
                    headers.append(number)
                    break
                series.add(split.with_point(cells[at]), "line", number)
        if not has_end and any(at >= min(len(cells), width) - 1 for at, _ in places):
            found.may_be_cut(number, cells[-1])
    if headers:
        found.notes.append(
            f"{found.source}: the header stands again in line {headers[0]:,}"
            + (f" and {len(headers) - 1:,} more" if len(headers) > 1 else "")
            + ": several runs in one file, read as one."
        )


def _names_delimiter(line: str) -> bool:
    """Tell whether a first line is the one by which Excel is told the delimiter."""
    return line.startswith("sep=") and len(line.strip("\r\n")) <= len("sep=;")


def _is_table(header: Sequence[str], rows: Sequence[Sequence[str]], found: Found) -> bool:
    """Tell whether a wanted name stands in the header, and a number or nothing below it."""
    places = [at for at, name in enumerate(header) if found.wants(name)]
    cells = [row[at].strip() for row in rows for at in places if at < len(row)]
    return bool(cells) and all(is_missing(cell) or is_number(cell) for cell in cells)


def _places(cells: Sequence[str], chosen: Mapping[str, Series]) -> list[tuple[int, Series]]:
    """Find the columns in a row that is a header, as where a second file was appended; nothing if it is none."""
    names = [cell.strip() for cell in cells]
    places = [(names.index(name), series) for name, series in chosen.items() if name in names]
    return places if len(places) == len(chosen) else []


class _Splitter:
    """Splits a line into its cells, of which some may be quoted."""

    def __init__(self, delimiter: str | None) -> None:
        self.delimiter = delimiter  # None: any white space
        inside, end = (r"\S", r"(\s+|$)") if delimiter is None else (f"[^{delimiter}]", f"({delimiter}|$)")
        self.closes = re.compile(rf'"\s*{end}').search  # where a quoted cell may end
        self._cell = re.compile(rf'[^\S\n\t]*"([^"]*(?:""[^"]*)*)"\s*{end}|({inside}*){end}')

    def with_point(self, cell: str) -> str:
        """Return a number with a decimal point, where a comma separates no cells."""
        return cell if self.delimiter == "," or "." in cell else cell.replace(",", ".")

    def __call__(self, line: str) -> tuple[list[str], bool]:
        """Return the cells, and whether a quote is never closed; it is a letter like others then."""
        line = line.rstrip("\r\n") if self.delimiter else line.strip()
        if '"' not in line:
            return line.split(self.delimiter), False
        cells, at, is_open, end = [], 0, False, "?"
        while end:
            cell = cast("re.Match[str]", self._cell.match(line, at))
            quoted, end_of_quoted, plain, end_of_plain = cell.groups()
            if quoted is None:
                is_open = is_open or plain.lstrip().startswith('"')
                cells.append(plain)
            else:
                cells.append(quoted.replace('""', '"'))
            end, at = end_of_plain if quoted is None else end_of_quoted, cell.end()
        return cells, is_open


def _splitter(lines: Sequence[str]) -> _Splitter:
    """Find what separates the cells: what stands in the header and in the first row."""
    bare = [re.sub('"[^"]*"', "", line) for line in lines]
    for delimiter in "\t;,":
        if all(delimiter in line for line in bare):
            return _Splitter(delimiter)
    words = {len(line.split()) for line in bare}
    return _Splitter(None if len(words) == 1 and words != {1} else ",")


def _rows(
    lines: Iterator[tuple[int, str]], split: _Splitter, width: int, places: Sequence[int], found: Found
) -> Iterator[tuple[int, list[str], bool]]:
    """Yield the rows: the number of their line, their cells, whether their line has an end.

    A quoted cell may hold line ends. A quote that is never closed would so swallow the rest of the file: it is a letter
    if a line inside it is a row by itself.
    """
    delimiter = split.delimiter
    waiting: deque[tuple[int, str]] = deque()
    open_quotes, first = 0, 0

    def is_row(cells: Sequence[str]) -> bool:
        return len(cells) == width > 1 and any(is_number(cells[at]) for at in places)

    while item := waiting.popleft() if waiting else next(lines, None):
        number, line = item
        if '"' not in line:
            yield number, line.split(delimiter), line[-1] in "\r\n"
            continue
        cells, is_open = split(line)
        last = line
        inside: list[tuple[int, str]] = []
        while is_open and open_quotes < _OPEN_QUOTES and len(inside) < _INSIDE:
            more = waiting.popleft() if waiting else next(lines, None)
            if more is None:
                break
            inside.append(more)
            if split.closes(more[1]):
                joined, still_open = split(line + "".join(text for _, text in inside))
                if not still_open:
                    if len(joined) == width:
                        cells, is_open, last = joined, False, more[1]
                    break
            if is_row(split(more[1])[0]):
                break
        if is_open:
            open_quotes, first = open_quotes + 1, first or number
            waiting.extendleft(reversed(inside))
        yield number, cells, last[-1] in "\r\n"
    if open_quotes:
        what = "a quote is" if open_quotes == 1 else f"{open_quotes:,} quotes are"
        found.notes.append(f"{found.source}: {what} never closed (line {first:,}), and read as a letter.")
