"""The market among liars: what a false seller is paid, and what a false buyer gets."""

from __future__ import annotations

import msgspec
import pytest
import trio

from aivillage.models.inference.generate import GenerateRequest, GenerateResult
from aivillage.models.mesh.noop import NoopRequest
from aivillage.node.identity import peer_of
from aivillage.protocols import codec, envelope, messages
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import CODES, PeerError
from aivillage.protocols.job import running_hash, token_bytes
from aivillage.protocols.messages import (
    JOB_PROTOCOL,
    Accepted,
    Call,
    Failure,
    Finished,
    Part,
    Step,
    StepItem,
)
from aivillage.protocols.types import AttemptId
from tests.conftest import make_hello, make_key
from tests.simulation.mesh import PRICE, open_mesh, price_of, result_of, settled, until
from tests.simulation.scripted import answer
from tests.simulation.test_market import PROMPT, expected, pair
from tests.simulation.test_market_failures import three

replace = msgspec.structs.replace


def each_item(change):
    """A tamper that changes every step item."""

    def tamper(frame):
        if isinstance(frame, Step):
            return (replace(frame, items=tuple(map(change, frame.items))),)
        return (frame,)

    return tamper


async def rejected(buyer, first, second, *, tokens=12):
    """Runs a job at a liar: it comes out right, elsewhere, and the liar is marked."""
    running = await buyer.ask(PROMPT, tokens=tokens)
    assert result_of(running) == expected(PROMPT, tokens)
    assert buyer.desk.discovery.record_of(first.peer).bad == 1
    assert buyer.events("attempt_failed")[0]["peer"] == first.peer
    assert running.pursuit.receipt().sellers[-1] == second.peer
    return running


async def final_items(seller):
    """(attempts, final ones) among the items that a seller was signed."""
    db = seller.ledger._ledger.desk._runner._db
    rows = await trio.to_thread.run_sync(
        lambda: db.execute("SELECT final FROM item WHERE mine = 0").fetchall()
    )
    return len(rows), sum(final for (final,) in rows)


async def test_a_failed_verdict_gets_no_final_voucher_and_the_next_peer_starts_anew(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.key = "another model"
        running = await rejected(buyer, first, second)
        assert second.script.made == 12
        await settled(buyer, second, price_of(PROMPT, 12))
        assert (await final_items(first))[1] == 0
        assert (await final_items(second))[1] == 1
        assert buyer.ledger.view(first.peer).owed_by_me <= price_of(PROMPT, 12)
        assert len(await buyer.desk.jobs.delivered(running.pursuit.row.id)) == len(
            running.pursuit.output.bodies
        )


async def test_a_module_that_answers_wrong_is_paid_nothing(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.key = "not what you said: "
        request = pack(NoopRequest(note="x", parts=2))
        running = await buyer.ask(operation="mesh.noop", request=request)
        assert running.error is None
        assert running.pursuit.spent == 30
        await settled(buyer, second, 30)
        assert buyer.ledger.view(first.peer).owed_by_me == 0


async def test_a_liar_that_links_anew_is_still_out_of_this_job(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 2.0)
    async with pair(tmp_path) as (mesh, buyer, seller):
        seller.script.key = "another model"
        running = await buyer.submit(PROMPT, tokens=4)
        await until(lambda: buyer.events("attempt_failed"))
        mesh.network.cut("buyer", "seller")
        await mesh.link(buyer, seller)
        await running.ended.wait()
        assert running.error.code == "NO_PEER"
        assert running.pursuit.receipt().attempts == 1


async def test_a_doubled_meter_is_refused_and_paid_at_most_what_was_streamed(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):

        def doubled(frame):
            if isinstance(frame, Finished):
                return (replace(frame, usage={u: 2 * n for u, n in frame.usage.items()}),)
            return (frame,)

        first.tamper = doubled
        await rejected(buyer, first, second)
        await settled(buyer, second, price_of(PROMPT, 12))
        await trio.sleep(0.4)  # a voucher would be on its way
        assert buyer.ledger.view(first.peer).owed_by_me <= price_of(PROMPT, 12)
        assert (await final_items(first))[1] == 0


async def test_a_doubled_meter_of_a_module_is_paid_nothing(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):

        def doubled(frame):
            return (
                (replace(frame, usage={"calls": 2, "parts": 0}),)
                if isinstance(frame, Finished)
                else (frame,)
            )

        first.tamper = doubled
        running = await buyer.ask(operation="mesh.noop", request=pack(NoopRequest(note="x")))
        assert (running.error, running.pursuit.spent) == (None, 10)
        await settled(buyer, second, 10)
        assert buyer.ledger.view(first.peer).owed_by_me == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda item: replace(item, hash8=bytes(8)),
        lambda item: replace(item, first=item.first + 1),
        lambda item: replace(item, read_bytes=10**6),
    ],
    ids=["wrong hash", "out of order", "more prompt than there is"],
)
async def test_steps_that_do_not_fit_are_not_paid(tmp_path, change):
    async with three(tmp_path) as (_, buyer, first, second):
        first.tamper = each_item(change)
        running = await rejected(buyer, first, second)
        assert running.pursuit.spent == price_of(PROMPT, 12)
        await settled(buyer, second, price_of(PROMPT, 12))
        await trio.sleep(0.3)
        assert buyer.ledger.view(first.peer).owed_by_me == 0
        await until(lambda: first.script.open_sessions == 0)


LIKELY = GenerateRequest(prompt=PROMPT, max_tokens=12, logprobs=2)


async def test_log_probabilities_go_on_at_the_next_seller(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.die_after = 5
        running = await buyer.ask(request=pack(LIKELY))
        assert result_of(running) == answer(LIKELY)
        assert len(result_of(running).logprobs) == 12
        assert (first.script.made, second.script.made) == (5, 7)


@pytest.mark.parametrize(
    "lie",
    [lambda said: said[:-1], lambda said: said + said, lambda _said: b""],
    ids=["a byte short", "two of one", "none"],
)
async def test_log_probabilities_of_another_number_of_tokens_are_not_paid(tmp_path, lie):
    """The hash is of what was sent, so it is the count alone that shows it."""
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.likelihood = lie
        running = await buyer.ask(request=pack(LIKELY))
        assert result_of(running) == answer(LIKELY)
        (failed,) = buyer.events("attempt_failed")
        assert failed["peer"] == first.peer
        assert "log-probabilities beside 1 tokens" in failed["reason"]
        assert second.script.made == 12
        reading = price_of(PROMPT, 0)  # what came before the first token was right
        assert running.pursuit.spent == price_of(PROMPT, 12) + reading


async def test_a_last_word_with_other_log_probabilities_than_were_streamed_is_refused(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):

        def other(frame):
            if isinstance(frame, Finished):
                result = codec.unpack(GenerateResult, frame.result)
                said = (replace(result.logprobs[0], logprob=-0.5), *result.logprobs[1:])
                return (replace(frame, result=pack(replace(result, logprobs=said))),)
            return (frame,)

        first.tamper = other
        running = await buyer.ask(request=pack(LIKELY))
        assert result_of(running) == answer(LIKELY)
        (failed,) = buyer.events("attempt_failed")
        assert "not what was streamed" in failed["reason"]
        assert running.pursuit.receipt().sellers[-1] == second.peer


async def test_tokens_beyond_the_request_are_neither_kept_nor_paid(tmp_path):
    async with three(tmp_path) as (_, buyer, first, second):
        first.script.extra_tokens = 5
        running = await buyer.ask(PROMPT, tokens=6)
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.spent == price_of(PROMPT, 6)
        assert buyer.desk.discovery.record_of(first.peer).bad == 1
        assert second.script.made == 0  # all that was asked for was there, and paid
        await settled(buyer, first, price_of(PROMPT, 6))
        assert buyer.ledger.view(second.peer).owed_by_me == 0


async def test_tokens_after_the_last_word_are_late_and_not_paid(tmp_path):
    """The result is short of what was asked for, so there would be room in the price."""
    async with pair(tmp_path) as (_, buyer, seller):
        state = {"hash": bytes(32), "n": 0}

        def short(frame):
            if isinstance(frame, Step):
                state["call"], state["n"] = frame.items[-1].session, state["n"] + len(frame.items)
            return (frame,)

        seller.tamper = short
        buyer.script.check_gate = trio.Event()
        running = await buyer.submit(PROMPT, tokens=6)
        await buyer.script.checking.wait()
        (attempt,) = buyer.desk.buyer._trade.attempts.values()
        before = attempt.amount
        attempt._most = {unit: 10 * count for unit, count in attempt._most.items()}
        late = (7, 8, 9)
        out_hash = running_hash(
            attempt.out_hash, attempt.attempt, attempt._number, token_bytes(late)
        )
        item = StepItem(state["call"], 6, late, "late ", out_hash[:8], len(PROMPT))
        seller.desk.links.get(buyer.peer).send(Step(99, (item,)))
        await until(lambda: any(isinstance(f, Step) and f.seq == 99 for f in buyer.heard))
        buyer.script.check_gate.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 6)
        assert running.pursuit.spent == before == price_of(PROMPT, 6)
        await settled(buyer, seller, price_of(PROMPT, 6))


@pytest.mark.parametrize("code", sorted(CODES))
async def test_every_refusal_of_a_seller_leads_to_the_next_one(tmp_path, code, monkeypatch):
    monkeypatch.setattr("aivillage.node.pursuit.BUSY_MAX", 1)
    async with three(tmp_path) as (_, buyer, first, second):

        def refuses(frame):
            if isinstance(frame, Accepted):
                return (Failure(id=frame.id, code=code, message="no"),)
            return (
                () if isinstance(frame, Step | Finished | messages.Started | Failure) else (frame,)
            )

        first.tamper = refuses
        if code in {"BUSY", "QUOTE_EXPIRED"}:
            running = await buyer.ask(PROMPT, tokens=4)  # waited for, then given up
            assert running.error.code == code
            assert running.pursuit.spent == 0
            return
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        await settled(buyer, second, price_of(PROMPT, 4))
        assert buyer.ledger.view(first.peer).owed_by_me == 0
        assert not first.ledger._ledger.desk.partner(buyer.peer).purchases


async def test_a_replayed_call_is_refused(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        calls = []

        def twice(frame):
            if isinstance(frame, Call):
                calls.append(frame)
                return (frame, replace(frame, id=frame.id + 1000))
            return (frame,)

        buyer.tamper = twice
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        await until(lambda: seller.events("call_refused"))
        assert seller.events("call_refused")[0]["code"] == "REPLAYED"
        buyer.desk.links.get(seller.peer).send(calls[0])  # and after its end, too
        await until(lambda: len(seller.events("call_refused")) > 1)
        assert [e["code"] for e in seller.events("call_refused")][-1] == "REPLAYED"
        assert seller.script.made == 4
        await settled(buyer, seller, price_of(PROMPT, 4))


async def test_a_buyer_cannot_claim_to_have_had_what_it_does_not_show(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        tokens = {"output_tokens": 1000}
        calls = {"calls": 1, "parts": 9}
        for done, request, operation, price in (
            (
                tokens,
                GenerateRequest(prompt=PROMPT, max_tokens=6),
                "inference.generate",
                13 * PRICE,
            ),
            (calls, NoopRequest(parts=1), "mesh.noop", 20),
        ):
            before = seller.ledger.view(buyer.peer).delivered
            buyer.tamper = lambda f, d=done: (replace(f, done=d),) if isinstance(f, Call) else (f,)
            await buyer.ask(operation=operation, request=pack(request))
            assert seller.ledger.view(buyer.peer).delivered - before == price


async def test_parts_without_end_are_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.attempt.RUN_BYTES_MAX", 20_000)
    async with three(tmp_path) as (_, buyer, first, second):

        def flood(frame):
            if not isinstance(frame, Finished):
                return (frame,)
            parts, out_hash = [], bytes(32)
            for seq in range(200):
                body = bytes(1000)
                out_hash = running_hash(out_hash, AttemptId(frame.attempt), seq, body)
                parts.append(Part(id=frame.id, seq=seq, body=body, hash8=out_hash[:8]))
            return parts

        first.tamper = flood
        running = await buyer.ask(operation="mesh.noop", request=pack(NoopRequest(note="x")))
        assert "more parts" in buyer.events("attempt_failed")[0]["reason"]
        assert buyer.events("attempt_failed")[0]["peer"] == first.peer
        assert running.pursuit.output is not None
        assert buyer.ledger.view(first.peer).owed_by_me == 0
        del second


async def test_a_peer_that_takes_only_small_frames_fells_nobody(tmp_path):
    """A hello may promise to take next to nothing; the node says little to such a peer."""
    async with open_mesh(tmp_path) as mesh:
        seller, buyer = await mesh.add("seller"), await mesh.add("buyer", serve=False)
        await mesh.knows(buyer, seller)
        key = make_key(99)
        async with mesh.network.open("tiny", peer_of(key)) as wire:
            for size in (0, *range(200, 1400, 100)):
                await wire.dial(seller.address)
                stream = await wire.open_stream(seller.peer, JOB_PROTOCOL)
                await stream.write(codec.frame(make_hello(max_frame_bytes=size)))
                request = pack(GenerateRequest(prompt="x"))
                for frame in (
                    messages.QuoteRequest(id=1, operation="inference.generate", request=request),
                    messages.QuoteRequest(id=3, operation="x" * 2000, request=request),
                    messages.Join(id=5, token="aiv1.x"),
                    messages.ListOperations(id=7),
                ):
                    await stream.write(codec.frame(frame))
                await trio.sleep(0.03)
                await wire.hang_up(seller.peer)
        assert (await buyer.ask(PROMPT, tokens=2)).error is None


async def test_an_offer_that_names_somebody_elses_address_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.market.SEEK_SECONDS", 0.5)
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        honest = await mesh.add("honest")
        liar = await mesh.add("liar")
        await mesh.knows(buyer, honest, liar)
        mesh.network.cut("buyer", "liar")
        liar.desk.links.transport.addresses = lambda: (honest.address,)
        await mesh.link(liar, honest)
        await until(
            lambda: any(
                o.addresses == (honest.address,) and o.seller == liar.peer
                for o in buyer.desk.discovery.offers()
            )
        )
        await liar.stop()
        running = await buyer.ask(PROMPT, tokens=2, peer=liar.peer)
        assert running.error.code == "NO_PEER"


# ------------------------------------------------------------------ versions


def newer_bytes(payload: bytes) -> bytes:
    """The same map with a field that came with 1.1."""
    fields = msgspec.msgpack.decode(payload)
    return (
        msgspec.msgpack.encode(fields | {"since_1_1": {"anything": [1, None]}})
        if isinstance(fields, dict)
        else payload
    )


def newer_seal(key, domain, value):
    body = newer_bytes(msgspec.msgpack.encode(value))
    signature = envelope.sign(key, envelope.prefix(domain) + body)
    return msgspec.msgpack.encode([key.public_key().public_bytes_raw(), body, signature])


async def test_a_newer_minor_version_is_understood_and_its_job_is_paid(tmp_path, monkeypatch):
    """Every map on the wire and in every envelope has a field that this version does not know."""
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda frame: newer_bytes(encode(frame)))
    for place in ("discovery", "pricelist", "village"):
        monkeypatch.setattr(f"aivillage.node.{place}.seal", newer_seal)
    monkeypatch.setattr("aivillage.node.daemon.VERSION_MINOR", 1)
    async with pair(tmp_path) as (_, buyer, seller):
        assert buyer.desk.links.get(seller.peer).hello.minor == 1
        running = await buyer.ask(PROMPT, tokens=4)
        assert result_of(running) == expected(PROMPT, 4)
        await settled(buyer, seller, price_of(PROMPT, 4))


async def test_another_major_version_is_refused_by_name(tmp_path):
    async with pair(tmp_path) as (mesh, buyer, seller):
        for node in (buyer, seller):
            hello = node.desk.links._hello
            if node is seller:
                node.desk.links._hello = lambda h=hello: replace(h(), major=2)
        mesh.network.cut("buyer", "seller")
        with pytest.raises(PeerError) as caught:
            await buyer.desk.links.connect(seller.address)
        assert caught.value.code == "VERSION_UNSUPPORTED"
