"""Ledger blobs off the wire: ours come back unchanged, everything else is a PeerError."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from aivillage.protocols import vouchers
from aivillage.protocols.envelope import is_signed_by, sign
from aivillage.protocols.errors import PeerError
from aivillage.protocols.vouchers import (
    BLOB_BYTES_MAX,
    JOB,
    Claim,
    Equivocation,
    Item,
    LaneDigest,
    LaneState,
    Receipt,
    ReceiptBody,
    ReceiptRow,
    SignedBody,
    SyncDigest,
    SyncReply,
    SyncRequest,
    Voucher,
    VoucherBody,
)

PAYER_KEY = Ed25519PrivateKey.from_private_bytes(b"p" * 32)
PAYEE_KEY = Ed25519PrivateKey.from_private_bytes(b"q" * 32)
PAYER, PAYEE = (key.public_key().public_bytes_raw() for key in (PAYER_KEY, PAYEE_KEY))
LANE, ID, HASH = bytes(16), b"i" * 16, b"h" * 32
ITEM = Item(JOB, ID, HASH, 269, HASH, final=True)
pack = msgspec.msgpack.encode


def _voucher(items=(ITEM,), key=PAYER_KEY, **changes):
    body = VoucherBody(PAYEE, LANE, 1, 269, vouchers.root_of(items))
    packed = pack(msgspec.structs.replace(body, **changes))
    return Voucher(packed, sign(key, vouchers.voucher_prefixed(packed)), tuple(items))


def _receipt():
    body = pack(ReceiptBody(PAYER, LANE, (ReceiptRow(1, HASH, attest=True),)))
    return Receipt(body, sign(PAYEE_KEY, vouchers.receipt_prefixed(body)))


def _proof(second):
    first = _voucher()
    signed = [SignedBody(v.body, v.signature) for v in (first, second)]
    return Equivocation(PAYER, *signed)


SAMPLES = (
    _voucher(),
    _receipt(),
    SyncDigest(1, LaneDigest(0, bytes(32)), LaneDigest(7, bytes(32)), (LaneState(True, LANE, 3),)),
    SyncRequest(1, 0, 1, (LaneState(True, LANE, 3), LaneState(False, LANE, 9, (1, 4, 6, 9)))),
    SyncReply(7, 1, 0, 1, False, (_voucher(),), (_voucher(),), (Claim(ID, HASH, 5, HASH),)),
    _proof(_voucher(cum=1)),
)


def _name(message):
    return type(message).__name__


def test_there_is_a_sample_of_every_ledger_message():
    assert {type(sample) for sample in SAMPLES} == set(vouchers._TYPES.values())


@pytest.mark.parametrize("message", SAMPLES, ids=_name)
def test_a_blob_comes_back_as_it_was_sent(message):
    assert vouchers.decode(vouchers.encode(5, message)) == (5, message)


@pytest.mark.parametrize("message", SAMPLES, ids=_name)
def test_a_blob_cut_anywhere_or_with_bytes_behind_it_is_refused(message):
    blob = vouchers.encode(5, message)
    for cut in range(len(blob)):
        with pytest.raises(PeerError):
            vouchers.decode(blob[:cut])
    with pytest.raises(PeerError):
        vouchers.decode(blob + b"\0")


def test_a_blob_over_its_limit_is_refused_before_it_is_looked_at():
    with pytest.raises(PeerError) as caught:
        vouchers.decode(b"\xff" * (BLOB_BYTES_MAX + 1))
    assert caught.value.code == "TOO_LARGE"
    with pytest.raises(PeerError) as caught:
        vouchers.decode(b"\xff" * BLOB_BYTES_MAX)
    assert caught.value.code == "BAD_REQUEST"


@pytest.mark.parametrize("opener", [b"\x91", b"\x81"])
def test_a_bottomless_blob_is_refused(opener):
    with pytest.raises(PeerError):
        vouchers.decode(b"\x93\x05\x01" + opener * 4000 + b"\xc0")
    with pytest.raises(PeerError):
        vouchers.decode_body(b"\x95" + opener * 4000 + b"\xc0", VoucherBody)


def test_the_same_blob_in_other_msgpack_is_refused():
    blob = vouchers.encode(5, SAMPLES[0])
    assert blob[1:2] == b"\x05"
    with pytest.raises(PeerError, match="canonical"):
        vouchers.decode(blob[:1] + b"\xcc\x05" + blob[2:])


@pytest.mark.parametrize("tag", [0, 6, -1, 2**63])
def test_an_unknown_type_of_blob_is_refused(tag):
    with pytest.raises(PeerError):
        vouchers.decode(pack((5, tag, SAMPLES[0])))


@given(st.sampled_from(SAMPLES), st.data())
def test_a_damaged_blob_is_a_message_or_a_peer_error(message, data):
    blob = bytearray(vouchers.encode(5, message))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        vouchers.decode(bytes(blob))
    except PeerError as error:
        assert error.code == "BAD_REQUEST"


@given(st.binary(max_size=200))
@example(b"\x93\x01\x01\x81\x80\x01")
def test_any_bytes_are_no_blob(data):
    with pytest.raises(PeerError):
        vouchers.decode(data)


# ------------------------------------------------------------------ who signed what


def _refused(voucher, payer=PAYER, payee=PAYEE):
    with pytest.raises(PeerError) as caught:
        vouchers.check_voucher(voucher, payer, payee, is_signed_by)
    return str(caught.value)


def test_a_voucher_is_believed_only_as_signed():
    assert vouchers.check_voucher(_voucher(), PAYER, PAYEE, is_signed_by).cum == 269
    assert "somebody else" in _refused(_voucher(), payee=PAYER)
    assert "wrong signature" in _refused(_voucher(), payer=PAYEE)
    assert "wrong signature" in _refused(_voucher(key=PAYEE_KEY))
    changed = msgspec.structs.replace(_voucher(), body=_voucher(cum=2**40).body)
    assert "wrong signature" in _refused(changed)


def test_items_that_were_not_signed_are_refused():
    dearer = msgspec.structs.replace(ITEM, amount=ITEM.amount + 1)
    assert "not those signed" in _refused(msgspec.structs.replace(_voucher(), items=(dearer,)))
    more = msgspec.structs.replace(ITEM, id=b"o" * 16)
    assert "not those signed" in _refused(msgspec.structs.replace(_voucher(), items=(ITEM, more)))


def test_one_attempt_twice_in_a_voucher_is_refused():
    twice = (ITEM, msgspec.structs.replace(ITEM, amount=1))
    assert "names one attempt twice" in _refused(_voucher(items=twice))


def test_a_receipt_is_worth_nothing_as_a_voucher():
    receipt = _receipt()
    assert "no VoucherBody" in _refused(Voucher(receipt.body, receipt.signature, (ITEM,)))
    voucher = _voucher()
    assert not is_signed_by(PAYER, vouchers.receipt_prefixed(voucher.body), voucher.signature)


def test_two_vouchers_prove_a_lie_only_if_they_contradict_each_other():
    for lie in (_voucher(cum=1), _voucher(n=2, cum=268)):  # one number, or a later one with less
        assert vouchers.check_equivocation(_proof(lie), is_signed_by).cum == 269
    no_lies = (_voucher(), _voucher(n=2, cum=269), _voucher(lane=b"l" * 16, cum=1))
    for no_lie in (*no_lies, _voucher(payee=bytes(32), cum=1)):
        with pytest.raises(PeerError, match="do not contradict"):
            vouchers.check_equivocation(_proof(no_lie), is_signed_by)
    with pytest.raises(PeerError, match="unsigned"):
        vouchers.check_equivocation(_proof(_voucher(key=PAYEE_KEY, cum=1)), is_signed_by)
