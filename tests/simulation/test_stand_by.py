"""A job that asked for a stand-by: somebody else has the model loaded, for nothing, and goes on."""

from __future__ import annotations

import pytest
import trio

from aivillage.protocols.codec import pack
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.messages import Call, Progress, Submit
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected
from tests.simulation.test_market_failures import buyer_has


async def village(mesh, *sellers):
    buyer = await mesh.add("buyer", serve=False)
    found = [await mesh.add(name) for name in sellers]
    await mesh.knows(buyer, *found)
    for rank, seller in enumerate(found):
        buyer.has_measured(seller.peer, 1000.0 / (1 + rank))
    return buyer, *found


async def paused_with_stand_by(buyer, seller, notes):
    """The job, its answer stopped at five tokens."""
    seller.script.pause_at = 5
    running = await buyer.submit(PROMPT, tokens=12, stand_by=True, mesh=True, say=notes.append)
    with trio.fail_after(10):
        await seller.script.paused.wait()
    await until(lambda: buyer_has(buyer, 5))
    return running


def said(notes):
    return [note.note for note in notes if isinstance(note, Progress)]


async def test_a_stand_by_loads_for_nothing_and_goes_on(tmp_path):
    notes = []
    async with open_mesh(tmp_path) as mesh:
        buyer, first, second, third = await village(mesh, "first", "second", "third")
        running = await paused_with_stand_by(buyer, first, notes)
        await until(lambda: buyer.events("stand_by_ready"))
        (ready,) = buyer.events("stand_by_ready")
        waiting = next(node for node in (second, third) if node.peer == ready["peer"])
        assert any("stands by" in note for note in said(notes))
        await until(lambda: not waiting.script.open_sessions)
        assert (waiting.script.made, buyer.ledger.owed_to(waiting.peer)) == (0, 0)
        # The other one would be chosen now: the model is loaded where it was asked to be.
        other = next(node for node in (second, third) if node is not waiting)
        buyer.has_measured(other.peer, 1e6)
        await first.stop()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer, waiting.peer)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        await settled(buyer, waiting, price_of(PROMPT, 12) - 5 * 269 - price_of(PROMPT, 0))


async def test_who_refuses_to_stand_by_is_passed_over(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, first, second, third = await village(mesh, "first", "second", "third")
        second.script.load_failure = RefusedError("no memory", code="OWNER_LIMIT")
        buyer.has_measured(second.peer, 900.0)
        buyer.has_measured(third.peer, 1.0)
        running = await paused_with_stand_by(buyer, first, [])
        await until(lambda: buyer.events("stand_by_ready"))
        assert {e["peer"] for e in buyer.events("stand_by_ready")} == {third.peer}
        first.script.go.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer,)


async def test_where_nobody_can_stand_by_the_answer_is_none_the_worse(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, first = await village(mesh, "first")
        running = await paused_with_stand_by(buyer, first, [])
        await until(lambda: buyer.events("stand_by_missing"))
        first.script.go.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)


async def test_a_stand_by_that_is_lost_first_is_replaced_by_the_market(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, first, second, third = await village(mesh, "first", "second", "third")
        running = await paused_with_stand_by(buyer, first, [])
        await until(lambda: buyer.events("stand_by_ready"))
        (ready,) = buyer.events("stand_by_ready")
        waiting = next(node for node in (second, third) if node.peer == ready["peer"])
        other = next(node for node in (second, third) if node is not waiting)
        await waiting.stop()
        await first.stop()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        assert running.pursuit.receipt().sellers == (first.peer, other.peer)


async def test_nobody_is_sought_once_the_job_has_ended(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, first, second = await village(mesh, "first", "second")
        # The stand-by says nothing at all: it would be waited for.
        second.tamper = lambda frame: () if type(frame).__name__ != "QuoteReply" else (frame,)
        running = await paused_with_stand_by(buyer, first, [])
        first.script.go.set()
        await running.ended.wait()
        calls = [frame for frame in second.heard if isinstance(frame, Call)]
        await until(lambda: not second.desk.seller.running())
        assert len(calls) <= 1
        assert not buyer.events("stand_by_ready")


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
