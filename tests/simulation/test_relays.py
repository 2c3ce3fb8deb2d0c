"""Villagers whom nobody can dial: found, reached, paid, and found again when a relay dies."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.node import relay_tab
from aivillage.node.relay_tab import Tab
from aivillage.protocols import relaying
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import Ledger
from aivillage.protocols.relaying import BILL_BYTES, CIRCUIT_LOSS_BYTES
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until, without
from tests.simulation.test_market import PROMPT, expected

PER_GIB = 4096 << 10
"""A MiB costs 4,096 micro-credits: under the exposure of 20,000 four of them fit unpaid."""
MIB = 1 << 20
DEAR = {"relay_price_micro_credits_per_gib": PER_GIB}
PAYS = {"relay_price_max_micro_credits_per_gib": PER_GIB}


@asynccontextmanager
async def hidden_pair(folder, relays=1, priced=(), **pays):
    """A buyer and a seller who only reach the relays, which are linked to both."""
    async with open_mesh(folder) as mesh:
        prices = [*priced, *[{}] * (relays - len(priced))]
        between = [
            await mesh.add(f"relay{n}", serve=False, **price) for n, price in enumerate(prices)
        ]
        mesh.network.hidden |= {"buyer", "seller"}
        seller = await mesh.add("seller", through_relay="always", **pays)
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


# --------------------------------------------------------------------------- pay


@pytest.fixture
def quick_bills(monkeypatch):
    monkeypatch.setattr(relay_tab, "BILL_SECONDS", 0.1)
    monkeypatch.setattr(relay_tab, "ROOM_SECONDS", 1.0)
    monkeypatch.setattr(relay_tab, "ROOM_CHECK_SECONDS", 0.1)


async def push(buyer, seller, size_bytes):
    """So many bytes to the seller over the circuit; the loopback carries only names on it else."""
    carrier = buyer.desk.detours.circuits._carriers[seller.peer]
    with trio.fail_after(20):
        for _ in range(size_bytes >> 16):
            await carrier.write(bytes(1 << 16))


async def linked(buyer, seller):
    """Through a relay, for some work."""
    running = await buyer.ask(PROMPT, tokens=2)
    assert result_of(running) == expected(PROMPT, 2)


def fare_of(seller):
    (fare,) = seller.desk.detours.circuits.fares()
    return fare


def carried_of(relay):
    (tab,) = relay.desk.detours._relay._reservations.values()
    return tab.carried_bytes


async def test_a_relay_is_paid_by_whom_it_makes_reachable_for_the_bytes_that_both_counted(
    tmp_path, quick_bills
):
    async with hidden_pair(tmp_path, priced=[DEAR], **PAYS) as (_, (relay,), buyer, seller):
        await linked(buyer, seller)
        await push(buyer, seller, 7 * MIB)
        await until(lambda: fare_of(seller).counted_bytes == carried_of(relay) > 7 * MIB)
        owed = relaying.price_of(carried_of(relay), PER_GIB)
        assert owed >= 7 * 4096  # more than the exposure: it was paid on the way
        await settled(seller, relay, owed)
        assert (await buyer.ledger.balance()).net == -price_of(PROMPT, 2)
        carried = relay.desk.detours.status()["carried"]
        assert (carried["price_micro_credits_per_gib"], carried["earned_micro_credits"]) == (
            PER_GIB,
            owed,
        )
        paying = seller.desk.detours.status()["paying"][relay.peer]
        assert paying["micro_credits"] == owed


async def test_unpaid_relaying_stops_at_the_exposure(tmp_path, quick_bills):
    async with hidden_pair(tmp_path, priced=[DEAR], **PAYS) as (_, (relay,), buyer, seller):
        await linked(buyer, seller)
        with without(seller, Ledger), pytest.raises((PeerError, trio.TooSlowError)):
            await push(buyer, seller, 20 * MIB)
        await until(lambda: relay.events("relay_unpaid"))
        (ended,) = relay.events("circuit_closed")
        assert 4 * MIB < ended["bytes"] <= 20_000 * MIB // 4096 + BILL_BYTES + (2 << 16)
        view = relay.ledger.view(seller.peer)
        assert view.owed_to_me == 0
        assert relay.events("relay_unpaid")[0]["micro_credits"] <= 20_000


async def test_a_relay_that_bills_more_than_passed_is_left_for_another_and_not_paid(
    tmp_path, quick_bills, monkeypatch
):
    async with hidden_pair(tmp_path, 2, [DEAR, DEAR], **PAYS) as (_, relays, buyer, seller):
        await linked(buyer, seller)
        used = buyer.desk.detours.circuits.relay_of(seller.peer)
        (liar,) = [relay for relay in relays if relay.peer == used]
        (other,) = [relay for relay in relays if relay.peer != used]
        honest = Tab.take

        async def lie(tab, size_bytes):
            return await honest(tab, 16 * size_bytes)

        monkeypatch.setattr(Tab, "take", lie)
        with pytest.raises((PeerError, trio.TooSlowError)):
            await push(buyer, seller, 8 * MIB)
        await until(lambda: seller.events("relay_left"))
        monkeypatch.setattr(Tab, "take", honest)
        assert "more than passed here" in seller.events("relay_left")[0]["reason"]
        await until(lambda: seller.desk.detours.status()["reachable_through"] == [other.peer])
        (paid,) = [
            event["micro_credits"]
            for event in seller.events("reservation_ended")
            if event["peer"] == liar.peer
        ]
        passed = (BILL_BYTES + 4 * CIRCUIT_LOSS_BYTES) * 2
        assert paid <= relaying.price_of(passed, PER_GIB)
        await settled(seller, liar, paid)
        await linked(buyer, seller)
        assert buyer.desk.detours.circuits.relay_of(seller.peer) == other.peer


async def test_a_relay_that_is_too_dear_is_not_used(tmp_path):
    cheaper = {"relay_price_max_micro_credits_per_gib": PER_GIB - 1}
    async with open_mesh(tmp_path) as mesh:
        dear = await mesh.add("dear", serve=False, **DEAR)
        free = await mesh.add("free", serve=False, relay_price_micro_credits_per_gib=0)
        seller = await mesh.add("seller", through_relay="always", **cheaper)
        await mesh.link(seller, dear)
        await until(lambda: seller.events("reservation_refused"))
        assert f"takes {PER_GIB} micro-credits" in seller.events("reservation_refused")[0]["reason"]
        await mesh.link(seller, free)
        await until(lambda: seller.desk.detours.circuits.relays() == [free.peer])
        willing = await mesh.add("willing", through_relay="always", **PAYS)
        await mesh.link(willing, dear)
        # A reservation that found the relay busy is asked for again after half a minute.
        await until(lambda: dear.peer in willing.desk.detours.circuits.relays(), 45)


@pytest.mark.parametrize("dies", ["relay", "seller"])
async def test_the_books_are_exact_after_either_was_stopped_in_the_middle(
    tmp_path, quick_bills, dies
):
    async with hidden_pair(tmp_path, priced=[DEAR], **PAYS) as (mesh, (relay,), buyer, seller):
        await linked(buyer, seller)
        await push(buyer, seller, 3 * MIB)
        await until(lambda: relay.ledger.view(seller.peer).owed_to_me >= 2 * 4096)
        gone = {"relay": relay, "seller": seller}[dies]
        await gone.stop()
        await mesh.start(gone)
        await mesh.link(seller, relay)
        await until(
            lambda: (
                relay.ledger.view(seller.peer).owed_to_me
                == seller.ledger.view(relay.peer).owed_by_me
            )
        )
        owed = relay.ledger.view(seller.peer).owed_to_me
        assert 2 * 4096 <= owed <= 4 * 4096
        await settled(seller, relay, owed)


async def test_what_a_relay_may_cost_ends_and_is_not_asked_for_again(tmp_path, quick_bills):
    few = {"ceiling_micro_credits": 3 * 4096}
    async with hidden_pair(tmp_path, priced=[DEAR], **PAYS, **few) as (_, (relay,), buyer, seller):
        await linked(buyer, seller)
        with pytest.raises((PeerError, trio.TooSlowError)):
            await push(buyer, seller, 20 * MIB)
        await until(lambda: seller.events("relay_left"))
        assert seller.events("relay_left")[0]["reason"] == "what it may cost is used up"
        assert relay.ledger.view(seller.peer).owed_to_me <= 3 * 4096
        await trio.sleep(1.5)
        assert seller.desk.detours.circuits.relays() == []
