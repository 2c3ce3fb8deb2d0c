"""The form of a statement: JSON that holds signed bytes in hex, and what is said about them.

Whether it is true is ledger/statement.py's to find out.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from aivillage.protocols.errors import EXIT_AUDIT, RequestError
from aivillage.protocols.types import Amount, Count, PeerId
from aivillage.protocols.vouchers import ARREARS, ITEMS_MAX, JOB

VERSION: Final = 1
VERSION_KEYS: Final = 2
"""Of a statement in which somebody changed its key: programs that read only 1 say so."""
SUCCESSIONS_MAX: Final = 64
"""Changes of one party's key; each costs two signatures' checks. One a month for five years."""
PROOFS_MAX: Final = 64
"""In one document; a book keeps 16 against one payer."""
DOCUMENT_BYTES_MAX: Final = 256 * 2**20
"""Some 380,000 vouchers: half a minute and 1.2 GB of memory to check."""
SERVICE: Final = (JOB, ARREARS)
"""The kinds of item that pay for work: the others are no job."""

Hex: TypeAlias = Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{2})*\Z")]
Hex16: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Hex32: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class StatementError(RequestError):
    """The document does not prove what it says; the sentence names the first thing wrong."""

    exit_code = EXIT_AUDIT


Keys: TypeAlias = tuple[bytes, ...]
"""All keys that one party ever had, the one in force first."""
PayerPayee: TypeAlias = tuple[Keys, Keys]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What a verified document proves, in words. `amount`: its net, or the job's price."""

    issuer: PeerId
    peer: PeerId
    amount: int
    proven: str
    not_proven: str


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unknown fields are refused: what nobody checked must not look as if it were proven."""


class Party(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """The id is a name of the key in force.

    `successions`: the envelopes in which each former key named the next one, the oldest first.
    """

    peer: PeerId
    public_key: Hex32
    successions: Annotated[tuple[Hex, ...], Meta(max_length=SUCCESSIONS_MAX)] = ()


class ShownItem(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """The exact bytes of an item, or only their sha-256 where the item is nobody's business."""

    item: Hex = ""
    hash: Hex = ""


class SignedVoucher(_Part, frozen=True, kw_only=True):
    """`body` is what the payer signed; `items` in the order in which its root names them."""

    body: Hex
    signature: Hex
    items: Annotated[list[ShownItem], Meta(min_length=1, max_length=ITEMS_MAX)]


class SignedReceipt(_Part, frozen=True, kw_only=True):
    body: Hex
    signature: Hex


class LaneTotal(_Part, frozen=True, kw_only=True):
    """`cum`: signed on this lane in all. `confirmed`: as much of it as the receipts cover."""

    lane: Hex16
    n: Count
    cum: Amount
    confirmed: Amount


class Direction(_Part, frozen=True, kw_only=True):
    """All that one of the two signed to the other."""

    total: int
    confirmed: int
    lanes: list[LaneTotal]
    vouchers: list[SignedVoucher]
    receipts: list[SignedReceipt]


class Statement(_Part, frozen=True, kw_only=True, tag_field="type", tag="aivillage-statement"):
    """One pair. `net` is what `peer` owes `issuer`: the first total less the second.

    The three times are unix milliseconds by the issuer's clock; nobody can check them.
    """

    version: int
    issuer: Party
    peer: Party
    issued_ms: Count
    since_ms: Count
    until_ms: Count
    net: int
    owed_to_issuer: Direction
    owed_by_issuer: Direction


class JobProof(_Part, frozen=True, kw_only=True):
    """One item, and the voucher that carries it."""

    kind: int
    amount: Amount
    final: bool
    quote_hash: Hex
    out_hash: Hex
    confirmed: bool
    attested: bool
    voucher: SignedVoucher
    receipt: SignedReceipt | None


class JobStatement(_Part, frozen=True, kw_only=True, tag_field="type", tag="aivillage-job"):
    """One attempt. `amount` is the sum of its proofs: the work, and arrears after a crash."""

    version: int
    issuer: Party
    peer: Party
    issued_ms: Count
    payer: PeerId
    attempt: Hex16
    amount: int
    proofs: Annotated[list[JobProof], Meta(min_length=1, max_length=len(SERVICE))]


class SignedBodies(_Part, frozen=True, kw_only=True):
    """Two voucher bodies of one payer on one lane that cannot both be honest."""

    first_body: Hex
    first_signature: Hex
    second_body: Hex
    second_signature: Hex


class Evidence(_Part, frozen=True, kw_only=True, tag_field="type", tag="aivillage-evidence"):
    """What `issuer` holds against `peer`: how `peer` contradicted itself in writing.

    The two are the same where a copy of the issuer signed too.
    """

    version: int
    issuer: Party
    peer: Party
    issued_ms: Count
    proofs: Annotated[list[SignedBodies], Meta(min_length=1, max_length=PROOFS_MAX)]


Document: TypeAlias = Statement | JobStatement | Evidence


class _Head(msgspec.Struct):
    type: str
    version: int


def encode_document(document: Document) -> bytes:
    """JSON, indented: people look into it.

    Raises:
        StatementError: TOO_LARGE, nobody would read it.
    """
    encoded = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
    _check_size(len(encoded), DOCUMENT_BYTES_MAX)
    return encoded


def decode_document(encoded: bytes, bytes_max: int = DOCUMENT_BYTES_MAX) -> Document:
    """The document, its form checked and nothing else.

    Raises:
        StatementError: it is none, or of another version.
    """
    _check_size(len(encoded), bytes_max)
    try:
        head = msgspec.json.decode(encoded, type=_Head)
        if head.version not in {VERSION, VERSION_KEYS}:
            raise wrong(f"it is of version {head.version}; this program reads {VERSION_KEYS}")
        document: Document = msgspec.json.decode(encoded, type=Statement | JobStatement | Evidence)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(f"it is no statement: {error}") from None
    return document


def _check_size(size_bytes: int, bytes_max: int) -> None:
    if size_bytes > bytes_max:
        raise StatementError(
            f"a statement of {size_bytes:,} bytes; {bytes_max:,} are read",
            code="TOO_LARGE",
            next_step="state single jobs with --job",
        )


def wrong(reason: str) -> StatementError:
    return StatementError(
        f"the statement is wrong: {reason}",
        code="BAD_REQUEST",
        next_step="do not rely on it; ask its issuer for another",
    )
