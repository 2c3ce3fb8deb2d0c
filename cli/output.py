"""Where an answer goes: standard output, or a file that is whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from aivillage.protocols.errors import RequestError


@contextmanager
def writing(path: str | None) -> Iterator[TextIO]:
    """Standard output, or the file at `path`, which appears when all of it was written.

    Raises:
        RequestError: BAD_REQUEST, it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(target)
    except OSError as error:
        raise RequestError(
            f"{path} cannot be written: {error.strerror}",
            code="BAD_REQUEST",
            next_step="name another file with --output",
        ) from None
    finally:
        part.unlink(missing_ok=True)
