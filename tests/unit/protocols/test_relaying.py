"""Addresses behind a relay, and what names the terms of a reservation."""

import itertools

import msgspec
import pytest

from aivillage.protocols.errors import RequestError
from aivillage.protocols.relaying import (
    Granted,
    Reserve,
    agreement,
    circuit_address,
    is_circuit,
    split_circuit,
)
from aivillage.protocols.types import PeerId

RELAY = "/ip4/10.0.0.1/tcp/4051/p2p/R"


def test_an_address_behind_a_relay_is_split_into_what_it_was_made_of():
    address = circuit_address(RELAY, "ME")
    assert address == f"{RELAY}/p2p-circuit/p2p/ME"
    assert is_circuit(address)
    assert not is_circuit(RELAY)
    assert split_circuit(address) == (RELAY, "ME")


@pytest.mark.parametrize(
    "address",
    [
        RELAY,
        f"{RELAY}/p2p-circuit",
        f"{RELAY}/p2p-circuit/p2p/",
        f"{RELAY}/p2p-circuit/ip4/1.2.3.4",
        "/ip4/10.0.0.1/tcp/4051/p2p-circuit/p2p/ME",
        f"{RELAY}/p2p-circuit/p2p/ME/p2p-circuit/p2p/YOU",
        f"{RELAY}/p2p-circuit/p2p/ME/tcp/1",
    ],
)
def test_what_leads_through_no_relay_or_two_is_refused(address):
    with pytest.raises(RequestError) as caught:
        split_circuit(address)
    assert "p2p-circuit" in caught.value.next_step


def test_whatever_was_agreed_on_otherwise_has_another_name():
    def name(relay="R", holder="H", ceiling=7, asked=b"a", granted=b"g", price=5):
        reserve = Reserve(nonce=asked, ceiling_micro_credits=ceiling)
        grant = Granted(nonce=granted, price_micro_credits_per_gib=price)
        return agreement(PeerId(relay), PeerId(holder), reserve, grant)

    changed = [
        name(**{key: value})
        for key, value in (
            ("relay", "Q"), ("holder", "I"), ("ceiling", 8), ("asked", b"b"), ("granted", b"h"),
            ("price", 6),
        )
    ]  # fmt: skip
    names = [name(), *changed]
    assert all(one != other for one, other in itertools.combinations(names, 2))
    assert {len(one) for one in names} == {32}


def test_a_version_before_prices_is_read_as_paying_nothing():
    old = msgspec.msgpack.encode({"t": "reserve"})
    assert msgspec.msgpack.decode(old, type=Reserve) == Reserve()
    assert Reserve().price_max_micro_credits_per_gib == 0
