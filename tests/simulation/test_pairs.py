"""`audit --peer` on a mesh: two real books, asked over a real link."""

from __future__ import annotations

import apsw
import msgspec
import pytest

from aivillage.protocols import messages
from aivillage.protocols.errors import RefusedError
from tests.simulation.mesh import Node, open_mesh, price_of, settled, until, without
from tests.simulation.test_changed_keys import rotate

PRICE = price_of("hello", 3)


async def ask(one: Node, other: Node) -> dict:
    return await one.desk.on_audit_peer({"peer": other.peer[-8:]})


def tamper(node: Node, table: str, change: str) -> None:
    """What an owner with a database tool can do, rule or no rule."""
    db = apsw.Connection(str(node.paths.ledger))
    rule = db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (f"{table}_rises",)).get
    db.execute(f"DROP TRIGGER IF EXISTS {table}_rises")
    db.execute(f"UPDATE {table} SET {change}")
    if rule:
        db.execute(rule)
    db.close()


async def traded(mesh) -> tuple[Node, Node]:
    buyer = await mesh.add("buyer", serve=False)
    seller = await mesh.add("seller")
    await mesh.knows(buyer, seller)
    await buyer.ask("hello", tokens=3)
    await settled(buyer, seller, PRICE)
    return buyer, seller


async def test_two_honest_books_agree_whoever_asks(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await traded(mesh)
        for one, other in ((buyer, seller), (seller, buyer)):
            found = await ask(one, other)
            assert (found["agree"], found["first"], found["differences"]) == (True, "", [])
            assert found["peer"] == other.peer


@pytest.mark.parametrize(
    ("table", "change", "told"),
    [
        ("lane_in", "cum = cum - 5, attr = attr - 5, service = service - 5", "contradicts"),
        ("bal", "amount = amount - 5", "balance"),
        ("lane_in", "n = n + 1", "do not know"),
    ],
)
async def test_a_book_that_was_tampered_with_differs_and_it_is_said_where(
    tmp_path, table, change, told
):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await traded(mesh)
        tamper(seller, table, change)
        for one, other in ((buyer, seller), (seller, buyer)):
            found = await ask(one, other)
            assert not found["agree"]
            assert told in found["first"]
            assert found["first"] == found["differences"][0]["text"]


async def test_what_is_on_its_way_is_no_difference(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await traded(mesh)
        with without(buyer, messages.Ledger):
            await buyer.ask("hello", tokens=3)
            await until(lambda: buyer.ledger.view(seller.peer).owed_by_me == 2 * PRICE)
            for one, other in ((buyer, seller), (seller, buyer)):
                found = await ask(one, other)
                assert (found["agree"], found["in_transit"]) == (True, PRICE)
                assert found["differences"][0]["in_transit"]


async def test_books_compare_across_a_change_of_key(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await traded(mesh)
        await rotate(buyer)
        await mesh.start(buyer, stranger=True)
        await mesh.knows(buyer, seller)
        await buyer.ask("hello", tokens=3)
        await settled(buyer, seller, 2 * PRICE)
        for one, other in ((buyer, seller), (seller, buyer)):
            assert (await ask(one, other))["agree"]


async def test_nobody_is_told_of_another_pair(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        _, seller = await traded(mesh)
        stranger = await mesh.add("stranger", serve=False, stranger=True)
        await mesh.link(stranger, seller)
        link = stranger.desk.links.get(seller.peer)
        reply = await link.ask(messages.PairQuestion(id=link.next_id()), timeout_seconds=2)
        assert reply == messages.PairView(id=reply.id, balance=0)


async def test_a_node_of_1_0_and_one_that_is_away_are_not_asked(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await traded(mesh)
        link = buyer.desk.links.get(seller.peer)
        link.hello = msgspec.structs.replace(link.hello, minor=0)
        with pytest.raises(RefusedError) as caught:
            await ask(buyer, seller)
        assert caught.value.code == "NOT_OFFERED"
        assert not [f for f in seller.heard if isinstance(f, messages.PairQuestion)]
        await seller.stop()
        await until(lambda: buyer.desk.links.get(seller.peer) is None)
        with pytest.raises(RefusedError) as caught:
            await ask(buyer, seller)
        assert caught.value.code == "NO_PEER"
