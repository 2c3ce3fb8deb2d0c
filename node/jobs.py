"""jobs.db: what the owner asked for, what was delivered so far, and whom this node knows.

It must survive kill -9, not power loss (`synchronous=NORMAL`): money lives in ledger.db. One
connection, one thread at a time; delivered output is written in groups, and counts as accepted
only once it is here. A small result is told as soon as the file beside has it (`told.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import apsw
import msgspec
import trio

from aivillage.node import records, store, told
from aivillage.node.records import PeerStore
from aivillage.node.told import Told
from aivillage.protocols.errors import ConfigError, NodeError
from aivillage.protocols.job import State
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import AttemptId, JobId, MicroCredits, PeerId

APPLICATION_ID: Final = 0x41_49_56_4A
SCHEMA_VERSION: Final = 5
IN_MEMORY: Final = ":memory:"
"""A path of SQLite's: of simulated nodes."""
TOLD_SUFFIX: Final = "-told"
CHECK_OF: Final = "check of "
"""Begins the `parent` of a job that does another one's work again."""
T = TypeVar("T")
_log = logging.getLogger("aivillage.jobs")

_SCHEMA: Final = """
CREATE TABLE job(
  id TEXT PRIMARY KEY, operation TEXT NOT NULL, request BLOB NOT NULL, state TEXT NOT NULL,
  ceiling INTEGER NOT NULL, deadline REAL, peer TEXT NOT NULL DEFAULT '', created REAL NOT NULL,
  ended REAL, result BLOB, receipt BLOB, code TEXT NOT NULL DEFAULT '',
  message TEXT NOT NULL DEFAULT '', local INTEGER NOT NULL DEFAULT 0,
  parent TEXT NOT NULL DEFAULT '', prefer TEXT NOT NULL DEFAULT '',
  mesh INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX job_open ON job(state) WHERE ended IS NULL;
CREATE TABLE attempt(
  id BLOB PRIMARY KEY, job TEXT NOT NULL REFERENCES job(id), seller TEXT NOT NULL,
  price INTEGER NOT NULL DEFAULT 0, outcome TEXT NOT NULL DEFAULT '', created REAL NOT NULL,
  kernel TEXT NOT NULL DEFAULT '', identical TEXT NOT NULL DEFAULT '',
  quote BLOB NOT NULL DEFAULT x'', done BLOB NOT NULL DEFAULT x'',
  choice BLOB NOT NULL DEFAULT x'') STRICT;
CREATE INDEX attempt_job ON attempt(job);
CREATE TABLE delivered(
  job TEXT NOT NULL REFERENCES job(id), seq INTEGER NOT NULL, attempt BLOB NOT NULL,
  body BLOB NOT NULL, PRIMARY KEY(job, seq)) STRICT, WITHOUT ROWID;
CREATE TABLE known_peer(
  id TEXT PRIMARY KEY, addresses BLOB NOT NULL, seen REAL NOT NULL,
  units_per_second REAL NOT NULL DEFAULT 0, good INTEGER NOT NULL DEFAULT 0,
  bad INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE certificate(body BLOB PRIMARY KEY, village BLOB NOT NULL, added REAL NOT NULL) STRICT;
CREATE TABLE setting(key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""

_SINCE_1: Final = (
    ("job", "local", "INTEGER NOT NULL DEFAULT 0"),
    ("job", "parent", "TEXT NOT NULL DEFAULT ''"),
    ("attempt", "kernel", "TEXT NOT NULL DEFAULT ''"),
    ("attempt", "identical", "TEXT NOT NULL DEFAULT ''"),
    ("attempt", "quote", "BLOB NOT NULL DEFAULT x''"),
    ("attempt", "done", "BLOB NOT NULL DEFAULT x''"),
    ("job", "prefer", "TEXT NOT NULL DEFAULT ''"),
    ("job", "mesh", "INTEGER NOT NULL DEFAULT 0"),
    ("attempt", "choice", "BLOB NOT NULL DEFAULT x''"),
)
"""Columns that versions 1 to 4 did not have, or not always."""


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """One job of the owner's."""

    id: JobId
    operation: str
    request: bytes
    state: State
    ceiling: MicroCredits
    deadline: float | None
    peer: str
    created: float
    ended: float | None = None
    result: bytes | None = None
    receipt: bytes | None = None
    code: str = ""
    message: str = ""
    local: bool = False
    parent: str = ""
    """The attempt or local job whose module wanted it; empty: the owner did."""
    prefer: str = ""
    """fast, cheap or balanced; empty: as the settings say."""
    mesh: bool = False
    """Never on this machine."""

    @property
    def is_check(self) -> bool:
        """Whether it does another job's work again."""
        return self.parent.startswith(CHECK_OF)


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One seller's try at a job; `price` is what was accepted from it.

    `quote` is the envelope that the seller signed, and `done` the packed usage that earlier
    attempts had delivered; both are empty where an older version of this program began it.
    """

    id: bytes
    job: JobId
    seller: PeerId
    price: MicroCredits
    outcome: str
    created: float
    kernel: str = ""
    identical: str = ""
    quote: bytes = b""
    done: bytes = b""
    choice: bytes = b""
    """Why this seller, in JSON."""


class Said(msgspec.Struct, frozen=True):
    """A job whose result was told before it was here, and its one attempt that is done."""

    job: JobRow
    attempt: AttemptRow


class _Kept(NamedTuple):
    """One piece of output on its way to the disk."""

    job: JobId
    seq: int
    attempt: AttemptId
    body: bytes
    price: MicroCredits
    kernel: tuple[str, str]


def _select(kind: type[msgspec.Struct], table: str) -> str:
    return f"SELECT {', '.join(kind.__struct_fields__)} FROM {table} "  # noqa: S608 ours alone


_ADD: Final = (
    "INSERT INTO job(id, operation, request, state, ceiling, deadline, peer, created,"
    " local, parent, prefer, mesh) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)"
)
_ADD_SAID: Final = (
    "INSERT INTO job(id, operation, request, state, ceiling, deadline, peer, created,"
    " local, parent, prefer, mesh, result) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?)"
    " ON CONFLICT(id) DO UPDATE SET state=excluded.state, result=excluded.result"
    " WHERE ended IS NULL"
)
_SAID_COLUMNS: Final = (
    "id", "job", "seller", "price", "outcome", "created", "kernel", "identical", "quote", "done",
)  # fmt: skip
_ADD_SAID_ATTEMPT: Final = (
    f"INSERT INTO attempt({', '.join(_SAID_COLUMNS)}) VALUES(?,?,?,?,?,?,?,?,?,?)"
    " ON CONFLICT(id) DO UPDATE SET price=excluded.price, outcome=excluded.outcome"
)
_SAID: Final = msgspec.msgpack.Decoder(Said)
_JOB: Final = _select(JobRow, "job")
_ATTEMPT: Final = _select(AttemptRow, "attempt")


class Jobs(PeerStore):
    """The store. Every method is one transaction in the store's own thread."""

    def __init__(self, db: apsw.Connection, file: Told) -> None:
        super().__init__(db)
        self._told = file
        self._pending: list[tuple[_Kept, Callable[[], None]]] = []
        self._wake = trio.Event()

    # ------------------------------------------------------------------ jobs
    async def add(self, job: JobRow) -> None:
        await self._write(_ADD, _added(job))

    def add_soon(self, job: JobRow, recorded: Callable[[], None]) -> None:
        """As `add`, but nobody waits: it is stored with what follows. Then `recorded` is called."""
        self.later(lambda db: _run(db, _ADD, _added(job)), recorded)

    async def end(
        self,
        job: JobId,
        state: State,
        *,
        result: bytes | None = None,
        receipt: bytes | None = None,
        code: str = "",
        message: str = "",
    ) -> None:
        await self._keep_writing(
            "UPDATE job SET state=?, ended=?, result=?, receipt=?, code=?, message=? WHERE id=?",
            (state, time.time(), result, receipt, code, message, job),
        )

    def end_passed(self, job: JobId, state: State, receipt: bytes) -> None:
        """As `end`, for a job whose result is stored: a restart would end it too."""
        row = (state, time.time(), receipt, job)
        self.later(
            lambda db: _run(db, "UPDATE job SET state=?, ended=?, receipt=? WHERE id=?", row)
        )

    async def keep_here(self, job: JobId) -> None:
        """It was decided that this machine does it; a restart does not ask again."""
        await self._keep_writing("UPDATE job SET local=1 WHERE id=?", (job,))

    async def get(self, job: str) -> JobRow | None:
        """The job whose id is, or begins with, `job`; None where that is not exactly one."""
        if not job or set(job) - set("0123456789abcdef"):
            return None
        rows = await self._read(_JOB + "WHERE id GLOB ? LIMIT 2", job + "*")
        return _row(JobRow, rows[0]) if len(rows) == 1 else None

    async def latest(self, limit: int) -> list[JobRow]:
        rows = await self._read(_JOB + "ORDER BY created DESC LIMIT ?", limit)
        return [_row(JobRow, row) for row in rows]

    async def unfinished(self) -> list[JobRow]:
        rows = await self._read(_JOB + "WHERE ended IS NULL ORDER BY created")
        return [_row(JobRow, row) for row in rows]

    # ------------------------------------------------------------------ attempts, output
    def begin_attempt(
        self,
        attempt: AttemptId,
        job: JobId,
        seller: PeerId,
        *,
        quote: bytes = b"",
        done: Usage | None = None,
        choice: bytes = b"",
    ) -> None:
        """`quote` is the accepted one as the seller signed it; what is `done` is not paid again.

        This and what follows of an attempt is stored soon: with the output or the job's end.
        """
        had = msgspec.msgpack.encode(dict(done or {}))
        row = (attempt, job, seller, time.time(), quote, had, choice)
        sql = "INSERT INTO attempt(id, job, seller, created, quote, done, choice)"
        self.later(lambda db: _run(db, f"{sql} VALUES(?,?,?,?,?,?,?)", row))

    def end_attempt(self, attempt: AttemptId, price: MicroCredits, outcome: str) -> None:
        row = (price, outcome, attempt)
        self.later(lambda db: _run(db, "UPDATE attempt SET price=?, outcome=? WHERE id=?", row))

    def name_kernel(self, attempt: AttemptId, kernel: tuple[str, str]) -> None:
        row = (*kernel, attempt)
        self.later(lambda db: _run(db, "UPDATE attempt SET kernel=?, identical=? WHERE id=?", row))

    async def attempts(self, job: JobId) -> list[AttemptRow]:
        rows = await self._read(_ATTEMPT + "WHERE job=? ORDER BY created", job)
        return [_row(AttemptRow, row) for row in rows]

    async def delivered(self, job: JobId) -> list[bytes]:
        rows = await self._read("SELECT body FROM delivered WHERE job=? ORDER BY seq", job)
        return [row[0] for row in rows]

    async def passed(self, job: JobRow, attempt: AttemptRow) -> None:
        """The result of `job` was checked: from here on a restart only has to settle.

        No cancel or deadline of the caller comes between.
        """

        def work(db: apsw.Connection) -> None:
            row = job.state, job.result, job.id
            db.execute("UPDATE job SET state=?, result=? WHERE id=?", row)
            ended = attempt.price, attempt.outcome, attempt.id
            db.execute("UPDATE attempt SET price=?, outcome=? WHERE id=?", ended)

        if self._told.append(msgspec.msgpack.encode(Said(job, attempt))):
            self.later(work, self._told.stored)
        else:
            with trio.CancelScope(shield=True):
                await self.transaction(work)

    async def hand_on(self, earlier: JobId, later: JobId) -> None:
        """Another job goes on from what this one was given."""
        await self._keep_writing(
            "INSERT OR REPLACE INTO delivered SELECT ?, seq, attempt, body FROM delivered"
            " WHERE job=?",
            (later, earlier),
        )

    async def forget_delivered(self, job: JobId) -> None:
        """Drops output that turned out to be wrong."""
        await self._keep_writing("DELETE FROM delivered WHERE job=?", (job,))

    def keep(
        self,
        place: tuple[JobId, int, AttemptId],
        body: bytes,
        price: MicroCredits,
        kernel: tuple[str, str],
        durable: Callable[[], None],
    ) -> None:
        """Queues one piece of output, with what its attempt costs now and what computes it.

        `durable` is called on this loop once both are stored.
        """
        self._pending.append((_Kept(*place, body, price, kernel), durable))
        self._wake.set()

    async def flush_forever(self) -> None:
        """Writes queued output in groups: whatever came while the last group was written."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            group, self._pending = self._pending, []
            while not await self._stored([row for row, _ in group]):  # noqa: ASYNC110
                await trio.sleep(store.FULL_DISK_SECONDS)
            for row, durable in group:
                try:
                    durable()
                except Exception:  # one job's books must not keep the others' output waiting
                    _log.exception("output_not_counted job=%s", row.job)

    async def _stored(self, rows: list[_Kept]) -> bool:
        """Output and its price together, so that a restart knows what it has spent."""
        latest = {row.attempt: row for row in rows}.values()

        def work(db: apsw.Connection) -> None:
            db.executemany(
                "INSERT OR REPLACE INTO delivered(job, seq, attempt, body) VALUES(?,?,?,?)",
                [row[:4] for row in rows],
            )
            db.executemany(
                "UPDATE attempt SET price=max(price, ?), kernel=?, identical=? WHERE id=?",
                [(row.price, *row.kernel, row.attempt) for row in latest],
            )

        try:
            await self.transaction(work)
        except NodeError as error:
            _log.warning("output_not_stored reason=%s", error)
            return False
        return True

    # ------------------------------------------------------------------ village
    async def add_certificates(self, village: bytes, bodies: tuple[bytes, ...]) -> None:
        now = time.time()
        await self._write(
            "INSERT OR IGNORE INTO certificate(body, village, added) VALUES(?,?,?)",
            *((body, village, now) for body in bodies),
        )

    async def certificates(self, village: bytes) -> tuple[bytes, ...]:
        rows = await self._read(
            "SELECT body FROM certificate WHERE village=? ORDER BY added DESC LIMIT 64", village
        )
        return tuple(row[0] for row in rows)

    async def setting(self, key: str) -> bytes | None:
        rows = await self._read("SELECT value FROM setting WHERE key=?", key)
        return rows[0][0] if rows else None

    async def set_setting(self, key: str, value: bytes) -> None:
        await self._write(
            "INSERT INTO setting(key, value) VALUES(?,?)"
            " ON CONFLICT(key) DO UPDATE SET value=excluded.value",
            (key, value),
        )

    async def set_durably(self, key: str, value: bytes) -> None:
        """A setting that outlasts a power cut too: what is counted against a cap."""

        def work(db: apsw.Connection) -> None:
            try:
                db.pragma("synchronous", 2)
                with db:
                    db.execute("INSERT OR REPLACE INTO setting VALUES(?,?)", (key, value))
            finally:
                db.pragma("synchronous", 1)

        with trio.CancelScope(shield=True):
            await self._alone(work)


@asynccontextmanager
async def open_jobs(path: Path) -> AsyncIterator[Jobs]:
    """Opens or makes jobs.db.

    Raises:
        ConfigError: the file is corrupt, newer than this program, or not ours.
    """
    db = await trio.to_thread.run_sync(_open, path)
    file = Told(told_beside(path))
    jobs = Jobs(db, file)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jobs.flush_forever)
            nursery.start_soon(jobs.write_later_forever)
            yield jobs
            nursery.cancel_scope.cancel()
    finally:
        await jobs.stop()
        file.close()


def told_beside(path: Path) -> Path | None:
    """The file of what was told already and is not in the jobs.db at `path` yet, if any can be."""
    return None if str(path) == IN_MEMORY else path.with_name(path.name + TOLD_SUFFIX)


def said_beside(path: Path) -> list[Said]:
    """What a kill kept out of the jobs.db at `path`, or what its node stores at this moment."""
    file = told_beside(path)
    return [_SAID.decode(record) for record in told.read(file)] if file else []


def store_said(db: apsw.Connection, said: list[Said]) -> None:
    """What is there already stays as it is, above all a job that ended."""
    with db:
        for each in said:
            db.execute(_ADD_SAID, (*_added(each.job), each.job.result))
            row = (getattr(each.attempt, name) for name in _SAID_COLUMNS)
            db.execute(_ADD_SAID_ATTEMPT, tuple(row))


def _open(path: Path) -> apsw.Connection:
    try:
        db = apsw.Connection(str(path))
        db.set_busy_timeout(5000)
        found = (db.pragma("application_id"), db.pragma("user_version"))
        if found == (0, 0):
            _create(db)
        elif found in {(APPLICATION_ID, older) for older in range(1, SCHEMA_VERSION)}:
            _upgrade(db)
        elif found != (APPLICATION_ID, SCHEMA_VERSION):
            raise ConfigError(
                f"{path} is of version {found[1]}, this program knows {SCHEMA_VERSION}",
                next_step="run the newer program, or choose another --data-dir",
            )
        db.pragma("journal_mode", "wal")
        db.pragma("synchronous", 1)
        db.pragma("foreign_keys", 1)
        store_said(db, said_beside(path))
    except apsw.Error as error:
        raise ConfigError(
            f"{path} cannot be opened: {error}",
            next_step=f"move it away: mv {path} {path}.broken (your credits are in ledger.db)",
        ) from None
    return db


def _create(db: apsw.Connection) -> None:
    with db:
        db.execute(_SCHEMA)
        db.execute(records.SCHEMA)
        db.pragma("application_id", APPLICATION_ID)
        db.pragma("user_version", SCHEMA_VERSION)


def _upgrade(db: apsw.Connection) -> None:
    """From any older version."""
    with db:
        for table, column, kind in _SINCE_1:
            known = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            if column not in known:
                db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
        db.execute(records.SCHEMA)
        db.pragma("user_version", SCHEMA_VERSION)


def _run(db: apsw.Connection, sql: str, row: tuple[Any, ...]) -> None:
    db.execute(sql, row)


def _added(job: JobRow) -> tuple[Any, ...]:
    """What a new job has."""
    return (
        job.id, job.operation, job.request, job.state, job.ceiling, job.deadline, job.peer,
        job.created, int(job.local), job.parent, job.prefer, int(job.mesh),
    )  # fmt: skip


def _row(kind: type[T], row: tuple[Any, ...]) -> T:
    fields: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]
    return kind(**dict(zip(fields, row, strict=True)))
