"""explain: sums are worked out anew, and what contradicts the signed quote is said."""

import apsw
import msgspec
import pytest

from aivillage.ledger.signed import Signed, SignedItem
from aivillage.models.inference.generate import GenerateRequest, GenerateResult, Piece
from aivillage.node.attempts import kept_job
from aivillage.node.explain import NO_MATCH, Kept, explain
from aivillage.node.jobs import APPLICATION_ID, AttemptRow, JobRow
from aivillage.node.pricelist import quote_hash
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import ConfigError, RequestError
from aivillage.protocols.messages import Quote
from aivillage.protocols.pricing import Terms
from aivillage.protocols.types import AttemptId, JobId
from tests.conftest import make_key, make_peer

JOB = JobId("ab" * 16)
FIRST, SECOND = bytes([1]) * 16, bytes([2]) * 16
PROMPT = "hello there mesh"  # 4 quads
PRICES = {"prompt_quads": 10, "output_tokens": 7}


def quote(number=1, prices=PRICES, operation="inference.generate"):
    return seal(
        make_key(number),
        "quote",
        Quote(
            seller=make_peer(number),
            operation=operation,
            terms=Terms(prices_micro_credits=prices),
            not_after_unix_ms=1,
            estimate={},
            seconds=1.0,
        ),
    )


def job(**changes):
    fields = {
        "id": JOB, "operation": "inference.generate", "state": "done", "ceiling": 1_000,
        "request": pack(GenerateRequest(prompt=PROMPT, max_tokens=8)), "deadline": None,
        "peer": "", "created": 1.0,
        "result": pack(GenerateResult(
            text="x", token_ids=tuple(range(8)), finish_reason="length", prompt_bytes=16)),
    }  # fmt: skip
    return JobRow(**(fields | changes))


def attempt(name=FIRST, number=1, done=(0, 0), **changes):
    if isinstance(done, tuple):
        done = msgspec.msgpack.encode(dict(zip(PRICES, done, strict=True)))
    fields = {
        "id": name, "job": JOB, "seller": make_peer(number), "price": 96, "outcome": "done",
        "created": 1.0, "kernel": "cpu", "identical": "guaranteed", "quote": quote(number),
        "done": done,
    }  # fmt: skip
    return AttemptRow(**(fields | changes))


def item(amount, envelope=None, **changes):
    fields = {
        "amount": amount, "final": True, "arrears": False, "receipt": True, "attested": True,
        "quote_hash": quote_hash(envelope or quote()),
    }  # fmt: skip
    return SignedItem(**(fields | changes))


def signed(*items):
    return {AttemptId(FIRST): Signed(items=items)}


def alone(row, items=(), bodies=(), **changes):
    found = explain(Kept(job(**changes), [row], {FIRST: bodies}), signed(*items))
    return found, found.attempts[0]


def test_a_job_of_one_seller_is_units_times_price():
    found, one = alone(attempt(), [item(96)])
    assert [(x.count, x.waived, x.amount_micro_credits) for x in one.lines] == [
        (4, 0, 40),
        (8, 0, 56),
    ]
    assert (found.ok, found.sum_micro_credits, found.signed_micro_credits) == (True, 96, 96)
    assert (one.quote, one.faults, one.note) == ("signed", (), "")
    assert (one.signed.final, one.signed.receipt, one.signed.attested) == (True, True, True)


def test_what_an_earlier_attempt_delivered_is_waived_in_the_next():
    pieces = [pack(Piece((), "", 16)), pack(Piece((1, 2), "ab", 16)), pack(Piece((3,), "c", 16))]
    rows = [
        attempt(price=61, outcome="PEER_LOST"),
        attempt(SECOND, 2, (4, 3), price=35),
    ]
    books = {
        AttemptId(FIRST): Signed(items=(item(61),)),
        AttemptId(SECOND): Signed(items=(item(35, quote(2)),)),
    }
    found = explain(Kept(job(), rows, {FIRST: pieces}), books)
    assert [a.sum_micro_credits for a in found.attempts] == [61, 35]
    assert [line.waived for line in found.attempts[1].lines] == [4, 3]
    assert (found.ok, found.sum_micro_credits, found.signed_micro_credits) == (True, 96, 96)


def test_a_tampered_price_does_not_match_the_signed_quote():
    cheaper = quote().replace(b"\x07", b"\x06")
    assert cheaper != quote()
    for stored in (cheaper, quote(prices=PRICES | {"output_tokens": 6}), quote(2), b"\x90"):
        found, one = alone(attempt(quote=stored), [item(96)])
        assert (found.ok, one.quote, one.sum_micro_credits) == (False, NO_MATCH, None)
        assert one.faults == (f"the stored quote {NO_MATCH}",)


def test_before_anything_is_signed_the_intent_names_the_quote():
    row = attempt(quote=quote(prices=PRICES | {"output_tokens": 6}), outcome="", price=0)
    kept = Kept(job(state="working", result=None), [row], {})
    intended = {AttemptId(FIRST): Signed(intended=quote_hash(quote()))}
    assert explain(kept, intended).attempts[0].quote == NO_MATCH
    right = {AttemptId(FIRST): Signed(intended=quote_hash(row.quote))}
    assert explain(kept, right).ok


@pytest.mark.parametrize("changes", [{"price": 95}, {"done": (1, 0)}])
def test_a_stored_sum_that_is_not_the_recomputed_one_is_a_fault(changes):
    found, one = alone(attempt(**changes), [item(96)])
    assert not found.ok
    assert "recomputed are" in one.faults[0]


def test_more_signed_than_recomputed_is_a_fault_and_less_is_said():
    found, one = alone(attempt(), [item(97)])
    assert (found.ok, one.faults) == (False, ("97 micro-credits were signed, recomputed are 96",))
    found, one = alone(attempt(), [item(90, final=False, receipt=False, attested=False)])
    assert (found.ok, one.signed.receipt) == (True, False)
    assert one.note.startswith("6 micro-credits are not signed yet")


def test_what_came_back_at_a_sync_may_be_more_than_was_stored():
    book = {AttemptId(FIRST): Signed(items=(item(200),), recovered=104)}
    found = explain(Kept(job(), [attempt()], {}), book)
    assert (found.ok, found.attempts[0].faults) == (True, ())
    assert "104 micro-credits were signed for output that this node has forgotten" in (
        found.attempts[0].note
    )
    book = {AttemptId(FIRST): Signed(items=(item(200),), recovered=103)}
    assert not explain(Kept(job(), [attempt()], {}), book).ok


def test_arrears_after_a_crash_may_be_more_than_was_stored():
    row = attempt(price=0, outcome="stopped")
    found, one = alone(row, [item(30, arrears=True)], state="failed", result=None)
    assert (found.ok, one.sum_micro_credits, one.signed.arrears_micro_credits) == (True, 0, 30)
    assert "claimed after a crash" in one.note


def test_an_attempt_of_an_older_version_says_that_it_kept_no_quote():
    found, one = alone(attempt(quote=b"", done=b""), [item(96)])
    assert (found.ok, found.sum_micro_credits, one.quote) == (True, None, "not stored")
    assert one.note == "without a signed quote its prices are not known"


def test_what_was_thrown_away_cannot_be_counted_again():
    found, one = alone(attempt(price=61, outcome="rejected"), [item(50)], result=None)
    assert (found.ok, one.sum_micro_credits) == (True, None)
    assert "thrown away" in one.note


def test_the_usage_of_another_packages_module_is_not_guessed():
    row = attempt(quote=quote(operation="theirs.op"))
    found, one = alone(row, [item(96, row.quote)], operation="theirs.op")
    assert (found.ok, one.sum_micro_credits, one.quote) == (True, None, "signed")
    assert "another package's module" in one.note


def test_a_job_on_this_machine_cost_nothing():
    found = explain(Kept(job(local=True), [attempt(price=0)], {}), {})
    assert (found.ok, found.local, found.attempts, found.sum_micro_credits) == (True, True, (), 0)


def test_a_store_that_no_node_has_opened_since_an_older_version_is_read_as_it_is(tmp_path):
    path = tmp_path / "jobs.db"
    db = apsw.Connection(str(path))
    db.execute(
        "CREATE TABLE job(id, operation, request, state, ceiling, deadline, peer, created, ended,"
        " result, receipt, code, message);"
        "CREATE TABLE attempt(id, job, seller, price, outcome, created);"
        "CREATE TABLE delivered(job, seq, attempt, body)"
    )
    db.execute("INSERT INTO job VALUES (?, 'mesh.noop', x'', 'done', 1, 0, '', 1, 1, 0, 0, 0, 0)",
               (JOB,))  # fmt: skip
    db.execute("INSERT INTO attempt VALUES (?, ?, 'x', 9, 'PEER_LOST', 1)", (FIRST, JOB))
    with pytest.raises(ConfigError, match="no store of jobs"):
        kept_job(path, JOB)
    db.pragma("application_id", APPLICATION_ID)
    db.pragma("user_version", 1)
    db.close()
    found = explain(kept_job(path, JOB[:5]), {})
    assert [(a.quote, a.stored_micro_credits) for a in found.attempts] == [("not stored", 9)]
    for name in ("", "ac", "*", "AB"):
        with pytest.raises(RequestError):
            kept_job(path, name)


@pytest.mark.parametrize("changes", [{"result": b"\xc1"}, {"request": b"\xc1"}, {"result": None}])
def test_a_damaged_job_cannot_be_recomputed(changes):
    assert alone(attempt(), [item(96)], **changes)[1].sum_micro_credits is None
    assert alone(attempt(done=b"\xc1"), [item(96)])[1].sum_micro_credits is None
