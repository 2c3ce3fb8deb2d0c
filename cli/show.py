"""How things look on a terminal: aligned columns, plain words, and JSON on request."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from aivillage.models.inference.vectors import numbers

_UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal would obey instead of showing it, or that hides the order of the rest."""


def plain(text: object) -> str:
    """Text of a peer's, harmless to a terminal; lines and tabs stay."""
    return _UNSHOWN.sub("\ufffd", str(text))


def one_line(text: object) -> str:
    return " ".join(plain(text).splitlines())


def as_json(value: Any) -> None:
    """One JSON value on one line: what scripts read."""
    print(json_line(value))


def json_line(value: Any) -> str:
    """Bytes become hexadecimal."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def with_numbers(result: Any) -> Any:
    """A result whose vectors, if it has any, are lists of numbers; each says its float32."""
    if not isinstance(result, dict) or not isinstance(result.get("vectors"), (list, tuple)):
        return result
    told = [
        [float(f"{number:.9g}") for number in numbers(vector)]
        if isinstance(vector, bytes) and len(vector) % 4 == 0
        else vector
        for vector in result["vectors"]
    ]
    return result | {"vectors": told}


def table(
    rows: Sequence[Sequence[Any]], headings: Sequence[str], out: TextIO | None = None
) -> None:
    """Columns as wide as what is in them, on standard output unless said."""
    cells = [list(headings), *[["" if c is None else one_line(c) for c in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        line = "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        print(line.rstrip(), file=out or sys.stdout)


def pairs(values: dict[str, Any]) -> None:
    """`name  value`, one a line."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"{name.ljust(width)}  {one_line(value)}")


def note(text: str) -> None:
    """Progress, for the person: standard error, so that answers stay clean."""
    print(plain(text), file=sys.stderr, flush=True)


def ago(unix: float | None) -> str:
    """`12 s ago`, `3 h ago`."""
    if not unix:
        return "never"
    seconds = max(0, time.time() - unix)
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def short(peer: str) -> str:
    """The end of a peer id: what people tell apart."""
    return peer[-8:]
