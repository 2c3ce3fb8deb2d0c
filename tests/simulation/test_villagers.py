"""Joining a village, and finding its people again."""

from __future__ import annotations

import pytest

from aivillage.protocols.errors import RefusedError
from tests.simulation.mesh import open_mesh, result_of, until
from tests.simulation.test_market import expected


def invite(node, line=None):
    return node.desk.villagers.invite((node.address,), line)


async def test_who_joins_by_invite_buys_at_once(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder")
        guest = await mesh.add("guest", stranger=True, serve=False)
        assert await guest.desk.villagers.join(invite(founder)) == founder.peer
        assert result_of(await guest.ask("hello", tokens=3)) == expected("hello", 3)
        assert (await guest.desk.on_status({}))["village"] == (await founder.desk.on_status({}))[
            "village"
        ]
        assert founder.events("member_admitted") == [{"peer": guest.peer}]


async def test_an_invite_admits_one_guest_only(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder")
        first = await mesh.add("first", stranger=True)
        second = await mesh.add("second", stranger=True)
        token = invite(founder)
        await first.desk.villagers.join(token)
        with pytest.raises(RefusedError) as caught:
            await second.desk.villagers.join(token)
        assert caught.value.code == "OWNER_LIMIT"
        assert "used already" in caught.value.message
        assert founder.desk.villagers.line_of(founder.desk.links.get(second.peer)) is None
        await first.desk.villagers.join(token)  # its answer may have been lost


async def test_the_line_is_the_lesser_of_the_promise_and_the_owners_limit(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", village_line_micro_credits=5_000)
        for name, promised, line in (("poor", 300, 300), ("rich", 10**9, 5_000)):
            guest = await mesh.add(name, stranger=True)
            await guest.desk.villagers.join(invite(founder, promised))
            await until(lambda g=guest, n=line: founder.ledger.view(g.peer).line == n)


async def test_only_the_founder_invites(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        await mesh.add("founder")
        member = await mesh.add("member")
        with pytest.raises(RefusedError) as caught:
            invite(member)
        assert caught.value.code == "OWNER_LIMIT"


async def test_members_who_never_met_know_each_other_by_their_papers(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder", serve=False)
        one = await mesh.add("one", stranger=True, serve=False)
        two = await mesh.add("two", stranger=True)
        for guest in (one, two):
            await guest.desk.villagers.join(invite(founder))
        # One hears of two through the founder, and dials it for the job.
        running = await one.ask("hello", tokens=2)
        assert result_of(running) == expected("hello", 2)
        assert running.pursuit.receipt().sellers == (two.peer,)


async def test_a_restarted_member_finds_its_village_again_by_itself(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        founder = await mesh.add("founder")
        guest = await mesh.add("guest", stranger=True, serve=False)
        await guest.desk.villagers.join(invite(founder))
        await guest.stop()
        await until(lambda: founder.desk.links.get(guest.peer) is None)
        await mesh.start(guest, stranger=True)
        assert result_of(await guest.ask("again", tokens=2)) == expected("again", 2)


async def test_a_quote_at_the_first_moment_of_a_link_knows_the_members_line(tmp_path, monkeypatch):
    """The book learns of a member in a transaction; a question that is faster waits for it."""
    monkeypatch.setattr("aivillage.node.pursuit.CREDIT_WAITS_SECONDS", ())
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        slow, gate = seller.ledger.set_line, []

        async def set_line(*args):
            gate.append(len([e for e in seller.heard if type(e).__name__ == "QuoteRequest"]))
            await until(lambda: any(type(e).__name__ == "QuoteRequest" for e in seller.heard))
            await slow(*args)

        seller.desk.villagers._book.set_line = set_line
        running = await buyer.submit("quick", tokens=2)
        await mesh.link(buyer, seller)
        await running.ended.wait()
        assert result_of(running) == expected("quick", 2)
        assert gate == [0]
