"""The control protocol of go-libp2p's daemon: protobuf by hand, for the four calls needed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import trio

IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER = 0, 1, 2, 3


class GoError(Exception):
    """The daemon said no."""


class Reply(NamedTuple):
    """Fields of a message by number, in order."""

    fields: dict[int, list[bytes | int]]

    def one(self, number: int) -> bytes:
        (found,) = self.fields[number]
        assert isinstance(found, bytes)
        return found


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def parsed(message: bytes) -> Reply:
    fields: dict[int, list[bytes | int]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        found = shift = 0
        while True:
            byte = message[at]
            at += 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while at < len(message):
        tag = number()
        value: bytes | int = number()
        if tag & 7 == 2:
            size, value = value, message[at : at + value]
            at += size
        fields.setdefault(tag >> 3, []).append(value)
    return Reply(fields)


async def read_message(socket: trio.SocketStream) -> Reply:
    size = shift = 0
    while True:
        (byte,) = await socket.receive_some(1) or b"\0"
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    message = b""
    while len(message) < size:
        chunk = await socket.receive_some(size - len(message))
        assert chunk, "the daemon ended inside a message"
        message += chunk
    return parsed(message)


class Go:
    """A running daemon; each call is a connection of its own, as the protocol wants."""

    def __init__(self, control: str) -> None:
        self._control = control

    async def ask(self, kind: int, *fields: bytes) -> tuple[Reply, trio.SocketStream]:
        """Raises: GoError: what it says is wrong."""
        socket = await trio.open_unix_socket(self._control)
        body = field(1, kind) + b"".join(fields)
        await socket.send_all(varint(len(body)) + body)
        reply = await read_message(socket)
        if reply.fields[1] != [0]:
            await socket.aclose()
            raise GoError(parsed(reply.one(2)).one(1).decode())
        return reply, socket

    async def identity(self) -> bytes:
        reply, socket = await self.ask(IDENTIFY)
        await socket.aclose()
        return parsed(reply.one(4)).one(1)

    async def connect(self, peer: bytes, address: bytes) -> None:
        _, socket = await self.ask(CONNECT, field(2, field(1, peer) + field(2, address)))
        await socket.aclose()

    async def open_stream(self, peer: bytes, protocol: str) -> trio.SocketStream:
        """From now on the socket is the stream."""
        wanted = field(1, peer) + field(2, protocol.encode())
        return (await self.ask(STREAM_OPEN, field(3, wanted)))[1]

    async def handle(self, protocol: str, address: bytes) -> None:
        """Inbound streams of `protocol` come to a socket of ours, and to no other one."""
        wanted = field(1, address) + field(2, protocol.encode()) + field(3, 0)
        _, socket = await self.ask(STREAM_HANDLER, field(4, wanted))
        await socket.aclose()


def strings(reply: Reply, number: int) -> Iterator[str]:
    for value in reply.fields.get(number, []):
        assert isinstance(value, bytes)
        yield value.decode()
