"""The relay's talk, its day, and its limits, on the in-memory network."""

from __future__ import annotations

from contextlib import AsyncExitStack

import msgspec
import pytest
import trio

from aivillage.node.events import Events
from aivillage.node.relay import RESERVATIONS_MAX, Day, Relay, RelayLimits
from aivillage.node.relay_tab import Toll
from aivillage.node.relay_talk import ask, hear, say
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.relaying import RELAY_PROTOCOL, TALK_BYTES_MAX, Reach, Refused, Reserve
from tests.integration.relayed import Shelf

LIMITS = RelayLimits(circuits=2, bytes_per_second=1 << 20, bytes_a_day=100)
NOON = 20_000 * 86_400 + 43_200.0


def test_a_day_takes_its_last_byte_and_not_one_more():
    day = Day(100)
    assert day.spend(60, NOON)
    assert day.spend(40, NOON)
    assert day.is_over(NOON)
    assert not day.spend(1, NOON)
    assert day.spent_bytes == 100


def test_a_day_that_refused_a_piece_is_over_until_midnight():
    day = Day(100)
    assert day.spend(60, NOON)
    assert not day.is_over(NOON)
    assert not day.spend(41, NOON)
    assert day.is_over(NOON)
    assert not day.spend(1, NOON + 43_199)
    assert day.spent_bytes == 60
    assert not day.is_over(NOON + 43_200)
    assert day.spend(100, NOON + 43_200)


def test_a_day_of_nothing_is_over_at_once():
    assert Day(0).is_over(NOON)


class Wire:
    """A stream of bytes that were sent, handed out a few at a time."""

    peer = "somebody"

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    async def read(self, size_bytes_max: int) -> bytes:
        chunk, self.data = self.data[: min(3, size_bytes_max)], self.data[min(3, size_bytes_max) :]
        return chunk

    async def write(self, data: bytes) -> None:
        self.data += data

    async def close(self) -> None: ...


async def test_talk_takes_not_a_byte_of_what_follows_it():
    wire = Wire()
    await say(wire, Reach(peer="you"))
    wire.data += b"noise"
    assert await hear(wire) == Reach(peer="you")
    assert wire.data == b"noise"


def padded(size_bytes: int) -> bytes:
    """A `reserve` of that size, with a field that this version does not know."""
    empty = msgspec.msgpack.encode({"t": "reserve", "later": b"x" * 1000})
    later = b"x" * (1000 + size_bytes - len(empty))
    payload = msgspec.msgpack.encode({"t": "reserve", "later": later})
    assert len(payload) == size_bytes
    return len(payload).to_bytes(4, "big") + payload


async def test_talk_at_the_limit_passes_and_one_byte_more_does_not():
    assert await hear(Wire(padded(TALK_BYTES_MAX))) == Reserve()
    with pytest.raises(PeerError) as caught:
        await hear(Wire(padded(TALK_BYTES_MAX + 1)))
    assert caught.value.code == "TOO_LARGE"


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x81\xa1t\xa7nothing", b"\x93\x01\x02\x03"])
async def test_what_is_no_talk_is_a_bad_request(payload):
    with pytest.raises(PeerError) as caught:
        await hear(Wire(len(payload).to_bytes(4, "big") + payload))
    assert caught.value.code == "BAD_REQUEST"


@pytest.mark.parametrize("cut", [0, 2, 5])
async def test_talk_that_is_cut_off_is_a_lost_peer(cut):
    wire = Wire()
    await say(wire, Reserve())
    with pytest.raises(PeerError) as caught:
        await hear(Wire(wire.data[:cut]))
    assert caught.value.code == "PEER_LOST"


async def test_a_question_is_no_answer_and_a_refusal_is_typed():
    wire = Wire()
    await say(wire, Refused(code="BUSY", message="full", next_step="wait"))

    class Answered(Wire):
        async def write(self, data: bytes) -> None: ...

    with pytest.raises(RefusedError) as caught:
        await ask(Answered(wire.data), Reserve())
    assert (caught.value.code, caught.value.next_step) == ("BUSY", "wait")
    asked = Wire()
    await say(asked, Reserve())
    with pytest.raises(PeerError) as wrong:
        await ask(Answered(asked.data), Reserve())
    assert wrong.value.code == "BAD_REQUEST"


async def test_reservations_end_at_the_limit_and_at_one_more(autojump_clock, peer_of):
    network = LoopbackNetwork()

    async def nothing(_stream) -> None: ...

    async def reserve(at: int):
        node = await stack.enter_async_context(network.open(f"n{at}", peer_of(at)))
        await node.dial(hub.addresses()[0])
        stream = await node.open_stream(hub.peer, RELAY_PROTOCOL)
        await ask(stream, Reserve())
        return stream

    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(network.open("hub", peer_of(1)))
        relay = Relay(
            transport=hub, is_member=lambda peer: True, limits=LIMITS, shelf=Shelf(),
            events=Events(), incoming=nothing, toll=Toll(hub.peer, None, 0),
        )  # fmt: skip
        first, *_ = [await reserve(at) for at in range(2, 2 + RESERVATIONS_MAX)]
        assert relay.status()["reservations"] == RESERVATIONS_MAX
        with pytest.raises(RefusedError, match="all the reservations"):
            await reserve(100)
        # Who has one may make it anew, and whoever leaves makes room.
        node = network.nodes["n3"]
        again = await node.open_stream(hub.peer, RELAY_PROTOCOL)
        await ask(again, Reserve())
        assert relay.status()["reservations"] == RESERVATIONS_MAX
        await first.close()
        await trio.sleep(0.1)
        assert relay.status()["reservations"] == RESERVATIONS_MAX - 1
        await reserve(101)
