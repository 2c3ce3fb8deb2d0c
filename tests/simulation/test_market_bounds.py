"""What the two sides can lose to each other, and that nobody waits for ever for a bad one."""

from __future__ import annotations

import msgspec
import pytest
import trio

from aivillage.models.mesh.noop import NoopRequest
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.messages import Failure, Finished, Progress, Step
from aivillage.protocols.pricing import Terms
from tests.simulation.mesh import PRICE, price_of, result_of, settled, until, without
from tests.simulation.test_market import PROMPT, expected, pair
from tests.simulation.test_market_failures import buyer_has, paused_job, three

replace = msgspec.structs.replace


# ------------------------------------------------------------------ what a buyer can lose


@pytest.mark.parametrize("forged", [b"\1" * 33, b"\1" * 32], ids=["no-hash", "another-hash"])
async def test_a_hash_of_a_modules_result_that_is_not_ours_is_not_signed(tmp_path, forged):
    async with three(tmp_path) as (_, buyer, first, second):
        first.tamper = lambda f: (replace(f, out_hash=forged),) if isinstance(f, Finished) else (f,)
        request = pack(NoopRequest(note="x", parts=2))
        running = await buyer.ask(operation="mesh.noop", request=request)
        assert running.error is None
        assert running.pursuit.receipt().sellers[-1] == second.peer
        await settled(buyer, second, 30)
        assert buyer.ledger.view(first.peer).owed_by_me == 0


async def test_a_seller_that_only_says_it_read_is_paid_and_so_is_the_one_that_did(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.die_after = 0
        running = await buyer.ask(PROMPT, tokens=6)
        assert result_of(running) == expected(PROMPT, 6)
        reading = price_of(PROMPT, 0)
        assert running.pursuit.spent == reading + price_of(PROMPT, 6)
        await settled(buyer, first, reading)
        await settled(buyer, second, price_of(PROMPT, 6))


async def test_of_a_rejected_result_nothing_more_is_signed_nor_can_be_claimed(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.key = "another model"
        await until(lambda: buyer.ledger.view(first.peer).synced)
        desk = buyer.ledger._ledger.desk
        msgspec.structs.force_setattr(desk.settings, "voucher_seconds", 30.0)
        running = await buyer.ask(PROMPT, tokens=8)
        assert result_of(running) == expected(PROMPT, 8)
        await settled(buyer, second, price_of(PROMPT, 8))
        assert not desk.partner(first.peer).purchases
        buyer.ledger._ledger.buying.flush(desk.partner(first.peer))
        await trio.sleep(0.1)
        assert buyer.ledger.view(first.peer).owed_by_me == 0
        intents = await trio.to_thread.run_sync(
            lambda: desk._runner._db.execute("SELECT count(*) FROM intent").fetchall()
        )
        assert intents == [(0,)]


async def test_a_seller_that_went_on_from_a_lie_is_not_blamed_for_it(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.key, first.script.die_after = "another model", 5
        running = await buyer.ask(PROMPT, tokens=12)
        assert result_of(running) == expected(PROMPT, 12)
        record = buyer.desk.discovery.record_of(second.peer)
        assert (record.good, record.bad) == (1, 0)
        assert second.script.made == 7 + 12


async def test_patience_is_not_the_sellers_choice(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.attempt.WORK_SLACK_SECONDS", -3.0)
    async with three(tmp_path) as (_, buyer, first, _second):
        quote = first.desk.seller.door._prices.quote
        first.desk.seller.door._prices.quote = lambda o, t, e, _s: quote(o, t, e, 1e9)
        running = await paused_job(buyer, first)
        with trio.fail_after(4):
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)


async def test_signs_of_life_without_work_do_not_hold_a_job_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.attempt.WORK_SLACK_SECONDS", -3.0)
    monkeypatch.setattr("aivillage.node.attempt.PROGRESS_SECONDS_MAX", 0.5)
    async with three(tmp_path) as (_, buyer, first, _second):
        running = await paused_job(buyer, first)
        (_, call) = next(iter(buyer.desk.buyer._trade.attempts))
        link = first.desk.links.get(buyer.peer)
        with trio.fail_after(5):
            while not running.ended.is_set():
                link.send(Progress(id=call, done=0))
                await trio.sleep(0.1)
        assert result_of(running) == expected(PROMPT, 12)


async def test_a_second_start_makes_no_seller_faster(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        first.script.step_seconds = 0.05
        del buyer.desk.discovery.records[first.peer]

        def again(frame):
            if isinstance(frame, Finished):
                return (messages.Started(id=frame.id, kernel_class="x", identical="y"), frame)
            return (frame,)

        first.tamper = again
        running = await buyer.ask(PROMPT, tokens=8, peer=first.peer)
        assert running.pursuit.receipt().identical == "guaranteed"
        assert buyer.desk.discovery.record_of(first.peer).units_per_second < 100


async def test_a_seller_that_works_past_the_jobs_deadline_is_rated_for_it(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        quote = first.desk.seller.door._prices.quote
        first.desk.seller.door._prices.quote = lambda o, t, e, _s: quote(o, t, e, 0.1)
        running = await paused_job(buyer, first, deadline=1.0)
        await running.ended.wait()
        assert running.error.code == "DEADLINE"
        assert buyer.desk.discovery.record_of(first.peer).bad == 1
        await settled(buyer, first, price_of(PROMPT, 5))


async def test_parts_that_do_not_fit_a_call_are_made_again(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.pause_at = 2
        request = pack(NoopRequest(note="x", parts=4))
        running = await buyer.submit(operation="mesh.noop", request=request)
        await first.script.paused.wait()
        await until(lambda: len(running.pursuit.output.bodies) == 2)
        running.pursuit.output.bodies[0] = bytes(1 << 20)
        await first.stop()
        with trio.fail_after(15):
            await running.ended.wait()
        assert running.error is None
        await settled(buyer, second, 50)


async def test_gifts_of_two_kinds_of_engine_are_not_called_identical(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        for node in (first, second):
            prices = node.desk.seller.door._prices
            prices.terms = lambda o, **_: Terms(
                prices_micro_credits=dict.fromkeys(o.terms.prices_micro_credits, 0)
            )
        first.script.die_after = 5

        def another(f):
            return (replace(f, kernel_class="2") if isinstance(f, messages.Started) else f,)

        second.tamper = another
        running = await buyer.ask(PROMPT, tokens=12)
        assert running.pursuit.receipt().identical == "best effort"
        assert running.pursuit.receipt().sellers == (first.peer, second.peer)


async def test_an_end_that_crashes_is_an_end(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):

        def crashes(*_args):
            raise ZeroDivisionError

        end, buyer.desk.jobs.end_passed = buyer.desk.jobs.end_passed, crashes
        end_sale = seller.ledger.end_sale
        seller.ledger.end_sale = crashes
        await buyer.ask(PROMPT, tokens=2)
        await until(lambda: seller.events("sale_end_crashed"))
        assert buyer.events("end_crashed")
        buyer.desk.jobs.end_passed, seller.ledger.end_sale = end, end_sale
        assert (await buyer.ask("again", tokens=2)).error is None


# ------------------------------------------------------------------ what a seller can lose


async def test_a_module_dearer_than_the_exposure_is_refused_before_any_work(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        dear = pack(NoopRequest(parts=2_000))
        running = await buyer.ask(operation="mesh.noop", request=dear)
        assert running.error.code == "OWNER_LIMIT"
        assert running.error.next_step
        cheap = pack(NoopRequest(parts=1))
        assert (await buyer.ask(operation="mesh.noop", request=cheap)).error is None
        said = []  # this one goes out at the quote for the other
        running = await buyer.ask(operation="mesh.noop", request=dear, say=said.append)
        assert running.error.code == "OWNER_LIMIT"
        assert not any(isinstance(frame, messages.Part) for frame in said)
        assert seller.script.open_sessions == 0


async def test_who_does_not_pay_holds_a_slot_for_seconds_only(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.delivery.ROOM_SECONDS", 0.5)
    monkeypatch.setattr("aivillage.node.pursuit.CREDIT_WAITS_SECONDS", ())
    async with pair(tmp_path) as (_, buyer, seller):
        await until(lambda: buyer.ledger.view(seller.peer).synced)
        with without(buyer, messages.Ledger):
            running = await buyer.ask("free lunch", tokens=200)
            assert running.error.code == "INSUFFICIENT_CREDITS"
            assert seller.desk.seller.free_slots() == seller.settings.slots
            assert buyer.desk.discovery.record_of(seller.peer).bad == 0  # an honest refusal


async def test_who_does_not_pay_gets_no_module_run_beyond_its_exposure(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.delivery.ROOM_SECONDS", 0.5)
    monkeypatch.setattr("aivillage.node.pursuit.CREDIT_WAITS_SECONDS", ())
    async with pair(tmp_path, village_exposure_micro_credits=50) as (_, buyer, seller):
        await until(lambda: buyer.ledger.view(seller.peer).synced)
        request = pack(NoopRequest(note="x", parts=4))
        with without(buyer, messages.Ledger):
            assert (await buyer.ask(operation="mesh.noop", request=request)).error is None
            said = []
            running = await buyer.ask(operation="mesh.noop", request=request, say=said.append)
            assert running.error.code == "INSUFFICIENT_CREDITS"
            assert not any(isinstance(frame, messages.Part) for frame in said)


async def test_room_that_nobody_told_of_is_found(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):

        async def never(_peer):
            await trio.sleep_forever()

        seller.ledger.room_changed = never
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)


async def test_who_read_for_nothing_often_enough_is_paid_for_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.allowances.READING_PER_EXPOSURE", 0)
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.die_after = 5
        running = await buyer.ask(PROMPT, tokens=12)
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.spent == price_of(PROMPT, 5) + price_of(PROMPT, 12)
        await settled(buyer, second, price_of(PROMPT, 12))


async def test_reading_is_not_waived_for_who_shows_no_token(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        buyer.tamper = lambda f: (
            (replace(f, done={"prompt_quads": 7}),) if isinstance(f, messages.Call) else (f,)
        )
        await buyer.ask(PROMPT, tokens=2)
        await until(lambda: seller.ledger.view(buyer.peer).delivered == price_of(PROMPT, 2))


# ------------------------------------------------------------------ who is asked again


async def test_credit_that_comes_back_in_a_moment_is_waited_for(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        state = {"refusals": 2}

        def restarted(frame):
            if isinstance(frame, messages.Accepted) and state["refusals"]:
                state["refusals"] -= 1
                return (Failure(id=frame.id, code="INSUFFICIENT_CREDITS", message="no"),)
            late = isinstance(frame, Step | Finished | messages.Started) and state["refusals"]
            return () if late else (frame,)

        seller.tamper = restarted
        running = await buyer.ask(PROMPT, tokens=4)
        assert running.error is None
        assert result_of(running) == expected(PROMPT, 4)


async def test_a_named_peer_is_dialled_whatever_we_thought_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 2.0)
    async with pair(tmp_path) as (_, buyer, seller):
        buyer.desk.discovery.unreachable(seller.peer)
        running = await buyer.ask(PROMPT, tokens=2, peer=seller.peer[-8:])
        assert result_of(running) == expected(PROMPT, 2)
        assert running.pursuit.spent == 2 * PRICE + price_of(PROMPT, 0)
        assert not buyer_has(buyer, 2)
