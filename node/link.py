"""One live link: a kept-open stream with one peer that carries every call of the pair.

Ids: who dialled opens calls with odd ids, who accepted with even ones, so an id names one call
whatever its direction, and an answer carries the id of its call.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from aivillage.node.framing import FrameReader
from aivillage.node.inbox import Inbox
from aivillage.node.link_costs import Costs
from aivillage.protocols import codec
from aivillage.protocols.errors import AivillageError, JobError, PeerError, RequestError, from_code
from aivillage.protocols.messages import (
    Answer,
    Ask,
    Failure,
    Frame,
    Hello,
    Ping,
    Pong,
    Submit,
    Text,
    Tunnel,
)
from aivillage.protocols.ports import PromptStream
from aivillage.protocols.types import PeerId, Seconds

log = logging.getLogger("aivillage.links")

NOT_FOR_PEERS: Final = (Hello, Ask, Answer, Submit, Text, Tunnel)
"""A second hello, and what only the owner's control socket may say."""


@dataclass(frozen=True, kw_only=True)
class LinkLimits:
    """What one peer may cost us. The defaults are generous: they stop abuse, not use."""

    queue_frames_max: int = 8192
    """256 calls in flight with some 30 frames each; more means that the peer does not read."""
    queue_bytes_max: int = 16 << 20
    """Sixteen of the largest frames."""
    inbox_frames_max: int = 1024
    """About 10 s of one session at 100 steps a second."""
    frame_bytes_max: int = codec.FRAME_BYTES_MAX
    frames_per_second: float = 20_000
    """Six times the 3,200 tokens a second that a full batch of 32 sends, one frame each."""
    blobs_per_second: float = 200
    blobs_burst: float = 400
    """Ledger blobs cost a signature's check each, 0.12 ms: two percent of a core. An honest pair
    has some five a second, and a SYNC of a few hundred parts once."""
    questions_per_second: float = 20
    questions_burst: float = 64
    """Of `link_costs.py`, each with an estimate, a signature or a transaction of ours behind it.
    One buyer has at most 64 jobs at a time, and quotes are good for a minute."""
    bytes_per_second: float = 64 << 20
    """Half of what one stream carries on a LAN."""
    write_bytes: int = 256 * 1024
    """Frames are joined up to here; beyond it a write gains nothing and delays a receipt."""
    hello_seconds: Seconds = 5.0
    probe_seconds: Seconds = 2.0
    """How long a link has to prove that it lives when its peer opens another one."""
    ping_seconds: Seconds = 10.0
    ping_misses_max: int = 3
    flush_seconds: Seconds = 1.0
    ride_seconds: Seconds = 0.005
    """How long a frame that may ride waits for one to ride with."""


class LinkOwner(Protocol):
    """Who hears what happens on a link. All plain calls."""

    def frame_arrived(self, link: Link, frame: Frame) -> None: ...
    def link_closed(self, link: Link, reason: str) -> None: ...
    def rider(self, link: Link) -> Frame | None:
        """A frame that may join a write that is about to leave."""
        ...


class Link:
    """A live link. Built by `Links`; `send`, `ask` and inboxes are for the daemon."""

    def __init__(
        self,
        stream: PromptStream,
        reader: FrameReader,
        hello: Hello,
        *,
        dialled: bool,
        limits: LinkLimits,
        owner: LinkOwner,
    ) -> None:
        self.peer: PeerId = stream.peer
        self.hello = hello
        self.clock_ahead_ms = hello.clock_unix_ms - int(time.time() * 1000)
        """Of the peer's clock, as its hello said it: what it signs with an end ends by that."""
        self.dialled = dialled
        self.rtt_seconds: Seconds = 0.0
        self.heard_count = 0
        self._heard_at = trio.current_time()
        self.closed_because = ""
        self.silent = False
        self.ended = trio.Event()
        self._stream = stream
        self._reader = reader
        self._limits = limits
        self._owner = owner
        self._ids = itertools.count(1 if dialled else 2, 2)
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._riders: list[bytes] = []
        self._has_riders = trio.Event()
        self._wake = trio.Event()
        self._is_idle = False
        """Nothing is queued or leaves, and the loop that writes has had its turn."""
        self._leaving = trio.lowlevel.ParkingLot()
        self._hearing = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._costs = Costs(limits)
        self._pings: dict[int, float] = {}
        self._asks: dict[int, _Asked] = {}
        self._inboxes: dict[int, Inbox[Frame]] = {}

    def next_id(self) -> int:
        """A fresh id for a call that this side opens: odd if it dialled, else even."""
        return next(self._ids)

    def send(self, message: Frame, *, may_ride: bool = False) -> None:
        """Queues `message`; what is queued together leaves in one write.

        `may_ride`: before the next frame, in its write, or alone after `ride_seconds`.

        Raises:
            PeerError: PEER_LOST, the link is closed or this send found the peer too slow.
            RequestError: TOO_LARGE, the peer would not take it.
        """
        if self.closed_because:
            raise self._lost()
        framed = codec.frame(message)
        if len(framed) - codec.LENGTH_BYTES > self.hello.max_frame_bytes:
            raise RequestError(
                f"the peer takes frames of at most {self.hello.max_frame_bytes:,} bytes",
                code="TOO_LARGE",
                next_step="make the request smaller, or choose another peer",
            )
        if may_ride:
            self._riders.append(framed)
            self._queue_bytes += len(framed)
            self._has_riders.set()
        else:
            self._enqueue(framed)
        if self._overflowing():
            self.close("the peer reads too slowly")
            raise self._lost()

    async def drained(self, size_bytes: int) -> None:
        """Returns once no more than so much waits to leave, or the link is closed.

        Who sends much waits here, so that what others send is not stuck behind it.
        """
        while self._queue_bytes > size_bytes and not self.closed_because:
            await self._leaving.park()

    async def ask(self, message: Frame, *, timeout_seconds: Seconds) -> Frame:
        """Sends `message` and returns the next frame with its id.

        Raises:
            AivillageError: the peer's `Failure`, typed by its code.
            PeerError: PEER_LOST.
            JobError: DEADLINE.
        """
        call: int = message.id  # type: ignore[union-attr]  # Step has none, and asks nothing
        asked = self._asks[call] = _Asked()
        try:
            self.send(message)
            with trio.move_on_after(timeout_seconds):
                await asked.done.wait()
        finally:
            del self._asks[call]
        if asked.reply is None:
            if self.closed_because:
                raise self._lost()
            raise JobError(f"no answer within {timeout_seconds:g} s", code="DEADLINE")
        if isinstance(asked.reply, Failure):
            raise as_error(asked.reply)
        return asked.reply

    def open_inbox(self, call: int) -> Inbox[Frame]:
        """Every frame with that id, in order, until `close_inbox`.

        When the link dies, the last frame is a `Failure` with PEER_LOST; when the reader falls
        `inbox_frames_max` behind, one with BUSY. Then the channel ends.
        """
        inbox = self._inboxes[call] = Inbox()
        if self.closed_because:
            self._end_inbox(call, "PEER_LOST", self.closed_because)
        return inbox

    def close_inbox(self, call: int) -> None:
        """Later frames with that id go to `on_message`. An unknown id is no error."""
        inbox = self._inboxes.pop(call, None)
        if inbox is not None:
            inbox.end()

    @property
    def waiting(self) -> bool:
        """Whether an answer to something of ours is still to come."""
        return bool(self._asks or self._inboxes)

    def close(self, reason: str, *, say: Failure | None = None) -> None:
        """Dead from now on, for both sides; what is queued has `flush_seconds` to leave.

        `say` is the last frame. Closing twice is no error, the first reason stays.
        """
        if self.closed_because:
            return
        if say is not None:
            self._enqueue(codec.frame(say))
        self._board()
        self.closed_because = reason
        self._scope.deadline = trio.current_time() + self._limits.flush_seconds
        self._wake.set()
        self._hearing.unpark_all()
        self._leaving.unpark_all()
        for asked in self._asks.values():
            asked.done.set()
        for call in list(self._inboxes):
            self._end_inbox(call, "PEER_LOST", reason)
        self._owner.link_closed(self, reason)

    async def is_alive(self, within_seconds: Seconds) -> bool:
        """Whether the peer can be heard on this link now."""
        if not self.closed_because:
            self._ping()
            with trio.move_on_after(within_seconds):
                await self._hearing.park()
                return not self.closed_because
        return False

    async def run(self) -> None:
        """Reads, writes and pings until the link is closed, then closes the stream."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    loops = (self._write_loop, self._read_loop, self._ping_loop, self._ride_loop)
                    for loop in loops:
                        nursery.start_soon(self._guarded, loop)
        finally:
            self.close("the node is stopping")
            with trio.CancelScope(shield=True):
                await self._stream.close()
            self.ended.set()

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        """The one place where a failure of this link ends: at this link."""
        try:
            await loop()
        except Exception as error:
            self._contain(error)

    def _contain(self, error: Exception) -> None:
        """Called where it is handled."""
        if isinstance(error, PeerError):
            self.fail(error)
        else:
            log.error("link_failed", exc_info=error, extra={"peer": self.peer})
            self.close(f"a defect of this node: {error!r}")

    def fail(self, error: AivillageError) -> None:
        """Closes because of `error`, and tells the peer unless it is gone."""
        gone = error.code == "PEER_LOST"
        say = None if gone else Failure(id=0, code=error.code, message=error.message[:200])
        self.close(error.message, say=say)
        if gone:
            self._scope.cancel()

    # ------------------------------------------------------------------ writing

    def _enqueue(self, framed: bytes) -> None:
        self._board()
        self._queue.append(framed)
        self._queue_bytes += len(framed)
        if self._is_idle:
            self._is_idle = False
            self._write_now()
        self._wake.set()

    def _write_now(self) -> None:
        """The first of a turn leaves at once; what is queued in the same turn follows together."""
        batch = self._batch()
        if not self._stream.write_now(batch):
            self._queue.appendleft(batch)
            self._queue_bytes += len(batch)

    def _board(self) -> None:
        """What may ride goes first: it was said first."""
        if self._riders:
            self._queue.extend(self._riders)
            self._riders.clear()

    async def _ride_loop(self) -> None:
        """Sends off what found nothing to ride with."""
        while True:
            await self._has_riders.wait()
            await trio.sleep(self._limits.ride_seconds)
            self._has_riders = trio.Event()
            if self._riders:
                self._board()
                self._wake.set()

    def _overflowing(self) -> bool:
        limits = self._limits
        return (
            len(self._queue) + len(self._riders) > limits.queue_frames_max
            or self._queue_bytes > limits.queue_bytes_max
        )

    async def _write_loop(self) -> None:
        while True:
            while self._queue:
                await self._stream.write(self._batch())
                self._leaving.unpark_all()
            if self.closed_because:
                self._scope.cancel()
                return
            self._wake, self._is_idle = trio.Event(), True
            await self._wake.wait()
            self._is_idle = False  # also where riders that found no company woke it

    def _batch(self) -> bytes:
        """What leaves in one write: queued frames up to `write_bytes`, at least one."""
        rider = self._owner.rider(self)
        if rider is not None:
            self._enqueue(codec.frame(rider))
        parts: list[bytes] = []
        size_bytes, size_max = 0, self._limits.write_bytes
        while self._queue and (not parts or size_bytes + len(self._queue[0]) <= size_max):
            part = self._queue.popleft()
            size_bytes += len(part)
            parts.append(part)
        self._queue_bytes -= size_bytes
        return b"".join(parts)

    # ------------------------------------------------------------------ reading

    async def _read_loop(self) -> None:
        self._stream.listen(self._hear)
        costs, size_bytes = self._costs, 1
        while size_bytes:
            count = len(self._reader.ready)
            while self._reader.ready and not self.closed_because:
                frame = codec.decode(self._reader.ready.popleft())
                self._take(frame)
                await costs.spend(costs.of(frame))
            if self.closed_because:
                return
            await costs.spend(costs.frames.take(count))
            size_bytes = await self._reader.fill()
            await costs.spend(costs.volume.take(size_bytes))
        raise PeerError("the peer closed the link", code="PEER_LOST")

    def _hear(self, data: bytes) -> bool:
        """What is small, in the turn in which it comes; False: `_read_loop` has to wait for it."""
        costs = self._costs
        if self.closed_because or costs.is_in_debt():
            return False
        try:
            self._reader.take(data)
            costs.owe(costs.volume.take(len(data)))
            costs.owe(costs.frames.take(len(self._reader.ready)))
            while self._reader.ready and not self.closed_because:
                frame = codec.decode(self._reader.ready.popleft())
                self._take(frame)
                costs.owe(costs.of(frame))
        except Exception as error:
            self._contain(error)
        return True

    def _take(self, frame: Frame) -> None:
        self.heard_count += 1
        self._heard_at = trio.current_time()
        self._hearing.unpark_all()
        if isinstance(frame, Ping):
            self.send(Pong(nonce=frame.nonce))
        elif isinstance(frame, Pong):
            self._ponged(frame.nonce)
        elif isinstance(frame, NOT_FOR_PEERS):
            raise PeerError(f"{type(frame).__name__} is not for peers", code="BAD_REQUEST")
        elif isinstance(frame, Failure) and frame.id == 0:
            raise PeerError(f"the peer ended it: {frame.code} {frame.message}", code="PEER_LOST")
        elif not self._answered(frame):
            self._owner.frame_arrived(self, frame)

    def _answered(self, frame: Frame) -> bool:
        """Whether an inbox or an ask here was waiting for `frame`."""
        call: int = getattr(frame, "id", 0)
        inbox = self._inboxes.get(call)
        if inbox is not None:
            if len(inbox) < self._limits.inbox_frames_max:
                inbox.put(frame)
            else:
                self._end_inbox(call, "BUSY", "this node did not keep up with the answers")
            return True
        asked = self._asks.get(call)
        if asked is None or asked.done.is_set():
            return False
        asked.reply = frame
        asked.done.set()
        return True

    def _end_inbox(self, call: int, code: str, message: str) -> None:
        inbox = self._inboxes.pop(call)
        inbox.put(Failure(id=call, code=code, message=message))
        inbox.end()

    # ------------------------------------------------------------------ liveness

    async def _ping_loop(self) -> None:
        """Three intervals in which nothing at all came from the peer drop the link.

        Counted from the last sign of life, in steps of our own sleep: a machine that was itself
        suspended for an hour heard nothing either, and that says nothing of its peer.
        """
        quiet, limit = 0.0, self._limits.ping_seconds * self._limits.ping_misses_max
        while quiet < limit:
            if self.closed_because:
                return
            heard_count = self.heard_count
            self._ping()
            step = min(self._limits.ping_seconds, limit - quiet)
            await trio.sleep(step)
            was_silent = self.heard_count == heard_count
            quiet = quiet + step if was_silent else trio.current_time() - self._heard_at
        self.silent = True
        misses = self._limits.ping_misses_max
        raise PeerError(f"no sign of life for {misses} pings", code="PEER_LOST")

    def _ping(self) -> None:
        nonce = next(_nonces)
        self._pings = {nonce: trio.current_time()}
        self.send(Ping(nonce=nonce))

    def _ponged(self, nonce: int) -> None:
        sent_at = self._pings.pop(nonce, None)
        if sent_at is not None:
            self.rtt_seconds = trio.current_time() - sent_at

    def _lost(self) -> PeerError:
        return PeerError(
            f"the link with {self.peer} is closed: {self.closed_because}",
            code="PEER_LOST",
            next_step="connect to the peer again",
        )


class _Asked:
    """A question under way."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Frame | None = None


_nonces = itertools.count(1)


def as_error(failure: Failure) -> AivillageError:
    return from_code(failure.code, failure.message, failure.next_step, failure.retry_after_seconds)
