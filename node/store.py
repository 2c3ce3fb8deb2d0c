"""One connection to jobs.db, and the one thread that may use it.

What waits is written in groups: each piece in a savepoint of its own, all in one transaction. What
nobody waits for (`later`) joins the next group that somebody does wait for, or goes by itself after
`LATER_SECONDS`; nothing overtakes what was asked for before it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final, TypeVar, cast

import apsw
import trio

from aivillage.protocols.errors import AivillageError, NodeError

FULL_DISK_SECONDS: Final = 1.0
"""Between two tries on a full disk: what was delivered waits, unaccepted, unpaid."""
LATER_SECONDS: Final = 0.05
"""What a kill may cost of what nobody waited for: never what somebody was told (`told.py`)."""
SELDOM_SECONDS: Final = 1.0
"""The same of how peers did: a few of some hundred good jobs."""
GROUP_MAX: Final = 256
"""About 10 ms of work, so that nobody waits long for the others."""
_FULL: Final = (apsw.FullError, apsw.IOError)
T = TypeVar("T")
Work = Callable[[apsw.Connection], T]
_log = logging.getLogger("aivillage.jobs")


class _Job:
    """`waiter`: the task that waits for it. `alone`: not within a transaction of ours.

    `reads`: it changes nothing, so a full disk does not concern it.
    """

    def __init__(
        self,
        work: Work[Any],
        waiter: trio.lowlevel.Task | None = None,
        *,
        alone: bool = False,
        reads: bool = False,
        done: Callable[[], None] | None = None,
    ) -> None:
        self.work = work
        self.waiter = waiter
        self.alone = alone
        self.reads = reads
        self.done = done
        self.found: Any = None
        self.error: Exception | None = None


class Store:
    """Every method is one transaction, or part of one, in the store's own thread."""

    def __init__(self, db: apsw.Connection) -> None:
        """From the trio thread that is to wait for it; `stop` ends the thread."""
        self._db = db
        self._token = trio.lowlevel.current_trio_token()
        # Bounded by who waits: 64 jobs and 32 commands have a few writes each under way.
        self._queue: queue.SimpleQueue[list[_Job]] = queue.SimpleQueue()
        self._later: list[_Job] = []
        self._is_later = trio.Event()
        self._seldom: dict[Hashable, Callable[[], Work[None]]] = {}
        self._seldom_at = trio.current_time()
        self._owed: list[_Job] = []
        """The thread's: what a full disk did not take, and nobody waits for."""
        self._thread = threading.Thread(target=self._work_forever, name="jobs", daemon=True)
        self._thread.start()

    async def transaction(self, work: Work[T]) -> T:
        """`work` on the connection, all of it or nothing; it is done even if nobody waits."""
        return cast("T", await self._asked(_Job(work, trio.lowlevel.current_task())))

    def later(self, work: Work[None], done: Callable[[], None] | None = None) -> None:
        """`work` with the next transaction, or soon; a full disk is waited for.

        Whoever asks for a transaction after this one finds it done. `done` is called on this loop
        once it is.
        """
        self._later.append(_Job(work, done=done))
        self._is_later.set()

    def seldom(self, key: Hashable, make: Callable[[], Work[None]]) -> None:
        """As `later` for what changes at every job: within `SELDOM_SECONDS`, as it is by then.

        `make` is called at that time, once however often `key` was named before.
        """
        self._seldom[key] = make
        self._is_later.set()

    async def written(self) -> None:
        """Returns once all that was left for later is stored."""
        await self._patiently(lambda: self.transaction(_nothing))

    async def stop(self) -> None:
        """Writes what waits and closes the connection; returns when the thread has ended."""
        self._flush_seldom()
        self._queue.put(self._later)
        self._queue.put([])
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
            self._db.close()

    async def write_later_forever(self) -> None:
        """Sends off what nobody asked for after a while."""
        while True:
            if not self._later and not self._seldom:
                self._is_later = trio.Event()
                await self._is_later.wait()
            await trio.sleep(LATER_SECONDS)
            if self._seldom and trio.current_time() >= self._seldom_at:
                self._flush_seldom()
            if self._later:
                await self.written()

    async def _alone(self, work: Work[T]) -> T:
        """`work` in no transaction but its own, such as one that changes a pragma."""
        return cast("T", await self._asked(_Job(work, trio.lowlevel.current_task(), alone=True)))

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
        def work(db: apsw.Connection) -> list[tuple[Any, ...]]:
            return cast("list[Any]", db.execute(sql, values).fetchall())

        job = _Job(work, trio.lowlevel.current_task(), reads=True)
        return cast("list[Any]", await self._asked(job))

    # ------------------------------------------------------------------ to the thread and back
    async def _asked(self, job: _Job) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._later.append(job)
        together, self._later = self._later, []
        self._queue.put(together)
        await trio.lowlevel.wait_task_rescheduled(_until_done)
        if job.error is not None:
            raise job.error
        return job.found

    def _flush_seldom(self) -> None:
        self._seldom_at = trio.current_time() + SELDOM_SECONDS
        for make in self._seldom.values():
            self._later.append(_Job(make()))
        self._seldom.clear()

    def _hand_back(self, jobs: list[_Job]) -> None:
        def release() -> None:
            for job in jobs:
                if job.waiter is not None:
                    trio.lowlevel.reschedule(job.waiter)
                elif job.done is not None:
                    job.done()

        try:
            self._token.run_sync_soon(release)
        except trio.RunFinishedError:  # the loop is gone, and everybody who waited
            _log.debug("nobody_waits")

    # ------------------------------------------------------------------ in the thread
    def _work_forever(self) -> None:
        going = True
        while going:
            group, going = self._take()
            self._run_all(group)

    def _take(self) -> tuple[list[_Job], bool]:
        """Waits for jobs and takes what else is there; False: it was asked to stop."""
        group: list[_Job] = []
        while together := self._queue.get():
            group += together
            if group[-1].alone or len(group) >= GROUP_MAX or self._queue.empty():
                return group, True
        return group, False

    def _run_all(self, group: list[_Job]) -> None:
        together = self._owed + [job for job in group if not job.alone]
        if together:
            self._run_group(together)
        for job in (job for job in group if job.alone):
            self._run(job)
        told = [job for job in together if job.done and not job.error and job not in self._owed]
        self._hand_back(told + [job for job in group if job.waiter is not None])

    def _run_group(self, group: list[_Job]) -> None:
        """All in one commit; a full disk fells the whole group."""
        self._owed = []
        try:
            self._db.execute("BEGIN")
            for job in group:
                self._db.execute("SAVEPOINT job")
                self._run(job)
                self._db.execute("ROLLBACK TO job; RELEASE job" if job.error else "RELEASE job")
            self._db.execute("COMMIT")
        except apsw.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._owed = [job for job in group if job.waiter is None]
            for job in group:
                job.error = typed(error) if job.waiter and not job.reads else None
                if job.reads:  # of what is written
                    self._run(job)

    def _run(self, job: _Job) -> None:
        """One piece; only a disk that takes no more is the whole group's affair."""
        try:
            job.found = job.work(self._db)
        except apsw.Error as error:
            if isinstance(error, _FULL) and not (job.alone or job.reads):
                raise
            job.error = typed(error)
            job.error.__cause__ = error
        except Exception as error:  # a defect in one piece of work is its caller's to hear of
            job.error = error
        if job.waiter is None and job.error is not None:
            _log.error("write_lost reason=%r", job.error)


def _until_done(_raise_cancel: Any) -> trio.lowlevel.Abort:
    """What was asked for happens, so its caller hears how it went, cancelled or not."""
    return trio.lowlevel.Abort.FAILED


def _nothing(_db: apsw.Connection) -> None:
    """Only what was left for later."""


def typed(error: apsw.Error) -> AivillageError:
    if isinstance(error, _FULL):
        return NodeError(
            f"jobs.db cannot be written: {error}",
            code="DISK_FULL",
            next_step="free some disk space; jobs wait until then",
        )
    return NodeError(f"jobs.db: {error}", code="INTERNAL")
