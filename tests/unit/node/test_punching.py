"""Meeting without a relay: when it is tried, where, and who may ask. The packets: test_punch.py."""

from __future__ import annotations

import pytest
import trio

from aivillage.node.framing import FrameReader
from aivillage.node.punching import PAUSE_SECONDS, PEERS_MAX, Pauses, Punching
from aivillage.node.relay_talk import say
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.errors import PeerError
from aivillage.protocols.meeting import PORT_LEAST, PUNCH_PROTOCOL, Meet, Now, place
from aivillage.protocols.relaying import TALK_BYTES_MAX
from tests.conftest import make_key, make_peer
from tests.integration.daemons import free_port
from tests.integration.relayed import ECHO, Node, World, echo, until, world

FIRST, LONGEST = PAUSE_SECONDS


def test_each_try_doubles_the_pause_up_to_an_hour_and_after_the_longest_it_begins_anew():
    pauses, peer, now, waited = Pauses(), make_peer(1), 0.0, []
    assert pauses.begin(peer, now)
    while len(waited) < 13:
        before = now
        while not pauses.begin(peer, now):
            now += 1.0
        waited.append(now - before)
    assert waited[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert waited == sorted(waited)
    assert waited[-2:] == [LONGEST, LONGEST]
    late = now + 2 * LONGEST
    assert [pauses.begin(peer, late + after) for after in (0, FIRST - 1, FIRST)] == [1, 0, 1]
    assert pauses.begin(make_peer(2), now)


def test_pauses_are_kept_of_so_many_peers_and_the_oldest_is_forgotten_first():
    pauses = Pauses()
    names = [make_peer(1) + str(at) for at in range(PEERS_MAX + 1)]
    assert all(pauses.begin(name, 0.0) for name in names)
    assert not pauses.begin(names[-1], 1.0)
    assert not pauses.begin(names[1], 1.0)
    assert pauses.begin(names[0], 1.0)


@pytest.mark.parametrize("address", ["/ip4/10.77.0.9/tcp/1024", "/ip4/8.8.8.8/tcp/65535"])
def test_a_meeting_place_is_a_number_and_a_high_port(address):
    ip, port = place(address)
    assert address == f"/ip4/{ip}/tcp/{port}"


@pytest.mark.parametrize(
    "address",
    [
        "", "/ip4/8.8.8.8", "/ip4/8.8.8.8/tcp/", "/ip4/8.8.8.8/udp/4000", "/ip6/::1/tcp/4000",
        "/dns4/example.org/tcp/4000", "/ip4/8.8.8.8/tcp/4000/p2p/x", "/ip4/8.8.8.8/tcp/4000\n",
        f"/ip4/8.8.8.8/tcp/{PORT_LEAST - 1}", "/ip4/8.8.8.8/tcp/65536", "/ip4/8.8.8.8/tcp/-1",
        "/ip4/127.0.0.1/tcp/4000", "/ip4/169.254.1.1/tcp/4000", "/ip4/224.0.0.1/tcp/4000",
        "/ip4/0.0.0.0/tcp/4000", "/ip4/255.255.255.255/tcp/4000", "/ip4/8.8.8.999/tcp/4000",
    ],
)  # fmt: skip
def test_nobody_is_sent_to_knock_elsewhere(address):
    with pytest.raises(PeerError) as caught:
        place(address)
    assert caught.value.code == "BAD_REQUEST"


async def test_a_port_is_seen_from_outside_and_used_for_a_second_connection():
    async with (
        open_libp2p(make_key(1), "127.0.0.1:0") as a,
        open_libp2p(make_key(2), "127.0.0.1:0") as relay,
        open_libp2p(make_key(3), "127.0.0.1:0") as b,
    ):
        b.serve(ECHO, echo)
        await a.dial(relay.addresses()[0])
        seen = await a.seen_by(relay.peer)
        assert seen is not None
        assert seen.address == f"/ip4/127.0.0.1/tcp/{seen.source[1]}"
        await a.meet(seen.source, b.addresses()[0], begins=True)
        again = await a.seen_by(b.peer)
        assert again is not None
        assert again.source == seen.source
        assert (a.met(), a.callers()) == ((b.peer,), ())
        stream = await a.open_stream(b.peer, ECHO)
        await stream.write(b"hi")
        assert await stream.read(2) == b"hi"
        await stream.close()
        with pytest.raises(PeerError, match="not connected"):
            await a.seen_by(make_peer(9))


async def test_whoever_comes_to_a_meeting_proves_to_be_the_one():
    source = ("127.0.0.1", free_port())
    async with (
        open_libp2p(make_key(1), "127.0.0.1:0") as a,
        open_libp2p(make_key(2), "127.0.0.1:0") as mallory,
    ):
        there = mallory.addresses()[0]
        with pytest.raises(PeerError):  # Mallory is at the place where Bob should be
            await a.meet(source, there.replace(mallory.peer, make_peer(3)), begins=True)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        bob = f"/ip4/127.0.0.1/tcp/{port}/p2p/{make_peer(3)}"

        async def comes() -> None:
            """Begins Noise on the connection that A made, as Bob would."""
            from libp2p.io.trio import TrioTCPStream
            from libp2p.network.connection.raw_connection import RawConnection
            from libp2p.peer.id import ID

            raw = RawConnection(TrioTCPStream(await listeners[0].accept()), True)
            upgrade = mallory._swarm.upgrade_outbound_raw_conn
            await upgrade(raw, ID.from_base58(a.peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(comes)
            with pytest.raises(PeerError) as caught:
                await a.meet(("127.0.0.1", free_port()), bob, begins=False)
        assert "came to the meeting" in caught.value.message
        await until(lambda: mallory.peer not in a.met())
        with pytest.raises(PeerError):
            await a.open_stream(mallory.peer, ECHO)
        await listeners[0].aclose()


async def relayed_pair(here: World) -> tuple[Node, Node, Node]:
    """The relay, who asks and who answers, linked through it; each may punch."""
    relay, one = await here.node(), await here.node()
    other = await here.node(mode="always")
    await other.links.connect(relay.address)
    await until(other.circuits.relays)
    await one.links.connect(other.behind(relay))
    await until(lambda: other.links.get(one.peer))
    first, second = sorted((one, other), key=lambda node: node.peer)
    return relay, first, second


def punching(node: Node) -> Punching:
    return Punching(
        node.transport, node.events, relay_of=node.circuits.relay_of, is_member=node.is_member
    )


async def test_where_no_place_is_to_be_had_the_relay_stays_and_it_is_said_once():
    async with world() as here:
        relay, first, second = await relayed_pair(here)
        asking, answering = punching(first), punching(second)
        assert await asking.ask(second.peer) is None  # on one machine there is no router
        assert first.events.counts["punch_failed"] == 1
        assert await asking.ask(second.peer) is None  # and not again before its time
        assert first.events.counts["punch_failed"] == 1
        assert await answering.ask(first.peer) is None  # not its turn, ever
        assert second.events.counts["punch_failed"] == 0
        assert await asking.ask(relay.peer) is None  # linked directly
        assert first.circuits.relay_of(second.peer) == relay.peer
        assert first.links.get(second.peer)


@pytest.mark.parametrize("case", ["stranger", "direct", "not their turn", "impatient"])
async def test_who_may_not_ask_hears_the_end(case):
    async with world() as here:
        relay, first, second = await relayed_pair(here)
        asker, asked = first, second
        if case == "not their turn":
            asker, asked = second, first
        elif case == "direct":
            asker = relay
        punching(asked)
        if case == "stranger":
            here.village.discard(asker.peer)
        for _ in range(2 if case == "impatient" else 1):
            stream = await asker.transport.open_stream(asked.peer, PUNCH_PROTOCOL)
            await say(stream, Meet(address="/ip4/10.77.0.9/tcp/4000"))
            with pytest.raises(PeerError, match=r"ended|broke"):
                await FrameReader(stream, TALK_BYTES_MAX).next()
            await stream.close()
        refused_late = asked.events.counts["punch_failed"]  # it had begun, and had no place
        assert refused_late == (1 if case == "impatient" else 0)


@pytest.mark.parametrize("said", [Now(), Meet(address="/ip4/127.0.0.1/tcp/4000"), None])
async def test_nonsense_ends_the_talk_and_nothing_else(said):
    async with world() as here:
        _, first, second = await relayed_pair(here)
        punching(second)
        stream = await first.transport.open_stream(second.peer, PUNCH_PROTOCOL)
        if said is None:
            await stream.write((TALK_BYTES_MAX + 1).to_bytes(4, "big"))
        else:
            await say(stream, said)
        with pytest.raises(PeerError):
            await FrameReader(stream, TALK_BYTES_MAX).next()
        await stream.close()
        await until(lambda: second.events.counts["punch_failed"] == 1)
        assert first.links.get(second.peer)
