"""The control socket: the owner's commands, in the frames that peers use, on a Unix socket.

Only the owner can open it (0600). One task per connection; a broken client fells nothing else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from aivillage.node import results
from aivillage.node.buyer import Buyer, Running
from aivillage.node.events import Events
from aivillage.node.framing import READ_BYTES, FrameReader
from aivillage.node.transport.arrivals import arrived
from aivillage.node.transport.at_once import taken_at_once
from aivillage.protocols import codec, messages
from aivillage.protocols.errors import (
    AivillageError,
    ConfigError,
    NodeError,
    PeerError,
    RequestError,
)
from aivillage.protocols.messages import Answer, Ask, Cancel, Failure, Frame, Submit
from aivillage.protocols.types import JobId, PeerId

CLIENTS_MAX: Final = 32
"""A person's terminals and one gateway; more is a mistake."""
UNSENT_MAX: Final = 4096
"""Frames for a client that does not read; its job goes on without it."""
WRITTEN_MAX: Final = 64
"""Frames in one write: a turn's worth."""
UNSENT_BYTES_MAX: Final = 32 << 20
"""The same in bytes: sixteen of the largest answers, twice."""
TEXT_MAX: Final = 4096
"""Characters of an error: a peer may have written it."""

Handler = Callable[[dict[str, Any]], Awaitable[Any]]


class _SocketStream:
    """A Unix socket as a `Stream`; its peer is the owner."""

    peer = PeerId("owner")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, size_bytes_max: int) -> bytes:
        return await arrived(self._stream.socket.fileno(), size_bytes_max)

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerError("the client is gone", code="PEER_LOST") from None

    def taken_at_once(self, data: bytes) -> int:
        """How many bytes of it left without waiting: from 0 to all."""
        return taken_at_once(self._stream, data)

    async def close(self) -> None:
        await self._stream.aclose()


class Control:
    """Serves `handlers` (name -> coroutine function of its arguments) and submissions."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        buyer: Buyer,
        hello: Callable[[], messages.Hello],
        events: Events,
    ) -> None:
        self._handlers = handlers
        self._buyer = buyer
        self._hello = hello
        self._events = events
        self._slots = trio.CapacityLimiter(CLIENTS_MAX)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One client, until it leaves; refused at once where too many are here."""
        wire = _SocketStream(stream)
        if not self._slots.available_tokens:
            await self._refuse(wire)
            return
        async with self._slots, stream:
            send, receive = trio.open_memory_channel[bytes](UNSENT_MAX)
            try:
                async with trio.open_nursery() as nursery:
                    client = _Client(send, nursery, wire)
                    nursery.start_soon(self._write, wire, receive, client)
                    client.say(self._hello())
                    try:
                        await self._read(wire, client)
                    finally:
                        client.jobs.clear()  # they go on, and nobody follows them
                    nursery.cancel_scope.cancel()
            except* PeerError:
                self._events.emit("client_lost", level=10)
            except* Exception as defects:  # a defect in one connection must not fell the daemon
                self._events.emit("client_crashed", level=40, exc_info=defects)

    async def _refuse(self, wire: _SocketStream) -> None:
        self._events.emit("client_refused", level=30, clients=CLIENTS_MAX)
        reason = Failure(
            id=0,
            code="BUSY",
            message=f"{CLIENTS_MAX} commands talk to this node already",
            next_step="wait for one, or end one",
        )
        with trio.move_on_after(1):
            try:
                await wire.write(codec.frame(self._hello()) + codec.frame(reason))
                # Closing on its question would lose it our answer: let it leave first.
                while await wire.read(READ_BYTES):
                    continue
            except PeerError:
                self._events.emit("client_lost", level=10)
        await wire.close()

    async def _write(
        self, wire: _SocketStream, frames: trio.MemoryReceiveChannel[bytes], client: _Client
    ) -> None:
        async for framed in frames:
            together = [framed]
            with suppress(trio.WouldBlock):  # what was said meanwhile leaves in the same write
                while len(together) < WRITTEN_MAX:
                    together.append(frames.receive_nowait())
            joined = b"".join(together)
            await wire.write(joined)
            client.unsent_bytes -= len(joined)

    async def _read(self, wire: _SocketStream, client: _Client) -> None:
        reader = FrameReader(wire, codec.FRAME_BYTES_MAX)
        while True:
            while reader.ready:
                self._take(client, codec.decode(reader.ready.popleft()))
            if not await reader.fill():
                return

    def _take(self, client: _Client, frame: Frame) -> None:
        if isinstance(frame, Ask):
            client.nursery.start_soon(self._answer, client, frame)
        elif isinstance(frame, Submit):
            self._buyer.start_soon(self._submit, client, frame)  # the job outlasts its client
        elif isinstance(frame, Cancel):
            running = client.jobs.get(frame.id)
            if running is not None:
                self._buyer.cancel(running.pursuit.row.id)

    async def _answer(self, client: _Client, ask: Ask) -> None:
        handler = self._handlers.get(ask.what, _unknown)
        try:
            client.say(Answer(id=ask.id, value=await handler(ask.args)))
        except AivillageError as error:
            client.say(_failure(ask.id, error))
        except (KeyError, TypeError, ValueError) as error:
            client.say(_failure(ask.id, RequestError(f"{ask.what}: {error!r}")))
        except Exception as defect:  # a defect in one answer must not fell the daemon
            self._events.emit("ask_crashed", level=40, what=ask.what, exc_info=defect)
            client.say(_failure(ask.id, NodeError(repr(defect))))

    async def _submit(self, client: _Client, submit: Submit) -> None:
        def say(frame: Frame) -> None:
            client.say(msgspec.structs.replace(frame, id=submit.id))

        def recorded(job: JobId) -> None:
            if submit.id in client.jobs:  # else its answer was sooner, and names it
                client.say(messages.Progress(id=submit.id, done=0, note=f"job {job}"), soon=True)

        def begun(running: Running) -> None:
            client.jobs[submit.id] = running
            running.on_end = functools.partial(self._tell, client, submit.id)

        try:
            if submit.follow:
                await self._buyer.pursue(submit, say, recorded, begun)
            else:
                running = await self._buyer.submit(submit, _unheard)
                await self._buyer.recorded()
                client.say(Answer(id=submit.id, value={"job": running.pursuit.row.id}))
        except AivillageError as error:
            client.say(_failure(submit.id, error))
        except Exception as defect:  # a defect in one submission must not fell the daemon
            self._events.emit("ask_crashed", level=40, what="submit", exc_info=defect)
            client.say(_failure(submit.id, NodeError(repr(defect))))

    def _tell(self, client: _Client, call: int) -> None:
        """The end of a job, to a client that still is there."""
        running = client.jobs.pop(call, None)
        if running is None:
            return
        try:
            client.say(_end(call, running))
        except Exception as defect:  # what a client hears must not fell the job
            self._events.emit("ask_crashed", level=40, what="submit", exc_info=defect)
            client.say(_failure(call, NodeError(repr(defect))))


class _Client:
    """One connection: what it follows, and its way out."""

    def __init__(
        self,
        send: trio.MemorySendChannel[bytes],
        nursery: trio.Nursery,
        wire: _SocketStream,
    ) -> None:
        self.jobs: dict[int, Running] = {}
        self.nursery = nursery
        self.unsent_bytes = 0
        self._send = send
        self._wire = wire

    def say(self, frame: Frame, *, soon: bool = False) -> None:
        """Writes a frame, or queues it; a client that does not read is cut off, its jobs go on.

        An answer that cannot travel becomes a typed failure; of what a job shows on its way
        (a peer wrote it) nothing is lost that the answer does not have.
        """
        try:
            framed = codec.frame(frame)
        except RequestError as error:
            if not isinstance(frame, Answer):
                return
            framed = codec.frame(_failure(frame.id, error))
        if not (soon or self.unsent_bytes):  # it overtakes nothing that is queued or under way
            framed = framed[self._wire.taken_at_once(framed) :]
        if framed:
            self._queue(framed)

    def _queue(self, framed: bytes) -> None:
        self.unsent_bytes += len(framed)
        try:
            self._send.send_nowait(framed)
        except (trio.WouldBlock, trio.BrokenResourceError):
            self.nursery.cancel_scope.cancel()
        if self.unsent_bytes > UNSENT_BYTES_MAX:
            self.nursery.cancel_scope.cancel()


def _end(call: int, running: Running) -> Answer | Failure:
    """What the owner sees of a job that ended."""
    if running.error is not None:
        return _failure(call, running.error)
    try:
        return Answer(id=call, value=_outcome(running))
    except AivillageError as error:
        return _failure(call, error)


def _outcome(running: Running) -> dict[str, Any]:
    """Of a job that is done.

    Raises:
        RequestError: its result is none of the operation's.
    """
    pursuit = running.pursuit
    receipt = msgspec.to_builtins(running.receipt)
    result = results.shown(pursuit.row.operation, pursuit.result)
    return {"job": pursuit.row.id, "result": result, "receipt": receipt}


async def _unknown(_args: dict[str, Any]) -> Any:
    raise NodeError(
        "this daemon does not know that question",
        next_step="restart it: `aivillage-node stop`, then `start`",
    )


def _failure(call: int, error: AivillageError) -> Failure:
    """A peer may have written its text: what is no Unicode is shown, what is long is cut."""
    message, next_step = (
        text[:TEXT_MAX].encode(errors="backslashreplace").decode()
        for text in (error.message, error.next_step)
    )
    return Failure(id=call, code=error.code, message=message, next_step=next_step)


def _unheard(_frame: Frame) -> None:
    """Nobody follows this job."""


@asynccontextmanager
async def open_control(path: Path, control: Control) -> AsyncIterator[None]:
    """Serves the control socket while the block runs.

    Raises:
        ConfigError: another daemon serves this data folder, or the place cannot be written.
    """
    await _require_free(path)
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        before = os.umask(0o177)
        try:
            await socket.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        socket.close()
        raise ConfigError(
            f"the control socket {path} cannot be made: {error.strerror}",
            next_step="set XDG_RUNTIME_DIR to a folder of yours",
        ) from None
    socket.listen(CLIENTS_MAX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, control.serve, [trio.SocketListener(socket)])
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            _remove(path)


async def _require_free(path: Path) -> None:
    """A socket without a listener is left from a crash; one with is a running daemon."""
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError:
        _remove(path)
        return
    await stream.aclose()
    raise ConfigError(
        "a daemon is running on this data folder",
        next_step="`aivillage-node status` shows it, `aivillage-node stop` ends it",
    )


def _remove(path: Path) -> None:
    """Only ever a socket: anything else in its place is somebody's file."""
    if path.is_socket():
        path.unlink(missing_ok=True)
