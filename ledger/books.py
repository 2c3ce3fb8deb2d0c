"""The book as a file: opening it, its boots, and the double-entry journal at its heart.

Functions here and in payer, payee, exposure and sync are one protocol step each, run inside a
transaction that the caller opens and commits. They take the time, randomness and keys they need.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import apsw
import msgspec

from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import MicroCredits, PeerId
from aivillage.protocols.vouchers import digest, lane_of

APPLICATION_ID: Final = 0x41495642  # "AIVB"
SCHEMA_VERSION: Final = 1
NO_ENTRY: Final = bytes(32)
EVIDENCE_MAX: Final = 16
"""Proofs kept against one payer: the first would do."""
RECEIVED_EXPOSURE: Final = 20_000
"""What a seller is taken to grant before it says so; the schema's default too."""


class Leg(NamedTuple):
    """One posting. Accounts: peer (what it owes me), earned, spent, unlabelled."""

    account: str
    attempt: bytes | None
    amount: MicroCredits


class Cause(NamedTuple):
    """The voucher that moves the money, and whether it came back in SYNC."""

    peer: PeerId
    lane: bytes
    n: int
    body: bytes
    kind: str


class Pair(NamedTuple):
    """The durable counters of this node and one peer."""

    peer: PeerId
    known: bool
    line: MicroCredits
    exposure: MicroCredits
    received_exposure: MicroCredits
    epoch: int
    reserved: MicroCredits
    paid: MicroCredits
    written_off: MicroCredits
    arrears: MicroCredits
    balance: MicroCredits

    @classmethod
    def of_stranger(cls, peer: PeerId) -> Pair:
        return cls(peer, False, 0, 0, RECEIVED_EXPOSURE, 0, 0, 0, 0, 0, 0)


def one(db: apsw.Connection, sql: str, bindings: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """The first row, or None."""
    row: tuple[Any, ...] | None = db.execute(sql, bindings).fetchone()
    return row


def rows(db: apsw.Connection, sql: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All rows."""
    return db.execute(sql, bindings).fetchall()


def configure(db: apsw.Connection) -> None:
    """WAL and FULL: what was committed survives a power cut."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        db.execute(f"PRAGMA {pragma}").fetchall()


def prepare(db: apsw.Connection, public_key: bytes, at_ms: int) -> None:
    """Makes an empty file a book of `public_key`, or checks that it is one.

    Raises:
        ConfigError: CONFIG, the file is no book, a newer book, or somebody else's book.
    """
    application = one(db, "PRAGMA application_id")
    version = one(db, "PRAGMA user_version")
    tables = one(db, "SELECT count(*) FROM sqlite_schema")
    if tables == (0,):
        return _create(db, public_key, at_ms)
    if application != (APPLICATION_ID,) or version != (SCHEMA_VERSION,):
        raise ConfigError(
            "the ledger file is not a book of this version",
            next_step="start with the version that wrote it, or name another data folder",
        )
    if one(db, "SELECT public_key FROM identity") != (public_key,):
        raise ConfigError(
            "the ledger belongs to another key",
            next_step="put the identity.key back that this ledger.db was written with",
        )
    return None


def _create(db: apsw.Connection, public_key: bytes, at_ms: int) -> None:
    schema = importlib.resources.files("aivillage.ledger").joinpath("schema.sql").read_text("utf-8")
    with db:
        db.execute(schema)
        db.execute("INSERT INTO identity VALUES (1, ?, ?)", (public_key, at_ms))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def start_boot(db: apsw.Connection, at_ms: int, random_bytes: bytes) -> tuple[int, bytes]:
    """(epoch, lane) of a new boot; nothing is ever signed again on an earlier lane."""
    row = one(db, "SELECT max(epoch) FROM boot")
    stored = row[0] if row and row[0] is not None else 0
    epoch = max(stored + 1, at_ms)
    lane = lane_of(epoch, random_bytes)
    db.execute("INSERT INTO boot VALUES (?, ?)", (epoch, lane))
    return epoch, lane


_PAIR: Final = (
    "SELECT peer, known, line, exposure, received_exposure, epoch, reserved, paid, written_off,"
    " arrears, coalesce(amount, 0) FROM peer LEFT JOIN bal USING (peer)"
)


def ensure_peer(db: apsw.Connection, peer: PeerId) -> None:
    db.execute("INSERT INTO peer(peer) VALUES (?) ON CONFLICT DO NOTHING", (peer,))


def read_pair(db: apsw.Connection, peer: PeerId) -> Pair:
    """The counters with `peer`; a stranger's are zero."""
    row = one(db, f"{_PAIR} WHERE peer = ?", (peer,))
    return _pair(row) if row else Pair.of_stranger(peer)


def read_pairs(db: apsw.Connection) -> list[Pair]:
    return [_pair(row) for row in db.execute(_PAIR)]


def _pair(row: tuple[Any, ...]) -> Pair:
    return Pair(row[0], bool(row[1]), *row[2:])


def entry_hash(seq: int, head: tuple[Any, ...], legs: Iterable[Leg], prev: bytes) -> bytes:
    """Links an entry to all before it. `head`: at_ms, kind, peer, lane, n, body hash."""
    content = msgspec.msgpack.encode((seq, prev, *head, [tuple(leg) for leg in legs]))
    return digest(b"aivillage/entry/1\0" + content)


def post(db: apsw.Connection, cause: Cause, legs: Iterable[Leg], at_ms: int) -> None:
    """Writes one balanced entry; legs of zero are left out, and an empty one is no entry."""
    kept = [leg for leg in legs if leg.amount]
    if not kept:
        return
    last = one(db, "SELECT seq, hash FROM entry ORDER BY seq DESC LIMIT 1") or (0, NO_ENTRY)
    seq, prev = last[0] + 1, last[1]
    head = (at_ms, cause.kind, cause.peer, cause.lane, cause.n, digest(cause.body))
    for index, leg in enumerate(kept):
        db.execute("INSERT INTO posting VALUES (?, ?, ?, ?, ?)", (seq, index, *leg))
    db.execute(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (seq, *head, prev, entry_hash(seq, head, kept, prev)),
    )


def keep_evidence(
    db: apsw.Connection, payer: PeerId, place: tuple[bytes, int], bodies: tuple[bytes, ...], at: int
) -> None:
    """`place`: lane, n. `bodies`: first body, first signature, second body, second signature."""
    db.execute(
        "INSERT INTO evidence(payer, lane, n, first_body, first_signature, second_body,"
        " second_signature, at_ms) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8"
        " WHERE (SELECT count(*) FROM evidence WHERE payer = ?1) < ?9 ON CONFLICT DO NOTHING",
        (payer, *place, *bodies, at, EVIDENCE_MAX),
    )
