"""What a helper dials and what not, and what is said of what helpers found."""

from __future__ import annotations

import pytest

from aivillage.node.reachability import _as_seen, _Tried, judged, may_dial, numbered
from aivillage.protocols.errors import PeerError
from tests.conftest import make_peer

ASKER, HELPER = make_peer(1), make_peer(2)


def at(ip, kind="ip4", peer=ASKER):
    return f"/{kind}/{ip}/tcp/4051/p2p/{peer}"


@pytest.mark.parametrize(
    ("address", "host", "allowed"),
    [
        (at("203.0.113.5"), "203.0.113.5", True),
        (at("203.0.113.5"), "203.0.113.6", False),  # a third party's door
        (at("8.8.4.4"), "8.8.4.4", True),
        (at("8.8.4.4"), "192.168.1.9", False),
        (at("8.8.4.4"), "", False),
        (at("192.168.1.7"), "8.8.4.4", True),
        (at("10.1.2.3"), "8.8.4.4", True),
        (at("fd00::7", "ip6"), "8.8.4.4", True),
        (at("127.0.0.1"), "127.0.0.1", True),
        (at("127.0.0.1"), "8.8.4.4", False),  # the helper's own machine
        (at("127.0.0.2"), "127.0.0.1", False),
        (at("::1", "ip6"), "192.168.1.9", False),
        (at("0.0.0.0"), "8.8.4.4", False),
        (at("169.254.169.254"), "192.168.1.9", False),
        (at("224.0.0.251"), "192.168.1.9", False),
        (at("192.168.1.7", peer=HELPER), "192.168.1.7", False),  # not the asker's own
        (f"/dns4/example.org/tcp/1/p2p/{ASKER}", "8.8.4.4", False),
        (f"{at('192.168.1.7', peer=HELPER)}/p2p-circuit/p2p/{ASKER}", "192.168.1.7", False),
        (f"/memory/ann/p2p/{ASKER}", "ann", True),
        (f"/memory/ann/p2p/{ASKER}", "bob", False),
        ("", "", False),
        ("nonsense", "nonsense", False),
    ],
)
def test_a_helper_dials_where_the_asker_comes_from_and_private_networks(address, host, allowed):
    assert may_dial(address, ASKER, host) is allowed


def tried(address, *, reached, seen_from=""):
    return _Tried(HELPER, address, reached, seen_from)


def test_one_address_that_answers_is_enough():
    lan, far = at("192.168.1.7"), at("8.8.4.4")
    found = judged([tried(lan, reached=False), tried(far, reached=True)], [lan, far])
    assert (found.state, found.next_step) == ("reachable", "")
    assert found.why == f"{HELPER[-8:]} dialled 8.8.4.4:4051"


def test_who_is_reached_on_its_own_network_only_is_told_so():
    lan = at("192.168.1.7")
    found = judged([tried(lan, reached=True)], [lan])
    assert found.state == "reachable"
    assert "nobody outside it was asked" in found.why


def test_an_address_that_works_and_is_not_handed_out_is_to_be_announced():
    lan, seen = at("192.168.1.7"), at("8.8.4.4")
    found = judged([tried(lan, reached=False), tried(seen, reached=True)], [lan])
    assert (found.state, found.next_step) == (
        "reachable", "hand it out: announce = 8.8.4.4:4051",
    )  # fmt: skip


def test_who_is_not_reached_hears_where_it_was_tried_and_what_to_do():
    lan, seen = at("192.168.1.7"), at("8.8.4.4")
    found = judged([tried(lan, reached=False), tried(seen, reached=False)], [lan])
    assert found.state == "not reachable"
    assert found.why == f"{HELPER[-8:]} could not dial 192.168.1.7:4051, 8.8.4.4:4051"
    assert "forward TCP port 4051" in found.next_step


@pytest.mark.parametrize(
    ("seen_from", "mine", "expected"),
    [
        ("8.8.4.4", [at("192.168.1.7")], [at("8.8.4.4")]),
        ("2a00::1", [at("192.168.1.7")], [at("2a00::1", "ip6")]),
        ("192.168.1.7", [at("192.168.1.7")], []),
        ("", [at("192.168.1.7")], []),
        ("not a number", [at("192.168.1.7")], []),
        ("8.8.4.4", [f"/dns4/example.org/tcp/1/p2p/{ASKER}"], []),
        ("8.8.4.4", [], []),
    ],
)
def test_where_a_helper_sees_us_is_one_more_address_to_try(seen_from, mine, expected):
    assert _as_seen(seen_from, mine) == expected


async def test_an_address_by_name_is_asked_for_by_number():
    assert await numbered("/dns4/localhost/tcp/7/p2p/x") == "/ip4/127.0.0.1/tcp/7/p2p/x"
    for address in (at("192.168.1.7"), "/memory/ann/p2p/x"):
        assert await numbered(address) == address
    with pytest.raises(PeerError, match="is not found"):
        await numbered(f"/dns4/{'x' * 64}/tcp/7/p2p/x")  # refused before anybody is asked
