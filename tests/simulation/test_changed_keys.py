"""A node changes its key: its people follow, its thief does not."""

from __future__ import annotations

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aivillage.node import rotation, village
from aivillage.node.identity import KEY_FILE, load
from aivillage.protocols import messages, succession
from aivillage.protocols.errors import LedgerError, PeerError
from tests.conftest import make_key, make_peer
from tests.simulation.mesh import (
    Node,
    certificate,
    open_mesh,
    price_of,
    result_of,
    settled,
    until,
    without,
)
from tests.simulation.test_market import expected


async def rotate(node: Node) -> None:
    """Stops the node and gives it a new key; the caller starts it, with the papers that it has."""
    await node.stop()
    if not (node.paths.data_dir / KEY_FILE).exists():
        _keep_key(node)
    await rotation.rotate(node.paths)
    node.key = load(node.paths.data_dir)
    node.peer = rotation.peer_of(node.key)


def _keep_key(node: Node) -> None:
    """A mesh's nodes have their keys in memory."""
    pem = node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = node.paths.data_dir / KEY_FILE
    path.touch(mode=0o600)
    path.write_bytes(pem)


async def test_a_seller_with_a_new_key_is_paid_on_the_same_account(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        assert result_of(await buyer.ask("hello", tokens=3)) == expected("hello", 3)
        first, price = seller.peer, price_of("hello", 3)
        await settled(buyer, seller, price)
        record = buyer.desk.discovery.record_of(first)
        await rotate(seller)
        await mesh.start(seller, stranger=True)  # its certificate names its first key
        await mesh.knows(buyer, seller)
        assert buyer.events("key_changed") == [{"peer": seller.peer, "former": first}]
        assert result_of(await buyer.ask("again", tokens=3)) == expected("again", 3)
        await settled(buyer, seller, price + price_of("again", 3))
        assert [view.peer for view in buyer.ledger.views()] == [first]
        assert buyer.desk.discovery.record_of(seller.peer) is record
        assert record.good == 2
        assert [known.id for known in await buyer.desk.jobs.known_peers()] == [seller.peer]


async def test_people_find_each_other_though_both_changed_their_keys(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        for node in (buyer, seller):
            await until(lambda n=node: n.desk.ledger.views())
            await rotate(node)
        for node in (buyer, seller):
            await mesh.start(node, stranger=True)
        # Each knows only an address with a key that is no more.
        await until(lambda: buyer.desk.links.get(seller.peer))
        assert buyer.desk.villagers.is_member(seller.peer)


async def test_whoever_took_over_a_lost_peers_address_is_left_alone(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node")
        stranger = await mesh.add("stranger", stranger=True, serve=False)
        address = f"/memory/{stranger.name}/p2p/{make_peer(99)}"
        await node.desk.jobs.saw_peer(make_peer(99), (address,))
        await until(lambda: stranger.events("peer_up"))
        await until(lambda: node.desk.links.get(stranger.peer) is None)


async def test_what_was_in_flight_when_the_key_changed_arrives(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        price = price_of("hello", 3)
        with without(buyer, messages.Ledger):
            await buyer.ask("hello", tokens=3)
            await until(lambda: buyer.ledger.view(seller.peer).owed_by_me == price)
            assert seller.ledger.view(buyer.peer).owed_to_me == 0
            await rotate(buyer)
            await rotate(seller)
        await mesh.start(buyer, stranger=True)
        await mesh.start(seller, stranger=True)
        await mesh.link(buyer, seller)
        await settled(buyer, seller, price)


async def test_a_replaced_key_is_refused_and_nothing_can_be_spent_with_it(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        stolen = buyer.key
        await rotate(buyer)
        await mesh.start(buyer, stranger=True)
        await mesh.link(buyer, seller)
        thief = await mesh.add("thief", serve=False, stranger=True)
        await thief.stop()
        thief.key, thief.peer = stolen, rotation.peer_of(stolen)
        thief.paths.ledger.unlink()
        await mesh.start(thief)  # with a fresh certificate, even
        with pytest.raises(PeerError, match="replaced"):
            await mesh.link(thief, seller)
        with pytest.raises(PeerError, match="replaced"):
            await mesh.link(seller, thief)
        assert seller.desk.links.get(thief.peer) is None
        assert seller.desk.villagers.is_member(buyer.peer)
        assert seller.ledger.view(buyer.peer).connected


async def test_a_thief_that_names_its_own_successor_later_is_a_stranger(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        stolen = buyer.key
        papers = certificate(seller, rotation.peer_of(stolen))
        await rotate(buyer)
        await mesh.start(buyer, stranger=True)
        await mesh.link(buyer, seller)
        thief = await mesh.add("thief", serve=False, stranger=True)
        home = village.village_of(seller.peer)
        await thief.desk.villagers.membership.store(home, (papers,))
        thief.ledger._ledger.desk.proofs = (succession.make(stolen, thief.key, 1),)
        await mesh.link(thief, seller)
        assert len(seller.events("succession_refused")) == 1
        assert not seller.desk.villagers.is_member(thief.peer)
        assert seller.ledger.names_of(buyer.peer)[0] == buyer.peer
        assert seller.ledger.view(thief.peer).line == 0


async def test_a_link_of_the_old_key_ends_when_the_new_one_comes(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        old = await mesh.add("old", serve=False)
        new = await mesh.add("new", serve=False, stranger=True)
        await mesh.knows(old, seller)
        new.ledger._ledger.desk.proofs = (succession.make(old.key, new.key, 1),)
        papers = old.desk.villagers.membership.certificates
        await new.desk.villagers.membership.store(village.village_of(seller.peer), papers)
        await mesh.link(new, seller)
        assert seller.desk.links.get(old.peer) is None
        await until(lambda: seller.ledger.view(new.peer).connected)
        assert seller.ledger.view(new.peer).line > 0
        assert seller.desk.villagers.members() == [seller.desk.links.get(new.peer)]


async def test_two_streams_of_a_new_key_are_followed_once(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        await rotate(buyer)
        await mesh.start(buyer, stranger=True)
        hello = buyer.desk.links._hello()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(seller.desk.villagers.admit, buyer.peer, hello)
            nursery.start_soon(mesh.link, buyer, seller)
        assert len(seller.events("key_changed")) == 1
        assert seller.ledger.view(buyer.peer).connected


def tried_only(rings):
    """A book's `route` that notes the ring and moves nothing."""

    async def route(ring, _amount):
        rings.append(ring)
        return "refunded"

    return route


async def test_debts_move_around_a_ring_of_changed_keys(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        ann, bob, cat = [await mesh.add(name) for name in ("ann", "bob", "cat")]
        for one, other in ((ann, bob), (bob, cat), (cat, ann)):
            await mesh.link(one, other)
        await mesh.knows(bob, ann)
        await mesh.knows(ann, cat)
        assert result_of(await bob.ask("hello", tokens=3, peer=ann.peer))
        assert result_of(await ann.ask("hello", tokens=3, peer=cat.peer))
        price = price_of("hello", 3)
        for node in (bob, cat):
            await rotate(node)
        for node in (bob, cat):
            await mesh.start(node, stranger=True)
        for one, other in ((ann, bob), (bob, cat), (cat, ann)):
            await mesh.link(one, other)
        for one, other in ((ann, bob), (ann, cat), (bob, cat)):
            await until(lambda a=one, b=other: a.ledger.view(b.peer).synced)
            await until(lambda a=one, b=other: b.ledger.view(a.peer).line)
        await until(lambda: ann.ledger.view(bob.peer).owed_to_me == price)
        done = await ann.desk.on_settle({"peer": cat.peer})
        assert done["amount"] == price
        await settled(bob, cat, price)
        # Nobody pays itself, by whichever of its ids it is asked for.
        tried = []
        ann.ledger.route = tried_only(tried)
        with pytest.raises(LedgerError):
            await ann.desk.on_settle({"peer": cat.peer, "micro_credits": 5_000})
        assert tried
        assert all(len({*map(ann.ledger.names_of, ring)}) == len(ring) for ring in tried)
        assert ann.ledger.view(bob.peer).owed_to_me == ann.ledger.view(cat.peer).owed_by_me == 0


async def test_two_changes_that_a_peer_missed_are_followed_at_once(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        await buyer.ask("hello", tokens=3)
        await settled(buyer, seller, price_of("hello", 3))
        first = buyer.peer
        await rotate(buyer)
        await rotate(buyer)
        await mesh.start(buyer, stranger=True)
        await mesh.knows(buyer, seller)
        assert len(seller.ledger.names_of(first)) == 3
        await buyer.ask("again", tokens=3)
        await settled(buyer, seller, 2 * price_of("hello", 3))


async def test_a_strangers_change_of_key_is_not_written_down(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        stranger = await mesh.add("stranger", serve=False, stranger=True)
        stranger.ledger._ledger.desk.proofs = (succession.make(make_key(99), stranger.key, 1),)
        await mesh.link(stranger, seller)
        assert seller.ledger.names_of(stranger.peer) == (stranger.peer,)


async def test_a_founder_with_a_new_key_still_admits_people(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        member = await mesh.add("member")
        home = (await founder.desk.on_status({}))["village"]
        await rotate(founder)
        await mesh.start(founder, stranger=True)
        assert (await founder.desk.on_status({}))["village"] == home
        guest = await mesh.add("guest", stranger=True, serve=False)
        token = await founder.desk.villagers.joining.invite((founder.address,), None)
        await guest.desk.villagers.joining.join(token)
        await mesh.link(guest, member)  # who never met the founder's new key
        assert member.desk.villagers.is_member(guest.peer)
        assert founder.desk.villagers.is_member(guest.peer)
        assert (await guest.desk.on_status({}))["village"] == home
