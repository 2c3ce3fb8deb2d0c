"""The ledger's blobs: what comes back is what went in, and everything else is refused."""

import contextlib

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols.envelope import is_signed_by, sign
from aivillage.protocols.errors import PeerError
from aivillage.protocols.vouchers import (
    ARREARS,
    BLOB_BYTES_MAX,
    ITEMS_MAX,
    JOB,
    ROUTE,
    Claim,
    Equivocation,
    Item,
    LaneState,
    Receipt,
    ReceiptBody,
    ReceiptRow,
    SignedBody,
    SyncReply,
    SyncRequest,
    Voucher,
    VoucherBody,
    check_equivocation,
    check_receipt,
    check_voucher,
    decode,
    encode,
    lane_epoch,
    lane_of,
    pack_reply,
    pack_request,
    receipt_prefixed,
    root_of,
    voucher_prefixed,
)

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
PAYER, PAYEE = (key.public_key().public_bytes_raw() for key in (KEY, OTHER))
LANE = lane_of(1234, b"12345678")


def items(count, kind=JOB):
    return tuple(
        Item(kind, bytes([n]) * 16, b"q" * 32, 2**53 - 1, b"o" * 32, True) for n in range(count)
    )


def voucher(n=1, cum=5, payee=PAYEE, key=KEY, parts=None):
    parts = parts or items(1)
    body = msgspec.msgpack.encode(VoucherBody(payee, LANE, n, cum, root_of(parts)))
    return Voucher(body, sign(key, voucher_prefixed(body)), parts)


def receipt(payer=PAYER, key=OTHER, count=1):
    rows = tuple(ReceiptRow(n + 1, bytes(32), True) for n in range(count))
    body = msgspec.msgpack.encode(ReceiptBody(payer, LANE, rows))
    return Receipt(body, sign(key, receipt_prefixed(body)))


MESSAGES = [
    voucher(),
    voucher(parts=items(ITEMS_MAX)),
    receipt(count=32),
    SyncRequest(1, 0, 1, (LaneState(False, LANE, 9, (1, 4, 6, 9)),)),
    SyncReply(7, 1, 0, 1, False, (voucher(),), (voucher(2),), (Claim(LANE, b"q", 3, b"o"),)),
    Equivocation(PAYER, SignedBody(b"a", bytes(65)), SignedBody(b"b", bytes(65))),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_blob_comes_back_and_fits(message):
    blob = encode(77, message)
    assert decode(blob) == (77, message)
    assert len(blob) <= BLOB_BYTES_MAX


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_truncated_blob_is_refused(message):
    blob = encode(77, message)
    for end in range(0, len(blob), 7):
        with pytest.raises(PeerError):
            decode(blob[:end])
    with pytest.raises(PeerError):
        decode(blob + b"\0")


@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_decoder(blob):
    with pytest.raises(PeerError):
        decode(blob)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_voucher_is_never_believed(place, flip):
    """Some bit of a good voucher changes: it is refused by the decoder or by the check."""
    blob = bytearray(encode(77, voucher()))
    start = 11  # past the epoch, which nobody signs
    blob[start + place % (len(blob) - start)] ^= flip
    with pytest.raises(PeerError):
        _, message = decode(bytes(blob))
        assert isinstance(message, Voucher)
        check_voucher(message, PAYER, PAYEE, is_signed_by)


def test_a_blob_at_the_limit_passes_the_size_check_and_one_more_does_not():
    with pytest.raises(PeerError) as at_limit:
        decode(b"\xc0" * BLOB_BYTES_MAX)
    with pytest.raises(PeerError) as above:
        decode(b"\xc0" * (BLOB_BYTES_MAX + 1))
    assert (at_limit.value.code, above.value.code) == ("BAD_REQUEST", "TOO_LARGE")


def test_a_voucher_carries_sixteen_items_and_no_more():
    decode(encode(1, voucher(parts=items(ITEMS_MAX))))
    with pytest.raises(PeerError):
        decode(encode(1, voucher(parts=items(ITEMS_MAX + 1))))


def test_other_encodings_of_the_same_value_are_refused():
    blob = encode(5, SyncRequest(1, 0, 1))
    wide = b"\x93\xcd\x00\x05" + blob[2:]  # 5 as a 16-bit integer
    assert msgspec.msgpack.decode(wide) == msgspec.msgpack.decode(blob)
    with pytest.raises(PeerError, match="canonical"):
        decode(wide)


def test_the_amount_limit_is_exact():
    decode(encode(1, voucher(cum=2**53 - 1)))
    check_voucher(voucher(cum=2**53 - 1), PAYER, PAYEE, is_signed_by)
    with pytest.raises(PeerError):
        check_voucher(voucher(cum=2**53), PAYER, PAYEE, is_signed_by)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (voucher(key=OTHER), "signature"),
        (voucher(payee=PAYER), "somebody else"),
        (msgspec.structs.replace(voucher(), items=items(2)), "items"),
        (voucher(parts=items(1, kind=1)), "ring"),
        (voucher(parts=items(1) * 2), "twice"),
        (msgspec.structs.replace(voucher(), body=b"\x90"), "VoucherBody"),
    ],
)
def test_a_wrong_voucher_is_refused(bad, reason):
    with pytest.raises(PeerError, match=reason):
        check_voucher(bad, PAYER, PAYEE, is_signed_by)


def test_a_ring_may_name_its_members_by_former_keys():
    """They changed after it was written; who comes after whom is checked all the same."""
    (item,) = items(1, kind=ROUTE)
    old, older, third = bytes([7]) * 32, bytes([8]) * 32, bytes([9]) * 32
    for ring, good in (((third, old, older), True), ((older, third, old), True),
                       ((old, third, older), False), ((older, old, third), False)):  # fmt: skip
        moved = voucher(parts=(msgspec.structs.replace(item, route=ring),))
        with contextlib.nullcontext() if good else pytest.raises(PeerError, match="this way"):
            check_voucher(moved, PAYER, PAYEE, is_signed_by, former=((old,), (older,)))
        with pytest.raises(PeerError, match="this way"):
            check_voucher(moved, PAYER, PAYEE, is_signed_by)


def test_arrears_are_payments():
    good = voucher(parts=items(1, kind=ARREARS))
    assert check_voucher(good, PAYER, PAYEE, is_signed_by).cum == 5


def test_a_receipt_is_for_its_payer_and_by_its_payee():
    assert check_receipt(receipt(), PAYER, PAYEE, is_signed_by).rows[0].n == 1
    for bad in (receipt(payer=PAYEE), receipt(key=KEY)):
        with pytest.raises(PeerError):
            check_receipt(bad, PAYER, PAYEE, is_signed_by)


def test_a_voucher_signature_is_no_receipt_signature():
    body = receipt().body
    with pytest.raises(PeerError):
        check_receipt(
            Receipt(body, sign(OTHER, voucher_prefixed(body))), PAYER, PAYEE, is_signed_by
        )


def test_two_bodies_for_one_n_are_proof_and_one_is_not():
    first, second = voucher(cum=5), voucher(cum=6)
    signed = [SignedBody(v.body, v.signature) for v in (first, second)]
    assert check_equivocation(Equivocation(PAYER, *signed), is_signed_by).n == 1
    with pytest.raises(PeerError):
        check_equivocation(Equivocation(PAYER, signed[0], signed[0]), is_signed_by)
    with pytest.raises(PeerError):
        check_equivocation(Equivocation(PAYEE, *signed), is_signed_by)


def test_a_lane_tells_its_epoch():
    assert lane_epoch(LANE) == 1234
    assert len(LANE) == 16


def test_long_answers_are_split_into_blobs_that_fit():
    mine = [voucher(n, parts=items(ITEMS_MAX)) for n in range(1, 8)]
    yours = [voucher(n) for n in range(1, 40)]
    claims = [Claim(bytes([n]) * 16, b"q" * 32, n, b"o" * 32) for n in range(60)]
    blobs = pack_reply(9, (8, 2), mine, yours, claims, more=True)
    parts = [decode(blob)[1] for blob in blobs]
    assert max(map(len, blobs)) <= BLOB_BYTES_MAX
    assert [v for part in parts for v in part.mine] == mine
    assert [v for part in parts for v in part.yours] == yours
    assert [c for part in parts for c in part.claims] == claims
    assert [part.part for part in parts] == list(range(parts[0].parts))
    assert all(part.more and (part.answers, part.round) == (8, 2) for part in parts)


def test_a_request_names_a_thousand_lanes():
    lanes = [LaneState(True, n.to_bytes(16, "big"), n) for n in range(1, 1001)]
    parts = [decode(blob)[1] for blob in pack_request(3, 1, lanes)]
    assert [lane for part in parts for lane in part.lanes] == lanes
    assert len(pack_request(3, 1, [])) == 1
