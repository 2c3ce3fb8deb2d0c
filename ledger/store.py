"""The one thread that writes the book.

Jobs are taken in groups: each in a savepoint of its own, all in one transaction, one fsync.
Results are handed back on the trio thread after COMMIT returned, never before.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import apsw
import trio

from aivillage.protocols.errors import AivillageError, NodeError

T = TypeVar("T")
log = logging.getLogger(__name__)
JOBS_MAX: Final = 256
"""In one group: about 50 ms of work, so that nobody waits long for the others."""
GATHER_SECONDS: Final = 0.01
"""After a group of several the next one waits so long for company: a commit costs some 300 us.

As PostgreSQL's commit_delay does. Who comes alone after one that came alone does not wait.
"""


class _Job(NamedTuple):
    run: Callable[[apsw.Connection], Any]
    done: Callable[[Any], None]
    failed: Callable[[AivillageError], None]


_Reply = Callable[[], None]


def _full() -> NodeError:
    return NodeError(
        "the disk is full: the ledger takes no new entries",
        code="DISK_FULL",
        next_step="free some space; the node goes on by itself",
    )


def _as_error(error: Exception) -> AivillageError:
    if isinstance(error, AivillageError):
        return error
    if isinstance(error, apsw.FullError):
        return _full()
    return NodeError(f"a ledger step was undone: {type(error).__name__}: {error}")


class Store:
    """Runs jobs on `db` in a thread. Until `start` and after `stop` the caller may use `db`."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self.on_fatal: Callable[[NodeError], None] = lambda error: None
        """Called on the trio thread when a COMMIT failed: the node must stop."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger")
        self._is_crowded = False
        self._token: trio.lowlevel.TrioToken | None = None

    def start(self) -> None:
        """From the trio thread that wants the replies."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()

    async def stop(self) -> None:
        """Finishes what is queued, joins the thread and returns when all replies were given."""
        self._jobs.put(None)
        given = trio.Event()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
            trio.lowlevel.current_trio_token().run_sync_soon(given.set)
            await given.wait()

    def submit(
        self,
        job: Callable[[apsw.Connection], T],
        done: Callable[[T], None],
        failed: Callable[[AivillageError], None],
    ) -> None:
        self._jobs.put(_Job(job, done, failed))

    def _work(self) -> None:
        going = True
        while going:
            group, going = self._take()
            self._is_crowded = len(group) > 1
            if group:
                self._run_group(group)

    def _take(self) -> tuple[list[_Job], bool]:
        """Waits for a job and takes what else is there; False: it was asked to stop."""
        group: list[_Job] = []
        job = self._jobs.get()
        if self._is_crowded and job is not None:
            time.sleep(GATHER_SECONDS)
        while job is not None:
            group.append(job)
            if len(group) == JOBS_MAX or self._jobs.empty():
                return group, True
            job = self._jobs.get()
        return group, False

    def _run_group(self, group: list[_Job]) -> None:
        replies: list[_Reply] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            replies = [self._run(job) for job in group]
            self._db.execute("COMMIT")
        except apsw.FullError:
            self._roll_back()
            replies = [_reply(job.failed, _full()) for job in group]
        except Exception as error:  # whatever it was, what is durable is now unknown: stop
            self._roll_back()
            fatal = NodeError(f"the ledger cannot be written: {error}")
            replies = [_reply(job.failed, fatal) for job in group]
            replies.append(_reply(self.on_fatal, fatal))
        self._hand_back(replies)

    def _run(self, job: _Job) -> _Reply:
        """One job, all or nothing; a full disk fells the whole group."""
        self._db.execute("SAVEPOINT job")
        try:
            result = job.run(self._db)
        except apsw.FullError:
            raise
        except Exception as error:  # a bad step must not fell the writer: undone, and told
            self._db.execute("ROLLBACK TO job")
            self._db.execute("RELEASE job")
            return _reply(job.failed, _as_error(error))
        self._db.execute("RELEASE job")
        return _reply(job.done, result)

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _hand_back(self, replies: list[_Reply]) -> None:
        def release() -> None:
            for reply in replies:
                try:
                    reply()
                except Exception as error:  # an exception here would end the whole event loop
                    log.exception("ledger_reply_failed")
                    self.on_fatal(NodeError(f"a defect in the ledger: {error!r}"))

        if self._token is not None:
            self._token.run_sync_soon(release)


def _reply(callback: Callable[[T], None], value: T) -> _Reply:
    return lambda: callback(value)
