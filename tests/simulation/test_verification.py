"""Results are done again by others: who lies is found, who does not is left alone."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.cli.reputation import explained
from aivillage.models.inference.generate import GenerateRequest
from aivillage.node import replication
from aivillage.node.reputation import KEYS_PER_PEER_MAX, Key
from aivillage.node.reputation_desk import ReputationDesk
from aivillage.node.verifier import TRUSTED_FROM, Trust
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import Accepted, Failure, Finished, Started, Submit
from tests.simulation.cheats import CHEATS, after, of_a_cheaper_model, wrong_text
from tests.simulation.mesh import open_mesh, price_of, result_of, until
from tests.simulation.test_market import PROMPT, expected

OPERATION, KERNEL = "inference.generate", "scripted/1"


def of(buyer, peer, kernel=KERNEL) -> Trust:
    key = Key(peer, OPERATION, GenerateRequest(prompt="x").model, kernel)
    return buyer.desk.replicator.reputation.of(key)


@asynccontextmanager
async def village(folder, *sellers, **settings):
    """A buyer that checks, and sellers that it knows."""
    async with open_mesh(folder) as mesh:
        chosen = {"serve": False, "verify_percent_max": 50} | settings
        buyer = await mesh.add("buyer", **chosen)
        buyer.script.is_check_cheap = True
        nodes = [await mesh.add(name) for name in sellers]
        await mesh.knows(buyer, *nodes)
        yield mesh, buyer, *nodes


async def bought(buyer, seller=None, tokens=6, **options):
    """A job, and what was done about it afterwards."""
    running = await buyer.ask(
        PROMPT, tokens=tokens, peer=seller.peer if seller else None, **options
    )
    with trio.fail_after(10):
        await buyer.desk.replicator.idle.wait()
    return running


async def submitted(buyer, **options):
    body = pack(GenerateRequest(prompt=PROMPT, max_tokens=6))
    submit = Submit(id=1, operation=OPERATION, request=body, **options)
    running = await buyer.desk.buyer.submit(submit, lambda _frame: None)
    with trio.fail_after(10):
        await running.ended.wait()
    return running


async def test_a_newcomers_result_is_done_again_by_another_and_both_are_trusted_more(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        await bought(buyer, one)
        assert (one.script.made, two.script.made) == (6, 6)
        assert of(buyer, one.peer) == Trust(count=1, done=1, checked=1)
        assert of(buyer, two.peer) == Trust(count=1, done=0, checked=1)


async def test_the_answer_is_there_before_it_is_done_again(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        two.script.pause_at = 3
        running = await buyer.ask(PROMPT, tokens=6, peer=one.peer)
        assert result_of(running) == expected(PROMPT, 6)
        with trio.fail_after(5):
            await two.script.paused.wait()  # only now is the other one at it
        assert of(buyer, one.peer).checked == 0
        two.script.go.set()
        await until(lambda: of(buyer, one.peer).checked == 1)


async def test_counts_rise_only_by_results_that_were_done_again(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        for _ in range(TRUSTED_FROM):
            await bought(buyer, one)
        assert of(buyer, one.peer).count == TRUSTED_FROM
        buyer.desk.replicator.draw = lambda: 1 / TRUSTED_FROM  # just not
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(count=10, done=11, checked=10)
        buyer.desk.replicator.draw = lambda: 1 / TRUSTED_FROM - 1e-9
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(count=11, done=12, checked=11)
        assert two.script.made == 11 * 6


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
async def test_a_lie_that_passes_the_cheap_check_is_found_and_cuts_the_liar_off(tmp_path, cheat):
    async with village(tmp_path, "liar", "two", "three") as (_, buyer, liar, two, three):
        await bought(buyer, liar)
        assert of(buyer, liar.peer).count == 1
        liar.script.cheat = cheat
        running = await bought(buyer, liar)
        assert running.error is None  # the answer was there before anybody knew
        assert of(buyer, liar.peer) == Trust(count=0, done=2, checked=2, failed=1)
        for honest in (two, three):
            assert of(buyer, honest.peer).failed == 0
            assert of(buyer, honest.peer).count >= 1
        for _ in range(3):
            assert (await bought(buyer)).pursuit.receipt().sellers != (liar.peer,)
        assert buyer.desk.discovery.record_of(liar.peer).bad == 1


async def test_what_the_liar_and_the_others_said_is_kept_with_their_signed_quotes(tmp_path):
    async with village(tmp_path, "liar", "two", "three") as (_, buyer, liar, two, three):
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar)
        (kept,) = await buyer.desk.replicator.reputation.evidence(liar.peer)
        assert "token 0 is not what" in kept.reason
        assert len(kept.answers) == 3
        assert (
            kept.answers[0].token_ids
            == of_a_cheaper_model(GenerateRequest(prompt=PROMPT, max_tokens=6)).token_ids
        )
        assert {a.shares[0].seller for a in kept.answers} == {liar.peer, two.peer, three.peer}
        assert all(answer.shares[0].quote for answer in kept.answers)


async def test_the_one_that_does_it_again_may_be_the_liar(tmp_path):
    async with village(tmp_path, "one", "liar", "three") as (_, buyer, one, liar, three):
        liar.script.cheat = of_a_cheaper_model
        buyer.desk.replicator.shuffle = lambda peers: peers.sort(key=lambda p: p != liar.peer)
        await bought(buyer, one)
        assert of(buyer, liar.peer).failed == 1
        assert of(buyer, one.peer).failed == of(buyer, three.peer).failed == 0
        assert of(buyer, one.peer).count >= 1
        assert buyer.desk.replicator.reputation.is_cut_off(liar.peer, OPERATION)


async def test_two_that_differ_and_no_third_accuse_nobody_and_are_both_watched(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        for _ in range(TRUSTED_FROM):
            await bought(buyer, one)
        one.script.cheat = of_a_cheaper_model
        buyer.desk.replicator.draw = lambda: 0.0
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(count=9, done=11, checked=10, unsettled=1)
        assert of(buyer, two.peer) == Trust(count=9, done=0, checked=10, unsettled=1)
        assert buyer.desk.replicator.reputation.cut_off(OPERATION) == {}
        assert buyer.events("disagreement_unsettled")


async def test_another_kernel_class_is_best_effort_and_accuses_nobody(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        two.script.kernel_class, two.script.cheat = "scripted/2", of_a_cheaper_model
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(done=1)
        unchecked = buyer.desk.replicator.reputation.unchecked
        assert unchecked == {replication.ANOTHER_CLASS: 1}
        del two


async def test_a_class_that_is_heard_of_after_the_work_counts_all_the_same(tmp_path):
    """Steps are taken as they come off the wire, other frames when their turn comes."""
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        held = []

        def steps_first(frame):
            if isinstance(frame, Started):
                held.append(frame)
                return ()
            return (*held, frame) if isinstance(frame, Finished) else (frame,)

        one.tamper = steps_first
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(count=1, done=1, checked=1)
        (attempt,) = await buyer.desk.jobs.attempts((await buyer.desk.jobs.latest(2))[1].id)
        assert (attempt.kernel, attempt.identical) == (KERNEL, "guaranteed")
        del two


async def test_a_class_that_guarantees_nothing_is_never_done_again(tmp_path):
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        one.script.identical = "best effort"
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(done=1)
        assert two.script.made == 0


async def test_a_node_that_serves_decides_by_its_own_engine_without_a_third(tmp_path):
    async with village(tmp_path, "liar", serve=True) as (_, buyer, liar):
        await bought(buyer, liar)
        assert of(buyer, liar.peer) == Trust(count=1, done=1, checked=1)
        assert buyer.script.made == 6
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar)
        assert of(buyer, liar.peer).failed == 1
        assert buyer.desk.replicator.reputation.checks_spent == 0


async def test_of_an_answer_in_two_parts_only_the_one_with_the_wrong_token_is_accused(tmp_path):
    async with village(tmp_path, "liar", "two", "three", "four") as (_, buyer, liar, *others):
        buyer.has_measured(liar.peer, 9_000.0)
        liar.script.key, liar.script.die_after = "another model", 3
        running = await bought(buyer)
        assert len(running.pursuit.receipt().sellers) == 2
        assert of(buyer, liar.peer).failed == 1
        assert all(of(buyer, other.peer).failed == 0 for other in others)


async def test_with_verify_a_wrong_result_is_not_given_nor_paid_to_its_end(tmp_path):
    async with village(tmp_path, "liar", "two", "three", verify_percent_max=0) as found:
        _, buyer, liar, *_ = found
        buyer.has_measured(liar.peer, 9_000.0)
        liar.script.cheat = of_a_cheaper_model
        running = await submitted(buyer, verify=True)
        assert result_of(running) == expected(PROMPT, 6)
        assert liar.peer not in running.pursuit.receipt().sellers[1:]
        assert running.pursuit.receipt().checked.startswith("the same at ")
        (lost, kept) = await buyer.desk.jobs.attempts(running.pursuit.row.id)
        assert (lost.seller, lost.outcome, kept.outcome) == (liar.peer, "rejected", "done")


async def test_with_verify_and_nobody_else_the_receipt_says_so(tmp_path):
    async with village(tmp_path, "one") as (_, buyer, one):
        running = await submitted(buyer, verify=True)
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.receipt().checked.startswith("not checked: nobody else")
        assert of(buyer, one.peer).checked == 0


async def test_a_failure_of_our_own_engine_is_held_against_nobody(tmp_path):
    async with village(tmp_path, "one", serve=True) as (_, buyer, one):
        buyer.script.die_after = 2
        running = await submitted(buyer, verify=True)
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.receipt().checked == "not checked: the engine died"
        await bought(buyer, one)
        assert buyer.desk.replicator.reputation.unchecked == {"it failed": 1}
        assert of(buyer, one.peer) == Trust(done=2)
        assert buyer.desk.discovery.record_of(one.peer).bad == 0


async def test_a_dispute_about_a_job_that_takes_most_of_its_ceiling_is_decided(tmp_path):
    async with village(tmp_path, "liar", "two", "three") as (_, buyer, liar, *_others):
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar, ceiling=price_of(PROMPT, 6))
        assert of(buyer, liar.peer).failed == 1


async def test_checks_stop_where_their_budget_ends_and_say_so(tmp_path, monkeypatch):
    price = price_of(PROMPT, 6)
    monkeypatch.setattr("aivillage.node.verifier.ALLOWANCE_MICRO_CREDITS", price - price // 2)
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        reputation = buyer.desk.replicator.reputation
        await bought(buyer, one)  # half of it and the allowance: just enough for one
        assert reputation.checks_spent == price
        await bought(buyer, one)
        assert reputation.unchecked == {replication.BUDGET: 1}
        await bought(buyer, one)
        assert (reputation.jobs_spent, reputation.checks_spent) == (3 * price, 2 * price)
        assert of(buyer, one.peer) == Trust(count=2, done=3, checked=2)
        del two


async def test_without_a_budget_nothing_is_done_again(tmp_path):
    async with village(tmp_path, "one", "two", verify_percent_max=0) as (_, buyer, one, two):
        await bought(buyer, one)
        assert of(buyer, one.peer) == Trust(done=1)
        assert two.script.made == 0


async def test_a_full_queue_loses_checks_and_no_job(tmp_path, monkeypatch):
    monkeypatch.setattr(replication, "WAITING_MAX", 2)
    async with village(tmp_path, "one", "two") as (_, buyer, one, two):
        two.script.pause_at = 0
        for _ in range(3):  # one at work, two wait
            assert (await buyer.ask(PROMPT, tokens=2, peer=one.peer)).error is None
            await two.script.paused.wait()
        assert buyer.desk.replicator.reputation.unchecked == {}
        assert (await buyer.ask(PROMPT, tokens=2, peer=one.peer)).error is None
        assert buyer.desk.replicator.reputation.unchecked == {"too many waited": 1}
        two.script.go.set()
        await buyer.desk.replicator.idle.wait()
        assert of(buyer, one.peer).checked == 3


async def test_what_was_found_out_outlives_a_restart_and_a_lost_check_costs_nobody(tmp_path):
    async with village(tmp_path, "liar", "two", "three") as (mesh, buyer, liar, two, three):
        await bought(buyer, two)
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar)
        before = {peer: of(buyer, peer) for peer in (liar.peer, two.peer, three.peer)}
        assert before[liar.peer].failed == 1
        liar.script.cheat = lambda _request: None
        for other in (two, three):
            other.script.pause_at = 0
        await buyer.ask(PROMPT, tokens=2, peer=liar.peer)
        await until(lambda: two.script.paused.is_set() or three.script.paused.is_set())
        spent = buyer.desk.replicator.reputation.jobs_spent
        await buyer.stop()
        await mesh.start(buyer)
        reputation = buyer.desk.replicator.reputation
        assert of(buyer, liar.peer) == before[liar.peer].after_done()
        assert all(of(buyer, peer) == before[peer] for peer in (two.peer, three.peer))
        assert reputation.is_cut_off(liar.peer, OPERATION)
        assert reputation.jobs_spent == spent
        rows = await buyer.desk.jobs.latest(20)
        assert all(row.ended is not None for row in rows)


async def test_a_peer_that_makes_up_classes_fills_no_book(tmp_path):
    async with village(tmp_path, "one") as (_, buyer, one):
        reputation = buyer.desk.replicator.reputation
        for number in range(KEYS_PER_PEER_MAX + 5):
            key = Key(one.peer, OPERATION, "m", f"class {number}")
            reputation.change([key], Trust.after_done)
        assert len(reputation.listing(one.peer)) == KEYS_PER_PEER_MAX + 1
        assert sum(row["done"] for row in reputation.listing(one.peer)) == KEYS_PER_PEER_MAX + 5


async def test_who_is_cut_off_is_named_and_forgiven(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 2.0)
    async with village(tmp_path, "liar", serve=True) as (_, buyer, liar):
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar)
        refused = await buyer.ask(PROMPT, tokens=2, mesh=True)
        assert refused.error.code == "NO_PEER"
        assert "cut off until" in refused.error.message
        named = await buyer.ask(PROMPT, tokens=2, peer=liar.peer)
        assert named.error is None  # its owner knows better
        asked = ReputationDesk(buyer.desk).handlers()
        said = "\n".join(
            explained(await asked["reputation"]({"peer": liar.peer[-8:]}), time.time())
        )
        assert "1 wrong" in said
        assert "cut off since" in said
        assert "token 0 is not what" in said
        after = await asked["forgive"]({"peer": liar.peer[-8:]})
        assert "cut off since" not in "\n".join(explained(after, time.time()))
        with pytest.raises(RequestError, match="nothing is held"):
            await asked["forgive"]({"peer": buyer.peer})
        assert (await buyer.ask(PROMPT, tokens=2)).error is None
        assert of(buyer, liar.peer).count == 0


async def test_a_new_key_does_not_wash_anybody_clean(tmp_path):
    async with village(tmp_path, "liar", serve=True) as (mesh, buyer, liar):
        liar.script.cheat = of_a_cheaper_model
        await bought(buyer, liar)
        reputation = buyer.desk.replicator.reputation
        buyer.desk.villagers.on_succeeded(liar.peer, "the new one")
        await until(lambda: reputation.is_cut_off("the new one", OPERATION))
        assert not reputation.is_cut_off(liar.peer, OPERATION)
        await until(lambda: reputation.listing("the new one"))
        await buyer.stop()
        await mesh.start(buyer)
        assert buyer.desk.replicator.reputation.is_cut_off("the new one", OPERATION)


async def test_one_that_waits_to_be_trusted_is_found_soon_after(tmp_path):
    async with village(tmp_path, "liar", "two", "three") as (_, buyer, liar, *_others):
        liar.script.cheat = after(of_a_cheaper_model, TRUSTED_FROM)
        for _ in range(TRUSTED_FROM):
            await bought(buyer, liar)
        draws = iter([0.5, 0.3, 0.05])
        buyer.desk.replicator.draw = lambda: next(draws, 0.0)
        for _ in range(2):
            await bought(buyer, liar)
        assert of(buyer, liar.peer).failed == 0
        await bought(buyer, liar)
        assert of(buyer, liar.peer).failed == 1


async def test_wrong_text_never_gets_as_far_as_being_done_again(tmp_path):
    async with village(tmp_path, "liar", "two") as (_, buyer, liar, two):
        buyer.has_measured(liar.peer, 9_000.0)
        liar.script.cheat = wrong_text
        running = await bought(buyer)
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.receipt().sellers[-1] == two.peer
        assert of(buyer, liar.peer).count == 0
        assert of(buyer, liar.peer).failed >= 1
        assert not buyer.desk.replicator.reputation.is_cut_off(liar.peer, OPERATION)


async def test_three_peers_are_asked_for_one_check_and_no_fourth(tmp_path):
    async with village(tmp_path, "one", "a", "b", "c", "d") as (_, buyer, one, *others):

        def refuses(frame):
            is_answer = isinstance(frame, Accepted)
            return (Failure(id=frame.id, code="OWNER_LIMIT", message="no"),) if is_answer else ()

        for other in others:
            honest = other.tamper
            other.tamper = lambda f, h=honest: (
                refuses(f) if isinstance(f, Accepted | Finished | Started) else h(f)
            )
        await bought(buyer, one)
        rows = [row for row in await buyer.desk.jobs.latest(20) if row.is_check]
        assert len(rows) == replication.PEERS_TRIED_MAX == len({row.peer for row in rows})
        assert buyer.desk.replicator.reputation.unchecked == {
            "who was asked refused: OWNER_LIMIT": 1
        }
        assert of(buyer, one.peer) == Trust(done=1)


async def test_of_the_evidence_the_newest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.reputation.EVIDENCE_MAX", 2)
    async with village(tmp_path) as (_, buyer):
        reputation = buyer.desk.replicator.reputation
        for number in range(3):
            await reputation.keep_evidence("liar", OPERATION, f"job {number}", "why")
        assert [kept.job for kept in await reputation.evidence("liar")] == ["job 2", "job 1"]
