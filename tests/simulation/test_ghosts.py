"""Who is alive: the departed stay away, sleepers come back, and gossip is believed in neither."""

from __future__ import annotations

import trio

from aivillage.protocols.messages import Gossip, QuoteRequest
from tests.simulation.mesh import open_mesh, result_of, until
from tests.simulation.test_market import expected
from tests.simulation.test_people import ask


def sellers(node):
    return {candidate.peer for candidate in node.desk.discovery.candidates("mesh.noop")}


def old_offer(node):
    """What `node` could have said a moment ago, and somebody kept."""
    made = node.desk.discovery.make_offer(
        node.desk.seller.operations(), (node.address,), 8, 60.0
    )  # fmt: skip
    return Gossip(topic="offer", envelope=made)


async def test_a_departed_nodes_old_offer_does_not_resurrect_it_whoever_brings_it(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        watcher = await mesh.add("watcher", serve=False)
        third, leaver = await mesh.add("third"), await mesh.add("leaver")
        await mesh.knows(watcher, third, leaver)
        kept = [old_offer(leaver) for _ in range(3)]
        leaver.leave.set()
        await leaver.closed.wait()
        await until(lambda: leaver.peer not in sellers(watcher))
        for offer in kept:
            third.desk.links.get(watcher.peer).send(offer)
        heard = len(watcher.heard)
        await until(lambda: len(watcher.heard) >= heard + 3)
        await trio.sleep(0.3)
        assert sellers(watcher) == {third.peer}
        shown = {peer["peer"]: peer for peer in await watcher.desk.on_peers({})}
        assert "said goodbye" in shown[leaver.peer]["why"]
        # It comes back as itself, and is there at once.
        await mesh.start(leaver)
        await until(lambda: sellers(watcher) == {third.peer, leaver.peer})


async def test_who_only_heard_of_a_node_hears_that_it_left(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        hub, leaver = await mesh.add("hub", serve=False), await mesh.add("leaver")
        far = await mesh.add("far", serve=False)
        mesh.network.hidden = {"leaver", "far"}
        await mesh.link(leaver, hub)
        await mesh.link(far, hub)
        await until(lambda: sellers(far) == {leaver.peer})
        assert far.desk.links.get(leaver.peer) is None
        leaver.leave.set()
        await until(lambda: sellers(far) == set(), seconds=0.7)  # an offer here lives 0.8 s
        assert far.desk.discovery.has_left(leaver.peer)


async def test_a_laptop_that_slept_for_three_minutes_comes_back_by_itself(tmp_path):
    """At 100 times the pace: 18 heartbeats of 0.1 s, and more than two lives of an offer."""
    async with open_mesh(tmp_path) as mesh:
        pace = {"heartbeat_seconds": 0.1}
        buyer, other = [await mesh.add(n, serve=False, **pace) for n in ("buyer", "other")]
        laptop = await mesh.add("laptop", **pace)
        await mesh.knows(buyer, laptop)
        await mesh.link(buyer, other)
        mesh.network.partition(["laptop"])
        await trio.sleep(1.8)
        assert buyer.desk.links.get(laptop.peer) is None
        assert buyer.desk.links.get(other.peer) is not None
        assert sellers(buyer) == set()
        assert "no sign of life" in buyer.desk.villagers.reasons.last(laptop.peer)
        mesh.network.heal()
        await until(lambda: buyer.desk.links.get(laptop.peer), seconds=12)
        await until(lambda: sellers(buyer) == {laptop.peer})
        assert result_of(await buyer.ask("hello", tokens=2)) == expected("hello", 2)


async def test_no_third_party_takes_a_living_node_down(tmp_path):
    """The liar plays its farewell of an earlier life, and invents one."""
    async with open_mesh(tmp_path) as mesh:
        watcher = await mesh.add("watcher", serve=False)
        liar, victim = await mesh.add("liar"), await mesh.add("victim")
        farewell = Gossip(topic="offer", envelope=victim.desk.discovery.make_farewell())
        await mesh.knows(watcher, liar, victim)
        link = liar.desk.links.get(watcher.peer)
        heard = len(watcher.heard)
        link.send(farewell)
        await until(lambda: farewell in watcher.heard[heard:])
        await trio.sleep(0.1)
        assert victim.peer in sellers(watcher)
        assert watcher.desk.links.get(victim.peer) is not None


# ------------------------------------------------------------------ why somebody is not linked


async def why(node, other):
    return {peer["peer"]: peer["why"] for peer in await node.desk.on_peers({})}[other.peer]


async def test_every_reason_for_a_missing_link_is_said_in_one_line(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node", serve=False)
        friend = await mesh.add("friend", serve=False)
        stranger = await mesh.add("stranger", stranger=True, serve=False)
        for other in (friend, stranger):
            await mesh.link(node, other)
        assert await why(node, friend) == "linked, a member"
        assert await why(node, stranger) == "linked, not of my village"
        with trio.fail_after(5):
            while friend.peer not in {known.id for known in await node.desk.jobs.known_peers()}:
                await trio.sleep(0.01)
        await friend.stop()
        await until(lambda: "could not be reached" in node.desk.villagers.why(friend.peer))
        assert "nobody answers at /memory/friend" in await why(node, friend)
        assert "the next try is in" in await why(node, friend)
        await ask(node, "block", peer=friend.peer)
        assert (await why(node, friend)).startswith("blocked by you; ")
        # Somebody else lives there now.
        impostor = await mesh.add("impostor", stranger=True, serve=False)
        wrong = f"/memory/impostor/p2p/{friend.peer}"
        await node.desk.villagers._dial(friend.peer, (wrong,))
        assert f"{impostor.peer} answered at" in await why(node, friend) or (
            "not the peer that was looked for" in await why(node, friend)
        )


async def test_who_was_only_heard_of_is_not_dialled_where_there_are_neighbours_enough(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("aivillage.node.villagers.NEIGHBOURS", 1)
    async with open_mesh(tmp_path) as mesh:
        hub = await mesh.add("hub", serve=False)
        one, two = await mesh.add("one", serve=False), await mesh.add("two")
        for other in (one, two):
            await mesh.link(other, hub)
        await until(lambda: sellers(one) == {two.peer})
        assert await why(one, two) == "never dialled: heard of only, and we have neighbours enough"


async def test_a_kept_quote_ends_by_its_sellers_clock(tmp_path, monkeypatch):
    """As of a seller that is ten minutes ahead: its word is good for 603 s of ours, it seems."""
    monkeypatch.setattr("aivillage.node.pricelist.QUOTE_SECONDS", 603.0)
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await mesh.add("buyer", serve=False), await mesh.add("seller")
        await mesh.knows(buyer, seller)
        buyer.desk.links.get(seller.peer).clock_ahead_ms = 600_000

        def asked():
            return sum(isinstance(frame, QuoteRequest) for frame in seller.heard)

        for _ in range(2):
            await buyer.ask("hello", tokens=1)
        assert asked() == 1
        await trio.sleep(1.1)  # 2 s of margin before the end
        await buyer.ask("hello", tokens=1)
        assert asked() == 2


async def test_a_links_clock_is_what_the_hello_said(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        one, two = await mesh.add("one"), await mesh.add("two")
        await mesh.link(one, two)
        assert abs(one.desk.links.get(two.peer).clock_ahead_ms) < 2_000
