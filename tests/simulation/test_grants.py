"""A grant's way on a mesh: from the founder to its holder, and to everybody who lends on it."""

from __future__ import annotations

import msgspec

from aivillage.node import grants
from aivillage.node.village import DAY_MS
from aivillage.protocols import messages
from tests.simulation.mesh import Node, open_mesh, price_of, result_of, until

PRICE = price_of("hello", 3)


async def give(founder: Node, holder: Node, amount: int) -> dict:
    return await founder.desk.on_grant(
        {"peer": holder.peer[-8:], "amount_micro_credits": amount, "days": 30}
    )


def line(member: Node, holder: Node) -> int:
    return member.ledger.view(holder.peer).line


async def test_one_grant_shown_to_many_members_costs_each_at_most_its_cap(tmp_path):
    caps = {"village_line_micro_credits": PRICE, "village_grant_cap_micro_credits": 2 * PRICE}
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        sellers = [await mesh.add(name, **caps) for name in ("one", "two")]
        holder = await mesh.add("holder", serve=False)
        await mesh.knows(holder, *sellers)
        await mesh.link(holder, founder)
        await until(lambda: all(line(seller, holder) == PRICE for seller in sellers))
        assert (await give(founder, holder, 10 * PRICE))["sent"]
        await until(lambda: all(line(seller, holder) == 3 * PRICE for seller in sellers))
        bought = 0
        for _ in range(8):
            bought += (await holder.ask("hello", tokens=3, deadline=1.0)).error is None
        owed = [holder.ledger.view(seller.peer).owed_by_me for seller in sellers]
        assert bought >= 5  # more than both plain lines, and the grant at one of them
        assert all(amount <= 3 * PRICE for amount in owed)


async def test_the_hello_shows_what_a_former_run_was_granted(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        holder = await mesh.add("holder", serve=False)
        found = await give_by_token(founder, holder)
        assert not found["sent"]
        await holder.stop()
        await mesh.start(holder)
        seller = await mesh.add("seller")
        await mesh.knows(holder, seller)
        await until(lambda: line(seller, holder) == 10_000_000 + 5_000)
        assert result_of(await holder.ask("hello", tokens=3))
        # What the seller tells of it may ride with a later frame than the answer.
        await until(lambda: holder.ledger.view(seller.peer).received_line == 10_000_000 + 5_000)


async def give_by_token(founder: Node, holder: Node) -> dict:
    found = await founder.desk.on_grant(
        {"peer": holder.peer, "amount_micro_credits": 5_000, "days": 30}
    )
    listed = await holder.desk.on_grants_import({"token": found["token"]})
    assert [one["amount_micro_credits"] for one in listed["held"]] == [5_000]
    return found


async def test_a_line_falls_back_when_its_grant_is_over(tmp_path, monkeypatch):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        seller, holder = await mesh.add("seller"), await mesh.add("holder", serve=False)
        await mesh.knows(holder, seller)
        await mesh.link(holder, founder)
        await give(founder, holder, 5_000)
        await until(lambda: line(seller, holder) == 10_000_000 + 5_000)
        later = grants._now() + 31 * DAY_MS
        monkeypatch.setattr(grants, "_now", lambda: later)
        await until(lambda: line(seller, holder) == 10_000_000)


async def test_a_peer_of_1_0_is_not_sent_what_it_does_not_know(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        holder = await mesh.add("holder", serve=False)
        old = await mesh.add("old", serve=False)
        for node in (founder, holder):
            await mesh.link(old, node)
            link = node.desk.links.get(old.peer)
            link.hello = msgspec.structs.replace(link.hello, minor=0)
        await mesh.link(holder, founder)
        await give(founder, holder, 5_000)
        assert not (await give(founder, old, 5_000))["sent"]
        await until(lambda: line(founder, holder) == 10_000_000 + 5_000)
        assert not [frame for frame in old.heard if isinstance(frame, messages.Granted)]
