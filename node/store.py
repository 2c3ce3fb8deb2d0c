"""One connection to jobs.db, and the one thread at a time that may use it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

import apsw
import trio

from aivillage.protocols.errors import AivillageError, NodeError

FULL_DISK_SECONDS: Final = 1.0
"""Between two tries on a full disk: what was delivered waits, unaccepted, unpaid."""
T = TypeVar("T")
_log = logging.getLogger("aivillage.jobs")


class Store:
    """Every method is one transaction in the store's own thread."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._limiter = trio.CapacityLimiter(1)  # apsw connections serve one thread at a time

    async def transaction(self, work: Callable[[apsw.Connection], T]) -> T:
        """`work` on the connection, all of it or nothing."""

        def transact() -> T:
            try:
                with self._db:
                    found = work(self._db)
            except apsw.Error as error:
                raise typed(error) from error
            return found

        return await trio.to_thread.run_sync(transact, limiter=self._limiter)

    async def _write(self, sql: str, *rows: tuple[Any, ...]) -> None:
        def work(db: apsw.Connection) -> None:
            db.executemany(sql, rows)

        await self.transaction(work)

    async def _keep_writing(self, sql: str, *rows: tuple[Any, ...]) -> None:
        """As `_write`, but a full disk is waited for: what this tells must not be lost."""
        await self._patiently(lambda: self._write(sql, *rows))

    async def _patiently(self, write: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await write()
            except NodeError as error:
                if error.code != "DISK_FULL":
                    raise
                _log.warning("write_waits reason=%s", error.message)
            else:
                return
            await trio.sleep(FULL_DISK_SECONDS)

    async def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return await self.transaction(
            lambda db: cast("list[Any]", db.execute(sql, values).fetchall())
        )


def typed(error: apsw.Error) -> AivillageError:
    if isinstance(error, apsw.FullError | apsw.IOError):
        return NodeError(
            f"jobs.db cannot be written: {error}",
            code="DISK_FULL",
            next_step="free some disk space; jobs wait until then",
        )
    return NodeError(f"jobs.db: {error}", code="INTERNAL")
