"""Frames off a byte stream: a length, a payload, and how many of them one peer may send."""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from aivillage.protocols.codec import LENGTH_BYTES
from aivillage.protocols.errors import PeerError
from aivillage.protocols.ports import Stream
from aivillage.protocols.types import Seconds

READ_BYTES: Final = 64 * 1024
"""One read costs about as much for 64 B as for 64 KiB, so take what is there."""


class FrameReader:
    """Splits a stream into payloads. `ready` holds those that are whole."""

    def __init__(self, stream: Stream, frame_bytes_max: int) -> None:
        self.ready: deque[bytes] = deque()
        self._stream = stream
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    async def fill(self) -> int:
        """Reads once; returns how many bytes came, 0 at the end of the stream.

        Raises:
            PeerError: TOO_LARGE before anything of that size is allocated; PEER_LOST when the
                stream breaks, also inside a frame.
        """
        chunk = await self._stream.read(READ_BYTES)
        if not chunk and self._buffer:
            raise PeerError("the stream ended inside a frame", code="PEER_LOST")
        self.take(chunk)
        return len(chunk)

    def take(self, chunk: bytes) -> None:
        """The next piece of the stream, however it came. Raises: PeerError: TOO_LARGE."""
        self._buffer += chunk
        self._split()

    async def next(self) -> bytes:
        """The next payload. Raises as `fill`, and PEER_LOST at the end of the stream."""
        while not self.ready:
            if not await self.fill():
                raise PeerError("the stream ended", code="PEER_LOST")
        return self.ready.popleft()

    def _split(self) -> None:
        buffer, at = self._buffer, 0
        while len(buffer) - at >= LENGTH_BYTES:
            start = at + LENGTH_BYTES
            size_bytes = int.from_bytes(buffer[at:start], "big")
            if size_bytes > self._frame_bytes_max:
                raise PeerError(
                    f"a frame of {size_bytes:,} bytes, at most {self._frame_bytes_max:,} pass",
                    code="TOO_LARGE",
                )
            if len(buffer) - start < size_bytes:
                break
            at = start + size_bytes
            self.ready.append(bytes(buffer[start:at]))
        del buffer[:at]


class RateLimit:
    """A token bucket, by default of one second's depth. Who is over it waits; nothing is lost."""

    def __init__(self, per_second: float, burst: float = 0.0) -> None:
        self._per_second = per_second
        self._burst = burst or per_second
        self._level = self._burst
        self._at = trio.current_time()

    async def spend(self, count: int) -> None:
        """Takes `count`, and sleeps until the bucket is out of debt."""
        seconds = self.take(count)
        if seconds > 0:
            await trio.sleep(seconds)

    def take(self, count: int) -> Seconds:
        """Takes `count`, and says how long the bucket is in debt for it."""
        now = trio.current_time()
        earned = (now - self._at) * self._per_second
        self._level = min(self._burst, self._level + earned) - count
        self._at = now
        return max(0.0, -self._level / self._per_second)
