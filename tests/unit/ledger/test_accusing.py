"""Proofs that a payer contradicted itself, shown: to those who are here, and in a file."""

import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books, exposure, issuing, payer, queries
from aivillage.ledger.documents import PROOFS_MAX, Evidence, StatementError
from aivillage.protocols import succession
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import (
    Equivocation,
    SignedBody,
    Voucher,
    VoucherBody,
    encode,
    root_of,
    voucher_prefixed,
)
from tests.simulation.scenes import Village
from tests.unit.ledger.test_statement import as_dict, refused, verified
from tests.unit.ledger.test_steps import A_KEY, BUYER, NOW, SELLER, A, B, book, forged, item, take

KEPT = "SELECT payer, n FROM evidence"


@pytest.fixture
def seller():
    """It was shown two vouchers with one number, and a later one that says less."""
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, NOW)
    take(db, forged(1, 20, item(1, 20)))
    take(db, forged(1, 10, item(2, 10)))
    take(db, forged(2, 15, item(3, 15)))
    return db


def held(db, peer=""):
    found = queries.run(db, issuing.evidence(peer, 9_000_000, is_signed_by))
    return [document for document, _ in found]


def test_a_stranger_checks_from_the_file_alone_that_a_payer_contradicted_itself(seller):
    (document,) = held(seller)
    assert held(seller, BUYER[-8:]) == [document]
    proof = verified(document)
    assert (proof.peer, proof.issuer) == (BUYER, SELLER)
    assert f"{BUYER} contradicted itself in writing to {SELLER}, 2 times" in proof.proven
    assert "says 0.00002 once, and 0.00001 once" in proof.proven
    assert "voucher 1 says 0.00002 in all, and 2 says 0.000015" in proof.proven
    assert "two running copies" in proof.not_proven


def test_a_book_without_proofs_accuses_nobody():
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, NOW)
    assert held(db) == held(db, BUYER) == []
    with pytest.raises(RequestError):
        held(db, "nobody")


def test_no_byte_of_a_proof_can_be_changed_unnoticed(seller):
    document = as_dict(held(seller)[0])
    for field, value in document["proofs"][0].items():
        for place in range(0, len(value), 2):
            changed = json.loads(json.dumps(document))
            flipped = f"{int(value[place : place + 2], 16) ^ 1:02x}"
            changed["proofs"][0][field] = value[:place] + flipped + value[place + 2 :]
            with pytest.raises(StatementError):
                verified(msgspec.convert(changed, Evidence))


def signed(n, cum, number, payee=B.public_key):
    body = msgspec.msgpack.encode(
        VoucherBody(payee, b"l" * 16, n, cum, root_of([item(number, cum)]))
    )
    return body.hex(), A.sign(voucher_prefixed(body)).hex()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (signed(1, 10, 1), signed(1, 10, 1)),
        (signed(1, 10, 1), signed(2, 10, 1)),
        (signed(1, 10, 1), signed(2, 20, 2)),
        (signed(1, 10, 1), signed(1, 20, 2, payee=bytes(32))),
    ],
    ids=["the same", "a later one as much", "a later one more", "to another payee"],
)
def test_what_contradicts_nothing_accuses_nobody(seller, one, other):
    """A boot signs to all payees on one lane: the same number to two of them is honest."""
    names = ("first_body", "first_signature", "second_body", "second_signature")
    proof = dict(zip(names, (*one, *other), strict=True))
    refused(as_dict(held(seller)[0]) | {"proofs": [proof]}, "do not contradict")


def test_nobody_is_accused_of_what_another_signed(seller):
    document = as_dict(held(seller)[0])
    refused(document | {"peer": document["issuer"]}, "unsigned proof")
    other = {"peer": peer_id(bytes(range(32))), "public_key": bytes(range(32)).hex()}
    refused(document | {"peer": other}, "unsigned proof")


def test_the_proofs_of_one_document_have_a_bound(seller):
    document = as_dict(held(seller)[0])
    proof = document["proofs"][0]
    verified(msgspec.convert(document | {"proofs": [proof] * PROOFS_MAX}, Evidence))
    refused(document | {"proofs": [proof] * (PROOFS_MAX + 1)}, "is no statement")
    refused(document | {"proofs": []}, "is no statement")


def test_what_a_key_signed_before_it_was_replaced_counts_against_its_owner(seller):
    new = Ed25519PrivateKey.from_private_bytes(bytes([33]) * 32)
    proof = succession.make(A_KEY, new, 1)
    name = peer_id(new.public_key().public_bytes_raw())
    with seller:
        books.succeed(seller, BUYER, name, proof, NOW)
    (document,) = held(seller, name)
    assert (document.version, document.peer.peer) == (2, name)
    assert verified(document).peer == name
    changed = as_dict(document)
    del changed["peer"]["successions"]
    refused(changed | {"version": 1}, "unsigned proof")


def test_a_copy_of_this_node_that_signed_too_is_held_against_this_node():
    db = book(A)
    for voucher in (forged(1, 20, item(1, 20)), forged(1, 10, item(2, 10))):
        with db:
            payer.adopt(db, SELLER, voucher, NOW)
    assert books.rows(db, KEPT) == [(BUYER, 1)]
    (document,) = held(db, BUYER)
    assert document.issuer == document.peer
    assert verified(document).peer == BUYER


# ------------------------------------------------------------------ told


@pytest.fixture
def village():
    """(village, liar, witness, judge), all linked."""
    village = Village()
    return village, *village.nodes


def lie(village, cums=(10, 20), ns=(1, 1)):
    """The liar signs twice for the witness."""
    _, liar, witness, _ = village
    for n, cum in zip(ns, cums, strict=True):
        wanted = (item(cum, cum),)
        body = msgspec.msgpack.encode(
            VoucherBody(witness.signer.public_key, b"x" * 16, n, cum, root_of(wanted))
        )
        voucher = Voucher(body, liar.signer.sign(voucher_prefixed(body)), wanted)
        witness.ledger.receive(liar.id, encode(liar.ledger.desk.epoch, voucher))
        witness.runner.flush()


def test_a_proof_is_told_to_the_payer_and_to_whoever_is_here(village):
    scene, liar, witness, judge = village
    lie(village)
    scene.wait(5)
    for node in (liar, witness, judge):
        assert books.rows(node.db, KEPT) == [(liar.id, 1)], node.index


def test_a_proof_goes_on_to_whom_the_witness_does_not_meet(village):
    scene, liar, witness, judge = village
    scene.part(witness, judge)
    lie(village)
    scene.wait(5)
    assert books.rows(judge.db, KEPT) == [(liar.id, 1)]  # by the liar's own node, which was told


def sent(node, call):
    """The blobs that `node` sends while `call` runs."""
    blobs = []
    for partner in node.ledger.desk.partners.values():
        partner.link.send = blobs.append
    call()
    return blobs


def test_a_proof_is_told_once(village):
    _, liar, witness, judge = village
    bodies = [
        SignedBody(body, liar.signer.sign(voucher_prefixed(body)))
        for body in (forged(1, cum, item(1, cum)).body for cum in (10, 20))
    ]
    blob = encode(witness.ledger.desk.epoch, Equivocation(liar.signer.public_key, *bodies))

    def hear():
        judge.ledger.receive(witness.id, blob)
        judge.runner.flush()

    assert len(sent(judge, hear)) == 2
    assert sent(judge, hear) == []


def test_what_older_peers_take_for_no_proof_is_kept_and_not_told(village):
    """They end the link with whoever sends what they cannot check."""
    _, liar, witness, _ = village
    blobs = sent(witness, lambda: lie(village, cums=(20, 10), ns=(1, 2)))
    assert books.rows(witness.db, KEPT) == [(liar.id, 2)]
    assert not [blob for blob in blobs if len(blob) > 200]
