"""A job that asked for a stand-by: somebody else has the model loaded, for nothing, and goes on."""

from __future__ import annotations

import functools

import msgspec
import pytest

from aivillage.protocols.codec import pack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import Call, Progress, Submit
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected
from tests.simulation.test_market_failures import buyer_has


async def village(mesh, count):
    buyer = await mesh.add("buyer", serve=False)
    sellers = [await mesh.add(f"seller{number}") for number in range(count)]
    await mesh.knows(buyer, *sellers)
    return buyer, sellers


async def paused_with_stand_by(buyer, sellers, notes):
    """The job, its answer stopped at five tokens, at work the first of what comes back."""
    for seller in sellers:
        seller.script.pause_at = 5
    running = await buyer.submit(PROMPT, tokens=12, stand_by=True, mesh=True, say=notes.append)
    await until(lambda: any(seller.script.paused.is_set() for seller in sellers))
    at_work = next(seller for seller in sellers if seller.script.paused.is_set())
    for seller in sellers:
        if seller is not at_work:
            seller.script.pause_at = None
    await until(lambda: buyer_has(buyer, 5))
    return running, at_work, *(seller for seller in sellers if seller is not at_work)


async def ready_of(buyer, nodes):
    """Who stands by, and who does not."""
    await until(lambda: buyer.events("stand_by_ready"))
    (ready,) = buyer.events("stand_by_ready")
    return sorted(nodes, key=lambda node: node.peer != ready["peer"])


def said(notes):
    return [note.note for note in notes if isinstance(note, Progress)]


async def test_a_stand_by_loads_for_nothing_and_goes_on(tmp_path):
    notes = []
    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, 3)
        running, first, *others = await paused_with_stand_by(buyer, sellers, notes)
        waiting, other = await ready_of(buyer, others)
        assert any("stands by" in note for note in said(notes))
        await until(lambda: not waiting.script.open_sessions)
        assert (waiting.script.made, buyer.ledger.owed_to(waiting.peer)) == (0, 0)
        # The other one would be chosen now: the model is loaded where it was asked to be.
        buyer.has_measured(other.peer, 1e6)
        await first.stop()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer, waiting.peer)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        await settled(buyer, waiting, price_of(PROMPT, 12) - 5 * 269 - price_of(PROMPT, 0))


async def test_who_refuses_to_stand_by_is_passed_over(tmp_path):
    spoiled = []

    def spoils_one(frame):
        if not spoiled and isinstance(frame, Call) and not frame.ceiling_micro_credits:
            spoiled.append(frame)
            return (msgspec.structs.replace(frame, quote_hash=bytes(32)),)  # that nobody gave
        return (frame,)

    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, 3)
        buyer.tamper = spoils_one
        running, first, *others = await paused_with_stand_by(buyer, sellers, [])
        waiting, other = await ready_of(buyer, others)
        (refused,) = buyer.events("stand_by_refused")
        assert (refused["peer"], len(spoiled)) == (other.peer, 1)
        assert not other.script.made + waiting.script.made
        first.script.go.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer,)


async def test_where_nobody_can_stand_by_the_answer_is_none_the_worse(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, 1)
        running, first = await paused_with_stand_by(buyer, sellers, [])
        await until(lambda: buyer.events("stand_by_missing"))
        first.script.go.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)


async def test_a_stand_by_that_is_lost_first_is_replaced_by_the_market(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, 3)
        running, first, *others = await paused_with_stand_by(buyer, sellers, [])
        waiting, other = await ready_of(buyer, others)
        await waiting.stop()
        await first.stop()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer, other.peer)


async def test_nobody_is_sought_once_the_job_has_ended(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, sellers = await village(mesh, 2)
        for seller in sellers:  # whoever stands by never says that it is ready
            seller.tamper = functools.partial(mute_to_stand_by, seller)
        running, first, second = await paused_with_stand_by(buyer, sellers, [])
        await until(lambda: calls_at(second))
        first.script.go.set()
        await running.ended.wait()
        await until(lambda: not second.desk.seller.running())
        assert len(calls_at(second)) == 1
        assert not buyer.events("stand_by_ready")


def mute_to_stand_by(node, frame):
    asked = {call.id for call in calls_at(node) if not call.ceiling_micro_credits}
    return () if getattr(frame, "id", 0) in asked else (frame,)


def calls_at(node):
    return [frame for frame in node.heard if isinstance(frame, Call)]


@pytest.mark.parametrize(
    "asked",
    [
        {"local": True},
        {"peer": "x"},
        {"operation": "mesh.noop", "request": pack({"note": "n"})},
    ],
    ids=["here", "one peer", "no model"],
)
async def test_only_an_answer_of_a_model_by_any_peer_has_a_stand_by(tmp_path, asked):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        wanted = {"operation": "inference.generate", "request": pack({"prompt": "p"})} | asked
        with pytest.raises(RequestError, match="standing by"):
            await buyer.desk.buyer.submit(
                Submit(id=1, stand_by=True, **wanted), lambda _frame: None
            )
