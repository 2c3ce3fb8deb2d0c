"""Hands a fenced worker connections to one host and port, one after the other.

The smallest opening that lets a worker ask a server of its owner's choice: it opens no socket,
names no address and looks up no name. Whatever runs in it can talk to that server alone.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

import trio

from aivillage.models.way_out import CONNECTED, REFUSED

DIAL_SECONDS_MAX: Final = 10.0


class Place(NamedTuple):
    """Where a worker may be connected to, and the one file that it may read for it, if any."""

    host: str
    port: int
    key_file: str = ""


class Hatch:
    """A pair of sockets: `theirs` goes to the worker, `serve` is at ours."""

    def __init__(self, place: Place) -> None:
        self._place = place
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ours = trio.socket.from_stdlib_socket(ours)

    async def serve(self) -> None:
        """Connects as often as the worker asks; ends when the worker does."""
        with self._ours:
            try:
                while await self._ours.recv(1):
                    await self._answer()
            except OSError:  # the worker is gone
                return

    async def _answer(self) -> None:
        try:
            with trio.fail_after(DIAL_SECONDS_MAX):
                stream = await trio.open_tcp_stream(self._place.host, self._place.port)
        except (OSError, trio.TooSlowError):
            await self._ours.send(REFUSED)
            return
        async with stream:  # ours is closed; the worker has one of its own
            handed = struct.pack("i", stream.socket.fileno())
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, handed)
            await self._ours.sendmsg([CONNECTED], [rights])
