"""The short way in, over real sockets: in order whatever is cut where, and only for plain data."""

from __future__ import annotations

import gc
import struct
import weakref
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from aivillage.node.transport.as_it_comes import HEARD_BYTES_MAX, TURN_MESSAGES, inbound
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.errors import PeerError

HOLD = "/test/hold/1"
KEY = bytes(range(32))
HEADER = struct.Struct("!BBHII")
FIN, RST = 4, 8
WINDOW_UPDATE = 1
PIECES = [bytes([at]) * (1 + 7 * at) for at in range(40)]


@asynccontextmanager
async def two_ends(key_of, village_key=None):
    """The library's stream that writes, ours that reads, and the reader's connection."""
    send, receive = trio.open_memory_channel(1)

    async def hold(stream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    async with (
        open_libp2p(key_of(1), "127.0.0.1:0", village_key) as mine,
        open_libp2p(key_of(2), "127.0.0.1:0", village_key) as other,
    ):
        other.serve(HOLD, hold)
        peer = await mine.dial(other.addresses()[0])
        writer = await mine.open_stream(peer, HOLD)
        with trio.fail_after(20):
            yield writer._muxed, await receive.receive()


def frame(stream, data: bytes, flags: int = 0) -> bytes:
    return HEADER.pack(0, 0, flags, stream.stream_id, len(data)) + data


async def say(stream, message: bytes) -> None:
    """One Noise message with these bytes."""
    await stream.conn.secured_conn.write(message)


async def read_all(stream, size_bytes: int) -> bytes:
    found = b""
    while len(found) < size_bytes:
        found += await stream.read(65_536)
    return found


class LongWay:
    """Counts what the library read of a connection itself."""

    def __init__(self, reader, monkeypatch) -> None:
        self.taken = 0
        session = reader._muxed.conn.secured_conn
        read = session.read

        async def counted(n=None):
            self.taken += 1
            return await read(n)

        monkeypatch.setattr(session, "read", counted)


@pytest.mark.parametrize("village_key", [None, KEY])
async def test_plain_data_goes_past_the_library(key_of, monkeypatch, village_key):
    async with two_ends(key_of, village_key) as (writer, reader):
        await say(writer, frame(writer, b"first"))
        assert await reader.read(100) == b"first"
        long_way = LongWay(reader, monkeypatch)
        for piece in PIECES:
            await say(writer, frame(writer, piece))
            assert await reader.read(65_536) == piece
        await say(writer, b"".join(frame(writer, piece) for piece in PIECES))
        whole = b"".join(PIECES)
        assert await read_all(reader, len(whole)) == whole, "many frames in one message"
        assert long_way.taken == 0


@pytest.mark.parametrize("at", [1, 11, 12, 13, 17, 24, 25, 30])
async def test_a_frame_that_is_cut_comes_in_order(key_of, at):
    async with two_ends(key_of) as (writer, reader):
        said = frame(writer, b"first") + frame(writer, b"second")
        await say(writer, said[:at])
        await say(writer, said[at:] + frame(writer, b"third")[:5])
        await say(writer, frame(writer, b"third")[5:])
        await say(writer, frame(writer, b"fourth"))
        assert await read_all(reader, 22) == b"firstsecondthirdfourth"


async def test_what_is_no_plain_data_is_the_librarys(key_of):
    async with two_ends(key_of) as (writer, reader):
        window = reader._muxed.send_window
        more = HEADER.pack(0, WINDOW_UPDATE, 0, writer.stream_id, 4)
        unknown = HEADER.pack(0, 0, 0, 9_999, 4) + b"none"
        end = frame(writer, b" and the end", FIN)
        await say(writer, frame(writer, b"data") + more + unknown + frame(writer, b", more") + end)
        assert await read_all(reader, 22) == b"data, more and the end"
        assert await reader.read(100) == b"", "it ended"
        assert reader._muxed.send_window == window + 4


async def test_a_reset_that_follows_data_is_one(key_of):
    async with two_ends(key_of) as (writer, reader):
        await say(writer, frame(writer, b"data") + frame(writer, b"", RST))
        with pytest.raises(PeerError):
            while await reader.read(100):
                continue


@pytest.mark.parametrize("above", [0, 1])
async def test_a_full_window_is_taken_and_a_byte_more_ends_the_stream(key_of, above):
    async with two_ends(key_of) as (writer, reader):
        left = reader._muxed.recv_window + above
        while left:
            size = min(left, 60_000)
            await say(writer, frame(writer, bytes(size)))
            left -= size
        while reader._muxed.recv_window > 0:
            await trio.sleep(0.001)
        assert reader._muxed.closed == bool(above)
        if above:
            with pytest.raises(PeerError):
                await reader.read(100)
            assert writer.stream_id not in reader._muxed.conn.streams, "nothing of it is kept"


class Listener:
    """Takes what it hears, but for the next `refusals`."""

    def __init__(self, reader) -> None:
        self.heard: list[bytes] = []
        self.refusals = 0
        reader.listen(self.take)

    def take(self, piece: bytes) -> bool:
        if self.refusals:
            self.refusals -= 1
            return False
        self.heard.append(piece)
        return True


@asynccontextmanager
async def waiting(reader):
    """A task that reads, and what it read."""
    read: list[bytes] = []

    async def forever():
        while piece := await reader.read(65_536):
            read.append(piece)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forever)
        await trio.testing.wait_all_tasks_blocked()
        yield read
        nursery.cancel_scope.cancel()


async def until(condition) -> None:
    while not condition():
        await trio.sleep(0.001)


@pytest.mark.parametrize("size", [1, HEARD_BYTES_MAX, HEARD_BYTES_MAX + 1])
async def test_what_is_small_is_heard_while_a_reader_waits(key_of, size):
    async with two_ends(key_of) as (writer, reader):
        listener = Listener(reader)
        async with waiting(reader) as read:
            await say(writer, frame(writer, bytes(size)))
            await until(lambda: listener.heard or read)
            assert (listener.heard, read) == (
                ([bytes(size)], []) if size <= HEARD_BYTES_MAX else ([], [bytes(size)])
            )


async def test_nobody_hears_what_follows_something_unread(key_of):
    async with two_ends(key_of) as (writer, reader):
        listener = Listener(reader)
        unread = reader._muxed.conn.stream_buffers[writer.stream_id]
        await say(writer, frame(writer, b"nobody waits"))
        await say(writer, frame(writer, b", so this waits too"))
        await until(lambda: len(unread) == 31)
        assert await read_all(reader, 31) == b"nobody waits, so this waits too"
        listener.refusals = 1
        async with waiting(reader) as read:
            await say(writer, frame(writer, b"refused") + frame(writer, b", then this"))
            await until(lambda: len(b"".join(read)) == 18)
            await trio.testing.wait_all_tasks_blocked()
            await say(writer, frame(writer, b"heard") + frame(writer, b" again"))
            await until(lambda: len(listener.heard) == 2)
        assert b"".join(read) == b"refused, then this"
        assert listener.heard == [b"heard", b" again"]


async def test_a_cancelled_reader_hears_nothing_more(key_of):
    async with two_ends(key_of) as (writer, reader):
        listener = Listener(reader)
        with trio.move_on_after(0.01):
            await reader.read(100)
        await say(writer, frame(writer, b"later"))
        await until(lambda: len(reader._muxed.conn.stream_buffers[writer.stream_id]) == 5)
        assert await reader.read(100) == b"later"
        assert listener.heard == []


async def test_what_is_heard_counts_against_the_window_and_gives_it_back(key_of):
    """More than a whole window goes by ear: it would stand still if nothing were given back."""
    async with two_ends(key_of) as (writer, reader):
        window = reader._muxed.recv_window
        listener, sent = Listener(reader), 0
        async with waiting(reader) as read:
            while sent < 2 * window:
                await writer.write(bytes(HEARD_BYTES_MAX))
                sent += HEARD_BYTES_MAX
            await until(lambda: len(b"".join(listener.heard + read)) == sent)
        assert listener.heard
        assert reader._muxed.recv_window < 2 * 2**20, "and no more than that"


async def test_nobody_hears_a_byte_more_than_the_window(key_of):
    async with two_ends(key_of) as (writer, reader):
        listener = Listener(reader)
        reader._muxed.__dict__["recv_window"] = 5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, reader)
            await trio.testing.wait_all_tasks_blocked()
            await say(writer, frame(writer, b"12345") + frame(writer, b"6"))
            await until(lambda: reader._muxed.closed)
        assert listener.heard == [b"12345"]


async def fails(reader) -> None:
    with pytest.raises(PeerError):
        await reader.read(100)


class TurnsOfOthers:
    """A task that does nothing, and how often it could."""

    def __init__(self) -> None:
        self.taken = 0

    async def run(self) -> None:
        while True:
            self.taken += 1
            await trio.lowlevel.checkpoint()


async def test_a_busy_connection_lets_others_have_a_turn(key_of):
    async with two_ends(key_of) as (writer, reader), trio.open_nursery() as nursery:
        way = inbound(reader._muxed.conn)
        messages = [reader._muxed.conn.secured_conn.conn] * (4 * TURN_MESSAGES)
        handed_out = iter(messages)

        async def message():
            return frame(writer, b"x") if next(handed_out, None) else None

        way._lane.message = message
        way._session = type("Session", (), {"low_watermark": 0, "high_watermark": 0})()
        way._session.conn = type("Noise", (), {"decrypt": staticmethod(bytes)})()
        others = TurnsOfOthers()
        nursery.start_soon(others.run)
        await trio.lowlevel.checkpoint()
        before = others.taken
        await way.deliver()
        assert others.taken - before >= 4
        nursery.cancel_scope.cancel()


async def test_nothing_is_kept_of_a_connection_that_ended(key_of):
    async with (
        open_libp2p(key_of(1), "127.0.0.1:0") as mine,
        open_libp2p(key_of(2), "127.0.0.1:0") as other,
    ):
        with trio.fail_after(20):
            await mine.dial(other.addresses()[0])
            (connection,) = next(iter(mine._swarm.connections.values()))
            session = weakref.ref(connection.muxed_conn.secured_conn)
            del connection
            await mine.hang_up(other.peer)
            while session() is not None:
                await trio.sleep(0.01)
                gc.collect()
