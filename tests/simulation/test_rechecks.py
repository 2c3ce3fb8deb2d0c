"""A node that serves reads others' answers in one pass instead of doing them again."""

from __future__ import annotations

import msgspec
import pytest

from aivillage.models.inference.fingerprint import Fingerprint, packed, read
from aivillage.models.inference.generate import Piece
from aivillage.node.verifier import Trust
from aivillage.protocols.codec import unpack
from aivillage.protocols.messages import Call, Step
from tests.simulation.cheats import CHEATS
from tests.simulation.mesh import price_of, result_of
from tests.simulation.test_market import PROMPT, expected
from tests.simulation.test_verification import bought, of, submitted, village

NAME = "torch1/2.13/w/float32/cpu/{}/threads1/rows/0"


def looks(buyer):
    buyer.script.rechecks = True


async def test_an_answer_is_read_once_and_not_done_again(tmp_path):
    async with village(tmp_path, "one", serve=True) as (_, buyer, one):
        looks(buyer)
        await bought(buyer, one, tokens=40)
        assert of(buyer, one.peer) == Trust(count=1, done=1, checked=1)
        assert (buyer.script.rechecked, buyer.script.made, one.script.made) == (1, 0, 40)
        check, job = (await buyer.desk.jobs.latest(2))[:2]
        assert (check.is_check, check.state, check.ceiling) == (True, "done", 0)
        bodies = await buyer.desk.jobs.delivered(job.id)
        marks = [unpack(Piece, body).fingerprint for body in bodies]
        assert [read(mark).end for mark in marks if mark] == [32, 40]


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
async def test_a_lie_is_found_and_its_teller_cut_off(tmp_path, cheat):
    async with village(tmp_path, "liar", serve=True) as (_, buyer, liar):
        looks(buyer)
        liar.script.cheat = cheat
        await bought(buyer, liar)
        assert of(buyer, liar.peer) == Trust(count=0, done=1, checked=1, failed=1)
        (kept,) = await buyer.desk.replicator.reputation.evidence(liar.peer)
        assert "than said" in kept.reason or "is not what this node computed" in kept.reason
        assert kept.answers[0].fingerprints
        assert buyer.desk.replicator.reputation.checks_spent == 0


@pytest.mark.parametrize("kernel", ["scripted/1", NAME.format("AVX2")])
async def test_another_precision_with_the_same_tokens_is_found(tmp_path, kernel):
    async with village(tmp_path, "liar", serve=True) as (_, buyer, liar):
        looks(buyer)
        is_near = kernel != "scripted/1"
        buyer.script.kernel_class = NAME.format("AVX512") if is_near else kernel
        liar.script.kernel_class = kernel
        await bought(buyer, liar)
        assert of(buyer, liar.peer, kernel).count == 1
        liar.script.blur = 1e-3
        running = await bought(buyer, liar)
        assert result_of(running) == expected(PROMPT, 6)
        assert of(buyer, liar.peer, kernel).failed == 1


async def test_in_another_class_without_fingerprints_nobody_is_judged(tmp_path):
    """An older peer: its steps have no such field."""
    async with village(tmp_path, "old", serve=True) as (_, buyer, old):
        looks(buyer)
        buyer.script.kernel_class = NAME.format("AVX512")
        old.script.kernel_class = NAME.format("AVX2")
        old.script.mark = lambda _mark: b""
        await bought(buyer, old)
        assert of(buyer, old.peer, old.script.kernel_class) == Trust(done=1)
        assert buyer.script.rechecked == 0


async def test_a_buyer_that_does_not_ask_gets_none_and_the_hash_agrees(tmp_path):
    """An older buyer: its call has no such field."""
    async with village(tmp_path, "one") as (_, buyer, one):
        seen = []

        def older(frame):
            return (
                (msgspec.structs.replace(frame, fingerprints=False),)
                if isinstance(frame, Call)
                else (frame,)
            )

        buyer.tamper = older
        one.tamper = lambda frame: seen.append(frame) or (frame,)
        running = await bought(buyer, one)
        assert result_of(running) == expected(PROMPT, 6)
        items = [item for frame in seen if isinstance(frame, Step) for item in frame.items]
        assert items
        assert not any(item.fingerprint for item in items)


async def test_a_fingerprint_of_the_wrong_span_ends_the_attempt(tmp_path):
    async with village(tmp_path, "liar", "two") as (_, buyer, liar, _two):
        buyer.has_measured(liar.peer, 9_000.0)

        def moved(mark):
            whole = read(mark)
            return packed(Fingerprint(whole.first + 1, whole.values[1:]))

        liar.script.mark = moved
        running = await bought(buyer)
        assert result_of(running) == expected(PROMPT, 6)
        (lost, kept) = await buyer.desk.jobs.attempts(running.pursuit.row.id)
        assert (lost.seller, lost.outcome, kept.outcome) == (liar.peer, "BAD_REQUEST", "done")
        assert kept.seller != liar.peer


async def test_each_seller_of_an_answer_in_two_parts_vouches_for_its_own(tmp_path):
    async with village(tmp_path, "liar", "two", serve=True) as (_, buyer, liar, two):
        looks(buyer)
        buyer.has_measured(liar.peer, 9_000.0)
        liar.script.key, liar.script.die_after = "another model", 3
        running = await submitted(buyer, verify=True)
        assert result_of(running) == expected(PROMPT, 6)
        assert of(buyer, liar.peer).failed == 1
        assert of(buyer, two.peer).failed == 0


async def test_with_verify_the_receipt_says_who_looked(tmp_path):
    async with village(tmp_path, "one", serve=True) as (_, buyer, one):
        looks(buyer)
        running = await submitted(buyer, verify=True)
        receipt = running.pursuit.receipt()
        assert receipt.checked == "rechecked at this node"
        assert receipt.price_micro_credits == price_of(PROMPT, 6)
        assert of(buyer, one.peer).count == 1


async def test_an_engine_of_ours_that_fails_is_held_against_nobody(tmp_path):
    async with village(tmp_path, "one", serve=True) as (_, buyer, one):
        looks(buyer)
        buyer.script.die_after = 2
        running = await submitted(buyer, verify=True)
        assert running.pursuit.receipt().checked == "not checked: the engine died"
        assert of(buyer, one.peer).checked == 0
