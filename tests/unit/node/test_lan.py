"""What is said on a network, and who understands it."""

from __future__ import annotations

import pytest
import trio

from aivillage.node import lan as lan_file
from aivillage.node.events import Events
from aivillage.node.lan import Announcement, Lan, announcement, near_places, recognised
from aivillage.protocols.types import public_key
from tests.conftest import make_peer

HOME, OTHER = b"h" * 32, b"o" * 32
ME, BOB, EVE = make_peer(1), make_peer(2), make_peer(3)
SALT = bytes(range(8))


def says(peer=BOB, village=HOME, salt=SALT):
    return announcement(village, peer, salt)


def test_villagers_recognise_each_other_and_nobody_else_does():
    assert recognised(HOME, says()) == BOB
    assert recognised(OTHER, says()) is None
    assert recognised(HOME, says(village=OTHER)) is None


def test_what_is_said_shows_neither_peer_nor_village_and_is_other_each_time():
    said, again = says(), says(salt=bytes(8))
    text = "".join((said.salt, said.tag, said.masked))
    for secret in (BOB, public_key(BOB).hex(), HOME.hex()[:16]):
        assert secret not in text
    assert not {said.salt, said.tag, said.masked} & {again.salt, again.tag, again.masked}
    # Two of one village cannot be told to be of one village.
    assert says(EVE, salt=b"another!").tag != said.tag


@pytest.mark.parametrize(
    "heard",
    [
        Announcement(salt="", tag="", masked=""),
        Announcement(salt="zz", tag="00", masked="00"),
        Announcement(salt=says().salt, tag=says().tag, masked="00"),
        Announcement(salt=says().salt, tag="0" * 16, masked=says().masked),
        Announcement(salt=says().salt, tag="\xff" * 16, masked=says().masked),
    ],
)
def test_nonsense_is_nobody(heard):
    assert recognised(HOME, heard) is None


def test_only_networks_of_this_house_are_spoken_on():
    assert near_places(
        (
            "/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/192.168.1.7/tcp/4051/p2p/x",
            "/ip4/8.8.4.4/tcp/4051/p2p/x", "/ip6/fd00::7/tcp/4051/p2p/x", "/ip6/::1/tcp/1/p2p/x",
            "/dns4/example.org/tcp/1/p2p/x", "/memory/ann/p2p/x",
        )
    ) == {"192.168.1.7": 4051, "fd00::7": 4051}  # fmt: skip


@pytest.fixture
def found():
    return []


@pytest.fixture
def lan(found):
    return Lan(ME, lambda: HOME, tuple, Events(), on_found=found.append)


def at(*ips):
    return [f"/ip4/{ip}/tcp/4051" for ip in ips]


def test_a_villager_is_found_where_it_says_on_this_network_only(lan, found):
    lan.hear("a", says(), at("8.8.4.4", "127.0.0.1", "192.168.1.7"))
    assert lan.found == {BOB: (f"/ip4/192.168.1.7/tcp/4051/p2p/{BOB}",)}
    lan.hear("a", says(), at("192.168.1.7"))
    assert found == [BOB]
    lan.hear("a", says(), at("192.168.1.8"))
    assert found == [BOB, BOB]
    lan.hear("a", None, ())
    assert lan.found == {}


def test_strangers_ourselves_and_who_is_nowhere_are_not_found(lan, found):
    lan.hear("a", says(village=OTHER), at("192.168.1.7"))
    lan.hear("b", says(ME), at("192.168.1.7"))
    lan.hear("c", says(), at("8.8.4.4"))
    lan.hear("d", says(), ())
    lan.hear("e", None, ())
    assert (lan.found, found) == ({}, [])


def test_a_network_full_of_inventions_has_a_bound(lan, monkeypatch):
    monkeypatch.setattr(lan_file, "PEERS_MAX", 3)
    for number in range(2, 8):
        lan.hear(str(number), says(make_peer(number)), at("192.168.1.7"))
    assert len(lan.found) == 3


async def test_without_a_network_nothing_is_said_and_the_library_is_not_loaded(lan, monkeypatch):
    monkeypatch.setattr(lan_file, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lan_file, "_open", lambda *_args: pytest.fail("it spoke"))
    with trio.move_on_after(0.1):
        await lan.run()
