"""Calls that find no slot: who waits, how long, whose turn it is, and who gives up its place."""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.models.inference.generate import GenerateRequest, Piece
from aivillage.node.identity import peer_of
from aivillage.node.pricelist import quote_hash
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.messages import Accepted, Call, Cancel, Failure, Progress, Started
from tests.conftest import make_key
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_limits import GENERATE, NOOP
from tests.simulation.test_market import PROMPT, expected, pair
from tests.simulation.test_people import ask, quote_from

ASKED = {"operation": "inference.generate", "request": GENERATE}


@asynccontextmanager
async def village(folder, buyers, **seller_settings):
    """One seller whose first session pauses, and so many buyers that know it."""
    async with open_mesh(folder) as mesh:
        seller = await mesh.add("seller", **seller_settings)
        seller.script.pause_at = 1
        nodes = [await mesh.add(f"buyer{n}", serve=False) for n in range(buyers)]
        for node in nodes:
            await mesh.knows(node, seller)
        yield mesh, seller, *nodes


async def paused(seller, buyer, tokens=4):
    """A job that has a slot and goes on when the script says so."""
    running = await buyer.submit(PROMPT, tokens=tokens)
    with trio.fail_after(5):
        await seller.script.paused.wait()
    return running


async def called(buyer, seller, quote, **more):
    """The first word on a call that nobody ends: its inbox stays open."""
    link = buyer.desk.links.get(seller.peer)
    call = Call(
        id=link.next_id(), attempt=secrets.token_bytes(16), quote_hash=quote_hash(quote.quote),
        ceiling_micro_credits=10_000, deadline_seconds=5.0, **more,
    )  # fmt: skip
    inbox = link.open_inbox(call.id)
    buyer.inboxes = [*getattr(buyer, "inboxes", []), inbox]
    link.send(call)
    with trio.fail_after(5):
        return await inbox.receive()


async def refused_later(buyer, number):
    """The typed end of the call that `called` made as number so much."""
    with trio.fail_after(5):
        while not isinstance(frame := await buyer.inboxes[number].receive(), Failure):
            continue
        return frame


def queue_of(seller):
    return seller.desk.seller.places.queue


async def test_a_call_that_finds_no_slot_waits_for_it_and_is_served(tmp_path):
    async with pair(tmp_path, slots=1) as (_, buyer, seller):
        seller.script.pause_at = 2
        first = await buyer.submit("first", tokens=4)
        await seller.script.paused.wait()
        said = []
        second = await buyer.submit("second", tokens=4, say=said.append)
        await until(lambda: queue_of(seller).waiting == 1)
        status = await ask(seller, "status")
        assert (status["sales_running"], status["sales_waiting"], status["slots_free"]) == (1, 1, 0)
        await until(lambda: any(isinstance(f, Progress) and "for a slot" in f.note for f in said))
        seller.script.go.set()
        await first.ended.wait()
        await second.ended.wait()
        assert result_of(second) == expected("second", 4)
        assert second.pursuit.receipt().attempts == 1
        assert not buyer.events("attempt_failed")
        await settled(buyer, seller, price_of("first", 4) + price_of("second", 4))


async def test_whoever_has_few_jobs_does_not_wait_behind_all_of_one_that_has_many(tmp_path):
    async with village(tmp_path, 2, slots=1) as (_, seller, heavy, light):
        jobs = [("heavy", await paused(seller, heavy))]
        jobs += [("heavy", await heavy.submit(PROMPT, tokens=4)) for _ in range(9)]
        await until(lambda: queue_of(seller).waiting == 9)
        jobs += [("light", await light.submit(PROMPT, tokens=4)) for _ in range(3)]
        await until(lambda: queue_of(seller).waiting == 12)
        order = []

        async def note(name, job):
            await job.ended.wait()
            assert job.error is None
            order.append(name)

        async with trio.open_nursery() as nursery:
            for name, job in jobs:
                nursery.start_soon(note, name, job)
            seller.script.go.set()
        assert max(at for at, name in enumerate(order) if name == "light") <= 6, order


async def test_what_goes_on_with_delivered_work_goes_before_new_work(tmp_path):
    async with village(tmp_path, 3, slots=1) as (_, seller, one, two, three):
        first = await paused(seller, one)
        newcomer = await two.submit(PROMPT, tokens=4)
        await until(lambda: queue_of(seller).waiting == 1)
        quote = await quote_from(three, seller, **ASKED)
        had = pack(Piece((5,), "x", 26))
        answer = await called(three, seller, quote, **ASKED, delivered=(had,))
        assert isinstance(answer, Accepted)
        begun = []
        places = seller.desk.seller.places
        enter = places.queue.begin

        def begin(now):
            ask = enter(now)
            begun.extend([] if ask is None else [ask.goes_on])
            return ask

        places.queue.begin = begin
        seller.script.go.set()
        await first.ended.wait()
        await newcomer.ended.wait()
        assert begun[:2] == [True, False]


@pytest.mark.parametrize("how", ["cancels", "is gone"])
async def test_a_waiting_buyer_that_leaves_frees_its_place(tmp_path, how):
    async with village(tmp_path, 2, slots=1) as (_, seller, one, two):
        first = await paused(seller, one)
        waits = await two.submit(PROMPT, tokens=4)
        await until(lambda: queue_of(seller).waiting == 1)
        if how == "cancels":
            two.desk.buyer.cancel(waits.pursuit.row.id)
            await waits.ended.wait()
        else:
            await two.stop()
        await until(lambda: queue_of(seller).waiting == 0)
        assert len(seller.desk.seller.taken()) == 1
        seller.script.go.set()
        await first.ended.wait()
        await until(lambda: queue_of(seller).running == 0)
        assert not seller.desk.seller.places._tickets


async def test_one_cancelled_in_the_moment_of_its_turn_leaves_its_slot(tmp_path):
    async with village(tmp_path, 2, slots=1) as (_, seller, one, two):
        first = await paused(seller, one)
        quote = await quote_from(two, seller, **ASKED)
        await called(two, seller, quote, **ASKED)
        sale = next(s for s in seller.desk.seller.taken() if not s.ticket.begun)
        call = sale.ticket.call

        def at_once(*refusal):
            call(*refusal)
            sale.scope.cancel()

        sale.ticket.call = at_once
        seller.script.go.set()
        await first.ended.wait()
        assert (await refused_later(two, 0)).code == "CANCELLED"
        await until(lambda: not seller.desk.seller.taken())
        assert (queue_of(seller).running, queue_of(seller).waiting) == (0, 0)


async def test_one_peers_calls_wait_up_to_the_limit_and_one_more_is_refused(tmp_path):
    settings = {"slots": 1, "queue_calls": 8, "queue_calls_per_peer": 2}
    async with village(tmp_path, 1, **settings) as (_, seller, buyer):
        first = await paused(seller, buyer)
        quote = await quote_from(buyer, seller, **ASKED)
        for _ in range(2):
            assert isinstance(await called(buyer, seller, quote, **ASKED), Accepted)
        refused = await called(buyer, seller, quote, **ASKED)
        assert (refused.code, "yours" in refused.message) == ("BUSY", True)
        assert refused.retry_after_seconds > 0
        seller.script.go.set()
        await first.ended.wait()


async def test_a_full_queue_refuses_and_makes_room_for_who_has_less_here(tmp_path):
    settings = {"slots": 1, "queue_calls": 3, "queue_calls_per_peer": 3}
    async with village(tmp_path, 2, **settings) as (_, seller, greedy, modest):
        first = await paused(seller, greedy)
        quote = await quote_from(greedy, seller, **ASKED)
        for _ in range(3):
            assert isinstance(await called(greedy, seller, quote, **ASKED), Accepted)
        assert queue_of(seller).waiting == 3
        theirs = await quote_from(modest, seller, **ASKED)
        assert isinstance(await called(modest, seller, theirs, **ASKED), Accepted)
        failure = await refused_later(greedy, 2)
        assert (failure.code, "less here" in failure.message) == ("BUSY", True)
        assert queue_of(seller).waiting == 3
        refused = await called(modest, seller, theirs, **ASKED)  # both have as many now
        assert (refused.code, "all slots" in refused.message) == ("BUSY", True)
        seller.script.go.set()
        await first.ended.wait()


async def test_whose_turn_would_come_after_its_deadline_hears_it_at_once(tmp_path):
    async with village(tmp_path, 1, slots=1) as (_, seller, buyer):
        queue_of(seller)._pace["model:SmolLM2-135M-Instruct"] = 0.01
        first = await paused(seller, buyer, tokens=300)
        quote = await quote_from(buyer, seller, **ASKED)
        assert quote.wait_seconds > 500
        assert (quote.queue_length, quote.slots) == (1, 1)
        refused = await called(buyer, seller, quote, **ASKED)
        assert (refused.code, "would come in" in refused.message) == ("BUSY", True)
        assert refused.retry_after_seconds == pytest.approx(quote.wait_seconds - 5, rel=0.05)
        assert queue_of(seller).waiting == 0
        buyer.desk.buyer.cancel(first.pursuit.row.id)
        await first.ended.wait()


async def test_nobody_waits_longer_than_the_owner_says(tmp_path):
    async with village(tmp_path, 1, slots=1, queue_seconds=0.3) as (_, seller, buyer):
        queue_of(seller)._pace["model:SmolLM2-135M-Instruct"] = 1e-9
        first = await paused(seller, buyer)
        quote = await quote_from(buyer, seller, **ASKED)
        assert isinstance(await called(buyer, seller, quote, **ASKED), Accepted)
        failure = await refused_later(buyer, 0)
        assert (failure.code, "no turn came" in failure.message) == ("BUSY", True)
        assert queue_of(seller).waiting == 0
        seller.script.go.set()
        await first.ended.wait()


async def test_a_pause_sends_home_those_who_wait(tmp_path):
    async with village(tmp_path, 2, slots=1) as (_, seller, one, two):
        await paused(seller, one)
        quote = await quote_from(two, seller, **ASKED)
        assert isinstance(await called(two, seller, quote, **ASKED), Accepted)
        await ask(seller, "pause")
        assert (await refused_later(two, 0)).code == "OWNER_LIMIT"
        await until(lambda: not seller.desk.seller.taken())
        assert (queue_of(seller).running, queue_of(seller).waiting) == (0, 0)


async def test_a_modules_time_begins_with_its_turn(tmp_path):
    """A speed that is measured from the call would count the queue as slowness."""
    async with village(tmp_path, 2, slots=1) as (_, seller, one, two):
        first, said = await paused(seller, one), []
        seller.tamper = lambda frame: (said.append(frame), (frame,))[1]
        waits = await two.submit(operation="mesh.noop", request=NOOP)
        await until(lambda: queue_of(seller).waiting == 1)
        assert not any(isinstance(frame, Started) for frame in said)
        seller.script.go.set()
        await first.ended.wait()
        await waits.ended.wait()
        assert waits.error is None
        assert any(isinstance(frame, Started) for frame in said)


async def test_an_idle_sellers_quote_says_that_nobody_waits(tmp_path):
    async with pair(tmp_path, slots=4) as (_, buyer, seller):
        quote = await quote_from(buyer, seller, **ASKED)
        assert (quote.queue_length, quote.wait_seconds, quote.slots) == (0, 0.0, 4)
        noop = await quote_from(buyer, seller)
        assert noop.slots == 2, "module_workers"


async def test_a_call_that_is_over_before_its_turn_costs_nothing(tmp_path):
    async with village(tmp_path, 2, slots=1) as (_, seller, one, two):
        first = await paused(seller, one)
        quote = await quote_from(two, seller, **ASKED)
        await called(two, seller, quote, **ASKED)
        sale = next(s for s in seller.desk.seller.taken() if not s.ticket.begun)
        two.desk.links.get(seller.peer).send(Cancel(id=sale.call.id))
        assert (await refused_later(two, 0)).code == "CANCELLED"
        seller.script.go.set()
        await first.ended.wait()
        await settled(two, seller, 0)


async def test_a_busy_sellers_word_on_when_to_come_again_is_kept_to(tmp_path, monkeypatch):
    async with village(tmp_path, 1, slots=1, queue_calls=0) as (_, seller, buyer):
        first = await paused(seller, buyer)

        def later(frame):
            if isinstance(frame, Failure) and frame.code == "BUSY":
                frame = messages.Failure(id=frame.id, code="BUSY", retry_after_seconds=9e9)
            return (frame,)

        monkeypatch.setattr("aivillage.node.pursuit.RETRY_SECONDS_MAX", 0.4)
        seller.tamper = later
        second = await buyer.submit(PROMPT, tokens=4)
        await until(lambda: buyer.events("attempt_failed"))
        begun = trio.current_time()
        await until(lambda: len(buyer.events("attempt_failed")) == 2)
        # Not at once, and not after years; `begun` is a little after the first one failed.
        assert trio.current_time() - begun >= 0.2
        seller.script.go.set()
        await first.ended.wait()
        await second.ended.wait()
        assert second.error is None


REQUEST = GenerateRequest(prompt=PROMPT, max_tokens=4)


async def test_the_owners_own_job_goes_before_those_who_wait(tmp_path):
    async with village(tmp_path, 2, slots=8) as (_, seller, one, two):
        places = seller.desk.seller.places
        places.queue._places_of = lambda kind: 1 if kind else 256
        first = await paused(seller, one)
        waits = await two.submit(PROMPT, tokens=4)
        await until(lambda: queue_of(seller).waiting == 1)
        order = []

        async def note(name, event):
            await event.wait()
            order.append(name)

        submit = messages.Submit(
            id=1, operation="inference.generate", request=pack(REQUEST), local=True
        )
        mine = await seller.desk.buyer.submit(submit, lambda _frame: None)
        await until(lambda: len(places._tickets) == 3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note, "theirs", waits.ended)
            nursery.start_soon(note, "mine", mine.ended)
            seller.script.go.set()
        assert mine.error is None
        assert order == ["mine", "theirs"]
        await first.ended.wait()


@pytest.mark.parametrize(
    ("percent", "shared", "first", "weight"),
    [
        (100, False, False, 2),
        (199, False, False, 2),
        (200, False, False, 3),
        (300, False, False, 4),
        (700, False, False, 4),
        (50, False, False, 1),
        (100, True, False, 1),
        (100, True, True, 4),
        (100, False, True, 4),
    ],
)
async def test_a_higher_price_or_the_owners_word_weighs_more_and_never_over_four(
    tmp_path, percent, shared, first, weight
):
    first_peers = (peer_of(make_key(2))[-8:],) if first else ()
    settings = {"slots": 1, "price_percent": percent, "first_peers": first_peers}
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller", **settings)
        buyer = await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        if shared:
            await ask(seller, "share", peers=[buyer.peer])
        seller.script.pause_at = 1
        running = await buyer.submit(PROMPT, tokens=4, ceiling=10_000_000)
        with trio.fail_after(5):
            await seller.script.paused.wait()
        [sale] = seller.desk.seller.running()
        assert sale.ticket.ask.weight == weight
        assert sale.ticket.ask.cost == price_of(PROMPT, 4), "work at default prices"
        seller.script.go.set()
        await running.ended.wait()
        assert running.error is None
