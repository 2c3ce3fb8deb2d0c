"""Stages that hand their states to the next one: fewer ways, and never another answer.

Whatever a neighbour does or fails to do, the buyer goes on with what it was shown itself.
"""

from __future__ import annotations

import msgspec
import pytest
import trio

from aivillage.models.inference.stages import OPERATION, StageInput
from aivillage.node.stage_call import QUIET_SECONDS
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.passing import TICKET_BYTES
from tests.simulation.mesh import result_of, until
from tests.simulation.scripted_stages import StageWorkers, expected
from tests.simulation.test_split_market import (
    LENDS,
    PROMPT,
    REQUEST,
    TOKENS,
    all_settled,
    begun,
    ended,
    lenders,
    outcomes,
)

SLICES = -(-len(PROMPT) // 32)


def handed_on(buyer):
    """How many inputs of its last split answer one stage handed to the next."""
    return buyer.events("split_ended")[-1]["handed_on"]


def said(node, kind):
    """What a node heard of that kind."""
    return [frame for frame in node.heard if isinstance(frame, kind)]


async def linked(mesh, sellers):
    """Each of them has a link with each other one, as in any small village."""
    for at, one in enumerate(sellers):
        for other in sellers[at + 1 :]:
            await mesh.link(one, other)


def rewrites(seller, change, *, first=0):
    """Makes a seller hand over something else than it shows its buyer, from number `first` on."""

    def tamper(frame):
        if isinstance(frame, messages.Passed) and frame.seq >= first:
            return change(frame)
        return (frame,)

    seller.tamper = tamper


async def test_states_go_to_the_next_stage_and_all_are_paid_as_ever(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST)
        (passed_to,) = [seller for seller in sellers if said(seller, messages.Passed)]
        rounds = len(said(passed_to, messages.Passed))
        assert handed_on(buyer) == rounds >= SLICES + 3
        assert [frame.end for frame in said(passed_to, messages.Input)] == [True], "nobody else fed"
        assert await outcomes(buyer, running) == ["done", "done"]
        await all_settled(buyer, sellers)


async def test_an_owner_can_deal_with_each_stage_alone(tmp_path):
    async with lenders(tmp_path, count=2, stage_pass_on=False) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        assert result_of(await buyer.ask(PROMPT, tokens=TOKENS)) == expected(REQUEST)
        assert handed_on(buyer) == 0
        calls = [frame for seller in sellers for frame in said(seller, messages.Call)]
        assert {(c.passing.to, c.passing.by, c.passing.fed_by) for c in calls} == {("", b"", b"")}


@pytest.mark.parametrize("who", ["first", "second"])
async def test_a_stage_of_an_earlier_version_is_fed_by_the_buyer(tmp_path, who):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        await buyer.ask(PROMPT, tokens=TOKENS)
        (second,) = [seller for seller in sellers if said(seller, messages.Passed)]
        (first,) = [seller for seller in sellers if seller is not second]
        old = first if who == "first" else second
        for node in (buyer, first, second):
            if (link := node.desk.links.get(old.peer)) is not None:
                link.hello = msgspec.structs.replace(link.hello, minor=3)
        before = len(said(second, messages.Passed))
        assert result_of(await buyer.ask(PROMPT, tokens=TOKENS)) == expected(REQUEST)
        assert handed_on(buyer) == 0
        assert len(said(second, messages.Passed)) == before
        last = said(old, messages.Call)[-1]
        assert last.passing == messages.Passing(), "an older one is asked for nothing new"


def other_states(frame):
    fed = unpack(StageInput, frame.body)
    wrong = msgspec.structs.replace(fed, states=bytes(len(fed.states)))
    return (msgspec.structs.replace(frame, body=pack(wrong)),)


def other_position(frame):
    fed = unpack(StageInput, frame.body)
    back = msgspec.structs.replace(fed, position=fed.position - 1)
    return (msgspec.structs.replace(frame, body=pack(back)),)


@pytest.mark.parametrize("change", [other_states, other_position])
async def test_a_stage_that_hands_over_other_states_than_it_shows_changes_nothing(tmp_path, change):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        for seller in sellers:
            rewrites(seller, change, first=SLICES + 4)
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST), "two lenders are enough for it"
        assert 0 < handed_on(buyer) < SLICES + TOKENS
        assert sorted(await outcomes(buyer, running)) == ["CANCELLED", "done", "done"]
        assert not running.pursuit.excluded, "nobody knows whose fault it was"
        failures = [buyer.desk.discovery.record_of(seller.peer).failures for seller in sellers]
        assert failures == [0, 0]
        await all_settled(buyer, sellers)


async def test_what_a_stage_says_it_handed_over_and_did_not_is_fed_by_the_buyer(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        for seller in sellers:
            rewrites(seller, lambda _frame: (), first=SLICES + 4)
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST)
        assert await outcomes(buyer, running) == ["done", "done"]
        assert handed_on(buyer) < SLICES + TOKENS, "from then on the buyer fed it alone"
        alone = [frame for seller in sellers for frame in said(seller, messages.Input)]
        assert any(frame.alone for frame in alone)
        await all_settled(buyer, sellers)


async def test_a_slow_stage_is_no_reason_to_hand_nothing_on(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        running, paused = await begun(buyer, sellers, SLICES + 4)
        await trio.sleep(QUIET_SECONDS + 0.3)
        paused.script.go.set()
        assert result_of(await ended(running)) == expected(REQUEST)
        last = buyer.events("split_ended")[-1]
        assert last["handed_on"] == last["inputs"]
        assert not any(frame.alone for s in sellers for frame in said(s, messages.Input))


async def test_a_lost_link_between_two_stages_is_no_loss_of_a_stage(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        running, paused = await begun(buyer, sellers, SLICES + 4)
        one, other = sellers
        one.desk.links.get(other.peer).close("a cable was cut")
        paused.script.go.set()
        assert result_of(await ended(running)) == expected(REQUEST)
        assert await outcomes(buyer, running) == ["done", "done"]
        assert 0 < handed_on(buyer) < SLICES + TOKENS


@pytest.mark.parametrize("at", [1, SLICES + 2, SLICES + 9])
async def test_a_lost_stage_is_replaced_while_states_are_handed_on(tmp_path, at):
    async with lenders(tmp_path, count=3) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        running, lost = await begun(buyer, sellers, at)
        await lost.stop()
        assert result_of(await ended(running)) == expected(REQUEST)
        assert running.pursuit.receipt().identical == "guaranteed"
        await all_settled(buyer, [seller for seller in sellers if seller is not lost])
        (event,) = buyer.events("stage_replaced")
        assert event["peer"] == lost.peer


async def test_five_stages_hand_on_from_one_to_the_next(tmp_path):
    async with lenders(tmp_path, count=0) as (mesh, buyer, sellers):
        for n in range(5):
            small = LENDS | {"worker_memory_mb": 640}
            sellers.append(await mesh.add(f"small{n}", workers=StageWorkers, **small))
        await mesh.knows(buyer, *sellers, operation=OPERATION)
        await linked(mesh, sellers)
        running = await buyer.ask(PROMPT, tokens=TOKENS)
        assert result_of(running) == expected(REQUEST)
        stages = buyer.events("split_ended")[-1]["stages"]
        assert stages >= 3
        rounds = {len(said(seller, messages.Passed)) for seller in sellers} - {0}
        assert len(rounds) == 1
        assert handed_on(buyer) == rounds.pop() * (stages - 1)
        assert await outcomes(buyer, running) == ["done"] * stages


async def test_a_ticket_that_nobody_knows_feeds_nothing(tmp_path):
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        stranger = await mesh.add("stranger", workers=StageWorkers)
        for seller in sellers:
            await mesh.link(stranger, seller)
        running, paused = await begun(buyer, sellers, SLICES + 4)
        for seller in sellers:
            link = stranger.desk.links.get(seller.peer)
            for seq in range(SLICES + 8):
                link.send(messages.Passed(ticket=bytes(TICKET_BYTES), seq=seq, body=b"junk"))
                link.send(messages.Passed(ticket=b"", seq=seq, body=b"junk"))
        await until(lambda: all(len(said(s, messages.Passed)) > SLICES for s in sellers))
        paused.script.go.set()
        assert result_of(await ended(running)) == expected(REQUEST)
        assert await outcomes(buyer, running) == ["done", "done"]
        assert all(stranger.desk.links.get(seller.peer) for seller in sellers)


async def test_a_long_prompt_is_fed_by_the_buyer_and_its_answer_handed_on(tmp_path):
    prompt = PROMPT * 6
    request = msgspec.structs.replace(REQUEST, prompt=prompt)
    slices = -(-len(prompt) // 32)
    assert slices > 16
    async with lenders(tmp_path, count=2) as (mesh, buyer, sellers):
        await linked(mesh, sellers)
        running = await buyer.ask(prompt, tokens=TOKENS, ceiling=10**6)
        assert result_of(running) == expected(request)
        inputs = [f for s in sellers for f in said(s, messages.Input) if f.body and not f.hops]
        assert len(inputs) == 2 * slices
        assert handed_on(buyer) > 3
