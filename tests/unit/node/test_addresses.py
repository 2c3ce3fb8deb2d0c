"""What is handed out: the owner's `announce`, and never more than a peer takes."""

import pytest

from aivillage.node.addresses import addresses_of, is_public, short_list
from aivillage.protocols.errors import ConfigError
from tests.conftest import make_peer
from tests.simulation.mesh import open_mesh, until


class Wire:
    peer = make_peer(1)
    found = ("/ip4/10.0.0.1/tcp/1/p2p/x",)

    def addresses(self):
        return self.found


@pytest.mark.parametrize(
    ("entry", "begins"),
    [
        ("example.org:4051", "/dns4/example.org/tcp/4051"),
        ("my-host:1", "/dns4/my-host/tcp/1"),
        ("203.0.113.9:65535", "/ip4/203.0.113.9/tcp/65535"),
        ("[2001:db8::1]:4051", "/ip6/2001:db8::1/tcp/4051"),
    ],
)
def test_an_announced_address_replaces_those_that_were_found(entry, begins):
    assert addresses_of(Wire(), (entry,))() == (f"{begins}/p2p/{Wire.peer}",)
    assert addresses_of(Wire(), ())() == Wire.found


@pytest.mark.parametrize(
    "entry", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "a/b:1", "a b:1", "é:1"]
)
def test_what_is_no_host_and_port_is_named(entry):
    with pytest.raises(ConfigError) as caught:
        addresses_of(Wire(), (entry,))
    assert repr(entry) in caught.value.message


def test_a_machine_with_many_interfaces_says_as_many_addresses_as_a_peer_takes():
    assert len(short_list([f"/ip4/10.0.0.{n}/tcp/1" for n in range(30)])) == 8
    assert short_list(["x" * 257, "y"]) == ("y",)
    with pytest.raises(ConfigError):
        addresses_of(Wire(), [f"host:{n}" for n in range(1, 10)])


async def test_what_is_announced_is_in_hello_offer_invite_and_status(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node", announce=("example.org:4051",))
        other = await mesh.add("other")
        await mesh.link(other, node)
        told = (f"/dns4/example.org/tcp/4051/p2p/{node.peer}",)
        assert other.desk.links.get(node.peer).hello.addresses == told
        await until(lambda: other.desk.discovery.candidates("mesh.noop"))
        assert [c.addresses for c in other.desk.discovery.candidates("mesh.noop")] == [told]
        assert (await node.desk.on_status({}))["addresses"] == list(told)
        from aivillage.node.village import read_invite

        assert read_invite((await node.desk.on_invite({}))["token"]).addresses == told


def test_addresses_behind_relays_follow_two_direct_ones():
    through = ("/ip4/1.2.3.4/tcp/1/p2p/R/p2p-circuit/p2p/me",)
    entries = [f"10.0.0.{n}:1" for n in range(1, 5)]
    known = addresses_of(Wire(), entries, lambda: through)
    assert known() == (*addresses_of(Wire(), entries)()[:2], *through)
    assert len(addresses_of(Wire(), entries, tuple)()) == 4


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("/ip4/8.8.8.8/tcp/1", True),
        ("/dns4/example.org/tcp/1", True),
        ("/ip6/2606:4700::1/tcp/1", True),
        ("/ip4/192.168.1.7/tcp/1", False),
        ("/ip4/127.0.0.1/tcp/1", False),
        ("/ip4/100.64.0.1/tcp/1", False),
        ("/memory/n1/p2p/x", True),
    ],
)
def test_a_public_address_is_told_from_one_of_a_house(address, public):
    assert is_public(address) == public
