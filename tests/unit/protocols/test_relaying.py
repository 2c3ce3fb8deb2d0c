"""Addresses behind a relay."""

import pytest

from aivillage.protocols.errors import RequestError
from aivillage.protocols.relaying import circuit_address, is_circuit, split_circuit

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
