"""The market, end to end: what is paid, by whom, for what, when everybody is honest."""

from __future__ import annotations

from contextlib import asynccontextmanager

import apsw
import msgspec
import pytest
import trio

from aivillage.ledger.ledger import open_ledger
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.mesh.noop import NoopRequest, NoopResult
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, NodeError, RequestError
from aivillage.protocols.messages import Text
from tests.simulation.mesh import PRICE, open_mesh, price_of, result_of, settled, until, without
from tests.simulation.scripted import answer

PROMPT = "a prompt of 26 bytes......"


def expected(prompt: str, tokens: int):
    return answer(GenerateRequest(prompt=prompt, max_tokens=tokens))


@asynccontextmanager
async def pair(folder, *, buyer_settings=None, **seller_settings):
    """A founder that buys, one member that sells."""
    async with open_mesh(folder) as mesh:
        buyer = await mesh.add("buyer", **({"serve": False} | (buyer_settings or {})))
        seller = await mesh.add("seller", **seller_settings)
        if seller_settings.get("serve", True):
            await mesh.knows(buyer, seller)
        yield mesh, buyer, seller


async def test_a_job_is_paid_exactly_its_own_meter_and_both_books_agree(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        said = []
        running = await buyer.ask(PROMPT, tokens=12, say=said.append)
        receipt = running.pursuit.receipt()
        assert receipt.price_micro_credits == price_of(PROMPT, 12) == 19 * PRICE
        assert (receipt.sellers, receipt.attempts) == ((seller.peer,), 1)
        assert receipt.identical == "guaranteed"
        assert result_of(running) == expected(PROMPT, 12)
        assert "".join(f.text for f in said if isinstance(f, Text)) == result_of(running).text
        await settled(buyer, seller, price_of(PROMPT, 12))
        assert (await buyer.ledger.balance()).net == -(await seller.ledger.balance()).net < 0


async def test_a_module_call_is_paid_for_its_parts_and_its_end(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        request = pack(NoopRequest(note="x", parts=3))
        running = await buyer.ask(operation="mesh.noop", request=request)
        assert running.error is None
        assert msgspec.msgpack.decode(running.pursuit.result) == {"note": "x", "parts": 3}
        await settled(buyer, seller, 40)


async def test_real_worker_processes_do_a_job_for_the_mesh(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        async with open_workers(
            WorkerSettings(), cache_folder=tmp_path / "c", scratch_folder=tmp_path / "s"
        ) as workers:
            seller.desk.seller.modules._workers = workers
            request = pack(NoopRequest(note="real", parts=2))
            running = await buyer.ask(operation="mesh.noop", request=request)
            assert msgspec.msgpack.decode(running.pursuit.result, type=NoopResult).parts == 2
        await settled(buyer, seller, 30)


async def test_a_long_prompt_is_delivered_slice_by_slice_within_the_exposure(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        prompt, most = "words " * 120, []
        delivery = seller.desk.seller.delivery
        step = delivery.deliver

        async def watched(*args):
            await step(*args)
            view = seller.ledger.view(buyer.peer)
            most.append(view.delivered - view.paid)

        delivery.deliver = watched
        running = await buyer.ask(prompt, tokens=5)
        assert result_of(running) == expected(prompt, 5)
        assert max(most) <= seller.settings.village_exposure_micro_credits
        await settled(buyer, seller, price_of(prompt, 5))


async def test_a_small_exposure_slows_a_job_but_never_stops_it(tmp_path):
    async with pair(tmp_path, village_exposure_micro_credits=3 * PRICE) as (_, buyer, seller):
        running = await buyer.ask("x" * 40, tokens=4)
        assert result_of(running) == expected("x" * 40, 4)
        await settled(buyer, seller, price_of("x" * 40, 4))


async def test_a_buyer_that_never_pays_gets_no_more_than_the_exposure(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await until(lambda: buyer.ledger.view(seller.peer).synced)
        with without(buyer, messages.Ledger):
            running = await buyer.submit("free lunch", tokens=200)
            exposure = seller.settings.village_exposure_micro_credits
            await until(lambda: seller.ledger.view(buyer.peer).delivered > exposure - PRICE)
            await trio.sleep(0.3)  # time in which more would come
            assert seller.ledger.view(buyer.peer).delivered <= exposure
            assert len(running.pursuit.output.ids) * PRICE <= exposure
            assert running.pursuit.result is None
            buyer.desk.buyer.cancel(running.pursuit.row.id)
            await running.ended.wait()


async def test_a_stranger_is_refused_for_lack_of_credit(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        stranger = await mesh.add("stranger", stranger=True, serve=False)
        await mesh.link(stranger, seller)
        await until(lambda: stranger.desk.discovery.candidates("inference.generate"))
        running = await stranger.ask()
        assert running.error.code == "INSUFFICIENT_CREDITS"
        assert (seller.script.made, running.pursuit.spent) == (0, 0)


async def test_a_price_above_the_ceiling_is_refused_before_any_call(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        running = await buyer.ask(PROMPT, tokens=12, ceiling=price_of(PROMPT, 12) - 1)
        assert running.error.code == "PRICE_ABOVE_CEILING"
        assert not any(isinstance(frame, messages.Call) for frame in seller.heard)
        await settled(buyer, seller, 0)
        running = await buyer.ask(PROMPT, tokens=12, ceiling=price_of(PROMPT, 12))
        assert running.error is None


async def test_too_little_room_is_said_before_any_call_and_is_no_memory(tmp_path):
    async with pair(tmp_path, village_line_micro_credits=10 * PRICE) as (_, buyer, seller):
        assert (await buyer.ask("abcd", tokens=12)).error.code == "INSUFFICIENT_CREDITS"
        assert not any(isinstance(frame, messages.Call) for frame in seller.heard)
        # The owner allows more: the buyer must not go on believing its old quote.
        await seller.ledger.set_line(buyer.peer, 50 * PRICE, 20_000)
        assert (await buyer.ask("abcd", tokens=12)).error is None


async def test_what_was_owed_and_is_earned_back_makes_room_again(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        one = await mesh.add("one", village_line_micro_credits=20 * PRICE)
        two = await mesh.add("two", village_line_micro_credits=20 * PRICE)
        await mesh.knows(one, two)
        await mesh.knows(two, one)
        assert (await one.ask("abcd", tokens=15)).error is None
        assert (await one.ask("abcd", tokens=15)).error.code == "INSUFFICIENT_CREDITS"
        assert (await two.ask("abcd", tokens=15)).error is None
        await settled(one, two, 0)
        assert (await one.ask("abcd", tokens=15)).error is None


@pytest.mark.parametrize("owing", [0, 1])
async def test_a_seller_that_owes_us_is_chosen_unless_another_is_much_faster(tmp_path, owing):
    async with open_mesh(tmp_path) as mesh:
        buyer, *sellers = [await mesh.add(name) for name in ("buyer", "x", "y")]
        debtor, other = sellers[owing], sellers[1 - owing]
        await mesh.knows(buyer, *sellers)
        await mesh.knows(debtor, buyer)
        assert (await debtor.ask("abcd", tokens=9, peer=buyer.peer)).error is None
        await until(lambda: buyer.ledger.view(debtor.peer).owed_to_me == 10 * PRICE)
        owed, market = [], buyer.desk.buyer._trade.market
        for faster, chosen in ((1.0, debtor), (1.2, debtor), (1.3, other), (1.0, debtor)):
            owed.append(buyer.ledger.view(debtor.peer).owed_to_me)
            for seller, speed in ((debtor, 1.0), (other, 1.0 * faster)):
                buyer.has_measured(seller.peer, speed)
                market.forget_peer(seller.peer)  # on old news a coin would decide
            receipt = (await buyer.ask("abcd", tokens=2)).pursuit.receipt()
            assert receipt.sellers == (chosen.peer,), (faster, receipt.why)
            assert ("owes us" in receipt.why) == (chosen is debtor)
        assert owed == [10 * PRICE, 7 * PRICE, 4 * PRICE, 4 * PRICE]
        for seller, speed in ((debtor, 0.9), (other, 1.0)):
            buyer.has_measured(seller.peer, speed)
            market.forget_peer(seller.peer)
        receipt = (await buyer.ask("abcd", tokens=2)).pursuit.receipt()
        assert receipt.sellers == (other.peer,), "what is owed is less than the price"


async def test_a_busy_seller_is_waited_for_and_then_used(tmp_path):
    async with pair(tmp_path, slots=1, queue_calls=0) as (_, buyer, seller):
        seller.script.pause_at = 2
        first = await buyer.submit("first", tokens=4)
        await seller.script.paused.wait()
        second = await buyer.submit("second", tokens=4)
        await until(lambda: buyer.events("attempt_failed"))
        assert buyer.events("attempt_failed")[0]["code"] == "BUSY"
        seller.script.go.set()
        await first.ended.wait()
        await second.ended.wait()
        assert result_of(second) == expected("second", 4)
        assert second.pursuit.receipt().attempts == 1  # waiting is no attempt
        assert seller.desk.discovery.records == {}
        await settled(buyer, seller, price_of("first", 4) + price_of("second", 4))


async def test_an_expired_quote_is_asked_anew_at_the_same_peer(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await buyer.ask("one", tokens=2)
        seller.desk.seller.door._prices._quotes.clear()
        running = await buyer.ask("two", tokens=2)
        assert result_of(running) == expected("two", 2)
        assert [e["code"] for e in buyer.events("attempt_failed")] == ["QUOTE_EXPIRED"]
        assert running.pursuit.receipt().sellers == (seller.peer,)


async def test_an_unknown_operation_is_refused_at_once(tmp_path):
    async with pair(tmp_path) as (_, buyer, _seller):
        with pytest.raises(RequestError) as caught:
            await buyer.submit(operation="inference.dream", request=b"\x80")
        assert caught.value.code == "UNKNOWN_OPERATION"
        with pytest.raises(RequestError) as caught:
            await buyer.submit(request=b"\x80")
        assert caught.value.code == "BAD_REQUEST"


async def test_an_owner_who_serves_nobody_is_not_asked_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 0.3)
    async with pair(tmp_path, serve=False) as (mesh, buyer, seller):
        await mesh.link(buyer, seller)
        running = await buyer.ask()
        assert running.error.code == "NO_PEER"
        link = buyer.desk.links.get(seller.peer)
        request = pack(GenerateRequest(prompt="x"))
        ask = messages.QuoteRequest(
            id=link.next_id(), operation="inference.generate", request=request
        )
        with pytest.raises(AivillageError) as caught:
            await link.ask(ask, timeout_seconds=2)
        assert caught.value.code == "NOT_OFFERED"


async def test_a_full_disk_refuses_new_jobs_and_goes_on_reading(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await buyer.ask("before", tokens=2)
        full = NodeError("the disk is full", code="DISK_FULL")
        for node in (buyer, seller):
            node.desk.buyer.refusal = node.desk.seller.door.refusal = lambda: full
        with pytest.raises(NodeError) as caught:
            await buyer.submit()
        assert caught.value.code == "DISK_FULL"
        assert seller.desk.seller.operations() == []
        assert (await buyer.desk.on_balance({}))["net"] == -price_of("before", 2)
        assert len(await buyer.desk.on_jobs({})) == 1
        assert (await buyer.desk.on_audit({}))["ok"]


async def test_a_seller_whose_disk_is_full_says_so(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        seller.desk.seller.door.refusal = lambda: NodeError("full", code="DISK_FULL")
        assert (await buyer.ask()).error.code == "DISK_FULL"


async def test_a_task_that_nobody_offers_is_advertised_and_a_latecomer_does_it(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        other = await mesh.add("other", serve=False)
        await mesh.link(buyer, other)
        running = await buyer.submit(PROMPT, tokens=3)
        await until(lambda: any(getattr(f, "topic", "") == "task" for f in other.heard))
        seller = await mesh.add("seller")
        await mesh.link(seller, other)  # not with the buyer: the village tells it
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 3)
        await settled(buyer, seller, price_of(PROMPT, 3))


async def test_who_is_back_is_dialled_by_a_job_that_found_nobody_else(tmp_path, monkeypatch):
    """Its offer comes by way of another: that is no sign of life, and worth a dial."""
    monkeypatch.setattr("aivillage.node.villagers.NEIGHBOURS", 1)  # nobody dials unasked
    async with open_mesh(tmp_path) as mesh:
        other = await mesh.add("other", serve=False)
        buyer, seller = await mesh.add("buyer", serve=False), await mesh.add("seller")
        await mesh.link(buyer, other)
        await mesh.link(seller, other)
        await until(lambda: buyer.desk.discovery.candidates("mesh.noop"))
        assert buyer.desk.links.get(seller.peer) is None
        buyer.desk.discovery.unreachable(seller.peer)
        running = await buyer.ask(PROMPT, tokens=3)
        assert result_of(running) == expected(PROMPT, 3)
        assert running.pursuit.receipt().sellers == (seller.peer,)


async def test_a_job_that_hears_nothing_asks_the_village_again(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 1.0)
    monkeypatch.setattr("aivillage.node.market.LOOK_AGAIN_SECONDS", 0.1)
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        said = []
        monkeypatch.setattr(buyer.desk.buyer._trade.market, "_advertise", said.append)
        assert (await buyer.ask(PROMPT, tokens=3)).error.code == "NO_PEER"
        assert len(said) >= 2


async def test_a_job_pinned_to_a_peer_goes_there_and_nowhere_else(tmp_path, monkeypatch):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        cheap = await mesh.add("cheap", price_percent=1)
        dear = await mesh.add("dear", price_percent=300)
        await mesh.knows(buyer, cheap, dear)
        running = await buyer.ask("abcd", tokens=2, peer=dear.peer)
        assert running.pursuit.receipt().sellers == (dear.peer,)
        running = await buyer.ask("abcd", tokens=2, peer=dear.peer[-8:])
        assert running.pursuit.receipt().sellers == (dear.peer,)
        await dear.stop()
        monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 0.3)
        assert (await buyer.ask("abcd", tokens=2, peer=dear.peer)).error.code == "NO_PEER"
        assert cheap.script.made == 0


async def test_work_given_away_is_done_and_named(tmp_path):
    async with pair(tmp_path, price_percent=0) as (_, buyer, seller):
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        assert running.pursuit.receipt().sellers == (seller.peer,)
        await settled(buyer, seller, 0)


async def test_a_book_that_was_altered_fails_its_audit(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        await buyer.ask(PROMPT, tokens=4)
        await settled(buyer, seller, price_of(PROMPT, 4))
        await seller.stop()
        db = apsw.Connection(str(seller.paths.ledger))
        db.execute("DROP TRIGGER posting_kept; UPDATE posting SET amount = 2 * amount")
        db.close()
        async with open_ledger(seller.paths.ledger, seller.key) as book:
            report = await book.audit()
            assert not report.ok
            assert report.first_error


async def test_32_jobs_of_two_buyers_at_two_sellers_do_not_mix_and_the_books_are_exact(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        nodes = [await mesh.add(name, serve=name > "c") for name in ("a", "b", "x", "y")]
        a, b, x, y = nodes
        for buyer in (a, b):
            await mesh.knows(buyer, x, y)
        jobs = [
            (buyer, prompt, n % 7 + 1, await buyer.submit(prompt, tokens=n % 7 + 1, ceiling=10**5))
            for n in range(16)
            for buyer in (a, b)
            for prompt in (f"{buyer.name} asks {n}",)
        ]
        for *_, running in jobs:
            with trio.fail_after(20):
                await running.ended.wait()
        paid = dict.fromkeys(((buyer, seller) for buyer in (a, b) for seller in (x, y)), 0)
        for buyer, prompt, tokens, running in jobs:
            assert result_of(running) == expected(prompt, tokens)
            (peer,) = running.pursuit.receipt().sellers
            paid[buyer, x if peer == x.peer else y] += price_of(prompt, tokens)
            assert running.pursuit.spent == price_of(prompt, tokens)
        for (buyer, seller), amount in paid.items():
            await settled(buyer, seller, amount)
        assert sum([(await node.ledger.balance()).net for node in nodes]) == 0
        assert [node.script.open_sessions for node in (x, y)] == [0, 0]


async def test_each_buyer_has_a_name_at_the_engine_that_tells_nothing_but_who_is_the_same(tmp_path):
    """What a buyer wrote is kept for its own next turn; another's must not get faster by it."""
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        ann, bob = [await mesh.add(name, serve=False) for name in ("ann", "bob")]
        for buyer in (ann, bob, ann):
            await mesh.knows(buyer, seller)
            await buyer.ask(PROMPT, tokens=2)
        first, other, again = seller.script.scopes
        assert first == again != other
        assert len(first) == len(other) == 16
        assert not any(str(buyer.peer).encode() in first + other for buyer in (ann, bob))
