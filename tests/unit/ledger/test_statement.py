"""Statements: what a book can prove to a stranger, and that no changed word of it passes."""

import json
from collections.abc import Iterator

import msgspec
import pytest

from aivillage.ledger import compaction, corrections, issuing, queries
from aivillage.ledger.documents import (
    StatementError,
    decode_document,
    encode_document,
)
from aivillage.ledger.statement import verify_document
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.errors import RequestError
from aivillage.protocols.vouchers import (
    ARREARS,
    ReceiptBody,
    ReceiptRow,
    VoucherBody,
    digest,
    receipt_prefixed,
    root_of,
    voucher_prefixed,
)
from tests.unit.ledger.pairs import NAMES, note, receipt_for, traded
from tests.unit.ledger.test_steps import (
    BUYER,
    SELLER,
    WALLET,
    A,
    B,
    body_of,
    exposure,
    forged,
    item,
    sign,
    take,
)


@pytest.fixture
def books():
    return traded()


def stated(db, peer):
    return queries.run(db, issuing.statement(peer, 9_000_000, is_signed_by)).document


def stated_job(db, peer, prefix, attempts=()):
    query = issuing.job_statement(peer, prefix, attempts, 9_000_000, is_signed_by)
    return queries.run(db, query).document


def verified(document):
    """As a stranger does it: from the bytes of the file alone."""
    return verify_document(decode_document(encode_document(document)), is_signed_by)


def refused(document, told):
    with pytest.raises(StatementError, match=told):
        verify_document(decode_document(json.dumps(document).encode()), is_signed_by)


def as_dict(document):
    return json.loads(encode_document(document))


# ------------------------------------------------------------------ one pair


def test_a_statement_holds_what_still_says_something_and_adds_up(books):
    buyer, _ = books
    document = stated(buyer, SELLER)
    by, to = document.owed_by_issuer, document.owed_to_issuer
    assert [body_of(_Signed(v)).n for v in by.vouchers] == [3, 4]
    assert (by.total, by.confirmed, to.total, document.net) == (100, 95, 40, -60)
    assert len(by.receipts) == 1
    assert (document.since_ms, document.until_ms) == (1_000_000, 2_000_000)
    proof = verified(document)
    assert f"{BUYER} owes {SELLER} 0.00006" in proof.proven
    assert "0.000095" in proof.proven


class _Signed:
    def __init__(self, voucher):
        self.body = bytes.fromhex(voucher.body)


def test_both_sides_state_the_same_but_for_what_is_in_transit(books):
    of_buyer, of_seller = stated(books[0], SELLER), stated(books[1], BUYER)
    assert of_buyer.owed_to_issuer.total == of_seller.owed_by_issuer.total == 40
    assert of_buyer.owed_by_issuer.confirmed == of_seller.owed_to_issuer.total == 95
    verified(of_seller)


def test_the_end_of_a_peers_id_suffices_and_another_name_is_refused(books):
    assert stated(books[0], SELLER[-8:]) == stated(books[0], SELLER)
    for wrong in ("nobody", ""):
        with pytest.raises(RequestError, match="no peer in the book"):
            stated(books[0], wrong)


def _places(value, path=()) -> Iterator[tuple]:
    """The way to every leaf of a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in below:
        if isinstance(child, dict | list):
            yield from _places(child, (*path, key))
        else:
            yield (*path, key)


def _changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    other = "0" if value[-1:] != "0" else "1"
    return value[:-1] + other if value else "00"


NOT_SIGNED = {("issued_ms",), ("until_ms",), ("since_ms",)}
"""The issuer's clock: stated, and said to be unproven."""


@pytest.mark.parametrize("kind", ["pair", "job"])
def test_no_value_can_be_changed_unnoticed(books, kind):
    document = stated(books[0], SELLER) if kind == "pair" else stated_job(books[0], SELLER, "01")
    text = encode_document(document)
    places = [place for place in _places(json.loads(text)) if place not in NOT_SIGNED]
    assert len(places) > 15
    for place in places:
        changed = json.loads(text)
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = _changed(parent[place[-1]])
        with pytest.raises(StatementError):
            verify_document(decode_document(json.dumps(changed).encode()), is_signed_by)


def test_a_stated_net_that_is_not_signed_is_refused(books):
    document = as_dict(stated(books[1], BUYER))
    refused(document | {"net": 1_000_000}, "its net is 1000000, what was signed gives 55")


def test_a_stated_amount_of_a_job_that_is_not_signed_is_refused(books):
    document = as_dict(stated_job(books[1], BUYER, "01"))
    refused(document | {"amount": 71}, "its amount is 71, what was signed gives 70")


def test_a_total_that_is_not_signed_is_refused(books):
    document = as_dict(stated(books[0], SELLER))
    for name, told in (("total", "its total is 101"), ("confirmed", "96 is stated as confirmed")):
        changed = json.loads(json.dumps(document))
        changed["owed_by_issuer"][name] += 1
        refused(changed, told)
    changed = json.loads(json.dumps(document))
    changed["owed_by_issuer"]["lanes"].clear()
    refused(changed, "what it states of lane")


def test_a_voucher_that_the_payer_did_not_sign_is_refused(books):
    document = as_dict(stated(books[1], BUYER))
    body = VoucherBody(B.public_key, WALLET.lane, 9, 900_000, root_of([item(1, 900_000)]))
    encoded = msgspec.msgpack.encode(body)
    own = document["owed_to_issuer"]["vouchers"][0]
    own |= {"body": encoded.hex(), "signature": B.sign(voucher_prefixed(encoded)).hex()}
    refused(document, "voucher 9 on lane .* is not signed by")


def test_a_voucher_to_somebody_else_is_refused(books):
    document = as_dict(stated(books[0], SELLER))
    both = document["owed_by_issuer"], document["owed_to_issuer"]
    both[0]["vouchers"], both[1]["vouchers"] = both[1]["vouchers"], both[0]["vouchers"]
    refused(document, "is not made out to")


def test_one_voucher_twice_is_refused(books):
    document = as_dict(stated(books[0], SELLER))
    vouchers = document["owed_by_issuer"]["vouchers"]
    refused_twice = vouchers[0]
    vouchers.append(refused_twice)
    refused(document, "voucher 3 on lane .* is in it twice")


def test_a_cum_that_falls_as_n_rises_is_refused(books):
    document = as_dict(stated(books[1], BUYER))
    liar = forged(7, 1, item(9, 1))
    shown = {
        "body": liar.body.hex(),
        "signature": liar.signature.hex(),
        "items": [{"item": msgspec.msgpack.encode(liar.items[0]).hex()}],
    }
    document["owed_to_issuer"]["vouchers"].append(shown)
    refused(document, "voucher 7 on lane .*: cum falls as n rises")


def test_a_receipt_for_other_bytes_and_one_for_nothing_shown_are_refused(books):
    document = as_dict(stated(books[0], SELLER))
    for voucher, told in (
        (forged(3, 5, item(9, 5)), "confirms another voucher 3"),
        (forged(30, 5, item(9, 5)), "confirms nothing that is shown"),
    ):
        receipt = receipt_for([voucher])
        entry = {"body": receipt.body.hex(), "signature": receipt.signature.hex()}
        changed = json.loads(json.dumps(document))
        changed["owed_by_issuer"]["receipts"] = [entry]
        refused(changed, told)


def test_an_id_that_is_not_of_the_key_is_refused(books):
    document = as_dict(stated(books[0], SELLER))
    document["issuer"]["peer"] = SELLER
    refused(document, "is not the id of its key")
    document["issuer"] = document["peer"]
    refused(document, "one peer alone")


def test_omission_lowers_what_is_proven_and_never_raises_what_was_signed(books):
    """Leaving out vouchers gives another right statement: of less. The text says so."""
    buyer, _ = books
    document = stated(buyer, SELLER)
    assert "if vouchers of" in verified(document).not_proven
    own = document.owed_by_issuer
    lanes = [msgspec.structs.replace(own.lanes[0], n=3, cum=95)]
    fewer = msgspec.structs.replace(own, vouchers=own.vouchers[:1], total=95, lanes=lanes)
    less = msgspec.structs.replace(document, owed_by_issuer=fewer, net=-55)
    assert verified(less).amount == -55


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "it is no statement"),
        (b"[]", "it is no statement"),
        (b"\xff\xfe", "it is no statement"),
        (b'{"type":"aivillage-statement","version":3}', "it is of version 3"),
        (b'{"type":"other","version":1}', "it is no statement"),
        (b'{"type":"aivillage-statement","version":1}', "missing required field"),
        (b"[" * 100_000, "it is no statement"),
    ],
)
def test_what_is_no_statement_is_refused(text, told):
    with pytest.raises(StatementError, match=told) as caught:
        decode_document(text)
    assert caught.value.exit_code == 7


def test_a_field_that_nobody_checks_is_refused(books):
    refused(as_dict(stated(books[0], SELLER)) | {"note": "paid in full"}, "unknown field")


def test_a_document_is_read_up_to_a_size_and_not_beyond(books):
    text = encode_document(stated(books[0], SELLER))
    decode_document(text, bytes_max=len(text))
    with pytest.raises(StatementError) as caught:
        decode_document(text, bytes_max=len(text) - 1)
    assert caught.value.code == "TOO_LARGE"


def test_a_damaged_book_states_nothing(books):
    buyer, _ = books
    for (name,) in buyer.execute("SELECT name FROM sqlite_schema WHERE type='trigger'").fetchall():
        buyer.execute(f"DROP TRIGGER {name}")
    buyer.execute("UPDATE voucher_out SET signature = zeroblob(65) WHERE n = 4")
    with pytest.raises(StatementError, match="voucher 4"):
        stated(buyer, SELLER)


def test_a_peer_without_any_voucher_gives_an_empty_statement(books):
    stranger = "12D3KooWGC6TvWhfapYrSsMBTQZi5sYaoHTwvPMbkdyGcZpTjMpV"
    exposure.certify(books[0], stranger, 5, 5, 1)
    document = stated(books[0], stranger)
    assert (document.net, document.since_ms, document.until_ms) == (0, 0, 0)
    verified(document)


def shown_n(direction):
    return [body_of(_Signed(voucher)).n for voucher in direction.vouchers]


def test_the_last_word_on_each_attempt_is_in_it_even_in_the_middle_of_a_lane(books):
    buyer, seller = books
    for paid in (item(5, 1), item(5, 2, final=True), item(6, 1), item(6, 2, final=True)):
        take(seller, sign(buyer, paid))
    assert shown_n(stated(buyer, SELLER).owed_by_issuer) == [3, 4, 6, 8]
    assert shown_n(stated(seller, BUYER).owed_to_issuer) == [3, 6, 8]


def test_the_last_confirmed_voucher_is_in_it_though_a_later_one_says_more(books):
    buyer, _ = books
    note(buyer, receipt_for([sign(buyer, item(2, 31))]))
    sign(buyer, item(2, 33))
    by = stated(buyer, SELLER).owed_by_issuer
    assert (shown_n(by), by.confirmed, by.total) == ([3, 5, 6], 101, 103)


def test_a_hash_stands_for_one_item_and_an_item_for_itself(books):
    document = as_dict(stated_job(books[0], SELLER, "01"))
    shown, hidden = document["proofs"][0]["voucher"]["items"]
    mine = digest(bytes.fromhex(shown["item"])).hex()
    for items in (
        [{"hash": mine + hidden["hash"]}],
        [shown, {}],
        [shown | {"hash": mine}, hidden],
        [shown, hidden | {"item": "00"}],
    ):
        document["proofs"][0]["voucher"]["items"] = items
        refused(document, "neither shown nor hashed")


def test_a_period_that_ends_before_it_begins_is_refused(books):
    document = as_dict(stated(books[0], SELLER))
    refused(document | {"since_ms": document["until_ms"] + 1}, "it ends before it begins")


def test_compaction_takes_nothing_from_a_statement(books):
    for db, peer, side in ((books[0], SELLER, "out"), (books[1], BUYER, "in")):
        before = stated(db, peer)
        with db:
            assert compaction.compact(db, compaction.Cursor(side), 1).vouchers == 2
        assert stated(db, peer) == before


def test_a_write_off_changes_nothing_that_was_signed(books):
    _, seller = books
    before = stated(seller, BUYER)
    with seller:
        corrections.write_off(seller, BUYER, 20, "gone", 1_500_000)
    after = stated(seller, BUYER)
    assert (after.net, after.owed_to_issuer) == (before.net, before.owed_to_issuer)


# ------------------------------------------------------------------ one attempt


def test_a_job_statement_shows_one_item_and_of_the_others_only_hashes(books):
    for db, peer in ((books[0], SELLER), (books[1], BUYER)):
        document = stated_job(db, peer, "01")
        (proof,) = document.proofs
        assert (document.payer, document.attempt) == (BUYER, NAMES[1].hex())
        assert (document.amount, proof.final, proof.out_hash) == (70, True, (b"o" * 32).hex())
        shown, hidden = proof.voucher.items
        assert (shown.hash, hidden.item) == ("", "")
        assert hidden.hash == digest(msgspec.msgpack.encode(item(2, 25))).hex()
        assert NAMES[2].hex() not in encode_document(document).decode()
        assert "in all" in verified(document).proven


def test_a_buyers_job_statement_carries_the_sellers_receipt_and_whether_it_knew_the_job(books):
    buyer, seller = books
    (proof,) = stated_job(buyer, SELLER, "01").proofs
    assert (proof.confirmed, proof.attested) == (True, True)
    assert "confirmed it, and that it knows" in verified(stated_job(buyer, SELLER, "01")).proven
    (open_one,) = stated_job(buyer, SELLER, "02").proofs
    assert (open_one.amount, open_one.final, open_one.confirmed) == (30, False, False)
    told = verified(stated_job(buyer, SELLER, "02")).proven
    assert "at least, it is not the last word" in told
    assert "has not confirmed" in told
    paid = sign(buyer, item(4, 9, final=True))
    take(seller, paid)
    note(buyer, receipt_for([paid], attest=False))
    (forgot,) = stated_job(buyer, SELLER, "04").proofs
    assert (forgot.confirmed, forgot.attested) == (True, False)


def test_arrears_count_with_the_work_that_they_complete(books):
    buyer, _ = books
    sign(buyer, item(2, 12, final=True, kind=ARREARS))
    document = stated_job(buyer, SELLER, "02")
    assert [proof.amount for proof in document.proofs] == [30, 12]
    assert verified(document).amount == document.amount == 42
    twice = as_dict(document)
    twice["proofs"] = [twice["proofs"][0]] * 2
    refused(twice | {"amount": 60}, "counts one item twice")


def test_both_kinds_of_one_attempt_in_one_voucher_are_two_proofs(books):
    buyer, _ = books
    sign(buyer, item(7, 5, final=True), item(7, 6, final=True, kind=ARREARS))
    assert verified(stated_job(buyer, SELLER, "07")).amount == 11


def test_an_attempt_is_found_by_its_beginning_or_by_those_of_a_job(books):
    buyer, _ = books
    for prefix, attempts in ((NAMES[1].hex(), ()), ("0", [NAMES[1]]), ("fe", [NAMES[1]])):
        if prefix != "0":
            assert stated_job(buyer, SELLER, prefix, attempts).attempt == NAMES[1].hex()
    with pytest.raises(RequestError, match="names 3 attempts"):
        stated_job(buyer, SELLER, "0")
    for nothing in ("ee", "", "xyz", "0" * 33):
        with pytest.raises(RequestError, match="nothing was signed"):
            stated_job(buyer, SELLER, nothing)


def test_a_job_statement_of_another_attempt_is_refused(books):
    document = as_dict(stated_job(books[0], SELLER, "01"))
    refused(document | {"attempt": NAMES[2].hex()}, "does not show this attempt alone")
    refused(document | {"payer": "12D3KooWnobody"}, "is neither of the two")


def test_an_item_above_what_its_voucher_pays_is_refused(books):
    document = as_dict(stated_job(books[1], BUYER, "01"))
    liar = forged(9, 100, item(1, 5_000, final=True))
    document["proofs"][0] |= {
        "amount": 5_000,
        "voucher": {
            "body": liar.body.hex(),
            "signature": liar.signature.hex(),
            "items": [{"item": msgspec.msgpack.encode(liar.items[0]).hex()}],
        },
    }
    refused(document | {"amount": 5_000}, "more for the attempt than it pays")


def test_a_job_statement_that_shows_a_second_item_is_refused(books):
    document = as_dict(stated_job(books[0], SELLER, "01"))
    other = {"item": msgspec.msgpack.encode(item(2, 25)).hex()}
    document["proofs"][0]["voucher"]["items"][1] = other
    refused(document, "does not show this attempt alone")


def test_a_receipt_of_another_lane_confirms_no_job(books):
    _, seller = books
    document = as_dict(stated_job(seller, BUYER, "01"))
    lane = bytes(16)
    n = body_of(_Signed(stated_job(seller, BUYER, "01").proofs[0].voucher)).n
    hash_ = digest(bytes.fromhex(document["proofs"][0]["voucher"]["body"]))
    body = msgspec.msgpack.encode(ReceiptBody(A.public_key, lane, (ReceiptRow(n, hash_, True),)))
    receipt = {"body": body.hex(), "signature": B.sign(receipt_prefixed(body)).hex()}
    document["proofs"][0] |= {"receipt": receipt, "confirmed": True, "attested": True}
    refused(document, "its receipt does not confirm voucher 3")


def test_an_item_in_another_encoding_is_refused_though_it_was_signed(books):
    """One item, one hash: else the same item could be shown as two."""
    document = as_dict(stated_job(books[1], BUYER, "01"))
    encoded = msgspec.msgpack.encode(item(1, 70, final=True)).replace(b"\x46", b"\xcc\x46", 1)
    body = VoucherBody(B.public_key, WALLET.lane, 9, 100, digest(digest(encoded)))
    signed = msgspec.msgpack.encode(body)
    document["proofs"][0]["voucher"] = {
        "body": signed.hex(),
        "signature": A.sign(voucher_prefixed(signed)).hex(),
        "items": [{"item": encoded.hex()}],
    }
    refused(document, "not in canonical form")
