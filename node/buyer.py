"""Takes the owner's jobs, and goes on with what a restart interrupted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from aivillage.node.config import Settings
from aivillage.node.jobs import JobRow
from aivillage.node.links import Link
from aivillage.node.pursuit import SETTLE_SECONDS, Pursuit, Say, Trade
from aivillage.protocols.errors import AivillageError, JobError, RefusedError
from aivillage.protocols.messages import Frame, Step, Submit
from aivillage.protocols.types import JobId, PeerId

JOBS_MAX: Final = 64
"""Running at the same time; one more is refused, since its owner can wait better than we."""
END_RETRY_SECONDS: Final = 1.0


class Running:
    """A pursuit in its task."""

    def __init__(self, pursuit: Pursuit) -> None:
        self.pursuit = pursuit
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.cancelled = False
        self.error: AivillageError | None = None


class Buyer:
    """All running jobs of the owner. One task each, all in the nursery given."""

    def __init__(self, *, settings: Settings, trade: Trade, nursery: trio.Nursery) -> None:
        self._settings = settings
        self._trade = trade
        self._nursery = nursery
        self._running: dict[JobId, Running] = {}
        self._starting = 0
        self._listed = trio.Event()
        self.refusal: Callable[[], AivillageError | None] = lambda: None

    async def submit(self, submit: Submit, say: Say) -> Running:
        """Records a job and starts it.

        Raises:
            AivillageError: the request is wrong, or this node takes no work now.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        if len(self._running) + self._starting >= JOBS_MAX:
            raise RefusedError(
                f"{JOBS_MAX} jobs of yours are running",
                code="BUSY",
                next_step="wait for one, or `aivillage-node jobs cancel ID`",
            )
        self._starting += 1
        try:
            return self._start(Pursuit(await self._record(submit), self._trade, say))
        finally:
            self._starting -= 1

    async def _record(self, submit: Submit) -> JobRow:
        await self._listed.wait()  # else a job of this run would be taken for an interrupted one
        await self._trade.workers.estimate(submit.operation, submit.request)
        ceiling = submit.ceiling_micro_credits
        row = JobRow(
            id=JobId(secrets.token_hex(16)),
            operation=submit.operation,
            request=submit.request,
            state="new",
            ceiling=self._settings.ceiling_micro_credits if ceiling is None else ceiling,
            deadline=submit.deadline_seconds,
            peer=submit.peer or "",
            created=time.time(),
        )
        await self._trade.jobs.add(row)
        return row

    async def resume(self) -> None:
        """Starts again what a stop or crash of this node interrupted."""
        rows = await self._trade.jobs.unfinished()
        self._listed.set()
        for row in rows:
            pursuit = Pursuit(row, self._trade, _unheard)
            try:
                await pursuit.restore()
            except AivillageError as error:  # one unreadable job must not keep the node down
                self._trade.events.emit("job_not_resumed", level=40, job=row.id, reason=str(error))
                continue
            self._trade.events.emit("job_resumed", job=row.id, delivered=len(pursuit.output.bodies))
            self._start(pursuit)

    def _start(self, pursuit: Pursuit) -> Running:
        running = Running(pursuit)
        self._running[pursuit.row.id] = running
        self._nursery.start_soon(self._live, running)
        return running

    def cancel(self, job: JobId) -> bool:
        """Stops a running job; what was accepted is paid. False: it is not running."""
        running = self._running.get(job)
        if running is None:
            return False
        running.cancelled = True
        running.scope.cancel()
        return True

    def running(self) -> list[Running]:
        return list(self._running.values())

    def on_step(self, link: Link, frame: Step) -> None:
        """Hands each item to its attempt; items of ended attempts are late, and not paid."""
        for item in frame.items:
            attempt = self._trade.attempts.get((link, item.session))
            if attempt is not None:
                attempt.on_step(item)

    def on_up(self, peer: PeerId) -> None:
        """A peer that is back may go on with what it lost; one that lied stays out."""
        self._trade.market.forget_peer(peer)
        self._trade.discovery.reachable(peer)
        for running in self.running():
            error = running.pursuit.excluded.get(peer)
            if error is not None and error.code == "PEER_LOST":
                del running.pursuit.excluded[peer]

    async def _live(self, running: Running) -> None:
        """One job; its end is in jobs.db before anybody hears of it."""
        row = running.pursuit.row
        with running.scope:
            try:
                with trio.fail_after(max(0.0, running.pursuit.seconds_left())):
                    if running.pursuit.result is None:
                        await running.pursuit.run()
            except trio.TooSlowError:
                running.error = JobError("the job's deadline passed", code="DEADLINE")
            except AivillageError as error:
                running.error = error
            except Exception as defect:  # one job must not fell the daemon
                self._trade.events.emit("job_crashed", level=40, job=row.id, error=repr(defect))
                running.error = JobError(f"a defect of this node: {defect!r}", code="JOB_FAILED")
        if running.pursuit.result is not None:
            running.error = None  # whatever came late: it is done, and paid
        elif running.cancelled:
            running.error = JobError("cancelled by its owner", code="CANCELLED")
        await self._close(running)

    async def _close(self, running: Running) -> None:
        pursuit, error = running.pursuit, running.error
        if error is None:
            pursuit.end("settled")
        else:
            pursuit.end("cancel" if running.cancelled else "fail")
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_SECONDS):
            await self._store_end(pursuit, error)
        self._trade.events.emit(
            "job_ended",
            job=pursuit.row.id,
            state=pursuit.state,
            micro_credits=pursuit.spent,
            code=error.code if error else "",
        )
        del self._running[pursuit.row.id]
        running.ended.set()

    async def _store_end(self, pursuit: Pursuit, error: AivillageError | None) -> None:
        """Where the disk is full to the last, the next start of this node ends the job."""
        receipt = msgspec.json.encode(pursuit.receipt()) if error is None else None
        while True:
            try:
                return await self._trade.jobs.end(
                    pursuit.row.id,
                    pursuit.state,
                    result=pursuit.result,
                    receipt=receipt,
                    code=error.code if error else "",
                    message=error.message if error else "",
                )
            except AivillageError as failure:
                self._trade.events.emit(
                    "end_not_stored", level=40, job=pursuit.row.id, reason=str(failure)
                )
                await trio.sleep(END_RETRY_SECONDS)


def _unheard(_frame: Frame) -> None:
    """Nobody follows this job now."""
