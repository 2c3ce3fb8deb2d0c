"""Maps in jobs.db: what each was asked, line by line. A task's result is its job's result.

So a task is done at the moment at which its job is: no second row could be lost by a crash.
The job of a task has `<map>/<line>` for its parent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final, Literal

import apsw
import msgspec

from aivillage.node.jobs import JobRow, Jobs
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import MicroCredits

REDUCE_LINE: Final = 0
"""The last task: it gets the results of all others."""
MapState = Literal["filling", "running", "done", "stopped"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS map(
  id TEXT PRIMARY KEY, operation TEXT NOT NULL, reduce TEXT NOT NULL, budget INTEGER NOT NULL,
  each INTEGER NOT NULL, parallel INTEGER NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
  ended REAL) STRICT;
CREATE TABLE IF NOT EXISTS map_line(
  map TEXT NOT NULL REFERENCES map(id), line INTEGER NOT NULL, request BLOB NOT NULL,
  usage BLOB NOT NULL, code TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
  PRIMARY KEY(map, line)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS job_parent ON job(parent) WHERE parent != '';
"""
"""Beside the tables of jobs.py, and unknown to it: an older program leaves them alone."""


class MapRow(msgspec.Struct, frozen=True, kw_only=True):
    """One map of the owner's. `budget` is for all its tasks, `each` the most for one."""

    id: str
    operation: str
    reduce: str
    budget: MicroCredits
    each: MicroCredits
    parallel: int
    state: MapState
    created: float
    ended: float | None = None


class LineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One task. `usage` is the most that it may come to; with a `code` it failed."""

    line: int
    request: bytes = b""
    usage: Usage = {}
    code: str = ""
    message: str = ""


class LineEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a task stands: the job whose result it has, or why there is none."""

    line: int
    code: str
    message: str
    job: str | None
    result: bytes | None
    receipt: bytes | None


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks: all of them, those with a result, and those that failed."""

    total: int
    done: int
    failed: int


_DONE: Final = "EXISTS (SELECT 1 FROM job WHERE parent=? || '/' || line AND result IS NOT NULL)"


class MapStore:
    """Every method is one transaction in the thread of jobs.db."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def open(self) -> None:
        """Makes the tables where there are none; forgets maps that nobody had finished asking."""

        def work(db: apsw.Connection) -> None:
            db.execute(_SCHEMA)
            unfinished = "(SELECT id FROM map WHERE state='filling')"
            db.execute(f"DELETE FROM map_line WHERE map IN {unfinished}")  # noqa: S608 ours alone
            db.execute("DELETE FROM map WHERE state='filling'")

        await self._jobs.transaction(work)

    async def add(self, row: MapRow) -> None:
        fields = MapRow.__struct_fields__
        sql = f"INSERT INTO map({', '.join(fields)}) VALUES({', '.join('?' * len(fields))})"
        await self._jobs.transaction(lambda db: db.execute(sql, msgspec.structs.astuple(row)))

    async def add_lines(self, row: MapRow, lines: Iterable[LineRow]) -> None:
        """The same line again replaces it."""
        rows = [
            (row.id, line.line, line.request, msgspec.msgpack.encode(dict(line.usage)),
             line.code, line.message)
            for line in lines
        ]  # fmt: skip
        sql = "INSERT OR REPLACE INTO map_line VALUES(?,?,?,?,?,?)"
        await self._jobs.transaction(lambda db: db.executemany(sql, rows))

    async def set_state(self, row: MapRow, state: MapState) -> None:
        ended = time.time() if state in {"done", "stopped"} else None
        sql = "UPDATE map SET state=?, ended=? WHERE id=?"
        await self._jobs.transaction(lambda db: db.execute(sql, (state, ended, row.id)))

    async def allow(self, row: MapRow, budget: MicroCredits, each: MicroCredits) -> None:
        """Another budget for the whole of it, what was spent included, and for one task."""
        sql = "UPDATE map SET budget=?, each=? WHERE id=?"
        await self._jobs.transaction(lambda db: db.execute(sql, (budget, each, row.id)))

    async def forgive(self, row: MapRow) -> None:
        """Tasks that failed are asked again, except where the request itself was wrong."""
        sql = "UPDATE map_line SET code='', message='' WHERE map=? AND usage != ?"
        nothing = msgspec.msgpack.encode({})
        await self._jobs.transaction(lambda db: db.execute(sql, (row.id, nothing)))

    async def failed(self, row: MapRow, ends: Iterable[tuple[int, str, str]]) -> None:
        """(line, code, message) of tasks without a result."""
        rows = [(code, message, row.id, line) for line, code, message in ends]
        sql = "UPDATE map_line SET code=?, message=? WHERE map=? AND line=?"
        await self._jobs.transaction(lambda db: db.executemany(sql, rows))

    # ------------------------------------------------------------------ reads
    async def get(self, prefix: str) -> MapRow | None:
        """The one map whose id begins with `prefix`."""
        if not prefix or set(prefix) - set("0123456789abcdef"):
            return None
        found = await self._maps("WHERE id GLOB ? LIMIT 2", prefix + "*")
        return found[0] if len(found) == 1 else None

    async def unfinished(self) -> list[MapRow]:
        return await self._maps("WHERE state='running' ORDER BY created")

    async def _maps(self, where: str, *values: Any) -> list[MapRow]:
        fields = MapRow.__struct_fields__
        sql = f"SELECT {', '.join(fields)} FROM map {where}"  # noqa: S608 ours alone
        rows = await self._read(sql, *values)
        return [MapRow(**dict(zip(fields, row, strict=True))) for row in rows]

    async def tally(self, row: MapRow) -> Tally:
        """How far it is, the reduction left out."""
        sql = (
            "SELECT count(*), coalesce(sum(is_done), 0), coalesce(sum(is_failed), 0)"  # noqa: S608
            f" FROM (SELECT {_DONE} AS is_done, code != '' AS is_failed FROM map_line"
            " WHERE map=? AND line > ?)"
        )
        total, done, failed = (await self._read(sql, row.id, row.id, REDUCE_LINE))[0]
        return Tally(total=total, done=done, failed=failed)

    async def open_lines(self, row: MapRow) -> dict[int, Usage]:
        """The tasks that have neither a result nor a failure, in order."""
        sql = (
            "SELECT line, usage FROM map_line"  # noqa: S608 ours alone
            f" WHERE map=? AND line > ? AND code='' AND NOT {_DONE} ORDER BY line"
        )
        rows = await self._read(sql, row.id, REDUCE_LINE, row.id)
        return {line: msgspec.msgpack.decode(usage) for line, usage in rows}

    async def request(self, row: MapRow, line: int) -> bytes:
        sql = "SELECT request FROM map_line WHERE map=? AND line=?"
        return bytes((await self._read(sql, row.id, line))[0][0])

    async def spent(self, row: MapRow) -> MicroCredits:
        """What all tries at all tasks cost so far."""
        sql = (
            "SELECT coalesce(sum(price), 0) FROM attempt WHERE job IN"
            " (SELECT id FROM job WHERE parent GLOB ?)"
        )
        return int((await self._read(sql, row.id + "/*"))[0][0])

    async def ends(self, row: MapRow, after: int, limit: int) -> list[LineEnd]:
        """How the lines after `after` stand, in order; of two results the later one counts."""
        sql = (
            "SELECT l.line, l.code, l.message, j.id, j.result, j.receipt FROM"
            " (SELECT * FROM map_line WHERE map=? AND line > ? ORDER BY line LIMIT ?) l"
            " LEFT JOIN job j ON j.parent = l.map || '/' || l.line AND j.result IS NOT NULL"
            " ORDER BY l.line, j.ended"
        )
        names = LineEnd.__struct_fields__
        rows = await self._read(sql, row.id, after, limit)
        found = (LineEnd(**dict(zip(names, values, strict=True))) for values in rows)
        return list({end.line: end for end in found}.values())

    async def leftovers(self, row: MapRow) -> list[JobRow]:
        """The last job of each unfinished task, where it was given something.

        It has all of it, that of earlier ones too: `OneTry` copies it. Where it has none, what
        earlier ones had turned out to be wrong.
        """
        sql = (
            f"SELECT {', '.join(JobRow.__struct_fields__)} FROM job j"  # noqa: S608 ours alone
            " WHERE parent GLOB ? AND result IS NULL AND NOT local"
            " AND created = (SELECT max(created) FROM job k"
            " WHERE k.parent = j.parent AND k.result IS NULL AND NOT k.local)"
            " AND EXISTS (SELECT 1 FROM delivered d WHERE d.job = j.id)"
        )
        names = JobRow.__struct_fields__
        rows = await self._read(sql, row.id + "/*")
        return [JobRow(**dict(zip(names, values, strict=True))) for values in rows]

    async def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return await self._jobs.transaction(lambda db: list(db.execute(sql, values)))


def parent_of(row: MapRow, line: int) -> str:
    """What the jobs of a task have for a parent."""
    return f"{row.id}/{line}"


def line_of(parent: str) -> int:
    return int(parent.rpartition("/")[2])
