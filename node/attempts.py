"""Jobs and their attempts, read from jobs.db without a daemon, or beside one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec

from aivillage.node.explain import Kept
from aivillage.node.jobs import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    AttemptRow,
    JobRow,
    Said,
    said_beside,
)
from aivillage.protocols.errors import ConfigError, RequestError
from aivillage.protocols.types import AttemptId

T = TypeVar("T")


def attempts_of(path: Path, prefix: str) -> list[AttemptId]:
    """The attempts of the jobs whose ids begin with `prefix`; none where there is no such file.

    Raises:
        ConfigError: the file is damaged, or no store of jobs.
    """
    if not path.is_file() or not _is_hex(prefix):
        return []
    said = said_beside(path)  # before the file is read: what leaves the one is in the other

    def work(db: apsw.Connection) -> list[AttemptId]:
        rows: list[tuple[Any, ...]] = db.execute(
            "SELECT id FROM attempt WHERE job GLOB ?", (prefix + "*",)
        ).fetchall()
        told = (each.attempt.id for each in said if each.job.id.startswith(prefix))
        return [AttemptId(found) for found in dict.fromkeys((*(row[0] for row in rows), *told))]

    return _read(path, work, "name the attempt itself with --job")


def kept_job(path: Path, prefix: str) -> Kept:
    """The one job whose id begins with `prefix`, and all that was kept of it; from one snapshot.

    Raises:
        RequestError: BAD_REQUEST, there is none, or there are several.
        ConfigError: the file is damaged, of a newer version, or no store of jobs.
    """
    if not path.is_file():
        raise _no_such_job(prefix, 0)
    said = said_beside(path)

    def work(db: apsw.Connection) -> Kept:
        _require_known(db, path)
        return _kept(db, prefix, said)

    return _read(path, work, "aivillage-node doctor")


def _kept(db: apsw.Connection, prefix: str, said: list[Said]) -> Kept:
    found = _rows(db, JobRow, "job", "WHERE id GLOB ?", prefix + "*") if _is_hex(prefix) else []
    told = [each for each in said if _is_hex(prefix) and each.job.id.startswith(prefix)]
    jobs = {row.id: row for row in (*(each.job for each in told), *found)}
    if len(jobs) != 1:
        raise _no_such_job(prefix, len(jobs))
    (job,) = jobs.values()
    if job.ended is None and told:
        job = told[0].job
    bodies: dict[bytes, list[bytes]] = defaultdict(list)
    for attempt, body in db.execute(
        "SELECT attempt, body FROM delivered WHERE job = ? ORDER BY seq", (job.id,)
    ):
        bodies[attempt].append(body)
    rows = _rows(db, AttemptRow, "attempt", "WHERE job = ? ORDER BY created", job.id)
    return Kept(job, _with_ends(rows, [each.attempt for each in told]), bodies)


def _with_ends(rows: list[AttemptRow], told: list[AttemptRow]) -> list[AttemptRow]:
    """The attempts as they will be once all that was told is stored."""
    ends = {row.id: row for row in told}
    begun = {row.id for row in rows}
    ended = [
        msgspec.structs.replace(row, price=end.price, outcome=end.outcome)
        if (end := ends.get(row.id))
        else row
        for row in rows
    ]
    return [*ended, *(row for row in told if row.id not in begun)]


def _rows(db: apsw.Connection, kind: type[T], table: str, where: str, value: str) -> list[T]:
    """The columns that an older file has; the others keep the defaults of `kind`."""
    there = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    fields: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]
    wanted = [name for name in fields if name in there]
    sql = f"SELECT {', '.join(wanted)} FROM {table} {where}"  # noqa: S608 names are ours alone
    return [kind(**dict(zip(wanted, row, strict=True))) for row in db.execute(sql, (value,))]


def _require_known(db: apsw.Connection, path: Path) -> None:
    application, version = db.pragma("application_id"), db.pragma("user_version")
    if application != APPLICATION_ID or not 1 <= version <= SCHEMA_VERSION:
        raise ConfigError(
            f"{path} is no store of jobs that this program knows",
            next_step="run the newer program, or choose another --data-dir",
        )


def _read(path: Path, work: Callable[[apsw.Connection], T], next_step: str) -> T:
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.set_busy_timeout(5000)
            with db:
                found = work(db)
        finally:
            db.close()
    except apsw.Error as error:
        raise ConfigError(f"{path} cannot be read: {error}", next_step=next_step) from None
    return found


def _is_hex(prefix: str) -> bool:
    return bool(prefix) and not set(prefix) - set("0123456789abcdef")


def _no_such_job(prefix: str, count: int) -> RequestError:
    return RequestError(
        f"{prefix!r} is the beginning of {count or 'no'} job{'s' if count else ''}",
        code="BAD_REQUEST",
        next_step="`aivillage-node jobs list` shows them; write more of the id",
    )
