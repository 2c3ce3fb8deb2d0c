"""A node that nobody can dial is reached through a villager: real sockets, one relay between."""

from __future__ import annotations

import pytest
import trio

from aivillage.node.relay import CIRCUITS_PER_PEER_MAX, RelayLimits
from aivillage.node.relay_talk import ask
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError
from aivillage.protocols.ports import SomebodyElseError
from aivillage.protocols.relaying import RELAY_PROTOCOL, Reach, circuit_address
from tests.integration.relayed import Node, World, echoes, until, world

BIG = bytes(range(256)) * 4096  # 1 MiB


async def behind_relay(here: World, relay: Node, **options: object) -> Node:
    """A seller that has its reservation with `relay`."""
    seller = await here.node(mode="always", **options)
    await seller.links.connect(relay.address)
    await until(seller.circuits.relays)
    return seller


def limited(**changes: int) -> RelayLimits:
    fields = {"circuits": 8, "bytes_per_second": 1 << 30, "bytes_a_day": 1 << 40}
    return RelayLimits(**(fields | changes))


async def test_a_seller_is_reached_and_its_link_works_through_the_relay():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        assert seller.circuits.addresses() == (seller.behind(relay),)
        link = await buyer.links.connect(seller.behind(relay))
        assert link.peer == seller.peer
        assert buyer.circuits.relay_of(seller.peer) == relay.peer
        await until(lambda: seller.links.get(buyer.peer))
        for size in (1, 1024, len(BIG)):
            assert await echoes(buyer, seller.peer, BIG[:size])
        assert await echoes(seller, buyer.peer, BIG[:1000])


async def test_what_is_relayed_is_counted_and_survives_a_restart_of_the_relay():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        await buyer.links.connect(seller.behind(relay))
        before = relay.relay.status()["bytes_today"]
        assert await echoes(buyer, seller.peer, BIG)
        carried = relay.relay.status()["bytes_today"] - before
        # Both directions, and Noise, Yamux and window updates on top.
        assert 2 * len(BIG) < carried < 2.1 * len(BIG)
        await until(lambda: relay.shelf.kept)
        again = await here.node()
        again.shelf.kept = relay.shelf.kept
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.relay.run)
            await until(lambda: again.relay.status()["bytes_today"] >= carried)
            nursery.cancel_scope.cancel()


async def test_the_relay_sees_neither_plaintext_nor_can_it_be_the_other_end():
    secret = b"the prompt of a private person " * 40
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        seen = spy_on(relay)
        await buyer.links.connect(seller.behind(relay))
        assert await echoes(buyer, seller.peer, secret)
        assert len(seen) > 2 * len(secret)
        assert secret[:31] not in seen


def spy_on(relay: Node) -> bytearray:
    """What passes through the hands of `relay`."""
    seen = bytearray()
    carry = relay.relay._carry

    async def carry_and_look(source, sink, circuit) -> None:
        class Looking:
            peer = source.peer

            async def read(self, size: int) -> bytes:
                data = await source.read(size)
                seen.extend(data)
                return data

        await carry(Looking(), sink, circuit)

    relay.relay._carry = carry_and_look
    return seen


async def test_a_relay_that_joins_us_to_somebody_else_is_found_out():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        other = await behind_relay(here, relay)
        reach = relay.relay._reach

        async def lie(source, question):
            return await reach(source, Reach(peer=other.peer))

        relay.relay._reach = lie
        with pytest.raises(SomebodyElseError) as caught:
            await buyer.links.connect(seller.behind(relay))
        assert caught.value.found == other.peer
        assert buyer.links.get(seller.peer) is None


async def test_the_seller_knows_its_buyer_by_noise_whatever_the_relay_says():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        victim = await here.node()
        reach = relay.relay._reach

        async def lie(_source, question):
            return await reach(victim.peer, question)

        relay.relay._reach = lie
        await buyer.links.connect(seller.behind(relay))
        await until(lambda: len(seller.links.all()) == 2)
        assert {link.peer for link in seller.links.all()} == {relay.peer, buyer.peer}


async def test_a_dead_relay_ends_the_link_and_the_reservation_is_made_elsewhere():
    async with world() as here:
        first, second, buyer = await here.node(), await here.node(), await here.node()
        seller = await behind_relay(here, first)
        await seller.links.connect(second.address)
        link = await buyer.links.connect(seller.behind(first))
        await here.end(first)
        with trio.fail_after(5):
            await link.ended.wait()
        await until(lambda: seller.circuits.relays() == [second.peer])
        link = await buyer.links.connect(seller.behind(second))
        assert link.peer == seller.peer
        assert await echoes(buyer, seller.peer, BIG[:1000])


async def test_strangers_neither_reserve_nor_reach():
    async with world() as here:
        relay = await here.node()
        seller = await behind_relay(here, relay)
        stranger = await here.node(mode="always", member=False)
        await stranger.links.connect(relay.address)
        await until(lambda: relay.links.get(stranger.peer))
        await until(lambda: stranger.events.counts["reservation_refused"])
        assert stranger.circuits.relays() == []
        with pytest.raises(RefusedError) as caught:
            await stranger.links.connect(seller.behind(relay))
        assert caught.value.code == "OWNER_LIMIT"
        assert relay.events.counts["circuit_opened"] == 0


async def test_whoever_has_no_reservation_is_not_reached():
    async with world() as here:
        relay, buyer, shy = await here.node(), await here.node(), await here.node()
        await shy.links.connect(relay.address)
        with pytest.raises(PeerError, match="no reservation"):
            await buyer.links.connect(shy.behind(relay))


async def test_an_owner_who_does_not_relay_is_left_alone():
    async with world() as here:
        relay, buyer = await here.node(limits=None), await here.node()
        seller = await here.node(mode="always")
        await seller.links.connect(relay.address)
        await until(lambda: seller.events.counts["reservation_refused"])
        with pytest.raises(RefusedError) as caught:
            await buyer.links.connect(seller.behind(relay))
        assert caught.value.code == "NOT_OFFERED"


async def test_a_stream_that_nobody_reserved_for_is_refused_by_the_end():
    async with world() as here:
        pusher, node = await here.node(), await here.node()
        await pusher.links.connect(node.address)
        from aivillage.protocols.relaying import Incoming

        stream = await pusher.transport.open_stream(node.peer, RELAY_PROTOCOL)
        with pytest.raises(AivillageError, match="no reservation"):
            await ask(stream, Incoming(peer=pusher.peer))
        await stream.close()


async def open_circuits(buyer: Node, relay: Node, seller: Node, count: int) -> list:
    """Circuits that stay open, without a connection over them."""
    await buyer.links.connect(relay.address)
    streams = []
    for _ in range(count):
        stream = await buyer.transport.open_stream(relay.peer, RELAY_PROTOCOL)
        streams.append(stream)
        await ask(stream, Reach(peer=seller.peer))
    return streams


async def test_the_circuits_of_a_relay_end_at_the_limit_and_at_one_more():
    async with world() as here:
        relay = await here.node(limits=limited(circuits=2))
        seller, buyer = await behind_relay(here, relay), await here.node()
        streams = await open_circuits(buyer, relay, seller, 2)
        assert relay.relay.status()["circuits"] == 2
        with pytest.raises(RefusedError, match="owner allows") as caught:
            await open_circuits(buyer, relay, seller, 1)
        assert caught.value.code == "BUSY"
        await streams[0].close()
        await until(lambda: relay.relay.status()["circuits"] == 1)
        await open_circuits(buyer, relay, seller, 1)


async def test_nobody_takes_all_circuits_of_a_relay():
    async with world() as here:
        relay = await here.node(limits=limited(circuits=64))
        seller, buyer, other = await behind_relay(here, relay), await here.node(), await here.node()
        await open_circuits(buyer, relay, seller, CIRCUITS_PER_PEER_MAX)
        with pytest.raises(RefusedError, match="circuits here"):
            await open_circuits(buyer, relay, seller, 1)
        await open_circuits(other, relay, seller, 1)


async def test_a_day_that_is_spent_ends_circuits_and_reservations():
    async with world() as here:
        relay, spare = await here.node(limits=limited(bytes_a_day=300_000)), await here.node()
        seller, buyer = await behind_relay(here, relay), await here.node()
        link = await buyer.links.connect(seller.behind(relay))
        assert await echoes(buyer, seller.peer, BIG[:100_000])
        assert not await echoes(buyer, seller.peer, BIG)
        await link.ended.wait()
        assert relay.relay.status()["bytes_today"] <= 300_000
        await until(lambda: not seller.circuits.relays())
        with pytest.raises(AivillageError):
            await buyer.links.connect(seller.behind(relay))
        await seller.links.connect(spare.address)
        await until(lambda: seller.circuits.relays() == [spare.peer])


async def test_the_rate_of_a_relay_is_kept():
    async with world() as here:
        relay = await here.node(limits=limited(bytes_per_second=1 << 20))
        seller, buyer = await behind_relay(here, relay), await here.node()
        await buyer.links.connect(seller.behind(relay))
        began = trio.current_time()
        assert await echoes(buyer, seller.peer, BIG)
        # Two MiB at one a second, the first of which is the bucket's.
        assert 0.8 < trio.current_time() - began < 4


async def test_a_cancelled_dial_leaves_no_circuit_and_a_second_one_works():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        await buyer.links.connect(relay.address)
        for microseconds in range(0, 20_000, 1000):
            with trio.move_on_after(microseconds / 1e6):
                await buyer.circuits.dial(seller.behind(relay))
            await buyer.transport.hang_up(seller.peer)
        await until(lambda: relay.relay.status()["circuits"] == 0)
        link = await buyer.links.connect(seller.behind(relay))
        assert link.peer == seller.peer
        assert await echoes(buyer, seller.peer, BIG)


async def test_two_hidden_ones_that_dial_each_other_at_once_have_one_link_that_works():
    async with world() as here:
        relay = await here.node()
        one, other = await behind_relay(here, relay), await behind_relay(here, relay)
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.links.connect, other.behind(relay))
                nursery.start_soon(other.links.connect, one.behind(relay))
            await until(lambda: one.links.get(other.peer) and other.links.get(one.peer))
            await trio.sleep(0.1)
            mine, theirs = one.links.get(other.peer), other.links.get(one.peer)
            assert mine.dialled != theirs.dialled
            assert await echoes(one, other.peer, BIG[:1000])
            await one.links.drop(other.peer, "once more")
            await until(lambda: relay.relay.status()["circuits"] == 0)
            await until(lambda: other.links.get(one.peer) is None)


async def test_a_node_that_is_dialled_needs_no_relay():
    async with world() as here:
        relay = await here.node()
        node = await here.node(mode="auto")
        node.circuits._called_at -= 60.0  # nobody has dialled it for a minute
        await node.links.connect(relay.address)
        await until(lambda: node.circuits.relays() == [relay.peer])
        other = await here.node()
        await other.links.connect(node.address)
        await until(lambda: node.circuits.relays() == [])
        await until(lambda: relay.relay.status()["reservations"] == 0)


async def test_an_idle_link_moves_to_a_direct_connection_and_a_busy_one_stays(monkeypatch):
    monkeypatch.setattr("aivillage.node.circuits.DIRECT_SECONDS", (0.5, 1.0))
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        seller = await behind_relay(here, relay)
        buyer.circuits.is_busy = seller.circuits.is_busy = lambda link: True
        first = await buyer.links.connect(seller.behind(relay))
        assert buyer.circuits.relay_of(seller.peer) == relay.peer
        await trio.sleep(2.5)
        assert buyer.links.get(seller.peer) is first
        buyer.circuits.is_busy = seller.circuits.is_busy = lambda link: False
        await until(lambda: buyer.links.get(seller.peer) not in (None, first))
        assert buyer.circuits.relay_of(seller.peer) is None
        await until(lambda: relay.relay.status()["circuits"] == 0)
        assert await echoes(buyer, seller.peer, BIG)


async def test_a_circuit_through_two_relays_or_to_oneself_is_no_address():
    async with world() as here:
        relay, buyer = await here.node(), await here.node()
        for address in (
            circuit_address(circuit_address(relay.address, relay.peer), buyer.peer),
            circuit_address(relay.address, buyer.peer),
            f"{relay.address}/p2p-circuit/p2p/",
        ):
            with pytest.raises(AivillageError) as caught:
                await buyer.links.connect(address)
            assert caught.value.code == "BAD_REQUEST"
