"""Whether a statement is true: each figure in it is worked out anew from the signed bytes.

Pure, and without a book: it runs on any machine. docs/statement.md says what a statement proves
and what it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

import msgspec

from aivillage.ledger.accusing import verify_evidence
from aivillage.ledger.documents import (
    SERVICE,
    SUCCESSIONS_MAX,
    VERSION,
    VERSION_KEYS,
    Direction,
    Document,
    Evidence,
    JobProof,
    JobStatement,
    Keys,
    LaneTotal,
    Party,
    PayerPayee,
    Proof,
    ShownItem,
    SignedReceipt,
    SignedVoucher,
    Statement,
    wrong,
)
from aivillage.ledger.signing import verified_receipt
from aivillage.protocols import succession
from aivillage.protocols.envelope import Verify
from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import PeerId, as_credits, peer_id
from aivillage.protocols.vouchers import (
    Item,
    Receipt,
    ReceiptBody,
    ReceiptRow,
    VoucherBody,
    bad,
    decode_body,
    digest,
    voucher_prefixed,
)


def verify_document(document: Document, verify: Verify) -> Proof:
    """What `document` proves. `verify` must be the real thing.

    Raises:
        StatementError: the first thing in it that is wrong.
    """
    issuer, peer = (keys_of(party) for party in (document.issuer, document.peer))
    is_evidence = isinstance(document, Evidence)
    if {*issuer} & {*peer} and not (is_evidence and document.issuer == document.peer):
        raise wrong("it is about one peer alone")
    changed = len(issuer) + len(peer) > 2
    if changed != (document.version == VERSION_KEYS):
        raise wrong(f"version {document.version} is not the one of a statement with these keys")
    if isinstance(document, Evidence):
        return verify_evidence(document, (issuer, peer), verify)
    if isinstance(document, Statement):
        return _verify_pair(document, (issuer, peer), verify)
    return _verify_job(document, (issuer, peer), verify)


def keys_of(party: Party) -> Keys:
    """Its key in force and those before it: each of them named the next, which agreed.

    Raises:
        StatementError: the id is not that of the key, or a change of key is not proven.
    """
    if peer_id(bytes.fromhex(party.public_key)) != party.peer:
        raise wrong(f"{party.peer} is not the id of its key")
    if len(party.successions) > SUCCESSIONS_MAX:
        raise wrong(f"{party.peer} changed its key more than {SUCCESSIONS_MAX} times")
    found, peer = [bytes.fromhex(party.public_key)], party.peer
    for envelope in reversed(party.successions):
        try:
            step = succession.read(bytes.fromhex(envelope))
        except PeerError as error:
            raise wrong(f"a change of the key of {party.peer}: {error.message}") from None
        if step.new != peer or step.old_key in found:
            raise wrong(f"a change of key that does not lead to {peer}")
        found.append(step.old_key)
        peer = step.old
    return tuple(found)


# ------------------------------------------------------------------ one pair


def _verify_pair(document: Statement, keys: PayerPayee, verify: Verify) -> Proof:
    """`keys`: of issuer and peer."""
    issuer, peer = keys
    to, by = document.owed_to_issuer, document.owed_by_issuer
    for stated, payer, payee in ((to, peer, issuer), (by, issuer, peer)):
        _compare(stated, summed(stated.vouchers, stated.receipts, (payer, payee), verify))
    if document.net != to.total - by.total:
        raise wrong(f"its net is {document.net}, what was signed gives {to.total - by.total}")
    if document.since_ms > document.until_ms:
        raise wrong("it ends before it begins")
    return _pair_proof(document)


def _compare(stated: Direction, found: Direction) -> None:
    for one, other in zip_longest(stated.lanes, found.lanes):
        if one != other:
            lane = (one or other).lane
            raise wrong(f"what it states of lane {lane} is not what was signed there")
    if stated.total != found.total:
        raise wrong(f"its total is {stated.total}, what was signed gives {found.total}")
    if stated.confirmed != found.confirmed:
        raise wrong(f"{stated.confirmed} is stated as confirmed, receipts give {found.confirmed}")


def summed(
    vouchers: Sequence[SignedVoucher],
    receipts: Sequence[SignedReceipt],
    keys: PayerPayee,
    verify: Verify,
) -> Direction:
    """These vouchers and receipts with what they add up to. `keys`: of payer and payee.

    Raises:
        StatementError: a signature, payee, root, receipt or order is wrong.
    """
    by_lane: dict[bytes, dict[int, _Checked]] = {}
    for voucher in vouchers:
        checked = check_shown(voucher, keys, verify)
        lane = by_lane.setdefault(checked.body.lane, {})
        if lane.setdefault(checked.body.n, checked) is not checked:
            raise wrong(f"{checked.name} is in it twice")
    confirmed = _confirmed(by_lane, receipts, keys, verify)
    lanes = [_lane_total(by_lane[lane], confirmed) for lane in sorted(by_lane)]
    return Direction(
        total=sum(lane.cum for lane in lanes),
        confirmed=sum(lane.confirmed for lane in lanes),
        lanes=lanes,
        vouchers=list(vouchers),
        receipts=list(receipts),
    )


class _Checked(NamedTuple):
    """A voucher whose signature, payee and root are right."""

    body: VoucherBody
    hash: bytes
    name: str


def check_shown(voucher: SignedVoucher, keys: PayerPayee, verify: Verify) -> _Checked:
    """Raises: StatementError: the payer did not sign this, to this payee, with these items."""
    encoded = bytes.fromhex(voucher.body)
    try:
        body = decode_body(encoded, VoucherBody)
    except PeerError as error:
        raise wrong(error.message) from None
    name = f"voucher {body.n} on lane {body.lane.hex()}"
    payer, payee = keys
    if body.payee not in payee:
        raise wrong(f"{name} is not made out to {peer_id(payee[0])}")
    signature = bytes.fromhex(voucher.signature)
    if not any(verify(key, voucher_prefixed(encoded), signature) for key in payer):
        raise wrong(f"{name} is not signed by {peer_id(payer[0])}")
    if digest(b"".join(_hash_of(item, name) for item in voucher.items)) != body.root:
        raise wrong(f"{name} has other items than were signed")
    return _Checked(body, digest(encoded), name)


def _hash_of(shown: ShownItem, name: str) -> bytes:
    if bool(shown.item) == bool(shown.hash) or len(shown.hash) not in {0, 64}:
        raise wrong(f"{name} has an item that is neither shown nor hashed")
    return digest(bytes.fromhex(shown.item)) if shown.item else bytes.fromhex(shown.hash)


_Lanes: TypeAlias = dict[bytes, dict[int, _Checked]]


def _confirmed(
    by_lane: _Lanes, receipts: Sequence[SignedReceipt], keys: PayerPayee, verify: Verify
) -> set[bytes]:
    """Hashes of the voucher bodies that the payee confirmed."""
    confirmed: set[bytes] = set()
    for receipt in receipts:
        body = _receipt_body(receipt, keys, verify)
        lane = by_lane.get(body.lane, {})
        hashes = {row.body_hash for row in body.rows if _row_fits(row, body.lane, lane)}
        if not hashes:
            raise wrong(f"a receipt on lane {body.lane.hex()} confirms nothing that is shown")
        confirmed |= hashes
    return confirmed


def _row_fits(row: ReceiptRow, lane: bytes, shown: dict[int, _Checked]) -> bool:
    """Whether `row` confirms a voucher that is shown; others need not be."""
    voucher = shown.get(row.n)
    if voucher is not None and voucher.hash != row.body_hash:
        raise wrong(f"a receipt confirms another voucher {row.n} on lane {lane.hex()}")
    return voucher is not None


def _receipt_body(receipt: SignedReceipt, keys: PayerPayee, verify: Verify) -> ReceiptBody:
    try:
        signed = Receipt(bytes.fromhex(receipt.body), bytes.fromhex(receipt.signature))
        return verified_receipt(signed, *keys, verify)
    except PeerError as error:
        raise wrong(error.message) from None


def _lane_total(vouchers: dict[int, _Checked], confirmed: set[bytes]) -> LaneTotal:
    cum = confirmed_cum = 0
    for n in sorted(vouchers):
        voucher = vouchers[n]
        if voucher.body.cum < cum:
            raise wrong(f"{voucher.name}: cum falls as n rises")
        cum = voucher.body.cum
        confirmed_cum = cum if voucher.hash in confirmed else confirmed_cum
    last = vouchers[max(vouchers)].body
    return LaneTotal(lane=last.lane.hex(), n=last.n, cum=cum, confirmed=confirmed_cum)


def _pair_proof(document: Statement) -> Proof:
    issuer, peer = document.issuer.peer, document.peer.peer
    to, by = document.owed_to_issuer, document.owed_by_issuer
    debtor, creditor = (peer, issuer) if document.net >= 0 else (issuer, peer)
    return Proof(
        issuer=issuer,
        peer=peer,
        amount=document.net,
        proven=(
            f"{peer} signed for at least {as_credits(to.total)} credits to {issuer}, and {issuer}"
            f" for at least {as_credits(by.total)} to {peer}, which confirmed"
            f" {as_credits(by.confirmed)} of it; by these vouchers {debtor} owes {creditor}"
            f" {as_credits(abs(document.net))}"
        ),
        not_proven=(
            f"that nothing was left out: if vouchers of {peer} were, it owes more than this;"
            f" if vouchers of {issuer} itself were, it owes more and the net is too much in its"
            f" favour, and only {peer} can show them. The dates are {issuer}'s word, and what"
            " was paid outside the mesh is in no voucher" + _replaced(document)
        ),
    )


def _replaced(document: Document) -> str:
    """What successions cannot prove."""
    if document.version == VERSION:
        return ""
    return (
        "; nor who held a key after it was replaced: what is signed with a former key counts as"
        " its owner's"
    )


# ------------------------------------------------------------------ one attempt


def _verify_job(document: JobStatement, of_both: PayerPayee, verify: Verify) -> Proof:
    """`of_both`: the keys of issuer and peer."""
    parties = dict(zip((document.issuer.peer, document.peer.peer), of_both, strict=True))
    if document.payer not in parties:
        raise wrong(f"its payer {document.payer} is neither of the two")
    payer = parties.pop(document.payer)
    ((payee, of_payee),) = parties.items()
    keys = (payer, of_payee)
    found = [
        job_proof(bytes.fromhex(document.attempt), proof.voucher, proof.receipt, keys, verify)
        for proof in document.proofs
    ]
    for stated, true in zip(document.proofs, found, strict=True):
        _compare_proofs(stated, true)
    if len({proof.kind for proof in found}) != len(found):
        raise wrong("it counts one item twice")
    amount = sum(proof.amount for proof in found)
    if document.amount != amount:
        raise wrong(f"its amount is {document.amount}, what was signed gives {amount}")
    return _job_proof_in_words(document, payee)


def _compare_proofs(stated: JobProof, true: JobProof) -> None:
    for field in JobProof.__struct_fields__:
        if getattr(stated, field) != getattr(true, field):
            raise wrong(
                f"its {field.replace('_', ' ')} is {getattr(stated, field)},"
                f" what was signed gives {getattr(true, field)}"
            )


def job_proof(
    attempt: bytes,
    voucher: SignedVoucher,
    receipt: SignedReceipt | None,
    keys: PayerPayee,
    verify: Verify,
) -> JobProof:
    """What one voucher says of `attempt`. `keys`: of payer and payee.

    Raises:
        StatementError: it says nothing, or something in it is wrong.
    """
    checked = check_shown(voucher, keys, verify)
    shown = [_item(entry, checked.name) for entry in voucher.items if entry.item]
    named = [item for item in shown if item.id == attempt and item.kind in SERVICE]
    if len(shown) != 1 or len(named) != 1:
        raise wrong(f"{checked.name} does not show this attempt alone")
    item = named[0]
    if item.amount > checked.body.cum:
        raise wrong(f"{checked.name} names more for the attempt than it pays in all")
    row = _row(receipt, checked, keys, verify)
    return JobProof(
        kind=item.kind,
        amount=item.amount,
        final=item.final,
        quote_hash=item.quote_hash.hex(),
        out_hash=item.out_hash.hex(),
        confirmed=row is not None,
        attested=row is not None and row.attest,
        voucher=voucher,
        receipt=receipt,
    )


def _item(shown: ShownItem, name: str) -> Item:
    encoded = bytes.fromhex(shown.item)
    try:
        item = msgspec.msgpack.decode(encoded, type=Item)
        if msgspec.msgpack.encode(item) != encoded:
            raise bad("has an item that is not in canonical form")
    except (msgspec.DecodeError, RecursionError, PeerError) as error:
        raise wrong(f"{name} shows something that is no item: {error}") from None
    return item


def _row(
    receipt: SignedReceipt | None, checked: _Checked, keys: PayerPayee, verify: Verify
) -> ReceiptRow | None:
    if receipt is None:
        return None
    body = _receipt_body(receipt, keys, verify)
    if body.lane == checked.body.lane:
        for row in body.rows:
            if _row_fits(row, body.lane, {checked.body.n: checked}):
                return row
    raise wrong(f"its receipt does not confirm {checked.name}")


def _job_proof_in_words(document: JobStatement, payee: PeerId) -> Proof:
    payer, proofs = document.payer, document.proofs
    ended = (
        "in all" if any(proof.final for proof in proofs) else "at least, it is not the last word"
    )
    answer = "has not confirmed it here"
    if all(proof.confirmed for proof in proofs):
        attested = all(proof.attested for proof in proofs)
        answer = "confirmed it" + (", and that it knows the attempt and its output" * attested)
    return Proof(
        issuer=document.issuer.peer,
        peer=document.peer.peer,
        amount=document.amount,
        proven=(
            f"{payer} signed {as_credits(document.amount)} credits {ended} to {payee} for attempt"
            f" {document.attempt}; {payee} {answer}"
        ),
        not_proven=(
            f"what is owed today: vouchers for other work, either way, are left out. A later"
            f" voucher for the same attempt may have been left out too; it can only raise what"
            f" {payer} signed. What {payee} confirmed is the money, and the output only by its hash"
            + _replaced(document)
        ),
    )
