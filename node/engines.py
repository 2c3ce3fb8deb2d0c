"""Resident engines, as the daemon holds them: one worker process each, many sessions."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from aivillage.models import worker_messages as say
from aivillage.node.worker_process import WorkerProcess
from aivillage.protocols.errors import AivillageError, JobError, RefusedError, from_code
from aivillage.protocols.ports import EngineInfo, SessionFrame
from aivillage.protocols.prefixes import PrefixTokens
from aivillage.protocols.pricing import token_price
from aivillage.protocols.rechecking import Claim, Finding
from aivillage.protocols.types import MicroCredits, PeerId

FRAMES_WAITING_MAX: Final = 16_384
"""More than an allowance can yield in a context: a session beyond it is a worker gone wrong."""
OWN_SCOPE: Final = b""
"""Of the node's own jobs; no buyer's name is empty."""


class Scopes:
    """Names of buyers for workers: they tell buyers apart, and say no more."""

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def of(self, peer: PeerId) -> bytes:
        return hashlib.blake2b(peer.encode(), key=self._key, digest_size=16).digest()


class EngineSession:
    """One answer in the making. Iterate for its frames; the last one says `finished`."""

    def __init__(self, number: int, client: EngineClient) -> None:
        self.number = number
        self._client = client
        self.inlet, self._outlet = trio.open_memory_channel[SessionFrame](FRAMES_WAITING_MAX)
        self.failure: AivillageError | None = None
        self._ended = False

    def allow(self, units: int) -> None:
        """It may produce up to `units` in all, delivered ones included: quads plus tokens.

        Raises:
            JobError: the engine is gone.
        """
        self._client.send(say.Allow(session=self.number, units=units))

    def feed(self, body: bytes) -> None:
        """One input, for an engine that takes them.

        Raises:
            JobError: the engine is gone.
        """
        self._client.send(say.Feed(session=self.number, body=body))

    def fail(self, error: AivillageError) -> None:
        """Ends the iteration with `error`, after the frames that came before it."""
        self.failure = self.failure or error
        self.inlet.close()

    def __aiter__(self) -> EngineSession:
        return self

    async def __anext__(self) -> SessionFrame:
        """Raises: AivillageError: why there is no more; JOB_FAILED where the worker died."""
        if self._ended:
            raise StopAsyncIteration
        try:
            frame = await self._outlet.receive()
        except trio.EndOfChannel:
            raise self.failure or JobError("the session was closed") from None
        if frame.error:
            raise JobError(frame.error)
        self._ended = bool(frame.finished)
        return frame


class EngineClient:
    """A loaded model in its worker. Made by `load_engine`."""

    def __init__(self, worker: WorkerProcess, loaded: say.Loaded, slots: int) -> None:
        self.info: EngineInfo = loaded.info
        self.load_seconds = loaded.load_seconds
        self.prefix_tokens = PrefixTokens()
        """Of all prompts: tokens that were read, and those that were kept from before."""
        self.slots = slots
        self._worker = worker
        self._sessions: dict[int, EngineSession] = {}
        self._numbers = itertools.count(1)
        self._is_put_away = False
        self._left = trio.Event()

    @property
    def token_price(self) -> MicroCredits:
        """Of its model, by default."""
        return token_price(self.info.active_parameters)

    @property
    def dead(self) -> bool:
        return self._worker.dead

    @property
    def pid(self) -> int:
        return self._worker.pid

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    @property
    def is_full(self) -> bool:
        return len(self._sessions) >= self.slots

    async def has_room(self) -> None:
        """Returns once a session can begin, unless another one comes first."""
        while self.is_full:
            await self._left.wait()

    def idle_seconds(self) -> float:
        """How long nobody has used it; 0 while somebody does."""
        return 0.0 if self._sessions else trio.current_time() - self._worker.idle_since

    def send(self, command: say.Command) -> None:
        self._worker.send(command)

    @asynccontextmanager
    async def open_session(
        self,
        request: bytes,
        delivered: Sequence[int] = (),
        claim: Claim | None = None,
        scope: bytes = OWN_SCOPE,
    ) -> AsyncIterator[EngineSession]:
        """Goes on after the token ids in `delivered`, or only reads `claim`.

        What sessions of one `scope` have read need not be read again. Leaving the block frees the
        slot.

        Raises:
            RefusedError: BUSY, every slot is taken, or another model got its memory just now.
            JobError: the engine is gone.
        """
        if self._is_put_away:
            raise RefusedError("the model was put away for another one", next_step="try again")
        if self.is_full:
            raise RefusedError(f"all {self.slots} slots of the engine are taken")
        session = EngineSession(next(self._numbers), self)
        added = say.Add(
            session=session.number, request=request, delivered=tuple(delivered), claim=claim,
            scope=scope,
        )  # fmt: skip
        self.send(added)
        self._sessions[session.number] = session
        try:
            yield session
        finally:
            del self._sessions[session.number]
            self._worker.idle_since = trio.current_time()
            self._left.set()
            self._left = trio.Event()
            with suppress(JobError):  # a dead worker holds no slot
                self.send(say.CancelSession(session=session.number))

    async def recheck(self, request: bytes, claim: Claim) -> Finding:
        """What reading an answer to `request` shows; between steps of whoever decodes meanwhile.

        Raises:
            RequestError: it can be no answer to it, or the engine rechecks nothing.
            RefusedError, JobError: as in `open_session`.
        """
        async with self.open_session(request, claim=claim) as session:
            async for frame in session:
                if frame.finding is not None:
                    return frame.finding
        raise JobError("the engine stopped before the end")

    async def dispatch(self) -> None:
        """Hands every frame to its session, until the worker ends; then fails them all."""
        try:
            while True:
                self._take(await self._worker.next())
        except AivillageError as error:
            for session in self._sessions.values():
                session.fail(from_code(error.code, error.message, error.next_step))
        finally:
            await self._worker.stop()

    async def put_away(self) -> None:
        """Ends the worker of a model that nobody uses: another one needs its memory."""
        self._is_put_away = True
        await self._worker.stop()

    async def stop(self) -> None:
        """Ends the worker; sessions that still run get JOB_FAILED."""
        await self._worker.stop()

    def _take(self, reply: say.Reply) -> None:
        """Raises: JobError: the worker said what an engine does not say."""
        if isinstance(reply, say.Frames):
            self.prefix_tokens = reply.prefix
            for frame in reply.frames:
                self._give(frame)
        elif isinstance(reply, say.Failed) and reply.session is not None:
            if session := self._sessions.get(reply.session):
                session.fail(from_code(reply.code, reply.message, reply.next_step))
        else:
            raise JobError(f"an engine's worker said {type(reply).__name__}")

    def _give(self, frame: SessionFrame) -> None:
        session = self._sessions.get(frame.session)
        if session is None or session.failure:
            return  # it was cancelled while the step ran
        try:
            session.inlet.send_nowait(frame)
        except trio.WouldBlock:
            raise JobError("an engine's worker floods its sessions") from None


async def load_engine(nursery: trio.Nursery, worker: WorkerProcess, load: say.Load) -> EngineClient:
    """Loads a model, or a part of one, in `worker`, and tells its sessions apart in `nursery`.

    Where that fails, the worker is stopped.

    Raises:
        AivillageError: the model is unknown, not on this machine, or damaged.
    """
    try:
        client = EngineClient(worker, await _loaded(worker, load), load.slots)
    except BaseException:
        await worker.stop()
        raise
    nursery.start_soon(client.dispatch)
    return client


async def _loaded(worker: WorkerProcess, load: say.Load) -> say.Loaded:
    """Raises: AivillageError: it cannot be loaded."""
    worker.send(load)
    reply = await worker.next()
    if isinstance(reply, say.Failed):
        raise from_code(reply.code, reply.message, reply.next_step)
    if not isinstance(reply, say.Loaded):
        raise JobError(f"a loading worker said {type(reply).__name__}")
    return reply
