"""Which attempts a job took, read from jobs.db without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw

from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import AttemptId


def attempts_of(path: Path, prefix: str) -> list[AttemptId]:
    """The attempts of the jobs whose ids begin with `prefix`; none where there is no such file.

    Raises:
        ConfigError: the file is damaged, or no store of jobs.
    """
    if not path.is_file() or not prefix or set(prefix) - set("0123456789abcdef"):
        return []
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            rows: list[tuple[Any, ...]] = db.execute(
                "SELECT id FROM attempt WHERE job GLOB ?", (prefix + "*",)
            ).fetchall()
        finally:
            db.close()
    except apsw.Error as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", next_step="name the attempt itself with --job"
        ) from None
    return [AttemptId(row[0]) for row in rows]
