"""A split answer in the market: paid stage by stage, and right whatever befalls a stage."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.stages import INPUT_ROWS_MAX, OPERATION, StageRequest
from aivillage.protocols import messages
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import RequestError
from tests.simulation.mesh import open_mesh, result_of, settled, until, without
from tests.simulation.scripted_stages import StageWorkers, expected

LENDS = {"enable": (OPERATION,), "worker_memory_mb": 800}
"""Fifteen layers and an end, and not the model."""
PROMPT = "why is the sky blue, and the evening sky red? " * 2
TOKENS = 24
REQUEST = GenerateRequest(prompt=PROMPT, max_tokens=TOKENS)


@asynccontextmanager
async def lenders(folder, count=3, **settings):
    """A buyer, and peers that lend layers."""
    async with open_mesh(folder) as mesh:
        buyer = await mesh.add("buyer", workers=StageWorkers, serve=False, **settings)
        sellers = [
            await mesh.add(f"seller{n}", workers=StageWorkers, **LENDS) for n in range(count)
        ]
        await mesh.knows(buyer, *sellers, operation=OPERATION)
        yield mesh, buyer, sellers


async def begun(buyer, sellers, at):
    """An answer whose stages work until one of them has had `at` inputs; it stops there."""
    for seller in sellers:
        seller.script.pause_at = at
    running = await buyer.submit(PROMPT, tokens=TOKENS)
    paused = []
    await until(lambda: paused.extend(s for s in sellers if s.script.paused.is_set()) or paused)
    for seller in sellers:
        seller.script.pause_at = None
        if seller is not paused[0]:
            seller.script.go.set()
    return running, paused[0]


async def ended(running):
    with trio.fail_after(20):
        await running.ended.wait()
    return running


async def all_settled(buyer, sellers):
    for seller in sellers:
        owed = buyer.ledger.view(seller.peer).owed_by_me
        await settled(buyer, seller, owed)


def paid(buyer, sellers):
    return [buyer.ledger.view(seller.peer).owed_by_me for seller in sellers]


async def test_a_split_answer_is_the_whole_models_and_each_stage_is_paid_what_it_computed(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST)
        receipt = running.pursuit.receipt()
        assert len(receipt.sellers) == 2
        assert receipt.identical == "guaranteed"
        assert "not for speed" in receipt.why
        assert receipt.price_micro_credits == sum(paid(buyer, sellers)) == running.pursuit.spent
        rows = len(PROMPT) + TOKENS - 1
        assert receipt.price_micro_credits >= 30 * 8 * rows + 57 * TOKENS
        assert sum(amount > 0 for amount in paid(buyer, sellers)) == 2
        await all_settled(buyer, sellers)
        assert not any(seller.script.open_sessions for seller in sellers)


async def outcomes(buyer, running):
    job = await buyer.desk.on_job({"job": running.pursuit.row.id})
    return [attempt["outcome"] for attempt in job["attempts"]]


async def test_a_round_begins_before_the_last_one_is_in_words(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        buyer.script.words_gate = trio.Event()
        running = await buyer.submit(PROMPT, tokens=TOKENS)
        slices = -(-len(PROMPT) // INPUT_ROWS_MAX)
        await until(lambda: sum(s.script.made for s in sellers) > 2 * slices)
        assert not running.pursuit.output.ids
        buyer.script.words_gate.set()
        assert result_of(await ended(running)) == expected(REQUEST)


async def test_no_round_is_computed_that_a_stop_string_or_the_length_makes_needless(tmp_path):
    stop = expected(REQUEST).text[40:48]
    request = msgspec.structs.replace(REQUEST, stop=(stop,))
    async with lenders(tmp_path) as (_mesh, buyer, _sellers):
        for asked, reason in ((request, "stop"), (REQUEST, "length")):
            running = await buyer.ask(request=pack(asked))
            assert result_of(running) == expected(asked)
            assert result_of(running).finish_reason == reason
            assert await outcomes(buyer, running) == ["done", "done"]


async def test_nothing_is_split_where_one_peer_has_the_whole_model(tmp_path):
    async with lenders(tmp_path) as (mesh, buyer, _sellers):
        whole = await mesh.add("whole", workers=StageWorkers)
        await mesh.knows(buyer, whole, operation="inference.generate")
        found = await buyer.desk.buyer.explain(
            messages.Submit(id=1, operation="inference.generate", request=pack(REQUEST))
        )
        assert found.candidates[0].peer == whole.peer


async def test_what_would_be_split_is_explained_and_nothing_bought(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        found = await buyer.desk.buyer.explain(
            messages.Submit(id=1, operation="inference.generate", request=pack(REQUEST))
        )
        assert "tokens/s expected (never measured: guessed)" in found.why
        assert paid(buyer, sellers) == [0, 0, 0]


@pytest.mark.parametrize("at", [0, 2, 9])
async def test_a_lost_stage_is_replaced_and_the_answer_is_the_same(tmp_path, at):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running, lost = await begun(buyer, sellers, at)
        await lost.stop()
        assert result_of(await ended(running)) == expected(REQUEST)
        assert len(running.pursuit.receipt().sellers) == 3
        assert running.pursuit.receipt().identical == "guaranteed"
        await all_settled(buyer, [seller for seller in sellers if seller is not lost])
        (event,) = buyer.events("stage_replaced")
        assert event["peer"] == lost.peer


def standing_by(buyer):
    """Layers -> whoever has them ready."""
    return {event["layers"]: event["peer"] for event in buyer.events("stand_in_ready")}


def loaded(seller):
    return seller.desk.seller._workers.parts.loaded()


async def test_while_an_answer_is_computed_others_load_its_layers_and_are_paid_nothing(tmp_path):
    async with lenders(tmp_path, count=4) as (_mesh, buyer, sellers):
        running, paused = await begun(buyer, sellers, 2)
        await until(lambda: len(standing_by(buyer)) == 2)
        chain = {hop.placed.peer for hop in running.pursuit._hops}
        ready = standing_by(buyer)
        assert len({*ready.values()} | chain) == 4, "one stage each, outside of the chain"
        by_peer = {seller.peer: seller for seller in sellers}
        for layers, peer in ready.items():
            first, last = map(int, layers.split("-"))
            assert loaded(by_peer[peer]) == {(first, last + 1)}
        await paused.stop()
        assert result_of(await ended(running)) == expected(REQUEST)
        (event,) = buyer.events("stage_replaced")
        assert event["was_ready"]
        assert event["by"] in ready.values()
        assert running.pursuit.receipt().identical == "guaranteed"
        idle = by_peer[({*ready.values()} - {event["by"]}).pop()]
        assert buyer.ledger.view(idle.peer).owed_by_me == 0
        await all_settled(buyer, [seller for seller in sellers if seller is not paused])


async def test_one_peer_stands_by_for_two_stages_and_the_next_answer_asks_nobody(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        await until(lambda: len(standing_by(buyer)) == 2)
        (idle,) = [s for s in sellers if buyer.ledger.view(s.peer).owed_by_me == 0]
        assert {*standing_by(buyer).values()} == {idle.peer}
        assert loaded(idle) == {(0, 15), (15, 30)}
        running.pursuit._have_stand_ins()
        await until(lambda: not buyer.desk.buyer._stand_ins._wanted)
        assert len(buyer.events("stand_in_ready")) == 2


async def test_who_computes_other_bits_does_not_stand_by_and_what_it_helps_with_is_not_guaranteed(
    tmp_path,
):
    """Its kernel class is the same, but for what its layers gave when they were tried."""
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running, paused = await begun(buyer, sellers, 0)
        (idle,) = [
            s for s in sellers if s.peer not in {h.placed.peer for h in running.pursuit._hops}
        ]
        await until(lambda: not buyer.desk.buyer._stand_ins._wanted)
        buyer.desk.buyer._stand_ins._ready.clear()
        for client in idle.desk.seller._workers.parts._loaded.values():
            client.info = msgspec.structs.replace(
                client.info, kernel_class=client.info.kernel_class + "-other"
            )
        running.pursuit._have_stand_ins()
        await until(lambda: buyer.events("stand_in_refused"))
        assert "other bits" in buyer.events("stand_in_refused")[0]["reason"]
        await paused.stop()
        await ended(running)
        (event,) = buyer.events("stage_replaced")
        assert (event["by"], event["was_ready"]) == (idle.peer, False)
        assert running.pursuit.receipt().identical == "best effort"


async def test_a_peer_whose_owner_forbids_it_is_not_asked_again_for_a_while(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        mean = await mesh.add("mean", workers=StageWorkers, stage_stand_by=False, **LENDS)
        await mesh.knows(buyer, mean, operation=OPERATION)
        buyer.desk.discovery.record_of(mean.peer).rate(good=False)  # so the others compute
        for _ in range(2):
            assert result_of(await buyer.ask(PROMPT, tokens=TOKENS)) == expected(REQUEST)
            await until(lambda: not buyer.desk.buyer._stand_ins._wanted)
        assert not loaded(mean)
        assert all(loaded(seller) for seller in sellers)
        (refusal,) = buyer.events("stand_in_refused")
        assert refusal["peer"] == mean.peer
        assert "ahead" in refusal["reason"]


async def test_a_stand_in_that_was_restarted_is_asked_again(tmp_path):
    async with lenders(tmp_path) as (mesh, buyer, sellers):
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        await until(lambda: len(standing_by(buyer)) == 2)
        (idle,) = [s for s in sellers if s.peer in standing_by(buyer).values()]
        await idle.stop()
        await mesh.start(idle)
        await mesh.knows(buyer, idle, operation=OPERATION)
        assert not loaded(idle)
        running.pursuit._have_stand_ins()
        await until(lambda: not buyer.desk.buyer._stand_ins._wanted)
        assert loaded(idle) == {(0, 15), (15, 30)}


async def test_a_stage_that_fails_is_replaced_too(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        for seller in sellers[:2]:
            seller.script.die_after = 4
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        if running.error is None:
            assert result_of(running) == expected(REQUEST)
        else:
            assert running.error.code in {"NO_PEER", "JOB_FAILED"}
        await all_settled(buyer, sellers)


async def test_nothing_more_is_waited_for_of_a_stage_that_said_how_it_ended(tmp_path):
    """A stand-in begins two seconds earlier so."""
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running, failing = await begun(buyer, sellers, 4)
        failing.script.die_after = 0
        failing.script.go.set()
        assert result_of(await ended(running)) == expected(REQUEST)
        assert running.pursuit.excluded[failing.peer].code == "JOB_FAILED"
        assert not [frame for frame in failing.heard if isinstance(frame, messages.Cancel)]
        await all_settled(buyer, sellers)


@pytest.mark.parametrize(
    "lie",
    [
        lambda part: {"body": part.body + b"x"},
        lambda part: {"seq": part.seq + 1},
        lambda part: {"hash8": bytes(8)},
    ],
)
async def test_a_stage_that_says_what_cannot_be_is_left_and_the_answer_right(tmp_path, lie):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        liars = []

        def lies_once(seller):
            def tamper(frame):
                if isinstance(frame, messages.Part) and frame.seq == 3 and not liars:
                    liars.append(seller)
                    return (msgspec.structs.replace(frame, **lie(frame)),)
                return (frame,)

            return tamper

        for seller in sellers:
            seller.tamper = lies_once(seller)
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST)
        assert len(running.pursuit.receipt().sellers) == 3
        assert running.pursuit.excluded[liars[0].peer].code == "BAD_REQUEST"


async def test_a_stage_gives_no_more_than_the_exposure_to_who_does_not_pay(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        with without(buyer, messages.Ledger):
            running = await buyer.submit(PROMPT * 4, tokens=200, ceiling=10**6)
            await until(lambda: any(seller.script.made > 3 for seller in sellers))
            await trio.sleep(0.5)
            for seller in sellers:
                exposure = seller.ledger.policy(buyer.peer).exposure
                assert seller.ledger.view(buyer.peer).owed_to_me == 0
                delivered = sum(sale.amount for sale in seller.desk.seller.running())
                assert delivered <= exposure
            buyer.desk.buyer.cancel(running.pursuit.row.id)
            await ended(running)


@pytest.mark.parametrize("ceiling", [10_000, 20_000])
async def test_the_ceiling_holds_over_all_stages_together(tmp_path, ceiling):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running = await buyer.ask(PROMPT, tokens=TOKENS, ceiling=ceiling)
        assert running.error is not None
        assert running.error.code == "PRICE_ABOVE_CEILING"
        assert sum(paid(buyer, sellers)) == 0, "neither stage alone is above it"


async def test_a_cancelled_answer_is_paid_as_far_as_it_came(tmp_path):
    async with lenders(tmp_path) as (_mesh, buyer, sellers):
        running, last = await begun(buyer, sellers, 6)
        buyer.desk.buyer.cancel(running.pursuit.row.id)
        last.script.go.set()
        await ended(running)
        assert running.error is not None
        assert running.error.code == "CANCELLED"
        assert sum(paid(buyer, sellers)) == running.pursuit.spent > 0
        await all_settled(buyer, sellers)
        await until(lambda: not any(seller.script.open_sessions for seller in sellers))


async def test_a_restarted_buyer_begins_anew_and_pays_what_it_had(tmp_path):
    async with lenders(tmp_path) as (mesh, buyer, sellers):
        running, paused = await begun(buyer, sellers, 6)
        job = running.pursuit.row.id
        await buyer.stop()
        paused.script.go.set()
        await mesh.start(buyer)
        await mesh.knows(buyer, *sellers, operation=OPERATION)
        await until(lambda: not buyer.desk.buyer.running(), 20)
        row = await buyer.desk.jobs.get(job)
        assert row is not None
        if row.state == "done":  # else nobody was known yet when it was begun again
            assert msgspec.msgpack.decode(row.result or b"")["token_ids"] == list(
                expected(REQUEST).token_ids
            )
        await all_settled(buyer, sellers)


async def test_a_stage_is_no_job_of_its_own(tmp_path):
    async with lenders(tmp_path, count=1, enable=(OPERATION,)) as (_mesh, buyer, _sellers):
        with pytest.raises(RequestError, match="part of other jobs"):
            await buyer.submit(operation=OPERATION, request=pack(StageRequest(first=0, last=3)))


async def test_too_few_lenders_are_no_peer(tmp_path):
    async with lenders(tmp_path, count=1) as (_mesh, buyer, _sellers):
        found = await buyer.submit(PROMPT, tokens=4, deadline=1.0)
        await ended(found)
        assert found.error is not None
        assert found.error.code in {"NO_PEER", "DEADLINE"}
