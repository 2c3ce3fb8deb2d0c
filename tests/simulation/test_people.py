"""The owner's word on people: over the control socket, on real books, with real jobs."""

from __future__ import annotations

from contextlib import asynccontextmanager

import apsw
import msgspec
import pytest
import trio

from aivillage.models.inference.catalogue import DEFAULT
from aivillage.node.pricelist import quote_hash
from aivillage.node.records import Work
from aivillage.protocols import messages
from aivillage.protocols.messages import Answer, Call, Failure
from tests.conftest import make_peer
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected, pair
from tests.unit.node.test_control import owner_of

GENERATE = Work("inference.generate", DEFAULT)


async def ask(node, what, **args):
    """One question of the owner's, and the answer."""
    async with owner_of(node) as client:
        answer = await client.ask(what, **args)
    assert isinstance(answer, Answer), answer
    return answer.value


async def refused(node, what, **args):
    async with owner_of(node) as client:
        failure = await client.ask(what, **args)
    assert isinstance(failure, Failure), failure
    assert failure.next_step
    return failure.code


def standings(node):
    return [
        (f.line_micro_credits, f.exposure_micro_credits)
        for f in node.heard
        if isinstance(f, messages.Standing)
    ]


def row_of(found, node):
    (row,) = [peer for peer in found["peers"] if peer["peer"] == node.peer]
    return row


@asynccontextmanager
async def seller_and_stranger(folder, **settings):
    """They are linked, and belong to no common village."""
    async with open_mesh(folder) as mesh:
        seller = await mesh.add("seller", **settings)
        stranger = await mesh.add("stranger", stranger=True, serve=False)
        await mesh.link(stranger, seller)
        yield mesh, seller, stranger


async def quote_from(buyer, seller, operation="mesh.noop", request=b"\x80"):
    link = buyer.desk.links.get(seller.peer)
    question = messages.QuoteRequest(id=link.next_id(), operation=operation, request=request)
    with trio.fail_after(5):
        return await link.ask(question, timeout_seconds=5)


# ------------------------------------------------------------------ trust


async def test_the_owners_line_beats_the_certificate_and_the_peer_hears_of_it(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        said = await ask(seller, "trust", peer=buyer.peer[-8:], line=5_000, exposure=600)
        assert (said["line"], said["exposure"], said["told"]) == (5_000, 600, True)
        await until(lambda: buyer.ledger.view(seller.peer).received_line == 5_000)
        assert standings(buyer)[-1] == (5_000, 600)
        await buyer.desk.links.drop(seller.peer, "again")
        await buyer.desk.links.connect(seller.address)  # the certificate is shown once more
        await until(lambda: len(standings(buyer)) > 2)
        assert standings(buyer)[-1] == (5_000, 600)
        assert seller.ledger.view(buyer.peer).line == 5_000


async def test_trust_of_nothing_lends_nothing_and_the_village_may_be_asked_again(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        before = seller.ledger.view(buyer.peer)
        assert before.line
        await ask(seller, "trust", peer=buyer.peer, line=0)
        await until(lambda: standings(buyer)[-1] == (0, 0))
        assert (await buyer.ask(PROMPT, tokens=2)).error.code == "INSUFFICIENT_CREDITS"
        said = await ask(seller, "trust", peer=buyer.peer, by_village=True)
        assert (said["line"], said["exposure"]) == (before.line, before.exposure)
        await until(lambda: standings(buyer)[-1] == (before.line, before.exposure))
        assert result_of(await buyer.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)


async def test_a_stranger_that_the_owner_trusts_is_lent_to_and_stays_so(tmp_path):
    async with seller_and_stranger(tmp_path) as (_, seller, stranger):
        assert (await quote_from(stranger, seller)).room_micro_credits == 0
        said = await ask(seller, "trust", peer=stranger.peer, line=300)
        # The exposure of a peer that had none, no more than its line.
        assert (said["line"], said["exposure"]) == (300, 300)
        assert (await quote_from(stranger, seller)).room_micro_credits == 300
        await until(lambda: stranger.ledger.view(seller.peer).received_line == 300)
        await stranger.desk.links.drop(seller.peer, "again")
        await stranger.desk.links.connect(seller.address)
        await until(lambda: len(standings(stranger)) == 2)
        assert standings(stranger)[-1] == (300, 300)
        with trio.fail_after(5):  # and looked for, should it go
            while stranger.peer not in {known.id for known in await seller.desk.jobs.known_peers()}:
                await trio.sleep(0.01)
        assert (await quote_from(stranger, seller)).room_micro_credits == 300


async def test_a_result_dearer_than_the_owners_exposure_is_refused_at_the_quote(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "trust", peer=buyer.peer, line=5_000, exposure=9)
        link = buyer.desk.links.get(seller.peer)
        question = messages.QuoteRequest(id=link.next_id(), operation="mesh.noop", request=b"\x80")
        with pytest.raises(Exception, match=r"at most 0\.000009 ahead"):
            await link.ask(question, timeout_seconds=5)


# ------------------------------------------------------------------ block


async def test_who_is_blocked_gets_no_quote_and_no_work_until_unblocked(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        assert result_of(await buyer.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)
        await settled(buyer, seller, price_of(PROMPT, 2))
        await ask(seller, "block", peer=buyer.peer)
        buyer.desk.buyer._trade.market.forget_peer(buyer.peer)
        link = buyer.desk.links.get(seller.peer)
        with pytest.raises(Exception, match="does no work for you") as caught:
            await quote_from(buyer, seller)
        assert caught.value.code == "OWNER_LIMIT"
        kept = buyer.desk.buyer._trade.market._quotes[
            seller.peer, Work("inference.generate", DEFAULT)
        ]
        call = Call(
            id=link.next_id(), attempt=b"a" * 16, operation="inference.generate", request=b"",
            quote_hash=kept.hash, ceiling_micro_credits=1_000, deadline_seconds=5.0,
        )  # fmt: skip
        inbox = link.open_inbox(call.id)
        link.send(call)  # with a quote from before
        with trio.fail_after(5):
            assert (await inbox.receive()).code == "OWNER_LIMIT"
        assert (await buyer.ask(PROMPT, tokens=2)).error.code == "OWNER_LIMIT"
        (shown,) = [p for p in await ask(seller, "peers") if p["peer"] == buyer.peer]
        assert shown["blocked"]
        assert row_of(await ask(seller, "balance"), buyer)["blocked"]
        await ask(seller, "block", peer=buyer.peer, stop=True)
        assert result_of(await buyer.ask(PROMPT, tokens=2)) == expected(PROMPT, 2)
        await settled(buyer, seller, 2 * price_of(PROMPT, 2))


async def test_what_runs_for_a_peer_ends_when_it_is_blocked_and_is_paid_so_far(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        seller.script.pause_at = 3
        running = await buyer.submit(PROMPT, tokens=12, peer=seller.peer)
        await seller.script.paused.wait()
        await until(lambda: len(running.pursuit.output.ids) == 3)
        await ask(seller, "block", peer=buyer.peer)
        with trio.fail_after(10):
            await running.ended.wait()
        assert running.error.code == "OWNER_LIMIT"
        assert not seller.desk.seller.running()
        await settled(buyer, seller, price_of(PROMPT, 3))


async def test_a_blocked_seller_is_asked_only_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 2.0)
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(buyer, "block", peer=seller.peer)
        assert (await buyer.ask(PROMPT, tokens=2)).error.code == "NO_PEER"
        assert result_of(await buyer.ask(PROMPT, tokens=2, peer=seller.peer))


# ------------------------------------------------------------------ share


def proof_of_nothing(node, side):
    """(amount, final, attested) of every item of work for nothing."""
    db = apsw.Connection(str(node.paths.ledger), flags=apsw.SQLITE_OPEN_READONLY)
    rows = db.execute(
        f"SELECT i.id, i.amount, i.final, v.attest FROM item i JOIN voucher_{side} v"
        " ON v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n"
        " WHERE i.kind = 0 AND i.amount = 0"
    ).fetchall()
    db.close()
    return rows


async def helped(buyer, seller, worth, jobs=1):
    """Both books tell the same, no money moved, and the proof is attested on both sides."""
    await until(lambda: len(proof_of_nothing(buyer, "out")) == jobs)
    with trio.fail_after(8):
        while [row[3] for row in proof_of_nothing(buyer, "out")] != [1] * jobs:
            await trio.sleep(0.05)
        while not (await ask(seller, "favours")):
            await trio.sleep(0.05)
    assert proof_of_nothing(seller, "in") == proof_of_nothing(buyer, "out")
    for node, peer, mine in ((buyer, seller, True), (seller, buyer, False)):
        rows = await ask(node, "favours")
        assert [(r["mine"], r["peer"]) for r in rows] == [(mine, peer.peer)] * jobs
        assert sum(r["worth"] for r in rows) == worth
        assert {r["attempt"] for r in rows} == {r[0].hex() for r in proof_of_nothing(buyer, "out")}
    row = row_of(await ask(buyer, "balance"), seller)
    assert (row["helped_me"], row["helped_it"]) == (worth, 0)
    row = row_of(await ask(seller, "balance"), buyer)
    assert (row["helped_me"], row["helped_it"]) == (0, worth)
    await settled(buyer, seller, 0)


@pytest.mark.parametrize("exposed", [True, False])
async def test_work_for_friends_is_free_and_both_books_say_what_it_was_worth(tmp_path, exposed):
    """What is free needs neither line nor exposure."""
    async with pair(tmp_path) as (_, buyer, seller):
        if not exposed:
            await ask(seller, "trust", peer=buyer.peer, line=0)
        (said,) = await ask(seller, "share", peers=[buyer.peer[-8:]])
        assert said["shared"]
        prompt = PROMPT * 20  # several slices of reading
        running = await buyer.ask(prompt, tokens=12)
        assert result_of(running) == expected(prompt, 12)
        assert running.pursuit.spent == 0
        await helped(buyer, seller, price_of(prompt, 12))
        assert seller.ledger.view(buyer.peer).delivered == 0


async def test_a_modules_work_for_friends_is_free_too(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "trust", peer=buyer.peer, line=0)
        await ask(seller, "share", peers=[buyer.peer])
        running = await buyer.ask(operation="mesh.noop", request=b"\x80")
        assert running.error is None
        await helped(buyer, seller, 10)


async def test_a_village_where_nothing_costs_anything_still_tells_who_helped_whom(tmp_path):
    async with pair(tmp_path, price_percent=0) as (_, buyer, seller):
        for _ in range(2):
            assert result_of(await buyer.ask(PROMPT, tokens=4)) == expected(PROMPT, 4)
        await until(lambda: len(proof_of_nothing(seller, "in")) == 2)
        await helped(buyer, seller, 2 * price_of(PROMPT, 4), jobs=2)


async def test_a_free_job_that_is_cancelled_is_a_favour_as_far_as_it_went(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "share", peers=[buyer.peer])
        seller.script.pause_at = 3
        running = await buyer.submit(PROMPT, tokens=12)
        await seller.script.paused.wait()
        await until(lambda: len(running.pursuit.output.ids) == 3)
        buyer.desk.buyer.cancel(running.pursuit.row.id)
        await running.ended.wait()
        await helped(buyer, seller, price_of(PROMPT, 3))


async def test_a_wrong_answer_for_nothing_is_no_favour(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "share", peers=[buyer.peer])
        seller.script.key = "another model"
        assert (await buyer.ask(PROMPT, tokens=4)).error is not None
        assert await ask(buyer, "favours") == []
        assert proof_of_nothing(buyer, "out") == []


async def test_a_friends_quote_is_of_no_use_to_others_and_none_after_sharing_ends(tmp_path):
    async with pair(tmp_path) as (mesh, buyer, seller):
        other = await mesh.add("other", serve=False)
        await mesh.knows(other, seller)
        await ask(seller, "share", peers=[buyer.peer])
        await buyer.ask(PROMPT, tokens=2)
        kept = buyer.desk.buyer._trade.market._quotes[
            seller.peer, Work("inference.generate", DEFAULT)
        ]
        other.tamper = lambda f: (
            (msgspec.structs.replace(f, quote_hash=kept.hash),) if isinstance(f, Call) else (f,)
        )
        running = await other.ask(PROMPT, tokens=2)
        assert running.error.code == "QUOTE_EXPIRED"
        await ask(seller, "share", peers=[buyer.peer], stop=True)
        running = await buyer.ask(PROMPT, tokens=2)  # its kept quote is free, and refused
        assert running.pursuit.spent == price_of(PROMPT, 2)


async def test_strangers_get_nothing_for_nothing_without_a_pool(tmp_path):
    async with seller_and_stranger(tmp_path, price_percent=0) as (_, seller, stranger):
        reply = await quote_from(stranger, seller)
        link = stranger.desk.links.get(seller.peer)
        call = Call(
            id=link.next_id(), attempt=b"a" * 16, operation="mesh.noop", request=b"\x80",
            quote_hash=quote_hash(reply.quote), ceiling_micro_credits=0, deadline_seconds=5.0,
        )  # fmt: skip
        inbox = link.open_inbox(call.id)
        link.send(call)
        with trio.fail_after(5):
            assert (await inbox.receive()).code == "INSUFFICIENT_CREDITS"


# ------------------------------------------------------------------ gifts, and what is given up


async def test_a_gift_is_in_both_books_and_no_larger_than_the_receiver_takes(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await ask(seller, "trust", peer=buyer.peer, line=1_000)
        await until(lambda: buyer.ledger.view(seller.peer).received_line == 1_000)
        await until(lambda: buyer.ledger.view(seller.peer).synced)
        assert await refused(buyer, "gift", peer=seller.peer, amount=1_001) == (
            "INSUFFICIENT_CREDITS"
        )
        said = await ask(buyer, "gift", peer=seller.peer, amount=1_000)
        assert said["owed_by_me"] == 1_000
        await settled(buyer, seller, 1_000)
        assert (await ask(buyer, "balance"))["gifts"] == -1_000
        assert (await ask(seller, "balance"))["gifts"] == 1_000
        assert await refused(buyer, "gift", peer=seller.peer, amount=1) == "INSUFFICIENT_CREDITS"


async def test_a_write_off_says_what_it_costs_and_the_debt_stays_signed(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await buyer.ask(PROMPT, tokens=2)
        owed = price_of(PROMPT, 2)
        await settled(buyer, seller, owed)
        said = await ask(seller, "write_off", peer=buyer.peer, amount=100, reason="moved away")
        assert said["cost"] == 100
        assert await refused(seller, "write_off", peer=buyer.peer, amount=owed, reason="x") == (
            "BAD_REQUEST"
        )
        assert await refused(seller, "write_off", peer=buyer.peer, reason=" ") == "BAD_REQUEST"
        found = await ask(seller, "balance")
        assert (found["net"], found["written_off"], found["doubtful"]) == (owed, 100, 100)
        assert row_of(found, buyer)["doubtful"] == 100
        await settled(buyer, seller, owed)


async def test_unsigned_work_that_the_owner_gives_up_makes_room_again(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        seller.ledger.want_room(buyer.peer, 1_000)
        await until(lambda: seller.ledger.room(buyer.peer) >= 1_000)
        gap = row_of(await ask(seller, "balance"), buyer)["at_risk"]
        assert (await ask(seller, "release_gap", peer=buyer.peer))["cost"] == gap > 0
        assert (await ask(seller, "release_gap", peer=buyer.peer))["cost"] == 0


async def test_a_transfer_that_is_stuck_is_given_up_by_the_beginning_of_its_id(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        one, two, three = [await mesh.add(name) for name in ("one", "two", "three")]
        for a, b in ((one, two), (two, three), (three, one)):
            await mesh.link(a, b)
        nodes = (one, two, three)
        await until(
            lambda: all(
                a.ledger.view(b.peer).synced and a.ledger.view(b.peer).received_line
                for a in nodes
                for b in nodes
                if a is not b
            )
        )
        three.tamper = lambda f: (
            () if isinstance(f, messages.Ledger) else (f,)
        )  # nothing comes back
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.ledger.route, [two.peer, three.peer], 1_000)
            await until(lambda: one.ledger.view(two.peer).routed == 1_000)
            (transfer,) = await ask(one, "transfers")
            assert transfer["amount"] == 1_000
            found = await ask(one, "balance")
            assert (found["held"], row_of(found, two)["held"]) == (1_000, 1_000)
            assert await refused(one, "release", transfer="ffff") == "BAD_REQUEST"
            said = await ask(one, "release", transfer=transfer["xid"][:12])
            assert said == {"transfer": transfer["xid"], "cost": 1_000}
            nursery.cancel_scope.cancel()
        found = await ask(one, "balance")
        assert (found["held"], found["written_off"], found["routed"]) == (0, 1_000, 0)
        assert (await one.ledger.audit()).ok


async def test_compact_says_what_it_dropped_and_the_book_is_still_right(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        buyer.ledger._ledger.desk.settings = msgspec.structs.replace(
            buyer.ledger._ledger.desk.settings, voucher_seconds=0.0
        )
        seller.script.step_seconds = 0.06
        await buyer.ask(PROMPT, tokens=12)
        await settled(buyer, seller, price_of(PROMPT, 12))
        while (await ask(buyer, "balance"))["in_transit"]:
            await trio.sleep(0.01)  # a voucher that is not confirmed yet keeps another one
        for node in (buyer, seller):
            done = await ask(node, "compact")
            assert done["looked"] > done["vouchers"] > 0
            assert done["looked"] == done["vouchers"] + 1
            assert (await ask(node, "compact"))["vouchers"] == 0
        await settled(buyer, seller, price_of(PROMPT, 12))


async def test_nobody_several_and_oneself_are_refused_by_name(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        for name in ("", "nobody", seller.peer):
            assert await refused(seller, "trust", peer=name, line=1) == "BAD_REQUEST"
        assert await refused(seller, "trust", peer=buyer.peer, line=-1) == "BAD_REQUEST"
        said = await ask(seller, "trust", peer=make_peer(77), line=1)  # never met
        assert not said["told"]
