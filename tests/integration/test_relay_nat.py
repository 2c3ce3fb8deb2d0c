"""A seller behind NAT serves a paid job: real daemons in network namespaces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.integration.daemons import Daemon, Yard, paused, settled, wait_for
from tests.integration.netns import Wires, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "present")]

RELAY, BUYER, ROUTER, SELLER = "10.77.0.1", "10.77.0.2", "10.77.0.9", "192.168.77.2"

PER_GIB = 4096 << 10
PRICE = ("--set", f"relay_price_micro_credits_per_gib={PER_GIB}")
PAYS = ("--set", f"relay_price_max_micro_credits_per_gib={PER_GIB}")
"""256 bytes are a micro-credit: a village's small talk is enough to see."""


class Village(NamedTuple):
    wires: Wires
    relay: Daemon
    buyer: Daemon
    seller: Daemon


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Village]:
    """Relay and buyer on a bridge; the seller gets out to the relay only, and nobody gets in."""
    with Wires() as wires, Yard(tmp_path_factory.mktemp("nat")) as yard:
        wires.place("relay", RELAY)
        wires.place("buyer", BUYER)
        wires.hide("seller", SELLER, router=ROUTER, reaches=[RELAY])
        relay = wires.move(yard.daemon("relay"), RELAY).start(*PRICE)
        buyer = wires.move(yard.daemon("buyer"), BUYER).start("--join", token_of(relay))
        always = "--set", "through_relay=always"
        seller = wires.move(yard.daemon("seller"), SELLER)
        seller.start("--join", token_of(relay), *always, *PAYS)
        yield Village(wires, relay, buyer, seller)
        for daemon in yard.daemons:
            assert "Traceback" not in daemon.log.read_text(), daemon.log_end(200)


def token_of(daemon: Daemon) -> str:
    return str(daemon.ask("invite")["token"])


def carried(relay: Daemon) -> int:
    return int(relay.ask("status")["relay"]["carried"]["bytes_today"])


def through(seller: Daemon) -> list[str]:
    """The relays that the seller has reservations with."""
    return list(seller.ask("status")["relay"]["reachable_through"])


def buys(village: Village, operation: str, **request: object) -> int:
    """The buyer's job at the seller, done and paid; gives the micro-credits it cost."""
    _, relay, buyer, seller = village
    wait_for(lambda: seller.peer in buyer.sellers_known(operation), 60, buyer.log_end)
    before = buyer.ask("balance")["net"]
    job = buyer.submit(operation, peer=seller.peer, **request)
    found = buyer.job_ended(job, 120)
    assert found["state"] == "done", "\n".join(
        (str(found), buyer.log_end(), seller.log_end(), relay.log_end())
    )
    settled([relay, buyer, seller], 20)
    return int(before - buyer.ask("balance")["net"])


def test_nobody_reaches_the_seller_and_the_seller_reaches_only_the_relay(village):
    wires, relay, buyer, seller = village
    assert not wires.can_connect("buyer", SELLER, seller.port)
    assert not wires.can_connect("buyer", ROUTER, seller.port)
    assert not wires.can_connect("seller", BUYER, buyer.port)
    assert wires.can_connect("seller", RELAY, relay.port)


def test_a_seller_behind_nat_serves_a_paid_job_through_a_relay(village):
    _, relay, buyer, seller = village
    wait_for(lambda: through(seller), 30, seller.log_end)
    before = carried(relay)
    assert buys(village, "mesh.noop", note="hello") == 10
    assert carried(relay) > before
    there = f"/p2p/{relay.peer}/p2p-circuit/p2p/{seller.peer}"
    assert any(address.endswith(there) for address in seller.ask("status")["addresses"])
    assert buyer.ask("balance")["spent"] == seller.ask("balance")["earned"] == 10
    ways = {row["peer"]: row["through"] for row in buyer.ask("peers")}
    assert ways == {relay.peer: None, seller.peer: relay.peer}
    assert relay.ask("status")["relay"]["carried"]["circuits"] == 1


def relay_pay(village: Village) -> int:
    """What the relay's book and the seller's say that it earned by relaying."""
    settled([village.relay, village.buyer, village.seller], 20)
    owed = {row["peer"]: row["net"] for row in village.relay.ask("balance")["peers"]}
    return int(owed[village.seller.peer])


def test_the_relay_is_paid_for_what_it_carried_and_no_more(village):
    _, relay, buyer, seller = village
    wait_for(lambda: relay.ask("balance")["earned"], 20, "the first bill")
    earned = relay_pay(village)
    assert 0 < earned <= carried(relay) // 256
    assert relay.ask("balance")["spent"] == 0
    assert [row["peer"] for row in buyer.ask("balance")["peers"] if row["net"]] == [seller.peer]
    (paying,) = seller.ask("status")["relay"]["paying"].values()
    assert paying["price_micro_credits_per_gib"] == PER_GIB
    assert f"takes {PER_GIB / 1e6} credits a GiB" in relay.run("status").out
    assert "relay_price_micro_credits_per_gib" in relay.run("price").out


def test_a_seller_behind_nat_generates_text_through_a_relay(village):
    pytest.importorskip("torch")
    cost = buys(village, "inference.generate", prompt="The capital of France is", max_tokens=8)
    assert cost > 10


def test_when_the_relay_comes_back_so_does_the_seller(village):
    _, relay, buyer, seller = village
    earned = relay_pay(village)
    relay.kill()
    wait_for(lambda: buyer.ask("status")["peers"] == 0, 40, buyer.log_end)
    assert through(seller) == []
    relay.restart()
    wait_for(lambda: through(seller), 60, seller.log_end)
    assert buys(village, "mesh.noop", note="again") == 10
    wait_for(lambda: relay_pay(village) > earned, 20, "the relay is paid again")


def test_when_the_seller_was_killed_the_relays_pay_is_in_both_books(village):
    _, _, buyer, seller = village
    earned = relay_pay(village)
    seller.kill()
    wait_for(lambda: buyer.ask("status")["peers"] == 1, 40, buyer.log_end())
    seller.restart()
    wait_for(lambda: through(seller), 60, seller.log_end())
    assert relay_pay(village) >= earned
    assert buys(village, "mesh.noop", note="and again") == 10
    wait_for(lambda: relay_pay(village) > earned, 20, "the relay is paid again")


def test_a_relay_that_hangs_is_left_within_35_seconds_by_both_ends(village):
    _, relay, buyer, seller = village
    wait_for(lambda: through(seller), 60, seller.log_end)
    assert buys(village, "mesh.noop", note="before") == 10
    with paused(relay):
        # Each counts from the last that it heard itself, so either may be first.
        until = time.monotonic() + 35
        wait_for(lambda: buyer.ask("status")["peers"] == 0, 35, buyer.log_end)
        wait_for(lambda: not through(seller), until - time.monotonic(), seller.log_end)
    wait_for(lambda: through(seller), 60, seller.log_end)
    assert buys(village, "mesh.noop", note="after") == 10
