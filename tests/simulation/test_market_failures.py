"""The market when machines fail: sellers die, links break, nodes restart, owners change their mind.

Whatever happens in between: the text is that of an undisturbed run, and so is the price.
"""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.models.mesh.noop import NoopRequest
from aivillage.node import market
from aivillage.node.attempt import Attempt
from aivillage.node.jobs import Jobs, open_jobs
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import unseal
from aivillage.protocols.errors import AivillageError, JobError, NodeError
from tests.simulation.mesh import PRICE, open_mesh, price_of, result_of, settled, until, without
from tests.simulation.test_market import PROMPT, expected

LONG = "a prompt that takes several slices to read " * 8


@asynccontextmanager
async def three(folder):
    """A buyer, the seller that it will choose, and the one after."""
    async with open_mesh(folder) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        first = await mesh.add("first")
        second = await mesh.add("second")
        await mesh.knows(buyer, first, second)
        buyer.has_measured(first.peer, 9_000.0)
        yield mesh, buyer, first, second


async def paused_job(buyer, seller, *, prompt=PROMPT, tokens=12, at=5, **options):
    """A job whose seller delivered `at` tokens, all accepted, and then makes no more."""
    seller.script.pause_at = at
    running = await buyer.submit(prompt, tokens=tokens, **options)
    with trio.fail_after(5):
        await seller.script.paused.wait()
    await until(lambda: buyer_has(buyer, at))
    return running


async def resumed_job(buyer):
    await until(buyer.desk.buyer.running)
    (resumed,) = buyer.desk.buyer.running()
    return resumed


def buyer_has(buyer, tokens):
    attempts = list(buyer.desk.buyer._trade.attempts.values())
    return attempts and len(attempts[0].output.ids) == tokens and not attempts[0]._unstored


@pytest.mark.parametrize("how", ["cut", "partition"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
async def test_the_next_peer_goes_on_and_nothing_is_billed_twice(tmp_path, how, prompt):
    async with three(tmp_path) as (mesh, buyer, first, second):
        running = await paused_job(buyer, first, prompt=prompt)
        if how == "partition":
            mesh.network.partition(["first"])  # silence, which the pings notice
        else:
            first.tamper = lambda _frame: ()
            mesh.network.cut("buyer", "first")
            mesh.network.partition(["first"])
        with trio.fail_after(5):
            await running.ended.wait()
        assert result_of(running) == expected(prompt, 12)
        receipt = running.pursuit.receipt()
        assert receipt.sellers == (first.peer, second.peer)
        assert receipt.price_micro_credits == price_of(prompt, 12)
        assert second.script.made == 7  # each token was made once, and billed once
        assert (
            second.ledger.view(buyer.peer).owed_to_me == 7 * PRICE or await trio.sleep(0.3) is None
        )
        await settled(buyer, second, 7 * PRICE)
        mesh.network.heal()
        first.tamper = lambda frame: (frame,)
        await settled(buyer, first, price_of(prompt, 5))


async def test_an_engine_that_dies_costs_only_what_it_delivered(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.die_after = 5
        running = await buyer.ask(PROMPT, tokens=12)
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        assert buyer.desk.discovery.record_of(first.peer).bad == 1
        await settled(buyer, first, price_of(PROMPT, 5))
        await settled(buyer, second, 7 * PRICE)


async def test_a_seller_lost_after_the_last_token_leaves_nothing_to_pay_for(tmp_path):
    async with three(tmp_path) as (mesh, buyer, first, second):
        with without(first, messages.Finished):
            running = await buyer.submit(PROMPT, tokens=6)
            await until(lambda: buyer_has(buyer, 6))
            mesh.network.cut("buyer", "first")
            mesh.network.partition(["first"])
            with trio.fail_after(5):
                await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.spent == price_of(PROMPT, 6)
        assert second.script.made == 0
        await settled(buyer, second, 0)


async def test_a_silent_seller_is_left_at_the_work_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.attempt.WORK_SLACK_SECONDS", -3.0)
    async with three(tmp_path) as (_, buyer, first, second):
        running = await paused_job(buyer, first)  # 3 x 1.2 s quoted, less 3 s: 0.7 s
        with trio.fail_after(3):
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert "silent" in buyer.events("attempt_failed")[0]["reason"]
        assert running.pursuit.spent == price_of(PROMPT, 12)
        await until(lambda: first.script.open_sessions == 0)  # told to stop
        await settled(buyer, first, price_of(PROMPT, 5))
        await settled(buyer, second, 7 * PRICE)


@asynccontextmanager
async def vanishing(folder, monkeypatch):
    """As `three`; what a lost machine takes is shortened, pings come too late to help."""
    monkeypatch.setattr("aivillage.node.attempt.QUIET_SECONDS", 0.3)
    async with open_mesh(folder) as mesh:
        nodes = [await mesh.add(n, heartbeat_seconds=60) for n in ("buyer", "first", "second")]
        await mesh.knows(*nodes)
        nodes[0].has_measured(nodes[1].peer, 9_000.0)
        yield mesh, *nodes


async def test_a_seller_whose_machine_vanished_is_left_long_before_the_deadlines(
    tmp_path, monkeypatch
):
    async with vanishing(tmp_path, monkeypatch) as (mesh, buyer, first, second):
        running = await paused_job(buyer, first)
        mesh.network.partition(["first"])  # no closed connection tells of it
        with trio.fail_after(4):  # 0.3 s of quiet, then 2 s for a sign of life
            await running.ended.wait()
        assert "no sign of life" in buyer.events("attempt_failed")[0]["reason"]
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        mesh.network.heal()
        await settled(buyer, first, price_of(PROMPT, 5))
        await settled(buyer, second, 7 * PRICE)


async def test_a_closed_connection_is_noticed_before_any_ping_is_missed(tmp_path, monkeypatch):
    async with vanishing(tmp_path, monkeypatch) as (mesh, buyer, first, second):
        running = await paused_job(buyer, first)
        mesh.network.cut("buyer", "first")
        mesh.network.partition(["first"])
        with trio.fail_after(2):  # a missed sign of life would take longer, three pings minutes
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer, second.peer)


async def test_a_seller_that_is_only_quiet_keeps_its_job(tmp_path, monkeypatch):
    async with vanishing(tmp_path, monkeypatch) as (_, buyer, first, second):
        running = await paused_job(buyer, first)
        await trio.sleep(1.5)  # five times as quiet as it takes to be asked
        first.script.go.set()
        with trio.fail_after(4):
            await running.ended.wait()
        assert running.pursuit.receipt().sellers == (first.peer,)
        assert second.script.made == 0


async def test_a_vanished_seller_that_nobody_could_replace_is_waited_for(tmp_path, monkeypatch):
    async with vanishing(tmp_path, monkeypatch) as (mesh, buyer, first, second):
        running = await paused_job(buyer, first, peer=first.peer)
        mesh.network.partition(["first"])
        await trio.sleep(3.5)  # more than another one at hand would have waited
        mesh.network.heal()
        first.script.go.set()
        with trio.fail_after(4):
            await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().attempts == 1
        assert second.script.made == 0


async def test_a_seller_that_never_acknowledges_is_left_for_the_next(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        kinds = (messages.Accepted, messages.Started, messages.Step, messages.Finished)
        with without(first, *kinds):
            running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        assert "no acknowledgement" in buyer.events("attempt_failed")[0]["reason"]
        await settled(buyer, second, price_of(PROMPT, 4))
        assert buyer.ledger.view(first.peer).owed_by_me == 0


async def test_cancel_pays_what_was_delivered_and_frees_the_slot(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        running = await paused_job(buyer, first)
        assert buyer.desk.buyer.cancel(running.pursuit.row.id)
        with trio.fail_after(2):
            await running.ended.wait()
        assert running.error.code == "CANCELLED"
        await until(lambda: first.script.open_sessions == 0)
        assert first.desk.seller.free_slots() == first.settings.slots
        await settled(buyer, first, price_of(PROMPT, 5))
        row = await buyer.desk.jobs.get(running.pursuit.row.id)
        assert (row.state, row.code) == ("cancelled", "CANCELLED")
        assert not buyer.desk.buyer.cancel(running.pursuit.row.id)


async def test_what_was_under_way_at_a_cancel_is_paid_so_that_no_exposure_is_lost(tmp_path):
    async with three(tmp_path) as (mesh, buyer, first, _second):
        mesh.network.latency_seconds = 0.05
        first.script.step_seconds = 0.005
        for number in range(3):
            running = await buyer.submit(f"{PROMPT}{number}", tokens=60)
            await until(lambda job=running: len(job.pursuit.output.ids) > 3)
            buyer.desk.buyer.cancel(running.pursuit.row.id)
            await running.ended.wait()
        mesh.network.latency_seconds = 0.0
        view = first.ledger.view
        await until(lambda: view(buyer.peer).paid == view(buyer.peer).delivered)
        await settled(buyer, first, view(buyer.peer).delivered)


async def test_a_cancel_during_the_verdict_ends_the_job_and_not_the_node(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        buyer.script.check_gate = trio.Event()
        running = await buyer.submit(PROMPT, tokens=4)
        await buyer.script.checking.wait()
        buyer.desk.buyer.cancel(running.pursuit.row.id)
        await running.ended.wait()
        assert running.error.code == "CANCELLED"
        await settled(buyer, first, price_of(PROMPT, 4))
        buyer.script.check_gate = None
        assert (await buyer.ask("again", tokens=2)).error is None


async def test_a_cancel_between_verdict_and_record_comes_too_late(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        jobs = buyer.desk.jobs
        passed = jobs.passed

        async def slow(*args):
            buyer.desk.buyer.cancel(args[0])
            await trio.lowlevel.checkpoint()
            await passed(*args)

        jobs.passed = slow
        running = await buyer.ask(PROMPT, tokens=4)
        assert (running.error, running.pursuit.state) == (None, "done")
        await settled(buyer, first, price_of(PROMPT, 4))


async def test_a_deadline_during_the_verdict_pays_what_was_streamed(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        buyer.script.check_gate = trio.Event()
        running = await buyer.ask(PROMPT, tokens=4, deadline=0.5)
        assert running.error.code == "DEADLINE"
        await settled(buyer, first, price_of(PROMPT, 4))


@pytest.mark.parametrize("code", ["DISK_FULL", "INTERNAL"])
async def test_a_result_that_cannot_be_recorded_is_paid_and_handed_over(
    tmp_path, monkeypatch, code
):
    monkeypatch.setattr("aivillage.node.store.FULL_DISK_SECONDS", 0.05)
    async with three(tmp_path) as (_, buyer, first, _second):
        jobs, write, failures = buyer.desk.jobs, buyer.desk.jobs._write, [1, 2]

        async def no_room(*_args):
            raise NodeError("jobs.db cannot be written", code=code)

        async def no_room_at_first(sql, *rows):
            if "SET state=?, ended=?" in sql and failures:
                failures.pop()
                await no_room()
            await write(sql, *rows)

        jobs.passed, jobs._write = no_room, no_room_at_first
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        await settled(buyer, first, price_of(PROMPT, 4))
        stored = (await jobs.get(running.pursuit.row.id)).state
        assert (stored == "done") == (code == "DISK_FULL")


async def test_a_verdict_that_our_own_worker_failed_to_give_is_asked_again(tmp_path):
    async with three(tmp_path) as (_, buyer, first, _second):
        buyer.script.check_failures = [JobError("a worker died", code="JOB_FAILED")]
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        assert running.pursuit.receipt().sellers == (first.peer,)
        assert buyer.desk.discovery.record_of(first.peer).bad == 0


async def test_a_link_lost_while_a_job_settles_costs_nothing(tmp_path):
    async with three(tmp_path) as (mesh, buyer, first, _second):
        buyer.script.check_gate = trio.Event()
        running = await buyer.submit(PROMPT, tokens=4)
        await buyer.script.checking.wait()
        mesh.network.cut("buyer", "first")
        buyer.script.check_gate.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 4)
        await mesh.link(buyer, first)
        await settled(buyer, first, price_of(PROMPT, 4))


async def test_a_new_link_counts_calls_anew_and_two_jobs_do_not_meet(tmp_path):
    async with three(tmp_path) as (mesh, buyer, first, second):
        await second.stop()
        buyer.script.check_gate = trio.Event()
        one = await buyer.submit("one", tokens=4)
        await buyer.script.checking.wait()
        (old,) = buyer.desk.buyer._trade.attempts
        mesh.network.cut("buyer", "first")
        await mesh.link(buyer, first)
        # The new link's next call gets the very id that the old one still holds.
        link = buyer.desk.links.get(first.peer)
        while (number := link.next_id()) + 4 < old[1]:
            continue
        link._ids = iter(range(old[1] - 2, 10_000, 2)) if number <= old[1] else link._ids
        first.script.step_seconds = 0.02
        two = await buyer.submit("two", tokens=8)
        await until(lambda: len(buyer.desk.buyer._trade.attempts) == 2)
        await until(lambda: len(two.pursuit.output.ids) > 2)
        buyer.script.check_gate.set()
        await one.ended.wait()
        await two.ended.wait()
        assert result_of(one) == expected("one", 4)
        assert result_of(two) == expected("two", 8)
        assert two.pursuit.receipt().attempts == 1


async def test_a_peer_that_comes_back_is_used_again(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        running = await paused_job(buyer, seller)
        seller.script.pause_at = None
        mesh.network.cut("buyer", "seller")
        await mesh.link(buyer, seller)
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        await settled(buyer, seller, price_of(PROMPT, 12))


async def test_a_peer_that_is_back_before_its_attempt_is_left_is_used_again(tmp_path, monkeypatch):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        running = await paused_job(buyer, seller)
        lost, leave = buyer.desk.links.get(seller.peer), Attempt.leave

        async def late(attempt, *args, **options):
            await leave(attempt, *args, **options)
            await until(lambda: buyer.desk.links.get(seller.peer) not in (None, lost))

        monkeypatch.setattr(Attempt, "leave", late)
        seller.script.pause_at = None
        mesh.network.cut("buyer", "seller")
        await mesh.link(buyer, seller)
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        await settled(buyer, seller, price_of(PROMPT, 12))


async def test_a_restarted_seller_is_asked_for_a_fresh_quote(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller")
        await mesh.knows(buyer, seller)
        await buyer.ask("one", tokens=2)
        await seller.stop()
        await mesh.start(seller)
        await mesh.link(buyer, seller)
        running = await buyer.ask("two", tokens=2)
        assert result_of(running) == expected("two", 2)
        await settled(buyer, seller, price_of("one", 2) + price_of("two", 2))


async def test_a_restarted_buyer_finishes_its_job_from_what_was_delivered(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        running = await paused_job(buyer, seller)
        job = running.pursuit.row.id
        await buyer.stop()
        seller.script.pause_at, made = None, seller.script.made
        await until(lambda: seller.script.open_sessions == 0)
        await mesh.start(buyer)
        await mesh.link(buyer, seller)
        resumed = await resumed_job(buyer)
        await resumed.ended.wait()
        assert result_of(resumed) == expected(PROMPT, 12)
        assert seller.script.made - made == 7
        assert resumed.pursuit.spent == price_of(PROMPT, 12)
        await settled(buyer, seller, price_of(PROMPT, 12))
        assert (await buyer.desk.jobs.get(job)).state == "done"
        await buyer.stop()
        await mesh.start(buyer)
        assert buyer.desk.buyer.running() == []


async def test_a_crash_does_not_let_a_job_spend_above_its_ceiling(tmp_path):
    """The attempt's end was never recorded; what it cost is known all the same."""
    async with three(tmp_path) as (mesh, buyer, first, _second):
        ceiling = price_of(PROMPT, 12) + PRICE
        running = await paused_job(buyer, first, ceiling=ceiling)
        (attempt,) = await buyer.desk.jobs.attempts(running.pursuit.row.id)
        assert (attempt.outcome, attempt.price) == ("", price_of(PROMPT, 5))
        await buyer.stop()
        first.script.pause_at = None
        async with open_jobs(buyer.paths.jobs) as jobs:
            # As a crash would have left it.
            await jobs._write("UPDATE attempt SET outcome='' WHERE id=?", (attempt.id,))
        await mesh.start(buyer)
        await mesh.knows(buyer, first)
        resumed = await resumed_job(buyer)
        await resumed.ended.wait()
        assert resumed.pursuit.spent == price_of(PROMPT, 12) <= ceiling
        (attempt, _) = await buyer.desk.jobs.attempts(running.pursuit.row.id)
        assert attempt.outcome == "stopped"


async def test_a_restart_after_the_verdict_only_settles(tmp_path):
    async with three(tmp_path) as (mesh, buyer, first, _second):
        buyer.desk.jobs.end_passed = lambda *_args: None  # as if it had been killed just then
        running = await buyer.submit(PROMPT, tokens=4)
        await until(lambda: running.pursuit.state == "done")
        made = first.script.made
        await buyer.stop()
        await mesh.start(buyer)
        await until(lambda: buyer.events("job_ended"))
        row = await buyer.desk.jobs.get(running.pursuit.row.id)
        assert (row.state, first.script.made) == ("done", made)
        await mesh.link(buyer, first)
        await settled(buyer, first, price_of(PROMPT, 4))


async def test_a_peer_that_answers_no_question_delays_nobody(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        with without(first, messages.QuoteReply), trio.fail_after(2):
            running = await buyer.ask(PROMPT, tokens=4)
        assert running.pursuit.receipt().sellers == (second.peer,)


async def test_a_peer_that_answers_no_question_and_is_alone_is_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.QUOTE_SECONDS", 0.1)
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 0.5)
    async with three(tmp_path) as (_, buyer, first, second):
        await second.stop()
        with without(first, messages.QuoteReply):
            assert (await buyer.ask(PROMPT, tokens=4)).error.code == "NO_PEER"


async def test_no_more_jobs_run_at_once_than_the_limit_however_fast_they_come(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("aivillage.node.buyer.JOBS_MAX", 3)
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        taken, refused = [], []

        async def submit():
            try:
                taken.append(await buyer.submit())
            except AivillageError as error:
                refused.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(submit)
        assert (len(taken), refused) == (3, ["BUSY"] * 5)
        assert len(await buyer.desk.jobs.latest(99)) == 3


async def test_a_job_asked_for_while_the_node_starts_runs_once(tmp_path, monkeypatch):
    real = Jobs.unfinished

    async def slow(jobs):
        await trio.sleep(0.1)
        return await real(jobs)

    monkeypatch.setattr(Jobs, "unfinished", slow)
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        running = await buyer.submit(PROMPT, tokens=2)
        await trio.sleep(0.2)
        seller = await mesh.add("seller")
        await mesh.link(buyer, seller)
        await running.ended.wait()
        assert buyer.events("job_resumed") == []
        assert (len(buyer.events("job_ended")), seller.script.made) == (1, 2)


async def test_a_job_with_parts_goes_on_at_the_next_peer(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.pause_at = 2
        request = pack(NoopRequest(note="x", parts=4))
        running = await buyer.submit(operation="mesh.noop", request=request)
        await first.script.paused.wait()
        await until(lambda: len(running.pursuit.output.bodies) == 2)
        await first.stop()
        await running.ended.wait()
        assert running.error is None
        assert len(await buyer.desk.jobs.delivered(running.pursuit.row.id)) == 4
        await settled(buyer, second, 50)


async def test_a_deadline_of_the_node_begins_anew_at_a_restart_the_owners_does_not(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        patient = await buyer.submit("patient", tokens=2)
        hasty = await buyer.submit("hasty", tokens=2, deadline=60.0)
        await buyer.stop()
        async with open_jobs(buyer.paths.jobs) as jobs:
            await jobs.transaction(lambda db: db.execute("UPDATE job SET created = created - 3600"))
        await mesh.start(buyer)
        seller = await mesh.add("seller")
        await until(lambda: buyer.events("job_ended"))
        assert (await buyer.desk.jobs.get(hasty.pursuit.row.id)).code == "DEADLINE"
        resumed = await resumed_job(buyer)
        assert resumed.pursuit.row.id == patient.pursuit.row.id
        await mesh.link(buyer, seller)
        await resumed.ended.wait()
        assert result_of(resumed) == expected("patient", 2)


async def test_a_seller_that_says_where_it_is_now_is_found_there_while_we_still_dial(
    tmp_path, monkeypatch
):
    """Behind NAT: its first offer names addresses that nobody reaches, the next one its relay."""
    monkeypatch.setattr(market, "CONNECT_SECONDS", 0.3)
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller", offer_seconds=60.0)
        buyer = await mesh.add("buyer", serve=False)
        links, dead = buyer.desk.links, f"/memory/behind/p2p/{seller.peer}"
        monkeypatch.setattr(buyer.desk.villagers, "_needs_neighbours", lambda: False)
        await mesh.knows(buyer, seller)  # who the other is, and what it may owe
        await links.drop(seller.peer, "a test")
        connect, dialled = links.connect, []

        async def dial(address):
            dialled.append(address)
            if address == dead:
                says(seller.address)
                await trio.sleep_forever()
            return await connect(address)

        def says(address):
            offer = seller.desk.discovery.make_offer(
                seller.desk.seller.operations(), (address,), 8, 60.0
            )
            signer, news = unseal(offer, "offer", messages.Offer)
            assert buyer.desk.discovery.accept(signer, news, offer)

        monkeypatch.setattr(links, "connect", dial)
        says(dead)
        running = await buyer.ask("hello", tokens=3, peer=seller.peer)
        assert result_of(running) == expected("hello", 3)
        assert dialled == [dead, seller.address]
