"""The book as a file: opening it, its boots, and the double-entry journal at its heart.

Functions here and in payer, payee, exposure and sync are one protocol step each, run inside a
transaction that the caller opens and commits. They take the time, randomness and keys they need.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import apsw
import msgspec

from aivillage.ledger.migrations import migrate, schema
from aivillage.protocols.errors import ConfigError, RequestError
from aivillage.protocols.types import MicroCredits, PeerId, peer_id, public_key
from aivillage.protocols.vouchers import GIFT, REFUND, ROUTE, Item, digest, lane_of

APPLICATION_ID: Final = 0x41495642  # "AIVB"
SCHEMA_VERSION: Final = 4
NO_ENTRY: Final = bytes(32)
EVIDENCE_MAX: Final = 16
"""Proofs kept against one payer: the first would do."""
RECEIVED_EXPOSURE: Final = 20_000
"""What a seller is taken to grant before it says so; the schema's default too."""


class Leg(NamedTuple):
    """One posting; `attempt` is the id of the item: an attempt, a transfer or a gift.

    Accounts: peer (what it owes me), earned and spent (work), routed (transfers on their way:
    sent and not yet returned, or the reverse), gift, unlabelled (no item explains it), doubtful
    (the part of peer that I no longer count on) and writeoff (what that cost me).
    """

    account: str
    attempt: bytes | None
    amount: MicroCredits


_ACCOUNTS: Final = {ROUTE: "routed", REFUND: "routed", GIFT: "gift"}


def account_of(kind: int, work: str) -> str:
    """Where an item's money is posted; `work`: the side of whoever asks, earned or spent."""
    return _ACCOUNTS.get(kind, work)


class Cause(NamedTuple):
    """The voucher that moves the money, and whether it came back in SYNC.

    A correction of my own has no lane, and its body is a memo.
    """

    peer: PeerId
    lane: bytes
    n: int
    body: bytes
    kind: str


class Pair(NamedTuple):
    """The durable counters of this node and one peer.

    `routed`: what transfers of mine that are under way may still make it owe me.
    """

    peer: PeerId
    known: bool = False
    line: MicroCredits = 0
    exposure: MicroCredits = 0
    received_line: MicroCredits = 0
    received_exposure: MicroCredits = RECEIVED_EXPOSURE
    epoch: int = 0
    reserved: MicroCredits = 0
    paid: MicroCredits = 0
    written_off: MicroCredits = 0
    arrears: MicroCredits = 0
    balance: MicroCredits = 0
    routed: MicroCredits = 0
    blocked: bool = False
    shared: bool = False
    unsynced: bool = False
    owner: str | None = None

    @property
    def unsigned(self) -> MicroCredits:
        """Delivered or reserved, and neither paid nor written off."""
        return max(0, self.reserved - self.paid - self.written_off)

    @property
    def owed(self) -> MicroCredits:
        """All that it owes me, or may come to owe without a further yes of mine."""
        return self.balance + self.routed + self.unsigned


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

    # Hot pages are written back once for four: a quarter less of what a commit costs, 16 MB more.
    db.execute("PRAGMA wal_autocheckpoint=4000").fetchall()
    # What undoes a job is some 60 KB: a temporary file for each would cost 30 us.
    db.execute("PRAGMA temp_store=MEMORY").fetchall()
    # Plans never depend on values: else SQLite compiles a range or a join again at every call.
    db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)


def prepare(db: apsw.Connection, public_key: bytes, at_ms: int) -> None:
    """Makes an empty file a book of `public_key`, or checks that it is one, and up to date.

    Raises:
        ConfigError: CONFIG, the file is no book, a newer book, or somebody else's book.
    """
    if one(db, "SELECT count(*) FROM sqlite_schema") == (0,):
        return _create(db, public_key, at_ms)
    version = one(db, "PRAGMA user_version")
    if one(db, "PRAGMA application_id") == (APPLICATION_ID,) and version is not None:
        migrate(db, version[0], SCHEMA_VERSION, at_ms)
        version = one(db, "PRAGMA user_version")
    if one(db, "PRAGMA application_id") != (APPLICATION_ID,) or version != (SCHEMA_VERSION,):
        raise ConfigError(
            "the ledger file is not a book of this version",
            next_step="start with the version that wrote it, or name another data folder",
        )
    if own_keys(db)[0] != public_key:
        raise ConfigError(
            "the ledger belongs to another key",
            next_step="put the identity.key back that this ledger.db was written with",
        )
    return None


def _create(db: apsw.Connection, public_key: bytes, at_ms: int) -> None:
    with db:
        db.execute(schema())
        db.execute("INSERT INTO identity VALUES (1, ?, ?, NULL)", (public_key, at_ms))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def own_keys(db: apsw.Connection) -> tuple[bytes, ...]:
    """The keys that this book ever had, the one in force first."""
    return tuple(key for (key,) in rows(db, "SELECT public_key FROM identity ORDER BY n DESC"))


def own_proofs(db: apsw.Connection) -> tuple[bytes, ...]:
    """What each key but the first was named with by the one before it, the oldest first."""
    return tuple(
        proof for (proof,) in rows(db, "SELECT proof FROM identity WHERE n > 1 ORDER BY n")
    )


def add_own_key(db: apsw.Connection, key: bytes, proof: bytes, at_ms: int) -> None:
    """This book goes by `key` from now on; the key in force so far signed `proof`."""
    db.execute("INSERT INTO identity SELECT max(n) + 1, ?, ?, ? FROM identity", (key, at_ms, proof))


def peer_names(db: apsw.Connection) -> dict[PeerId, PeerId]:
    """Later names of peers that changed their key -> the name under which the book has them."""
    return dict(rows(db, "SELECT key_peer, peer FROM peer_key ORDER BY n"))


_key = functools.lru_cache(maxsize=4096)(public_key)
"""Each voucher names its payee by key, and base58 costs 10 us."""


def key_of(db: apsw.Connection, peer: PeerId) -> bytes:
    """The key in force of a peer in the book."""
    row = one(db, "SELECT key_peer FROM peer_key WHERE peer = ? ORDER BY n DESC LIMIT 1", (peer,))
    return _key(row[0] if row else peer)


def name_of(db: apsw.Connection, key: bytes) -> PeerId:
    """The name under which the book has the peer with this key."""
    name = peer_id(key)
    row = one(db, "SELECT peer FROM peer_key WHERE key_peer = ?", (name,))
    return row[0] if row else name


_KEEP_ITEM: Final = """
  INSERT INTO item VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    amount = max(amount, excluded.amount), final = max(final, excluded.final),
    voucher = CASE WHEN excluded.last_n > last_n THEN excluded.voucher ELSE voucher END,
    last_n = max(last_n, excluded.last_n) WHERE lane = excluded.lane
"""


def keep_item(
    db: apsw.Connection, peer: PeerId, item: Item, voucher: tuple[bytes, int, int], *, mine: bool
) -> None:
    """Notes what a stored voucher, (lane, n, id), says of an item of its lane."""
    lane, n, number = voucher
    said = (mine, peer, item.kind, item.id, lane, item.amount, n, item.final, number)
    db.execute(_KEEP_ITEM, said)


def succeed(db: apsw.Connection, peer: PeerId, key_peer: PeerId, proof: bytes, at_ms: int) -> bool:
    """Whose key in force is that of `peer` goes by `key_peer` from now on; False: it did already.

    Raises:
        RequestError: BAD_REQUEST, the new key is one that the book has as somebody else, or
            `peer` is a key that was replaced by another one.
    """
    former = public_key(peer)
    peer = name_of(db, former)
    known = one(db, "SELECT peer FROM peer_key WHERE key_peer = ?", (key_peer,))
    if known is not None and known[0] == peer:
        return False
    if key_of(db, peer) != former:
        raise RequestError(f"this key of {peer} was replaced already, by another one")
    if known is not None or one(db, "SELECT 1 FROM peer WHERE peer = ?", (key_peer,)):
        raise RequestError(f"{key_peer} is somebody of its own in this book")
    ensure_peer(db, peer)
    db.execute(
        "INSERT INTO peer_key SELECT ?, ?, coalesce(max(n), 1) + 1, ?, ? FROM peer_key"
        " WHERE peer = ?",
        (key_peer, peer, at_ms, proof, peer),
    )
    return True


def start_boot(db: apsw.Connection, at_ms: int, random_bytes: bytes) -> tuple[int, bytes]:
    """(epoch, lane) of a new boot; nothing is ever signed again on an earlier lane."""
    row = one(db, "SELECT max(epoch) FROM boot")
    stored = row[0] if row and row[0] is not None else 0
    epoch = max(stored + 1, at_ms)
    lane = lane_of(epoch, random_bytes)
    db.execute("INSERT INTO boot VALUES (?, ?)", (epoch, lane))
    return epoch, lane


_PAIR: Final = """
  SELECT peer, known, line, exposure, received_line, received_exposure, epoch, reserved, paid,
    written_off, arrears, coalesce(amount, 0),
    coalesce((SELECT sum(amount) FROM route_hop WHERE peer = peer.peer), 0),
    blocked, shared, unsynced, owner
  FROM peer LEFT JOIN bal USING (peer)
"""


def ensure_peer(db: apsw.Connection, peer: PeerId) -> None:
    db.execute("INSERT INTO peer(peer) VALUES (?) ON CONFLICT DO NOTHING", (peer,))


def read_pair(db: apsw.Connection, peer: PeerId) -> Pair:
    """The counters with `peer`; a stranger's are zero."""
    row = one(db, f"{_PAIR} WHERE peer.peer = ?", (peer,))
    return Pair(*row) if row else Pair(peer)


def read_pairs(db: apsw.Connection) -> list[Pair]:
    return [Pair(*row) for row in db.execute(_PAIR)]


def entry_hash(
    seq: int, head: Sequence[Any], legs: Sequence[tuple[Any, ...]], prev: bytes
) -> bytes:
    """Links an entry to all before it. `head`: at_ms, kind, peer, lane, n, body hash."""
    content = msgspec.msgpack.encode((seq, prev, *head, legs))
    return digest(b"aivillage/entry/1\0" + content)


def post(db: apsw.Connection, cause: Cause, legs: Iterable[Leg], at_ms: int) -> None:
    """Writes one balanced entry; legs of zero are left out, and an empty one is no entry."""
    kept = [leg for leg in legs if leg.amount]
    if not kept:
        return
    last = one(db, "SELECT seq, hash FROM entry ORDER BY seq DESC LIMIT 1") or (0, NO_ENTRY)
    seq, prev = last[0] + 1, last[1]
    head = (at_ms, cause.kind, cause.peer, cause.lane, cause.n, digest(cause.body))
    postings = [(seq, index, *leg) for index, leg in enumerate(kept)]
    db.executemany("INSERT INTO posting VALUES (?, ?, ?, ?, ?)", postings)
    db.execute(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (seq, *head, prev, entry_hash(seq, head, kept, prev)),
    )


def correct(
    db: apsw.Connection, peer: PeerId, kind: str, reason: str, legs: Sequence[Leg], at_ms: int
) -> None:
    """A compensating entry: nothing that was written changes, and it says why it was made."""
    seq = (one(db, "SELECT coalesce(max(seq), 0) + 1 FROM entry") or (1,))[0]
    memo = msgspec.msgpack.encode((seq, kind, peer, reason))
    db.execute("INSERT INTO memo VALUES (?, ?)", (digest(memo), memo))
    post(db, Cause(peer, b"", 0, memo, kind), legs, at_ms)


def keep_evidence(
    db: apsw.Connection, payer: PeerId, place: tuple[bytes, int], bodies: tuple[bytes, ...], at: int
) -> bool:
    """Whether it is news. `place`: lane, n. `bodies`: first body, its signature, and the second."""
    db.execute(
        "INSERT INTO evidence(payer, lane, n, first_body, first_signature, second_body,"
        " second_signature, at_ms) SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8"
        " WHERE (SELECT count(*) FROM evidence WHERE payer = ?1) < ?9 ON CONFLICT DO NOTHING",
        (payer, *place, *bodies, at, EVIDENCE_MAX),
    )
    return db.changes() > 0
