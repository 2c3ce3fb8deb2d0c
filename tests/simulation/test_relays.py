"""Villagers whom nobody can dial: found, reached, paid, and found again when a relay dies."""

from __future__ import annotations

from contextlib import asynccontextmanager

import trio

from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected


@asynccontextmanager
async def hidden_pair(folder, relays=1):
    """A buyer and a seller who only reach the relays, which are linked to both."""
    async with open_mesh(folder) as mesh:
        between = [await mesh.add(f"relay{n}", serve=False) for n in range(relays)]
        mesh.network.hidden |= {"buyer", "seller"}
        seller = await mesh.add("seller", through_relay="always")
        buyer = await mesh.add("buyer", serve=False, through_relay="never")
        for relay in between:
            await mesh.link(seller, relay)
            await mesh.link(buyer, relay)
        await until(lambda: len(ways(buyer, seller)) == relays)
        yield mesh, between, buyer, seller


def ways(buyer, seller):
    """The addresses behind relays at which the buyer would look for the seller."""
    found = [offer for offer in buyer.desk.discovery.offers() if offer.seller == seller.peer]
    return [a for offer in found for a in offer.addresses if "/p2p-circuit/" in a]


async def test_a_job_between_two_whom_nobody_can_dial_is_done_and_paid(tmp_path):
    async with hidden_pair(tmp_path) as (_, (relay,), buyer, seller):
        running = await buyer.ask(PROMPT, tokens=8)
        assert result_of(running) == expected(PROMPT, 8)
        await settled(buyer, seller, price_of(PROMPT, 8))
        assert buyer.desk.detours.circuits.relay_of(seller.peer) == relay.peer
        status = (await relay.desk.on_status({}))["relay"]["carried"]
        assert (status["reservations"], status["circuits"]) == (1, 1)
        assert (await relay.ledger.balance()).net == 0


async def test_a_job_goes_on_through_another_relay_when_its_own_dies(tmp_path):
    async with hidden_pair(tmp_path, relays=2) as (_, relays, buyer, seller):
        seller.script.pause_at = 5
        running = await buyer.submit(PROMPT, tokens=12)
        with trio.fail_after(5):
            await seller.script.paused.wait()
        used = buyer.desk.detours.circuits.relay_of(seller.peer)
        seller.script.pause_at = None
        (dies,) = [relay for relay in relays if relay.peer == used]
        (stays,) = [relay for relay in relays if relay.peer != used]
        await dies.stop()
        with trio.fail_after(15):
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert buyer.desk.detours.circuits.relay_of(seller.peer) == stays.peer
        await settled(buyer, seller, price_of(PROMPT, 12))


async def test_a_node_that_nobody_dials_for_a_while_asks_for_a_relay_by_itself(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("aivillage.node.circuits.AUTO_SECONDS", 1.5)
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder")
        shy = await mesh.add("shy")
        other = await mesh.add("other", through_relay="never")
        await mesh.link(shy, founder)
        assert shy.desk.detours.status()["reachable_through"] == []
        await until(lambda: shy.desk.detours.status()["reachable_through"] == [founder.peer])
        await mesh.link(other, shy)
        await until(lambda: shy.desk.detours.status()["reachable_through"] == [])
        assert founder.desk.detours.status()["reachable_through"] == []
