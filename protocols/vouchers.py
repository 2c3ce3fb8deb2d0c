r"""What two books say to each other: vouchers, receipts, and what heals them after a crash.

A blob is the msgpack array `[sender epoch, type, message]`, at most 4 KiB, in canonical form
(encoding what was decoded gives the same bytes). Amounts are micro-credits. Signatures are
`alg byte || raw bytes` over `aivillage/ledger/2\0<type>\0` and the exact body bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from aivillage.protocols.envelope import Verify
from aivillage.protocols.errors import LedgerError, PeerError
from aivillage.protocols.types import AMOUNT_MAX, Amount

BLOB_BYTES_MAX: Final = 4096
"""The codec holds a frame to it too; whatever comes another way is measured here."""
ITEMS_MAX: Final = 16
ID_BYTES: Final = 16
HASH_BYTES: Final = 32
RECEIPT_ROWS_MAX: Final = 32
CLAIMS_MAX: Final = 64
STRANGER_PARTS_MAX: Final = 16
"""Of what a peer without a line asks: 60 KiB of lanes."""
PARTS_MAX: Final = 4096
"""16 MiB of SYNC at most; what does not fit follows in the next round."""

JOB: Final = 0
ROUTE: Final = 1
ARREARS: Final = 2
REFUND: Final = 3
GIFT: Final = 4
"""Kinds of item: work; a transfer that passes on; work claimed after a crash; a transfer that
comes back; a present. Only the first and the third pay for service."""
SERVICE: Final = frozenset({JOB, ARREARS})
ROUTE_MINOR: Final = 1
"""Transfers and gifts go only to peers whose hello says this minor version or a later one."""
RING_MIN: Final = 3
RING_MAX: Final = 5
"""Members of a transfer's ring: two would be a payment, and each more is one more to wait for."""

_PART_BYTES: Final = 3800  # leaves room for the frame around the elements of a part

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Lane = Annotated[bytes, Meta(min_length=16, max_length=16)]
Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
ShortHash = Annotated[bytes, Meta(max_length=32)]
Signature = Annotated[bytes, Meta(min_length=65, max_length=65)]
Count = Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]


class Item(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One attempt's share of a voucher. `amount` is cumulative for this (kind, id).

    Of a transfer `route` is the whole ring: each pays the next, and the last one the first.
    """

    kind: Annotated[int, Meta(ge=JOB, le=GIFT)]
    id: Id
    quote_hash: ShortHash
    amount: Amount
    out_hash: ShortHash
    final: bool
    route: Annotated[tuple[Key, ...], Meta(max_length=RING_MAX)] = ()


class VoucherBody(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the payer signs: "on this lane I owe `payee` `cum` in all"."""

    payee: Key
    lane: Lane
    n: Count
    cum: Amount
    root: Digest


class Voucher(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Signed body bytes and, beside them, the items whose hashes make up its root."""

    body: Annotated[bytes, Meta(max_length=256)]
    signature: Signature
    items: Annotated[tuple[Item, ...], Meta(min_length=1, max_length=ITEMS_MAX)]


class ReceiptRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`attest`: I know these attempts and their output, not only the money."""

    n: Count
    body_hash: Digest
    attest: bool


class ReceiptBody(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    payer: Key
    lane: Lane
    rows: Annotated[tuple[ReceiptRow, ...], Meta(min_length=1, max_length=RECEIPT_ROWS_MAX)]


class Receipt(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    body: Annotated[bytes, Meta(max_length=3000)]
    signature: Signature


class LaneState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the asking side has of one lane.

    `mine`: the asking side is its payer. `held`: for lanes of the answering side, runs of n
    that the asking side holds, as first, last, first, last...
    """

    mine: bool
    lane: Lane
    n: Count
    held: Annotated[tuple[int, ...], Meta(max_length=64)] = ()


class Claim(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Seller to a buyer that restarted: this attempt had been delivered up to `amount`."""

    id: Id
    quote_hash: ShortHash
    amount: Amount
    out_hash: ShortHash


Part = Annotated[int, Meta(ge=0, lt=PARTS_MAX)]
Parts = Annotated[int, Meta(ge=1, le=PARTS_MAX)]


class SyncRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One part of "this is what I have; show me the rest". `round` counts up on a link."""

    round: Count
    part: Part
    parts: Parts
    lanes: tuple[LaneState, ...] = ()


class LaneDigest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Of all lanes of a payer's former boots: how many, and the hash over what they say."""

    count: Amount
    hash: Digest


class SyncDigest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A SYNC_REQ in one blob, since minor version 1: old lanes by their digest only.

    Where a digest differs the answer is empty and asks for more: then all lanes are listed.
    """

    round: Count
    mine: LaneDigest
    yours: LaneDigest
    lanes: Annotated[tuple[LaneState, ...], Meta(max_length=16)] = ()


class SyncReply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One part of the answer to request `round` of epoch `answers`.

    `mine`: vouchers that the sender signed. `yours`: vouchers that the asking side signed and
    seems to have forgotten, in order of n. `more`: ask again, it did not all fit.
    """

    answers: Amount
    round: Count
    part: Part
    parts: Parts
    more: bool
    mine: tuple[Voucher, ...] = ()
    yours: tuple[Voucher, ...] = ()
    claims: Annotated[tuple[Claim, ...], Meta(max_length=CLAIMS_MAX)] = ()


class SignedBody(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    body: Annotated[bytes, Meta(max_length=256)]
    signature: Signature


class Equivocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Two bodies of one payer for the same payee, lane and n: proof that it lied."""

    payer: Key
    first: SignedBody
    second: SignedBody


Message: TypeAlias = Voucher | Receipt | SyncRequest | SyncReply | Equivocation | SyncDigest

_TYPES: Final[dict[int, type[Message]]] = {
    1: Voucher,
    2: Receipt,
    3: SyncRequest,
    4: SyncReply,
    5: Equivocation,
    6: SyncDigest,
}
_TAGS: Final = {kind: tag for tag, kind in _TYPES.items()}


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    epoch: Amount
    tag: int
    message: msgspec.Raw


T = TypeVar("T", bound=msgspec.Struct)


def bad(reason: str) -> PeerError:
    return PeerError(f"a ledger blob {reason}", code="BAD_REQUEST")


def encode(epoch: int, message: Message) -> bytes:
    """The blob that carries `message` from a sender of boot `epoch`."""
    return msgspec.msgpack.encode((epoch, _TAGS[type(message)], message))


def decode(blob: bytes) -> tuple[int, Message]:
    """(sender's epoch, message).

    Raises:
        PeerError: TOO_LARGE above 4 KiB; BAD_REQUEST, malformed or not canonical.
    """
    if len(blob) > BLOB_BYTES_MAX:
        raise PeerError(f"a ledger blob of {len(blob):,} bytes", code="TOO_LARGE")
    try:
        frame = msgspec.msgpack.decode(blob, type=_Frame)
        kind = _TYPES[frame.tag]
        message = msgspec.msgpack.decode(frame.message, type=kind)
    except (msgspec.DecodeError, RecursionError, KeyError) as error:
        raise bad(f"is malformed: {error}") from None
    if encode(frame.epoch, message) != blob:
        raise bad("is not in canonical form")
    return frame.epoch, message


def decode_body(body: bytes, kind: type[T]) -> T:
    """A signed body as a value.

    Raises:
        PeerError: BAD_REQUEST, malformed or not canonical.
    """
    try:
        value = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad(f"has no {kind.__name__} in it: {error}") from None
    if msgspec.msgpack.encode(value) != body:
        raise bad(f"has a {kind.__name__} that is not in canonical form")
    return value


def voucher_prefixed(body: bytes) -> bytes:
    """The bytes that a payer signs."""
    return b"aivillage/ledger/2\0voucher\0" + body


def receipt_prefixed(body: bytes) -> bytes:
    """The bytes that a payee signs."""
    return b"aivillage/ledger/2\0receipt\0" + body


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def root_of(items: Iterable[Item]) -> bytes:
    """sha-256 of the concatenated item hashes: one item can be shown without the others."""
    return digest(b"".join(digest(msgspec.msgpack.encode(item)) for item in items))


def lane_of(epoch: int, random_bytes: bytes) -> bytes:
    """A lane id: 8 bytes of the payer's boot epoch, 8 of the system's randomness."""
    return epoch.to_bytes(8, "big") + random_bytes[:8]


def lane_epoch(lane: bytes) -> int:
    return int.from_bytes(lane[:8], "big")


def check_voucher(
    voucher: Voucher,
    payer: bytes,
    payee: bytes,
    verify: Verify,
    *,
    former: tuple[Sequence[bytes], Sequence[bytes]] = ((), ()),
) -> VoucherBody:
    """The body, if `payer` signed it to `payee` and the items are those that it names.

    `former`: other keys of the payer and of the payee, by which a ring may name them: it was
    written before they changed.

    Raises:
        PeerError: BAD_REQUEST, wrong payee, root, kinds of item or signature.
    """
    body = decode_body(voucher.body, VoucherBody)
    if body.payee != payee:
        raise bad("has a voucher for somebody else")
    for item in voucher.items:
        _check_route(item, (payer, *former[0]), (payee, *former[1]))
    if len({(item.kind, item.id) for item in voucher.items}) != len(voucher.items):
        raise bad("has a voucher that names one attempt twice")
    if root_of(voucher.items) != body.root:
        raise bad("has a voucher whose items are not those signed")
    if not verify(payer, voucher_prefixed(voucher.body), voucher.signature):
        raise bad("has a voucher with a wrong signature")
    return body


def _check_route(item: Item, payers: Sequence[bytes], payees: Sequence[bytes]) -> None:
    """A transfer names its ring, in which the payer comes right before the payee; others none."""
    if item.kind != ROUTE:
        if item.route:
            raise bad("has a route where none belongs")
        return
    ring = item.route
    if len(ring) < RING_MIN or len(set(ring)) != len(ring):
        raise bad("has a transfer whose ring is none")
    follows = zip(ring, (*ring[1:], ring[0]), strict=True)
    if not any(one in payers and other in payees for one, other in follows):
        raise bad("has a transfer that does not come this way")
    if not item.final or not item.amount:
        raise bad("has a transfer that is not whole")


def xid_of(started_ms: int, random_bytes: bytes) -> bytes:
    """A transfer's id: 8 bytes of its starter's clock, 8 of randomness."""
    return started_ms.to_bytes(8, "big") + random_bytes[:8]


def check_receipt(receipt: Receipt, payer: bytes, payee: bytes, verify: Verify) -> ReceiptBody:
    """The body, if `payee` signed it to `payer`.

    Raises:
        PeerError: BAD_REQUEST, wrong payer or signature.
    """
    body = decode_body(receipt.body, ReceiptBody)
    if body.payer != payer:
        raise bad("has a receipt for somebody else")
    if not verify(payee, receipt_prefixed(receipt.body), receipt.signature):
        raise bad("has a receipt with a wrong signature")
    return body


def check_equivocation(proof: Equivocation, verify: Verify) -> VoucherBody:
    """The first body, if the two really contradict each other.

    Raises:
        PeerError: BAD_REQUEST, they are no proof.
    """
    first, _ = check_contradiction((proof.payer,), proof.first, proof.second, verify)
    return first


def check_contradiction(
    payers: Sequence[bytes],
    first: SignedBody,
    second: SignedBody,
    verify: Verify,
    families: Iterable[Sequence[bytes]] = (),
) -> tuple[VoucherBody, VoucherBody]:
    """Both bodies, if one payer signed them, with any of its keys, and they contradict each other.

    They do with one number and two bodies, or if the later one says less. A boot has one lane for
    all payees, so the payee is the same key, or both keys are of one of `families`: each the keys
    of one node.

    Raises:
        PeerError: BAD_REQUEST, they are no proof.
    """
    one, other = (decode_body(signed.body, VoucherBody) for signed in (first, second))
    (low_n, low_cum), (high_n, high_cum) = sorted([(one.n, one.cum), (other.n, other.cum)])
    contradict = one != other if low_n == high_n else low_cum > high_cum
    payees = {one.payee, other.payee}
    same = len(payees) == 1 or any(payees <= {*family} for family in families)
    if one.lane != other.lane or not same or not contradict:
        raise bad("has two vouchers that do not contradict each other")
    for signed in (first, second):
        if not any(verify(k, voucher_prefixed(signed.body), signed.signature) for k in payers):
            raise bad("has an unsigned proof")
    return one, other


def check_item(id_: bytes, out_hash: bytes) -> None:
    """What nobody could decode must not be signed: a signature cannot be taken back.

    Raises:
        LedgerError: BAD_REQUEST, an id is not 16 bytes, or an output hash not 32.
    """
    if len(id_) != ID_BYTES or len(out_hash) != HASH_BYTES:
        raise LedgerError(
            f"an id of {len(id_)} bytes with a hash of {len(out_hash)} cannot be signed",
            code="BAD_REQUEST",
        )


def _groups(elements: Iterable[tuple[int, T]]) -> list[list[tuple[int, T]]]:
    """Elements (tagged by column) in runs that fit into one part each."""
    groups: list[list[tuple[int, T]]] = [[]]
    room = _PART_BYTES
    for tagged in elements:
        size = len(msgspec.msgpack.encode(tagged[1]))
        if size > room and groups[-1]:
            groups.append([])
            room = _PART_BYTES
        groups[-1].append(tagged)
        room -= size
    return groups


def pack_request(epoch: int, round_: int, lanes: Sequence[LaneState]) -> list[bytes]:
    """The blobs of one SYNC_REQ."""
    groups = _groups((0, lane) for lane in lanes)
    return [
        encode(epoch, SyncRequest(round_, index, len(groups), tuple(lane for _, lane in group)))
        for index, group in enumerate(groups)
    ]


def pack_reply(
    epoch: int,
    answers: tuple[int, int],
    mine: Sequence[Voucher],
    yours: Sequence[Voucher],
    claims: Sequence[Claim],
    *,
    more: bool,
) -> list[bytes]:
    """The blobs of one SYNC_REP. `answers`: epoch and round of the request."""
    tagged: list[tuple[int, Voucher | Claim]] = [
        *((0, voucher) for voucher in mine),
        *((1, voucher) for voucher in yours),
        *((2, claim) for claim in claims[:CLAIMS_MAX]),
    ]
    groups = _groups(tagged)
    return [
        encode(epoch, _reply_part(answers, (index, len(groups)), group, more=more))
        for index, group in enumerate(groups)
    ]


def _reply_part(
    answers: tuple[int, int],
    part: tuple[int, int],
    group: Sequence[tuple[int, Voucher | Claim]],
    *,
    more: bool,
) -> SyncReply:
    vouchers = [(tag, value) for tag, value in group if isinstance(value, Voucher)]
    return SyncReply(
        *answers,
        *part,
        more,
        mine=tuple(value for tag, value in vouchers if tag == 0),
        yours=tuple(value for tag, value in vouchers if tag == 1),
        claims=tuple(value for _, value in group if isinstance(value, Claim)),
    )
