"""Numbers behind their names in lines of text: `grad_norm: 1.5`, `grad_norm=1.5`, `'grad_norm': 1.5`, `grad_norm 1.5`.

That is what trainers print. A name is up to four words, so that `actor grad norm` and `critic grad norm` stay two.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from autoclip_core.logs.found import is_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from autoclip_core.logs.found import Found

# Nothing here backtracks over more than a word: a line may have any length. Possessive quantifiers would say so, but do
# not hold what they promise before Python 3.11.5; what a lookahead has found is as final.
_WORD = r"[^\W\d][\w./-]{0,80}(?![\w./(-])"
_pairs = re.compile(
    rf"(?<![\w./-])(?=({_WORD}(?: {_WORD}){{0,3}}))\1['\"]?"  # the name
    r"(?:\s*([:=])\s*|\s+)['\"]?(?:[\w.]+\()?"
    r"((?:[^\s,;|'\"(){}\[\]:=]+|,(?=\d))+)"  # the number; with a comma in it, it is none
).finditer

_without_colours = re.compile(r"\x1b\[[\d;]*m").sub


def read(lines: Iterable[tuple[int, str]], found: Found) -> None:
    """Read the numbers of all lines."""
    for number, line in lines:
        for name, value, rest in _named(line):
            if series := found.under(name):
                series.add(value, "line", number)
                if rest in {"", ","}:
                    found.may_be_cut(number, value)


def stand_in(lines: Iterable[tuple[int, str]], found: Found) -> bool:
    """Tell whether a line holds a number that is wanted."""
    return any(is_number(value) and found.wants(name) for _, line in lines for name, value, _ in _named(line))


def _named(line: str) -> Iterator[tuple[str, str, str]]:
    """Yield names, what stands behind them, and up to two letters more. Without a sign between it must be a number."""
    line = _without_colours("", line)
    for pair in _pairs(line):
        name, sign, value = pair.groups()
        if sign or is_number(value):
            yield name, value.rstrip("."), line[pair.end() : pair.end() + 2]
