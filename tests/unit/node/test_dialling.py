"""Several addresses of one peer at a time: who wins, who is left, and what is said of failure."""

from __future__ import annotations

import pytest
import trio

from aivillage.node.dialling import FAR, NEAR, RELAYED, distance, first_to_answer, in_order
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import ADDRESSES_MAX
from tests.conftest import make_peer


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("/ip4/127.0.0.1/tcp/1", NEAR),
        ("/ip4/192.168.1.7/tcp/1", NEAR),
        ("/ip4/10.0.0.7/tcp/1", NEAR),
        ("/ip4/169.254.3.4/tcp/1", NEAR),
        ("/ip6/fe80::1/tcp/1", NEAR),
        ("/ip6/fd00::1/tcp/1", NEAR),
        ("/memory/ann/p2p/x", NEAR),
        ("/ip6/::ffff:10.0.0.7/tcp/1", NEAR),
        ("/ip4/8.8.4.4/tcp/1", FAR),
        ("/ip4/203.0.113.5/tcp/1", FAR),
        ("/ip6/2a00:1450::1/tcp/1", FAR),
        ("/dns4/example.org/tcp/1", FAR),
        ("/ip4/nonsense/tcp/1", FAR),
        ("nonsense", FAR),
        ("/ip4/10.0.0.7/tcp/1/p2p/x/p2p-circuit/p2p/y", RELAYED),
    ],
)
def test_an_address_is_near_far_or_relayed(address, where):
    assert distance(address) == where


def test_the_nearest_come_first_each_once_and_else_as_they_came():
    far, lan, other = "/ip4/8.8.4.4/tcp/1", "/ip4/192.168.1.7/tcp/1", "/dns4/example.org/tcp/1"
    assert in_order((far, other, lan, far)) == [lan, far, other]


class Scene:
    """A peer at some of its addresses; notes who was dialled when, and who was cancelled."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.begun = {}
        self.cancelled = []

    async def reach(self, name):
        self.begun[name] = trio.current_time()
        try:
            await trio.sleep(self.seconds.get(name, 1000))
        except trio.Cancelled:
            self.cancelled.append(name)
            raise
        if name.startswith("dead"):
            raise PeerError(f"{name} refuses", code="PEER_LOST")
        return name


async def test_a_dead_address_costs_its_head_start_and_not_its_timeout(autojump_clock):
    scene = Scene(good=0.02)
    began = trio.current_time()
    assert await first_to_answer(("silent", "good"), scene.reach, seconds=10) == "good"
    assert trio.current_time() - began == pytest.approx(0.17)
    assert scene.cancelled == ["silent"]


async def test_an_address_that_refuses_at_once_costs_nothing(autojump_clock):
    scene = Scene(dead=0.0, good=0.02)
    began = trio.current_time()
    assert await first_to_answer(("dead", "good"), scene.reach, seconds=10) == "good"
    assert trio.current_time() - began == pytest.approx(0.02)


async def test_who_is_near_wins_though_both_answer(autojump_clock):
    near, far = "/ip4/192.168.1.7/tcp/1", "/ip4/8.8.4.4/tcp/1"
    scene = Scene(**{near: 0.1, far: 0.0})
    assert await first_to_answer((far, near), scene.reach, seconds=10) == near
    assert list(scene.begun) == [near]


async def test_where_all_fail_the_first_in_line_says_why_after_one_timeout(autojump_clock):
    began = trio.current_time()
    with pytest.raises(PeerError, match="silent1 does not answer"):
        await first_to_answer(("silent1", "dead", "silent2"), Scene(dead=1).reach, seconds=5)
    assert trio.current_time() - began == pytest.approx(5 + 2 * 0.15)
    with pytest.raises(PeerError, match="no address"):
        await first_to_answer((), Scene().reach, seconds=5)


@pytest.mark.parametrize("count", [ADDRESSES_MAX, ADDRESSES_MAX + 1])
async def test_no_more_addresses_are_tried_than_a_peer_may_name(autojump_clock, count):
    scene = Scene()
    with pytest.raises(PeerError):
        await first_to_answer([f"a{n}" for n in range(count)], scene.reach, seconds=9)
    assert len(scene.begun) == ADDRESSES_MAX


async def test_on_a_network_one_connection_is_left_and_the_dead_addresses_cost_little(
    autojump_clock,
):
    network = LoopbackNetwork(latency_seconds=0.4)
    ann, bob = make_peer(1), make_peer(2)
    async with (
        network.open("ann", ann) as dialler,
        network.open("bob", bob),
        network.open("other", make_peer(3)),
    ):
        addresses = [f"/memory/{name}/p2p/{bob}" for name in ("gone", "other", "bob")]
        network.partition(["gone"])
        began = trio.current_time()
        assert await first_to_answer(addresses, dialler.dial, seconds=10) == bob
        assert trio.current_time() - began == pytest.approx(0.8 + 2 * 0.15)
        assert list(dialler.connections) == [bob]
