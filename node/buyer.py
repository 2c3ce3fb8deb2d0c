"""Takes the owner's jobs, and goes on with what a restart interrupted."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.node.blob_fetch import BlobFetch
from aivillage.node.choice import RATES, Explanation
from aivillage.node.config import Settings
from aivillage.node.draft import NONE, require_possible
from aivillage.node.jobs import JobRow
from aivillage.node.links import Link
from aivillage.node.local import LocalJob
from aivillage.node.market import Need
from aivillage.node.pursuit import SETTLE_SECONDS, Pursuit
from aivillage.node.split_job import SplitJob
from aivillage.node.stage_peers import explanation, plan_for, with_draft
from aivillage.node.stand_by import StandBy
from aivillage.node.stand_ins import StandIns
from aivillage.node.sub_jobs import Bought, Order, SubJobs
from aivillage.node.trade import Receipt, Say, Trade, Verify
from aivillage.node.wishes import require_consistent
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError, JobError, RefusedError, RequestError
from aivillage.protocols.job import State
from aivillage.protocols.messages import Frame, Step, Submit
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import JobId, PeerId

JOBS_MAX: Final = 64
"""Running at the same time; one more is refused, since its owner can wait better than we."""


Begun = Pursuit | LocalJob | BlobFetch
AnyJob = Begun | SplitJob
"""A split job begins as a pursuit."""


class Running:
    """A job in its task."""

    def __init__(self, pursuit: AnyJob) -> None:
        self.pursuit: AnyJob = pursuit
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.on_end: Callable[[], None] = _unasked
        """Called at its end, before anything else hears of it: somebody waits."""
        self.cancelled = False
        self.error: AivillageError | None = None
        self.receipt: Receipt | None = None
        """As it is stored and told, once the job is done."""


class Buyer:
    """All running jobs of the owner. One task each, all in the nursery given."""

    def __init__(self, *, settings: Settings, trade: Trade, nursery: trio.Nursery) -> None:
        self._settings = settings
        self._trade = trade
        self._nursery = nursery
        self._running: dict[JobId, Running] = {}
        self._starting = 0
        self.refusal: Callable[[], AivillageError | None] = lambda: None
        trade.market.running_at = self._running_at
        self._stand_ins = StandIns(trade, nursery)
        self.on_ended: Callable[[Pursuit], None] = lambda _pursuit: None
        """A job on the mesh ended, and its owner heard of it."""
        self.verify: Verify | None = None
        self.by_node: dict[str, Callable[[JobRow, Say], BlobFetch]] = {}
        """Operations that no worker does: what pursues a job of theirs."""

    def start_soon(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """A task that lives as long as jobs do, not as long as whoever asks for one."""
        self._nursery.start_soon(work, *args)

    async def submit(self, submit: Submit, say: Say, order: Order | None = None) -> Running:
        """Records a job and starts it. `order` says for which module, if for one.

        Raises:
            AivillageError: the request is wrong, or this node takes no work now.
        """
        running = await self._begun(submit, say, order, _noted_id)
        self._nursery.start_soon(self._live, running)
        return running

    async def pursue(
        self,
        submit: Submit,
        say: Say,
        recorded: Callable[[JobId], None],
        begun: Callable[[Running], None],
    ) -> None:
        """As `submit`, to the end of the job, in the caller's own task, which `start_soon` made.

        `recorded` hears its id once that outlasts a kill of this node: with the job's first
        output, or soon. `begun` is called before anything else happens to the job.

        Raises:
            AivillageError: the request is wrong, or this node takes no work now.
        """
        running = await self._begun(submit, say, None, recorded)
        begun(running)
        await self._live(running)

    async def _begun(
        self, submit: Submit, say: Say, order: Order | None, recorded: Callable[[JobId], None]
    ) -> Running:
        """Recorded, and in the list; nobody works at it yet."""
        self._require_room()
        self._starting += 1
        try:
            row = await self._record(submit, order.parent if order else "")
            self._trade.jobs.add_soon(row, functools.partial(recorded, row.id))
            pursuit = self._pursuit(row, say, order.sub_jobs if order else None)
            if isinstance(pursuit, Pursuit):
                pursuit.draft = submit.draft
                if submit.verify:
                    pursuit.verify = self.verify
                if submit.stand_by:
                    pursuit.stand_by = StandBy(self._trade, self._nursery, say)
            return self._listed(pursuit)
        finally:
            self._starting -= 1

    async def take(self, row: JobRow, pursuit: Pursuit | None = None) -> Running:
        """Records and starts a task of a map, whose request was looked at before.

        Raises:
            AivillageError: this node takes no work now.
        """
        self._require_room()
        self._starting += 1
        try:
            self._trade.jobs.add_soon(row, _noted)
            return self._start(pursuit or self._pursuit(row, _unheard))
        finally:
            self._starting -= 1

    def _require_room(self) -> None:
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        if len(self._running) + self._starting >= JOBS_MAX:
            raise RefusedError(
                f"{JOBS_MAX} jobs of yours are running",
                code="BUSY",
                next_step="wait for one, or `aivillage-node jobs cancel ID`",
            )

    async def buy(self, order: Order) -> Bought:
        """A sub-job of a module that runs here, to its end. Cancelled, it ends too.

        Raises:
            AivillageError: it was not begun.
        """
        submit = Submit(
            id=0,
            operation=order.operation,
            request=order.request,
            ceiling_micro_credits=order.budget,
            deadline_seconds=order.deadline_seconds,
            local=order.local,
        )
        running = await self._to_its_end(await self.submit(submit, _unheard, order))
        pursuit = running.pursuit
        return Bought(result=pursuit.result, spent=pursuit.spent, error=running.error)

    async def again(self, row: JobRow, pursuit: LocalJob | None = None) -> Running:
        """A job that does another one's work again, to its end. Cancelled, it ends too.

        Raises:
            AivillageError: it was not begun: this node takes no work now.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        self._trade.jobs.add_soon(row, _noted)
        return await self._to_its_end(self._start(pursuit or self._pursuit(row, _unheard)))

    async def _to_its_end(self, running: Running) -> Running:
        """Whoever stops waiting for it wants it no more."""
        try:
            await running.ended.wait()
        finally:
            self.cancel(running.pursuit.row.id)
        return running

    async def _record(self, submit: Submit, parent: str) -> JobRow:
        require_consistent(submit)
        await self._trade.workers.estimate(submit.operation, submit.request)
        await self._trade.workers.validate(submit.operation, submit.request)
        require_possible(submit, self._trade.workers.shelf)
        ceiling = submit.ceiling_micro_credits
        return JobRow(
            id=JobId(secrets.token_hex(16)),
            operation=submit.operation,
            request=submit.request,
            state="new",
            ceiling=self._settings.ceiling_micro_credits if ceiling is None else ceiling,
            deadline=submit.deadline_seconds,
            peer=submit.peer or "",
            created=time.time(),
            local=submit.local,
            parent=parent,
            prefer=self._preference(submit.prefer),
            mesh=submit.mesh or submit.verify or submit.stand_by,
        )

    def _preference(self, said: str) -> str:
        """Raises: RequestError: nobody can prefer that."""
        preference = said or self._settings.prefer
        if preference not in RATES:
            raise RequestError(
                f"nobody can prefer {preference!r}", next_step=f"--prefer {', '.join(RATES)}"
            )
        return preference

    async def explain(self, submit: Submit) -> Explanation:
        """What would be chosen for a job, and why; nothing is recorded, and nothing bought.

        Raises:
            AivillageError: the request is wrong, or nobody does it.
        """
        if submit.local:
            raise RequestError("a local job chooses nobody", next_step="leave out --local")
        if registry.is_done_by_node(submit.operation):
            raise RequestError(
                f"{submit.operation} takes all who have it", next_step="leave out --dry-run"
            )
        usage, seconds = await self._trade.workers.estimate(submit.operation, submit.request)
        await self._trade.workers.validate(submit.operation, submit.request)
        require_possible(submit, self._trade.workers.shelf)
        ceiling = submit.ceiling_micro_credits
        need = Need(
            operation=submit.operation,
            request=submit.request,
            usage=usage,
            done={},
            budget=self._settings.ceiling_micro_credits if ceiling is None else ceiling,
            seconds=seconds,
            peer=submit.peer or "",
            prefer=self._preference(submit.prefer),
            may_stay=not (submit.mesh or submit.peer),
        )
        try:
            return await self._trade.market.explain(need)
        except AivillageError as error:
            split, before = None, self._stand_ins.before(need.work.model)
            if error.code == "NO_PEER" and registry.is_served_by_engine(need.operation):
                split = None if need.peer else plan_for(self._trade, need.work.model, before)
            if split is None:
                raise
            named = submit.draft if submit.draft != NONE else ""
            return explanation(with_draft(split, named), need.prefer)

    async def resume(self) -> None:
        """Starts again what a stop or crash of this node interrupted."""
        for row in await self._trade.jobs.unfinished():
            if row.parent and row.result is None:
                reason = "the job that wanted it was interrupted"
                await self._trade.jobs.end(row.id, "cancelled", code="CANCELLED", message=reason)
                continue
            pursuit = self._pursuit(row, _unheard)
            try:
                await pursuit.restore()
            except AivillageError as error:  # one unreadable job must not keep the node down
                self._trade.events.emit("job_not_resumed", level=40, job=row.id, reason=str(error))
                continue
            self._trade.events.emit("job_resumed", job=row.id, delivered=len(pursuit.output.bodies))
            self._start(pursuit)

    def _pursuit(self, row: JobRow, say: Say, sub_jobs: SubJobs | None = None) -> Begun:
        if pursue := self.by_node.get(row.operation):
            return pursue(row, say)
        if not row.local:
            return Pursuit(row, self._trade, say)
        local = LocalJob(row, self._trade, say)
        local.on_call = sub_jobs or self._local_sub_jobs(local)
        return local

    def _local_sub_jobs(self, local: LocalJob) -> SubJobs:
        return SubJobs(
            self.buy,
            parent=local.row.id,
            ceiling=local.row.ceiling,
            deadline_seconds=local.seconds_left(),
            local=True,
        )

    def _start(self, pursuit: AnyJob) -> Running:
        running = self._listed(pursuit)
        self._nursery.start_soon(self._live, running)
        return running

    def _listed(self, pursuit: AnyJob) -> Running:
        running = self._running[pursuit.row.id] = Running(pursuit)
        return running

    def cancel(self, job: JobId) -> bool:
        """Stops a running job; what was accepted is paid. False: it is not running."""
        running = self._running.get(job)
        if running is None:
            return False
        running.cancelled = True
        running.scope.cancel()
        return True

    def state_of(self, row: JobRow) -> State:
        """What a job is doing now; jobs.db knows only how it began and ended."""
        running = self._running.get(row.id)
        return running.pursuit.state if running else row.state

    async def recorded(self) -> None:
        """Returns once all jobs taken so far outlast a kill of this node."""
        await self._trade.jobs.written()

    async def metered(self, row: JobRow) -> Usage:
        """What a job took in all, by our own meter; a stranger's one runs in a worker.

        Raises:
            AivillageError: it has no result, or its operation is not enabled here.
        """
        if row.result is None:
            raise RequestError(
                f"job {row.id[:8]} has no result", next_step=f"aivillage-node jobs show {row.id}"
            )
        return await self._trade.workers.meter(row.operation, row.request, row.result)

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
        running.scope.deadline = trio.current_time() + max(0.0, running.pursuit.seconds_left())
        with running.scope:
            try:
                await self._work(running)
            except AivillageError as error:
                running.error = error
            except Exception as defect:  # one job must not fell the daemon
                self._trade.events.emit("job_crashed", level=40, job=row.id, error=repr(defect))
                running.error = JobError(f"a defect of this node: {defect!r}", code="JOB_FAILED")
        if running.pursuit.result is not None:
            running.error = None  # whatever came late: it is done, and paid
        elif running.cancelled:
            running.error = JobError("cancelled by its owner", code="CANCELLED")
        elif running.scope.cancelled_caught:
            running.error = JobError("the job's deadline passed", code="DEADLINE")
        try:
            await self._close(running)
        except Exception as defect:  # the next start of this node ends the job
            self._trade.events.emit("end_crashed", level=40, job=row.id, error=repr(defect))
        finally:
            self._running.pop(row.id, None)
            running.on_end()
            running.ended.set()
            self._after(running)

    def _after(self, running: Running) -> None:
        """What nobody waits for once a job has ended."""
        pursuit, error = running.pursuit, running.error
        self._trade.events.emit_often(
            "job_ended",
            job=pursuit.row.id,
            state=pursuit.state,
            micro_credits=pursuit.spent,
            code=error.code if error else "",
        )
        if isinstance(pursuit, Pursuit):
            if pursuit.stand_by:
                pursuit.stand_by.stop()
            self.on_ended(pursuit)

    async def _work(self, running: Running) -> None:
        """Raises: AivillageError: why there is no result."""
        pursuit = running.pursuit
        if pursuit.result is None:
            await pursuit.run()
        if isinstance(pursuit, Pursuit) and pursuit.here:
            await self._do_here(running, pursuit, pursuit.here)
        elif isinstance(pursuit, Pursuit) and pursuit.is_split:
            running.pursuit = split = SplitJob(
                pursuit, self._trade, self._stand_ins, self._nursery,
                passes_on=self._settings.stage_pass_on,
            )  # fmt: skip
            await split.run()

    async def _do_here(self, running: Running, pursuit: Pursuit, choice: Explanation) -> None:
        """No peer was better than this machine. Raises: AivillageError: why there is no result."""
        await self._trade.jobs.keep_here(pursuit.row.id)
        local = LocalJob(pursuit.row, self._trade, pursuit.say, choice)
        local.on_call = self._local_sub_jobs(local)
        running.pursuit = local
        pursuit.say(messages.Progress(id=0, done=0, note=choice.why))
        try:
            await local.run()
        except AivillageError as error:
            error.next_step = f"{error.next_step or 'it failed on this machine'}; or submit --mesh"
            raise

    def _running_at(self, peer: PeerId) -> int:
        """Jobs of ours that run at a peer now."""
        return sum(link.peer == peer for link, _ in self._trade.attempts)

    def running_here(self) -> int:
        return sum(isinstance(running.pursuit, LocalJob) for running in self.running())

    async def _close(self, running: Running) -> None:
        pursuit, error = running.pursuit, running.error
        if error is None:
            pursuit.move("settled")
            running.receipt = pursuit.receipt()
            if isinstance(pursuit, Pursuit) and pursuit.is_kept:  # so nobody waits for its end
                receipt = msgspec.json.encode(running.receipt)
                self._trade.jobs.end_passed(pursuit.row.id, pursuit.state, receipt)
                return
        else:
            pursuit.move("cancel" if running.cancelled else "fail")
        with trio.CancelScope(shield=True, deadline=trio.current_time() + SETTLE_SECONDS) as grace:
            await self._store_end(running)
        if grace.cancelled_caught:  # a full disk: until there is room, or the node stops
            await self._store_end(running)

    async def _store_end(self, running: Running) -> None:
        pursuit, error = running.pursuit, running.error
        receipt = msgspec.json.encode(running.receipt) if running.receipt else None
        try:
            await self._trade.jobs.end(
                pursuit.row.id,
                pursuit.state,
                result=pursuit.result,
                receipt=receipt,
                code=error.code if error else "",
                message=error.message if error else "",
            )
        except AivillageError as failure:  # the next start of this node ends the job
            self._trade.events.emit(
                "end_not_stored", level=40, job=pursuit.row.id, reason=str(failure)
            )


def _noted() -> None:
    """Nobody asks when it was stored."""


def _noted_id(_job: JobId) -> None:
    """Nor of this one."""


def _unasked() -> None:
    """Nobody waits for the end of this job."""


def _unheard(_frame: Frame) -> None:
    """Nobody follows this job now."""
