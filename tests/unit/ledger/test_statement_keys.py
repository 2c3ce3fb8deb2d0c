"""Statements across changes of keys: every key counts, and only those that the one before named."""

import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books as ledger_books
from aivillage.ledger import payee, payer
from aivillage.ledger.documents import SUCCESSIONS_MAX, Party, StatementError
from aivillage.ledger.signing import Ed25519Signer
from aivillage.ledger.statement import keys_of
from aivillage.protocols import succession
from aivillage.protocols.types import peer_id
from tests.unit.ledger.pairs import traded
from tests.unit.ledger.test_statement import as_dict, refused, stated, stated_job, verified
from tests.unit.ledger.test_steps import BUYER, SELLER, WALLET, item

SEEDS = {"buyer": (1, 11, 12), "seller": (2, 21)}
KEYS = {
    who: [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in seeds]
    for who, seeds in SEEDS.items()
}
NAMES_OF = {
    who: [peer_id(key.public_key().public_bytes_raw()) for key in keys]
    for who, keys in KEYS.items()
}


def rotate(own, other, who):
    """One more key of `who`, in its own book and in the other's."""
    known = len(ledger_books.own_keys(own))
    old, new = KEYS[who][known - 1 : known + 1]
    proof = succession.make(old, new, known)
    with own, other:
        ledger_books.add_own_key(own, new.public_key().public_bytes_raw(), proof, 1)
        ledger_books.succeed(other, NAMES_OF[who][known - 1], NAMES_OF[who][known], proof, 1)
    return Ed25519Signer(new)


@pytest.fixture
def rotated():
    """The buyer changed its key twice and the seller once, and each key signed something."""
    buyer, seller = traded()
    for n, who in ((5, "buyer"), (6, "seller"), (7, "buyer")):
        own, other = (buyer, seller) if who == "buyer" else (seller, buyer)
        signer = rotate(own, other, who)
        payer_book, payee_book, payee_name, payer_name = (
            (buyer, seller, SELLER, BUYER) if who == "buyer" else (seller, buyer, BUYER, SELLER)
        )
        wallet = payer.Wallet(signer, WALLET.lane[:8] + bytes([n]) * 8)
        with payer_book:
            voucher = payer.make_voucher(payer_book, wallet, payee_name, [item(n, n, True)], 1)
        with payee_book:
            payee.book_voucher(payee_book, payer_name, voucher, "receive", attest=True, at_ms=1)
    return buyer, seller


def test_a_statement_speaks_for_every_key_that_a_peer_ever_had(rotated):
    buyer, seller = rotated
    of_buyer, of_seller = stated(buyer, SELLER), stated(seller, BUYER)
    assert (of_buyer.version, of_buyer.net, of_seller.net) == (2, 46 - 112, (95 + 5 + 7) - 46)
    assert of_buyer.issuer.peer == NAMES_OF["buyer"][2]
    assert [len(p.successions) for p in (of_buyer.issuer, of_buyer.peer)] == [2, 1]
    assert of_buyer.owed_by_issuer.confirmed == 95  # confirmed by the seller's first key
    for document in (of_buyer, of_seller):
        proof = verified(document)
        assert "what is signed with a former key counts" in proof.not_proven
    job = stated_job(buyer, SELLER, "05")
    assert (job.version, job.amount, job.payer) == (2, 5, NAMES_OF["buyer"][2])
    verified(job)


def test_a_peer_is_found_by_its_earlier_and_its_later_id(rotated):
    buyer, _ = rotated
    assert len({stated(buyer, name[-8:]).net for name in NAMES_OF["seller"]}) == 1
    assert stated(buyer, NAMES_OF["seller"][1]) == stated(buyer, NAMES_OF["seller"][0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.reverse(), "does not lead to"),
        (lambda s: s.pop(0), "is not (signed by|made out to)"),
        (lambda s: s.pop(), "does not lead to"),
        (lambda s: s.clear(), "is not (signed by|made out to)"),
        (lambda s: s.append(s[0]), "does not lead to"),
        (lambda s: s.__setitem__(0, s[0][:-2] + "00"), "a change of the key of"),
        (lambda s: s.__setitem__(0, "00"), "a change of the key of"),
    ],
    ids=["order", "first gone", "last gone", "all gone", "twice", "unsigned", "garbage"],
)
@pytest.mark.parametrize("kind", ["pair", "job"])
def test_a_change_of_key_that_is_not_proven_is_refused(rotated, kind, change, told):
    """Offline, from the file alone."""
    _, seller = rotated
    document = stated(seller, BUYER) if kind == "pair" else stated_job(seller, BUYER, "01")
    changed = as_dict(document)
    change(changed["peer"]["successions"])
    refused(changed, told)


def test_somebody_elses_key_is_no_successor_without_a_proof():
    changed = as_dict(stated(traded()[1], BUYER))
    evil = KEYS["buyer"][2]
    changed["version"] = 2
    changed["peer"] = {
        "peer": NAMES_OF["buyer"][2],
        "public_key": evil.public_key().public_bytes_raw().hex(),
        "successions": [succession.make(KEYS["seller"][1], evil, 1).hex()],
    }
    refused(changed, "is not signed by")


def test_the_version_says_whether_there_were_other_keys(rotated):
    for document, version in ((stated(traded()[0], SELLER), 2), (stated(rotated[0], SELLER), 1)):
        refused(as_dict(document) | {"version": version}, f"version {version} is not the one")
    assert "successions" not in json.dumps(as_dict(stated(traded()[0], SELLER)))


def test_the_changes_of_a_key_have_a_bound(rotated):
    document = as_dict(stated(rotated[1], BUYER))
    envelope = document["peer"]["successions"][0]
    document["peer"]["successions"] = [envelope] * SUCCESSIONS_MAX
    refused(document, "does not lead to")
    document["peer"]["successions"] = [envelope] * (SUCCESSIONS_MAX + 1)
    refused(document, "is no statement")
    party = msgspec.convert(document["issuer"], Party)
    party = msgspec.structs.replace(party, successions=("00",) * (SUCCESSIONS_MAX + 1))
    with pytest.raises(StatementError, match="more than 64 times"):
        keys_of(party)
