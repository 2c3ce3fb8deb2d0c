"""Knocking at an address without staying, and several addresses of one node at a time."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from aivillage.node.dialling import first_to_answer
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.ports import SomebodyElseError
from tests.integration.daemons import Yard, wait_for
from tests.integration.test_transport_conformance import ECHO, echo, echoes


@pytest.fixture(params=["loopback", "libp2p"])
def pair(request, key_of, peer_of):
    """Two nodes on either transport."""

    @asynccontextmanager
    async def open_pair():
        network = LoopbackNetwork()
        async with AsyncExitStack() as stack:
            nodes = []
            for number in (1, 2):
                if request.param == "loopback":
                    node = network.open(f"n{number}", peer_of(number))
                else:
                    node = open_libp2p(key_of(number), "127.0.0.1:0")
                nodes.append(await stack.enter_async_context(node))
                nodes[-1].serve(ECHO, echo)
            with trio.fail_after(30):
                yield nodes

    return open_pair


def open_to(one, other):
    connections = one._swarm.connections
    return [c for key, known in connections.items() if str(key) == other.peer for c in known]


async def test_a_probe_proves_who_is_there_and_leaves_nothing_behind(pair):
    async with pair() as (a, b):
        address = b.addresses()[0]
        await a.probe(address)
        assert a.host_of(b.peer) == ""
        with pytest.raises(PeerError):
            await a.open_stream(b.peer, ECHO)
        assert await a.dial(address) == b.peer
        for _ in range(3):
            await a.probe(address)  # past the open connection, and beside it
            assert await echoes(a, b.peer)


async def test_a_probe_finds_nobody_or_somebody_else_and_says_so(pair, peer_of):
    async with pair() as (a, b):
        address = b.addresses()[0]
        await a.dial(address)
        with pytest.raises(SomebodyElseError) as caught:
            await a.probe(address.replace(b.peer, peer_of(9)))
        assert caught.value.found == b.peer
        with pytest.raises(PeerError):
            await a.probe(address.replace("/n2/", "/gone/").replace(address.split("/")[4], "1"))
        with pytest.raises(RequestError):
            await a.probe("nonsense")
        assert await echoes(a, b.peer)


async def test_both_sides_of_a_connection_know_where_the_other_comes_from(pair):
    async with pair() as (a, b):
        await a.dial(b.addresses()[0])
        while not b.host_of(a.peer):
            await trio.sleep(0.01)
        host = b.addresses()[0].split("/")[2]
        assert a.host_of(b.peer) == host
        assert b.host_of(a.peer) == a.addresses()[0].split("/")[2]
        await a.hang_up(b.peer)
        while a.host_of(b.peer):
            await trio.sleep(0.01)


async def test_of_several_addresses_that_all_answer_one_connection_is_left(key_of):
    async with open_libp2p(key_of(1), "127.0.0.1:0") as a, open_libp2p(key_of(2), "0.0.0.0:0") as b:
        b.serve(ECHO, echo)
        port = b.addresses()[0].split("/")[4]
        places = [f"/ip4/127.0.0.{n}/tcp/{port}/p2p/{b.peer}" for n in range(1, 6)]
        # All at the same moment, which the head start of the first one makes rare.
        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(a.dial, place)
        assert await echoes(a, b.peer)
        with trio.fail_after(5):
            while len(open_to(a, b)) > 1:
                await trio.sleep(0.01)
        assert await first_to_answer(places, a.dial, seconds=5) == b.peer
        assert len(open_to(a, b)) == 1
        assert await echoes(a, b.peer)


def test_two_daemons_say_whether_they_can_be_dialled_and_who_tried(tmp_path):
    with Yard(tmp_path) as yard:
        ann = yard.daemon("ann").start()
        assert "unknown: no villager is here" in ann.run("status").out
        bob = yard.daemon("bob").start("--join", ann.ask("invite")["token"])
        for asker, helper in ((ann, bob), (bob, ann)):
            found = wait_for(
                lambda a=asker: (f := a.ask("status")["reachable"])["state"] != "unknown" and f,
                20,
                f"somebody dialled back\n{yard.logs()}",
            )
            assert found["state"] == "reachable"
            assert found["why"].startswith(f"{helper.peer[-8:]} dialled 127.0.0.1:{asker.port}")
        assert "from outside" in ann.run("doctor").out
        shown = ann.run("peers", "--why", bob.peer[-8:]).out
        assert "linked, a member" in shown
        bob.stop()
        wait_for(
            lambda: "said goodbye" in ann.run("peers", "--why").out, 10, "ann heard the goodbye"
        )
        assert ann.run("peers", "--why", "nobody").code == 2
