"""The short way out of a stream, over real sockets: all or nothing, in order, without a turn."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from aivillage.node.transport.at_once import shortcut, taken_at_once
from aivillage.node.transport.libp2p import open_libp2p

TAKES_ALL = "/test/sink/1"
PIECE_BYTES = 60_000
KEY = bytes(range(32))


@asynccontextmanager
async def stream_to_a_sink(key_of, village_key=None):
    """A stream, and what came at its other end."""
    came = bytearray()

    async def sink(stream) -> None:
        while data := await stream.read(65_536):
            came.extend(data)

    async with (
        open_libp2p(key_of(1), "127.0.0.1:0", village_key) as mine,
        open_libp2p(key_of(2), "127.0.0.1:0", village_key) as other,
    ):
        other.serve(TAKES_ALL, sink)
        peer = await mine.dial(other.addresses()[0])
        stream = await mine.open_stream(peer, TAKES_ALL)
        with trio.fail_after(20):
            yield stream, came
            await stream.close()


def socket_of(stream):
    """The library's, below Noise."""
    return stream._shortcut._socket


class Turns(trio.abc.Instrument):
    """Counts what the loop gives a turn."""

    def __init__(self) -> None:
        self.taken = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken += 1


async def until_came(came: bytearray, size_bytes: int) -> None:
    while len(came) < size_bytes:
        await trio.sleep(0.001)


@pytest.mark.parametrize("village_key", [None, KEY])
async def test_what_the_socket_takes_leaves_without_a_turn(key_of, village_key):
    async with stream_to_a_sink(key_of, village_key) as (stream, came):
        turns = Turns()
        trio.lowlevel.add_instrument(turns)
        assert stream.write_now(b"one")
        assert stream.write_now(b"two")
        assert turns.taken == 0, "nobody else ran"
        trio.lowlevel.remove_instrument(turns)
        await stream.write(b"three")
        assert stream.write_now(b"four")
        await until_came(came, len(b"onetwothreefour"))
        assert came == b"onetwothreefour", "both ways share the cipher, and keep the order"


async def test_the_rest_of_what_a_socket_takes_in_part_goes_before_all_else(key_of):
    pieces = [bytes([at]) * PIECE_BYTES for at in range(4)]
    async with stream_to_a_sink(key_of) as (stream, came):
        below = socket_of(stream)
        below.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        # The other end reads in this very loop, so it reads nothing meanwhile.
        at_once = [piece for piece in pieces if stream.write_now(piece)]
        assert below.owed, "the test must fill the socket"
        assert at_once == pieces[: len(at_once)]
        assert len(at_once) < len(pieces)
        assert not stream.write_now(b"too early")
        for piece in pieces[len(at_once) :]:
            await stream.write(piece)
        await until_came(came, len(pieces) * PIECE_BYTES)
        assert came == b"".join(pieces)
        assert not below.owed
        assert stream.write_now(b"!"), "what was owed is gone, so the short way is open again"


async def test_a_rest_leaves_though_nobody_writes_again(key_of):
    async with stream_to_a_sink(key_of) as (stream, came):
        socket_of(stream).stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sent = 0
        while stream.write_now(b"x" * PIECE_BYTES):
            sent += PIECE_BYTES
        assert socket_of(stream).owed
        await until_came(came, sent)


async def test_more_than_the_window_or_a_frame_and_a_closed_stream_go_the_long_way(key_of):
    async with stream_to_a_sink(key_of) as (stream, came):
        window = stream._muxed.send_window
        stream._muxed.send_window = 2
        assert not stream.write_now(b"123"), "above the window"
        assert stream.write_now(b"12"), "at the window"
        stream._muxed.send_window = window
        assert not stream.write_now(bytes(65_508)), "one byte more than a Noise message takes"
        assert stream.write_now(bytes(65_507))
        await until_came(came, 2 + 65_507)
        await stream.close()
        assert not stream.write_now(b"late")


def test_there_is_no_short_way_but_over_noise_on_tcp():
    plain = SimpleNamespace(conn=SimpleNamespace(secured_conn=SimpleNamespace(conn=None)))
    assert shortcut(plain, None) is None


async def test_a_broken_socket_takes_nothing():
    one, other = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    stream = trio.SocketStream(one) if one.type == socket.SOCK_STREAM else None
    assert taken_at_once(stream, b"abc") == 3
    other.close()
    assert taken_at_once(stream, b"abc") == 0
    await stream.aclose()
    assert taken_at_once(stream, b"abc") == 0
