"""The short way in: from the socket to a stream's buffer in one turn of the loop.

The library reads a frame through sixteen coroutines, eight lines for its log and two locks. What is
plain data of an open stream, whole in one Noise message, needs none of that. The library's way
stays the way of all else: streams that open and end, pings, windows, what is cut or wrong. Both
take from the same buffers, so nothing overtakes anything.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

import trio

from aivillage.node.transport.psk import Lane

_HEADER: Final = struct.Struct("!III")
"""Of a Yamux frame: version, type and flags together; stream; length. All 0 first: plain data."""
TURN_MESSAGES: Final = 16
"""Of what was read ahead; then everybody else has a turn."""
HEARD_BYTES_MAX: Final = 4096
"""What a reader takes in the socket's own turn: a few frames; more has a turn of its own."""


class Inbound:
    """What comes on one Yamux connection over Noise; made by `inbound`."""

    def __init__(self, muxed: Any, session: Any, lane: Lane) -> None:
        self._muxed = muxed
        self._session = session
        self._lane = lane

    async def deliver(self) -> None:
        """Returns when something came that is no plain data: the library's to read, from here."""
        session, taken = self._session, 0
        while session.low_watermark == session.high_watermark:  # it has nothing of its own
            message = await self._lane.message()
            if message is None:
                return
            data = session.conn.decrypt(message)
            at = self._delivered(data)
            if at < len(data):
                session._fill(data[at:])  # noqa: SLF001 the library's, in the release we know
            taken += 1
            if taken % TURN_MESSAGES == 0:
                await trio.lowlevel.checkpoint()

    def _delivered(self, data: bytes) -> int:
        """How much of `data` was plain data, and is where its reader looks for it."""
        muxed, at = self._muxed, 0
        while at + _HEADER.size <= len(data) and not muxed.streams_lock.locked():
            other, name, size = _HEADER.unpack_from(data, at)
            begin, end = at + _HEADER.size, at + _HEADER.size + size
            stream = muxed.streams.get(name)
            if other or end > len(data) or not _is_open(stream):
                break
            buffer = muxed.stream_buffers[name]
            if buffer or not _heard(stream, data[begin:end]):
                buffer.extend(data[begin:end])
                stream.recv_window -= size
                muxed.stream_events[name].set()
            if stream.closed:  # for that: it was more than it may send
                muxed._finalize_stream_locked(stream, fully_closed=True)  # noqa: SLF001
            at = end
        return at


def inbound(muxed: Any) -> Inbound | None:
    """The short way of a connection; None: it is not over Noise on a lane of ours."""
    from libp2p.security.noise.io import NoiseTransportReadWriter

    session = muxed.secured_conn
    noise = getattr(session, "conn", None)
    if not isinstance(noise, NoiseTransportReadWriter):
        return None
    lane = getattr(noise.read_writer.read_write_closer, "stream", None)
    return Inbound(muxed, session, lane) if isinstance(lane, Lane) else None


class Ear:
    """A reader that takes what is small in the turn in which it comes, while it waits for it."""

    def __init__(self, take: Callable[[bytes], bool]) -> None:
        self.take = take
        self.waits = False


def _heard(stream: Any, piece: bytes) -> bool:
    """Whether the reader of a stream with nothing unread took it; never more than may come."""
    ear: Ear | None = stream.ear
    most = min(HEARD_BYTES_MAX, stream.recv_window)
    if ear is None or not ear.waits or not 0 < len(piece) <= most or not ear.take(piece):
        return False
    stream.recv_window -= len(piece)
    stream.release(len(piece))
    return True


async def plain_data(stream: Any, size_bytes_max: int) -> bytes:
    """What came on a Yamux stream, or comes next.

    Empty: it is not just open any more, and the way of the library tells how it is.
    """
    conn, name = stream.conn, stream.stream_id
    while _is_open(stream) and not conn.event_shutting_down.is_set():
        buffer, event = conn.stream_buffers.get(name), conn.stream_events.get(name)
        if event is None:  # the connection is gone
            break
        if buffer:
            data = bytes(buffer[:size_bytes_max])
            del buffer[:size_bytes_max]
            stream.release(len(data))
            return data
        await _next_of(stream, event)
        if name in conn.stream_events:
            conn.stream_events[name] = trio.Event()
    return b""


async def _next_of(stream: Any, event: trio.Event) -> None:
    """Returns when something came that nobody heard."""
    ear: Ear | None = stream.ear
    if ear is None:
        return await event.wait()
    ear.waits = True
    try:
        await event.wait()
    finally:
        ear.waits = False
    return None


def _is_open(stream: Any) -> bool:
    """Whether its peer may send: it is known, and neither ended nor reset."""
    return stream is not None and not (stream.recv_closed or stream.closed)
