"""The short way out, for what the socket takes at once: from a frame to the wire in one plain call.

The library's way is six coroutines and a task, and Trio gives everybody else a turn at its end. It
stays the way of all that has to wait. Both share locks, windows and the cipher's counter, so what
goes one way never overtakes what went the other.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

import trio

from aivillage.node.transport.patches import CHUNK_BYTES, quietly
from aivillage.node.transport.psk import Lane

_HEADER: Final = struct.Struct("!BBHII")
"""Of a Yamux frame: version, type, flags, stream, length. Type 0 is data."""


def taken_at_once(stream: trio.SocketStream, data: bytes) -> int:
    """How many bytes of `data` the operating system took without waiting; 0 of a broken socket."""
    try:
        return os.write(stream.socket.fileno(), data)
    except OSError:  # full, closed or broken: the way that waits finds out, and says so
        return 0


def shortcut(muxed: Any, nursery: trio.Nursery) -> Shortcut | None:
    """The short way of a Yamux stream; None: it is not on Noise on TCP, as through a relay.

    What a socket does not take at once is written by a task in `nursery`, where nobody cancels it.
    """
    from libp2p.io.trio import TrioTCPStream
    from libp2p.security.noise.io import NoiseTransportReadWriter

    noise = getattr(muxed.conn.secured_conn, "conn", None)
    if not isinstance(noise, NoiseTransportReadWriter):
        return None
    lane: Any = getattr(noise.read_writer.read_write_closer, "stream", None)
    socket = lane.raw_socket if isinstance(lane, Lane) else None
    return Shortcut(muxed, noise, lane, socket, nursery) if type(socket) is TrioTCPStream else None


class Shortcut:
    """Made by `shortcut`."""

    def __init__(
        self, muxed: Any, noise: Any, lane: Lane, socket: Any, nursery: trio.Nursery
    ) -> None:
        self._muxed = muxed
        self._noise = noise
        self._lane = lane
        self._socket = socket
        self._nursery = nursery

    def write(self, data: bytes) -> bool:
        """All of it in one frame, or nothing; whether it did.

        What the socket does not take is kept and goes before all else: it is encrypted already.
        """
        muxed, socket = self._muxed, self._socket
        if not self._is_free(len(data)):
            return False
        muxed.send_window -= len(data)
        frame = _HEADER.pack(0, 0, 0, muxed.stream_id, len(data)) + data
        message = self._noise.read_writer.encode_msg(self._noise.encrypt(frame))
        sealed = self._lane.sealed(message)
        taken = taken_at_once(socket.stream, sealed)
        if taken < len(sealed):
            socket.owed = sealed[taken:]
            self._nursery.start_soon(quietly, socket.write, b"")  # what is owed goes first
        return True

    def _is_free(self, size_bytes: int) -> bool:
        """Whether nobody is at work anywhere on the way, and the peer lets us send so much."""
        muxed, conn, socket = self._muxed, self._muxed.conn, self._socket
        writing = conn._write_lock  # noqa: SLF001 the library's, in the one release that we know
        return (
            size_bytes <= min(CHUNK_BYTES, muxed.send_window)
            and not (muxed.closed or muxed.send_closed or conn.event_shutting_down.is_set())
            and not self._nursery.cancel_scope.cancel_called
            and not (writing.locked() or socket.write_lock.locked() or socket.owed)
        )
