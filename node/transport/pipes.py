"""What a connection of the in-memory network carries: streams, each of two pipes."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import PeerId

BUFFER_BYTES: Final = 256 * 1024
"""In flight per direction, as a Yamux window: beyond it a writer waits for the reader."""


class Wires(Protocol):
    """What a pipe knows of the network that it is laid in."""

    def delay_seconds(self) -> float: ...
    def separated(self, one: str, other: str) -> bool: ...
    async def joined(self, one: str, other: str) -> None: ...


class LoopbackStream:
    """One end of a stream: the pipe it reads and the pipe it writes."""

    def __init__(self, peer: PeerId, inward: Pipe, outward: Pipe) -> None:
        self._peer = peer
        self._inward = inward
        self._outward = outward
        self._broken = trio.Event()
        self._writing = trio.Lock()

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def ended(self) -> bool:
        return self._broken.is_set() or (self._inward.discards and self._outward.finished)

    @property
    def last_arrival(self) -> float:
        return self._inward.last_arrival

    async def read(self, size_bytes_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        # What arrived before the connection broke is still there to be read.
        while (data := self._inward.take(size_bytes_max)) is None and not self._broken.is_set():
            await self._inward.wait_readable()
        if data is not None:
            return data
        raise lost(f"the stream with {self._peer} broke")

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        async with self._writing:
            # Room is waited for before the first byte, so that a cancelled write wrote nothing.
            while not self._broken.is_set() and self._outward.full:
                await self._outward.wait_writable()
            if self._broken.is_set() or self._outward.finished:
                raise lost(f"the stream with {self._peer} broke")
            self._outward.put(data)

    def write_now(self, data: bytes) -> bool:
        is_closed = self._broken.is_set() or self._outward.finished
        if is_closed or self._writing.locked() or self._outward.full:
            return False
        self._outward.put(data)
        return True

    def listen(self, take: Callable[[bytes], bool]) -> None:
        """All of it is left to be read: whoever writes here has a turn of its own."""

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self._outward.finish()
        self._inward.discard()

    def break_(self, *, at_once: bool) -> None:
        """`at_once`: what has arrived and was not read is gone too."""
        self._broken.set()
        if at_once:
            self._inward.lose()
        self._inward.wake()
        self._outward.wake()


class Pipe:
    """One direction: chunks with the time at which they arrive. `None` is the end."""

    def __init__(self, network: Wires, source: str, sink: str) -> None:
        """`source` and `sink`: the names of the nodes that it joins."""
        self.finished = False
        self.discards = False
        self._names = source, sink
        self._network = network
        self._chunks: deque[tuple[float, bytes | None]] = deque()
        self._size_bytes = 0
        self.last_arrival = 0.0
        self._changed = trio.Event()

    @property
    def full(self) -> bool:
        return self._size_bytes >= BUFFER_BYTES and not self.discards

    def put(self, data: bytes | None) -> None:
        if self.discards or data == b"":
            return
        # Later chunks never overtake earlier ones, whatever the jitter says.
        arrival = max(self.last_arrival, trio.current_time() + self._network.delay_seconds())
        self.last_arrival = arrival
        self._chunks.append((arrival, data))
        self._size_bytes += len(data or b"")
        self.wake()

    def finish(self) -> None:
        if not self.finished:
            self.finished = True
            self.put(None)

    def discard(self) -> None:
        """Nobody reads any more: writers must not wait for it."""
        self.discards = True
        self._chunks.clear()
        self._size_bytes = 0
        self.wake()

    def lose(self) -> None:
        """The connection is gone, with all that was under way."""
        self.finished = True
        self._chunks.clear()
        self._size_bytes = 0
        self.wake()

    def take(self, size_bytes_max: int) -> bytes | None:
        """What has arrived, `b""` at the end, or None if that is nothing yet."""
        taken, now = bytearray(), trio.current_time()
        while self._arrived(now) and len(taken) < size_bytes_max:
            arrival, chunk = self._chunks.popleft()
            if chunk is None:
                self._chunks.appendleft((arrival, chunk))
                break
            room = size_bytes_max - len(taken)
            taken += chunk[:room]
            if len(chunk) > room:
                self._chunks.appendleft((arrival, chunk[room:]))
        if taken:
            self._size_bytes -= len(taken)
            self.wake()
            return bytes(taken)
        return b"" if self._arrived(now) or self.discards else None

    async def wait_readable(self) -> None:
        """Returns when something may have arrived, or the stream broke."""
        changed = self._changed
        if not self._chunks:
            await changed.wait()
        elif self._network.separated(*self._names):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first, changed.wait, nursery.cancel_scope)
                await self._network.joined(*self._names)
                nursery.cancel_scope.cancel()
        else:
            with trio.move_on_at(self._chunks[0][0]):
                await changed.wait()

    async def wait_writable(self) -> None:
        await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _arrived(self, now: float) -> bool:
        return (
            bool(self._chunks)
            and self._chunks[0][0] <= now
            and not self._network.separated(*self._names)
        )


async def first(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()


def lost(message: str) -> PeerError:
    return PeerError(message, code="PEER_LOST", next_step="dial the peer again")
