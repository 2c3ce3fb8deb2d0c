"""Proofs that a payer contradicted itself: what is kept must convince somebody else."""

import pytest

from aivillage.ledger import books, exposure, sync
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import (
    Equivocation,
    SignedBody,
    check_equivocation,
    encode,
    voucher_prefixed,
)
from tests.simulation.scenes import Village
from tests.unit.ledger.test_steps import (
    BUYER,
    NOW,
    SELLER,
    A,
    B,
    body_of,
    book,
    forged,
    item,
    sign,
    take,
)

KEPT = "SELECT first_body, first_signature, second_body, second_signature FROM evidence"


@pytest.mark.parametrize(
    ("stored", "later"),
    [
        (forged(2, 10, item(1, 10)), forged(1, 20, item(2, 20))),
        (forged(1, 20, item(1, 20)), forged(2, 10, item(2, 10))),
        (forged(1, 20, item(1, 20)), forged(1, 10, item(2, 10))),
    ],
    ids=["an earlier one says more", "a later one says less", "one number, two bodies"],
)
def test_both_signed_bodies_are_kept_and_nothing_is_booked(stored, later):
    seller = book(B)
    exposure.certify(seller, BUYER, 1_000, 160, NOW)
    take(seller, stored)
    before = books.read_pair(seller, BUYER)
    assert take(seller, later).receipt is None
    assert books.read_pair(seller, BUYER) == before
    (kept,) = books.rows(seller, KEPT)
    for body, signature, voucher in ((*kept[:2], stored), (*kept[2:], later)):
        assert body == voucher.body
        assert B.verify(A.public_key, voucher_prefixed(body), signature)


@pytest.mark.parametrize(
    ("stored", "later"),
    [
        (forged(1, 20, item(1, 20)), forged(2, 20, item(1, 20, final=True))),
        (forged(2, 20, item(1, 20)), forged(1, 20, item(2, 20))),
        (forged(2, 20, item(1, 20)), forged(1, 19, item(2, 19))),
    ],
    ids=["a later one says as much", "an earlier one says as much", "an earlier one says less"],
)
def test_what_contradicts_nothing_is_no_evidence(stored, later):
    seller = book(B)
    exposure.certify(seller, BUYER, 1_000, 160, NOW)
    take(seller, stored)
    assert take(seller, later).receipt is not None
    assert books.rows(seller, KEPT) == []
    assert books.read_pair(seller, BUYER).balance == 20


def accuse(first_n, second_n):
    """(village, liar, judge), and the proof that a third one shows to the judge."""
    village = Village()
    liar, witness, judge = village.nodes
    signed = []
    for n, cum in ((first_n, 10), (second_n, 20)):
        body = forged(n, cum, item(1, cum)).body
        signed.append(SignedBody(body, liar.signer.sign(voucher_prefixed(body))))
    proof = Equivocation(liar.signer.public_key, *signed)
    return village, (liar, witness, judge), proof


def test_a_proof_that_somebody_shows_is_checked_and_kept():
    _, (liar, witness, judge), proof = accuse(1, 1)
    judge.ledger.receive(witness.id, encode(witness.ledger.desk.epoch, proof))
    judge.runner.flush()
    assert books.rows(judge.db, "SELECT payer, n FROM evidence") == [(liar.id, 1)]
    assert check_equivocation(proof, judge.signer.verify) == body_of(proof.first)


def test_what_is_no_proof_is_refused():
    _, (_, witness, judge), proof = accuse(1, 2)
    with pytest.raises(PeerError):
        judge.ledger.receive(witness.id, encode(witness.ledger.desk.epoch, proof))


def test_a_proof_about_a_stranger_is_not_kept():
    _, (_, witness, judge), proof = accuse(1, 1)
    about = Equivocation(bytes(32), proof.first, proof.second)
    judge.ledger.receive(witness.id, encode(witness.ledger.desk.epoch, about))
    judge.runner.flush()
    assert books.rows(judge.db, "SELECT 1 FROM evidence") == []


def test_a_peer_may_change_its_key_again_and_again():
    db = book(B)
    names = [peer_id(bytes([n]) * 32) for n in range(5)]
    for former, name in zip((BUYER, *names), names, strict=False):
        assert books.succeed(db, former, name, b"proof", NOW)
    assert books.key_of(db, BUYER) == bytes([4]) * 32
    assert {books.name_of(db, bytes([n]) * 32) for n in range(5)} == {BUYER}
    assert not books.succeed(db, BUYER, names[0], b"proof", NOW)


def test_the_budget_for_claims_is_the_exposure_and_a_sixteenth_of_what_was_paid():
    buyer = book(A)
    exposure.set_received(buyer, SELLER, 1_000, 100)
    assert sync.arrears_left(buyer, SELLER) == 100
    sign(buyer, item(1, 320))
    assert sync.arrears_left(buyer, SELLER) == 120
    buyer.execute("UPDATE peer SET arrears = 16")
    assert sync.arrears_left(buyer, SELLER) == 100 + (320 - 16) // 16 - 16
