"""Module calls in workers: a small warm pool, one call at a time each."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import trio

from aivillage.models import worker_messages as say
from aivillage.node.worker_process import WorkerProcess
from aivillage.protocols.errors import AivillageError, JobError, from_code
from aivillage.protocols.ports import Event, ResultEvent

RUN_BYTES_MAX: Final = 64 << 20
"""All events of one run together: what a run may fill of the daemon's memory and disk."""
EVENT_BYTES_MIN: Final = 256
"""Small events count as this much: their handling is what they cost."""
CANCEL_SECONDS_MAX: Final = 1.0
"""A cancelled module has this long to come to its senses; then its worker is killed."""
CALL_SECONDS_MAX: Final = 30.0
"""`estimate`, `meter`, `check` and `describe` are fast by contract."""

OnCall = Callable[[str, bytes, int], Awaitable[bytes]]
"""(operation, request, budget in micro-credits) -> result: a sub-job on the mesh."""
StartWorker = Callable[[], Awaitable[WorkerProcess]]
Answer = TypeVar("Answer", bound=say.ModuleReply)


def _as_it_is(_worker: WorkerProcess) -> None:
    """Any worker is fit."""


class WorkerPool:
    """Idle workers by key. Third-party code shares a process with nobody: its key is its own."""

    def __init__(self, start: StartWorker, size: int) -> None:
        self._start = start
        self._limiter = trio.CapacityLimiter(size)
        self._places: dict[WorkerProcess, object] = {}
        self._idle: dict[str, list[WorkerProcess]] = {}

    @asynccontextmanager
    async def worker(
        self, key: str, require_fit: Callable[[WorkerProcess], None] = _as_it_is
    ) -> AsyncIterator[WorkerProcess]:
        """A worker for one call; it goes back unless the block left it dead or in mid-call.

        `require_fit` raises what is wrong with it, if anything.
        """
        place = object()
        try:
            self._limiter.acquire_on_behalf_of_nowait(place)  # a free one costs no turn of the loop
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(place)
        try:
            worker = await self._take(key)
            self._places[worker] = place
            try:
                require_fit(worker)
                yield worker
            finally:
                del self._places[worker]
                if worker.dead or worker.is_busy:
                    await worker.stop()
                else:
                    worker.idle_since = trio.current_time()
                    self._idle.setdefault(key, []).append(worker)
        finally:
            with suppress(RuntimeError):  # lent to others, and cancelled while it waited for it
                self._limiter.release_on_behalf_of(place)

    @asynccontextmanager
    async def away(self, worker: WorkerProcess) -> AsyncIterator[None]:
        """Lends the place of `worker` to others while its module waits for a sub-job.

        Else modules that wait in every place would keep out the calls that they wait for.
        """
        place = self._places[worker]
        self._limiter.release_on_behalf_of(place)
        try:
            yield
        finally:
            await self._limiter.acquire_on_behalf_of(place)

    async def stop_idle(self, longer_than_seconds: float = -1.0) -> None:
        """Ends the workers that nobody has used for that long; without it, all idle ones."""
        now = trio.current_time()
        ended: list[WorkerProcess] = []
        for key, workers in list(self._idle.items()):
            old = [w for w in workers if now - w.idle_since > longer_than_seconds]
            ended += old
            # All before the first await: calls take from these lists while a worker ends.
            self._idle[key] = [w for w in workers if w not in old]
        for worker in ended:
            await worker.stop()

    async def _take(self, key: str) -> WorkerProcess:
        while mine := self._idle.get(key):
            worker = mine.pop()
            if not worker.dead:
                return worker
            await worker.stop()
        idle_count = sum(map(len, self._idle.values()))
        if idle_count + self._limiter.borrowed_tokens > self._limiter.total_tokens:
            await self.stop_idle()
        return await self._start()


class ModuleRun:
    """A run in its worker. Iterate for its events; the last one is its result."""

    def __init__(self, worker: WorkerProcess, run: say.Run, on_call: OnCall) -> None:
        worker.send(run)
        worker.is_busy = True
        self._worker = worker
        self._run = run
        self._on_call = on_call
        self._bytes_left = RUN_BYTES_MAX
        self._deadline = trio.current_time() + (run.deadline_seconds or math.inf)
        self.ended = False

    def __aiter__(self) -> ModuleRun:
        return self

    async def __anext__(self) -> Event:
        """Raises: AivillageError: why there is no more; DEADLINE where time ran out."""
        if self.ended:
            raise StopAsyncIteration
        with trio.CancelScope(deadline=self._deadline):
            while True:
                reply = await self._worker.next()
                if isinstance(reply, say.SubCall):
                    await self._answer(reply)
                elif (event := self._event(reply)) is not None:
                    if isinstance(event, ResultEvent):
                        self._see_end()
                    return event
                else:
                    raise StopAsyncIteration
        self._worker.kill()
        raise JobError(
            f"{self._run.operation} ran out of its {self._run.deadline_seconds:.0f} s",
            code="DEADLINE",
            next_step="allow more time",
        )

    async def cancel(self) -> None:
        """Asks the module to end; kills its worker if it does not. Awaits, even when cancelled."""
        deadline = trio.current_time() + CANCEL_SECONDS_MAX
        with trio.CancelScope(deadline=deadline, shield=True):
            try:
                self._worker.send(say.CancelRun(id=self._run.id))
                while not self.ended:
                    self._event(await self._worker.next())
            except AivillageError:
                self.ended = True
        if not self.ended:
            self._worker.kill()

    def _event(self, reply: say.Reply) -> Event | None:
        """The event that `reply` carries; None at the end."""
        if isinstance(reply, say.Failed):
            self._end()
            raise from_code(reply.code, reply.message, reply.next_step)
        if isinstance(reply, say.RunEnded):
            self._end()
            return None
        if not isinstance(reply, say.Ran):
            self._worker.kill()
            raise JobError(f"a running worker said {type(reply).__name__}")
        self._bytes_left -= EVENT_BYTES_MIN + len(getattr(reply.event, "body", b""))
        if self._bytes_left < 0:
            self._worker.kill()
            raise JobError(f"{self._run.operation} sent more than {RUN_BYTES_MAX:,} bytes")
        return reply.event

    def _see_end(self) -> None:
        """A result and the end of its run are written together: mostly both are here."""
        reply = self._worker.next_nowait()
        if reply is not None:
            self._event(reply)

    def _end(self) -> None:
        self.ended = True
        self._worker.is_busy = False

    async def _answer(self, call: say.SubCall) -> None:
        try:
            result = await self._on_call(call.operation, call.request, call.budget)
            answer = say.CallAnswer(id=call.id, result=result)
        except AivillageError as error:
            answer = say.CallAnswer(
                id=call.id, code=error.code, message=error.message, next_step=error.next_step
            )
        self._worker.send(answer)


async def ask(worker: WorkerProcess, command: say.ModuleCommand, kind: type[Answer]) -> Answer:
    """One short call of a module.

    Raises:
        AivillageError: the module's refusal; JOB_FAILED where the worker or its time ended.
    """
    worker.send(command)
    worker.is_busy = True
    with trio.move_on_after(CALL_SECONDS_MAX):
        reply = await worker.next()
        worker.is_busy = False
        if isinstance(reply, say.Failed):
            raise from_code(reply.code, reply.message, reply.next_step)
        if isinstance(reply, kind):
            return reply
        worker.kill()
        raise JobError(f"a worker answered {type(reply).__name__} to {type(command).__name__}")
    worker.kill()
    raise JobError(
        f"{command.operation} took longer than {CALL_SECONDS_MAX:.0f} s for a short call"
    )
