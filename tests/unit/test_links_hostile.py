"""Links and peers that break the rules: what it costs them, and that nobody else pays."""

from __future__ import annotations

import pytest
import trio

from aivillage.protocols import codec
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import (
    BLOBS_MAX,
    JOB_PROTOCOL,
    Accepted,
    Answer,
    Ask,
    Failure,
    Ledger,
    ListOperations,
    Ping,
    QuoteRequest,
    Standing,
    Submit,
    Text,
    Tunnel,
)
from tests.mesh import mesh, settle


@pytest.fixture
def two(hello_of, peer_of):
    return lambda **options: mesh(hello_of, peer_of, **options)


async def raw_stream(a, b):
    """A stream to `b` with no links behind it, past the hello."""
    await a.links.transport.dial(b.address)
    return await a.links.transport.open_stream(b.peer, JOB_PROTOCOL)


async def read_failure(stream) -> Failure:
    """The last frame before the end of the stream."""
    data = b""
    while chunk := await stream.read(65536):
        data += chunk
    frames = []
    while data:
        size = int.from_bytes(data[:4], "big")
        frames.append(codec.decode(data[4 : 4 + size]))
        data = data[4 + size :]
    assert isinstance(frames[-1], Failure)
    return frames[-1]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (codec.frame(Ask(id=1, what="x")), "BAD_REQUEST"),
        (codec.frame(Answer(id=1)), "BAD_REQUEST"),
        (codec.frame(Submit(id=1, operation="mesh.noop", request=b"")), "BAD_REQUEST"),
        (codec.frame(Text(id=1, text="x")), "BAD_REQUEST"),
        (codec.frame(Tunnel(id=1, body=b"x")), "BAD_REQUEST"),
        (b"\0\0\0\x03abc", "BAD_REQUEST"),
        (b"\0\0\0\0", "BAD_REQUEST"),
        (b"\xff\xff\xff\xff", "TOO_LARGE"),
        ((codec.FRAME_BYTES_MAX + 1).to_bytes(4, "big"), "TOO_LARGE"),
    ],
)
async def test_what_is_no_message_ends_the_link_with_its_code(
    two, hello_of, autojump_clock, frame, code
):
    async with two(count=3) as (a, b, c):
        stream = await raw_stream(a, b)
        await stream.write(codec.frame(hello_of()) + frame)
        failure = await read_failure(stream)
        assert (failure.id, failure.code) == (0, code)
        assert b.links.get(a.peer) is None
        assert await c.links.connect(b.address)


async def test_a_second_hello_is_refused(two, hello_of, autojump_clock):
    async with two() as (a, b):
        stream = await raw_stream(a, b)
        await stream.write(codec.frame(hello_of()) * 2)
        assert (await read_failure(stream)).code == "BAD_REQUEST"


async def test_a_message_before_the_hello_is_refused(two, autojump_clock):
    async with two() as (a, b):
        stream = await raw_stream(a, b)
        await stream.write(codec.frame(Ping(nonce=1)))
        assert (await read_failure(stream)).code == "BAD_REQUEST"
        assert b.events == []


async def test_who_says_no_hello_is_let_go_after_five_seconds(two, autojump_clock):
    async with two() as (a, b):
        stream = await raw_stream(a, b)
        began = trio.current_time()
        assert await stream.read(1) == b""
        assert trio.current_time() - began == pytest.approx(5)


async def test_a_refused_message_costs_its_link_and_no_other(two, autojump_clock):
    async with two(count=3) as (a, b, c):
        link = await a.links.connect(b.address)
        await c.links.connect(b.address)

        def refuse(link, frame) -> None:
            raise PeerError("not like this", code="REPLAYED")

        b.links.on_message = refuse
        link.send(Accepted(id=1))
        await settle()
        assert "REPLAYED not like this" in a.reasons[0]
        assert b.links.counts["peer_errors"] == 1
        assert b.links.get(c.peer) is not None


async def test_a_defect_in_a_callback_costs_its_link_and_is_counted(two, caplog, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        b.links.on_message = lambda link, frame: 1 / 0
        link.send(Accepted(id=1))
        await settle()
        assert b.links.counts["defects"] == 1
        assert b.links.get(a.peer) is None
        assert "link_callback_failed" in caplog.messages


# ------------------------------------------------------------------ what costs us more than them


@pytest.mark.parametrize(
    ("frame", "weight", "burst", "per_second"),
    [
        (Ledger(blobs=(b"x",) * BLOBS_MAX), BLOBS_MAX, 400, 200),
        (Ledger(blobs=(b"x",)), 1, 400, 200),
        (Ledger(blobs=()), 1, 400, 200),
        (QuoteRequest(id=1, operation="x", request=b""), 1, 64, 20),
        (Standing(line_micro_credits=1, exposure_micro_credits=1), 1, 64, 20),
        (ListOperations(id=1), 1, 64, 20),
    ],
    ids=["blobs", "one blob", "no blobs", "quotes", "standings", "lists"],
)
async def test_dear_frames_of_one_peer_wait_their_turn_and_those_of_others_do_not(
    two, autojump_clock, frame, weight, burst, per_second
):
    async with two(count=3) as (a, b, c):
        flood = await a.links.connect(b.address)
        other = await c.links.connect(b.address)
        for _ in range(2 * (burst + 4 * per_second) // weight):
            flood.send(frame)
        other.send(Accepted(id=77))
        await settle(0.1)
        assert Accepted(id=77) in b.frames
        for seconds in (0.1, 2.1):
            taken = weight * sum(heard == frame for heard in b.frames)
            assert abs(taken - (burst + seconds * per_second)) <= 2 * weight + 2, seconds
            await settle(2)
        assert b.links.get(a.peer) is not None


async def test_nothing_that_waited_is_lost(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        sent = [Ledger(blobs=(bytes([n % 256]),) * 8) for n in range(200)]
        for frame in sent:
            link.send(frame)
        await settle(10)
        assert b.frames == sent


async def test_more_blobs_than_a_frame_may_hold_end_the_link(two, hello_of, autojump_clock):
    async with two(count=3) as (a, b, _c):
        stream = await raw_stream(a, b)
        many = codec.frame(Ledger(blobs=(b"x",) * (BLOBS_MAX + 1)))
        await stream.write(codec.frame(hello_of()) + many)
        assert (await read_failure(stream)).code == "BAD_REQUEST"
        assert b.frames == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"agent": "x" * 129},
        {"addresses": ("/ip4/1.2.3.4/tcp/1",) * 9},
        {"addresses": ("x" * 257,)},
        {"kernel_classes": ("x",) * 17},
        {"certificates": (bytes(8193),)},
    ],
    ids=str,
)
async def test_a_hello_that_says_too_much_is_refused(two, hello_of, autojump_clock, wrong):
    async with two(count=3) as (a, b, _c):
        stream = await raw_stream(a, b)
        await stream.write(codec.frame(hello_of(**wrong)))
        assert (await read_failure(stream)).code == "BAD_REQUEST"
        assert b.events == []
