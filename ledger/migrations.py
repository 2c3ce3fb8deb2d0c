"""A book of an older version becomes one of this version in one transaction.

The rows of version 1 are written anew under today's rules; those of later ones stay as they are,
and what today's rules would not have let in is looked for. Either way a book that breaks them is
refused, not carried along. The chain of entries keeps its hashes: what was signed or hashed never
changes.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import apsw
import msgspec

from aivillage.protocols.types import peer_id
from aivillage.protocols.vouchers import VoucherBody

_RENAMED: Final = (
    "identity", "boot", "peer", "bal", "entry", "posting", "lane_out", "voucher_out", "receipt",
    "lane_in", "voucher_in", "item", "intent", "evidence",
)  # fmt: skip

_FROM_1: Final = """
INSERT INTO identity SELECT 1, public_key, created_ms, NULL FROM old_identity;
INSERT INTO boot SELECT * FROM old_boot ORDER BY epoch;
INSERT INTO peer(peer, known, line, exposure, certified_line, certified_exposure, received_line,
  received_exposure, epoch, reserved, paid, written_off, arrears, allowance_ms, healed_ms)
SELECT peer, known, line, exposure, CASE known WHEN 1 THEN line END,
  CASE known WHEN 1 THEN exposure END, received_line, received_exposure, epoch,
  max(reserved, written_off), paid, written_off, arrears, allowance_ms, healed_ms FROM old_peer;
INSERT INTO posting SELECT * FROM old_posting;
INSERT INTO entry SELECT * FROM old_entry ORDER BY seq;
INSERT INTO receipt SELECT * FROM old_receipt;
INSERT INTO lane_out SELECT peer, lane, n, cum,
  min(cum, coalesce((SELECT sum(i.amount) FROM old_item i
    WHERE i.mine = 1 AND i.peer = l.peer AND i.lane = l.lane), 0)),
  coalesce((SELECT max(v.cum) FROM old_voucher_out v
    WHERE v.peer = l.peer AND v.lane = l.lane AND v.receipt IS NOT NULL), 0), NULL
FROM old_lane_out l;
INSERT INTO lane_in SELECT peer, lane, n, cum, attr, CASE sealed WHEN 1 THEN cum ELSE attr END,
  count, sealed, NULL FROM old_lane_in;
INSERT INTO intent SELECT peer, attempt, quote_hash, ceiling, ?1 FROM old_intent;
INSERT INTO evidence SELECT * FROM old_evidence;
"""
# Vouchers have numbers since version 4, and items name them.
_NUMBERED: Final = ("voucher_out", "voucher_in", "item")
_NUMBERS: Final = """
INSERT INTO voucher_out SELECT rowid, * FROM old_voucher_out ORDER BY rowid;
INSERT INTO voucher_in SELECT rowid, * FROM old_voucher_in ORDER BY rowid;
INSERT INTO item SELECT i.*, coalesce(CASE i.mine
  WHEN 1 THEN (SELECT rowid FROM old_voucher_out v
    WHERE v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n)
  ELSE (SELECT rowid FROM old_voucher_in v
    WHERE v.peer = i.peer AND v.lane = i.lane AND v.n = i.last_n) END, 0) FROM old_item i;
"""
# What was confirmed is what receipts prove; a later one of the lane will say it again.
_FROM_2: Final = """
INSERT INTO entry SELECT * FROM old_entry ORDER BY seq;
INSERT INTO favour_sum SELECT mine, peer, sum(worth) FROM favour GROUP BY mine, peer;
UPDATE lane_out AS l SET confirmed = coalesce((SELECT max(v.cum) FROM voucher_out v
  WHERE v.peer = l.peer AND v.lane = l.lane AND v.receipt IS NOT NULL), 0);
UPDATE peer SET reserved = written_off WHERE reserved < written_off;
"""
_OWN_KEY: Final = "SELECT public_key FROM identity ORDER BY n DESC LIMIT 1"
_PROOFS: Final = "SELECT id, payer, first_body FROM evidence"
_MISSHAPEN: Final = """
  SELECT e.seq FROM entry e CROSS JOIN posting p ON p.seq = e.seq WHERE e.lane = x''
  GROUP BY e.seq HAVING count(*) <> 2
    OR sum(p.account = 'writeoff') <> 1 OR sum(p.account IN ('doubtful', 'routed')) <> 1
  UNION ALL SELECT max(e.seq) FROM entry e CROSS JOIN posting p ON p.seq = e.seq
  WHERE e.lane = x'' AND p.account = 'doubtful' GROUP BY e.peer HAVING sum(p.amount) > 0 LIMIT 1
"""


def schema() -> str:
    """Today's schema, as SQL."""
    return importlib.resources.files("aivillage.ledger").joinpath("schema.sql").read_text("utf-8")


def migrate(db: apsw.Connection, version: int, wanted: int, at_ms: int) -> None:
    """Brings a book of an older version to `wanted`; all of it, or nothing.

    Raises:
        apsw.Error: the old book breaks the rules of the new one, or the disk is full.
    """
    if version not in _STEPS or version == wanted:
        return
    db.execute("PRAGMA foreign_keys=OFF")
    try:
        with db:
            _STEPS[version](db, at_ms)
            db.execute(f"PRAGMA user_version = {wanted}")
    finally:
        db.execute("PRAGMA foreign_keys=ON")


def _rewrite(db: apsw.Connection, at_ms: int) -> None:
    """Version 1: other columns, so every row is copied."""
    _drop(db, "trigger", "index")
    for table in _RENAMED:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    db.execute(schema())
    db.execute(_NUMBERS)
    for statement in _FROM_1.split(";\n"):
        bindings = (at_ms,) if "?1" in statement else ()
        db.execute(statement, bindings)
    for table in reversed(_RENAMED):
        db.execute(f"DROP TABLE old_{table}")


def _correct(db: apsw.Connection, at_ms: int) -> None:
    """Version 2: new tables, rules of corrections; entries lose the index of their hashes."""
    _copy(db, ("entry", *_NUMBERED), _FROM_2)
    _disown(db)
    for (seq,) in db.execute(_MISSHAPEN).fetchall():
        raise apsw.ConstraintError(f"entry {seq} is no correction")
    _create_missing(db, "TRIGGER")


def _number(db: apsw.Connection, at_ms: int) -> None:
    """Version 3: vouchers get numbers."""
    _copy(db, _NUMBERED, "")
    _create_missing(db, "TRIGGER")


def _copy(db: apsw.Connection, tables: Sequence[str], more: str) -> None:
    """Writes the rows of `tables` anew, and makes what today's schema has besides, but no trigger.

    `more`: SQL that needs the old rows of other tables than those of vouchers.
    """
    _drop(db, "trigger", "index")
    # As before SQLite 3.26: else postings would be said to belong to the renamed entries.
    db.execute("PRAGMA legacy_alter_table=ON")
    for table in tables:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    db.execute("PRAGMA legacy_alter_table=OFF")
    _create_missing(db, "TABLE")
    db.execute(_NUMBERS + more)
    for table in tables:
        db.execute(f"DROP TABLE old_{table}")
    _create_missing(db, "INDEX")


def _drop(db: apsw.Connection, *kinds: str) -> None:
    found = db.execute("SELECT type, name FROM sqlite_schema WHERE sql NOT NULL").fetchall()
    for kind, name in found:
        if kind in kinds:
            db.execute(f"DROP {kind} {name}")


def _create_missing(db: apsw.Connection, *kinds: str) -> None:
    present = {name for (name,) in db.execute("SELECT name FROM sqlite_schema").fetchall()}
    for statement in re.split(r"\n(?=CREATE )", schema()):
        words = re.match(r"CREATE (\w+) (\w+)", statement)
        if words and words[1] in kinds and words[2] not in present:
            db.execute(statement)


def _disown(db: apsw.Connection) -> None:
    """Two copies of this node that contradicted each other: version 2 accused who showed it."""
    keys: list[tuple[Any, ...]] = db.execute(_OWN_KEY).fetchall()
    proofs: list[tuple[Any, ...]] = db.execute(_PROOFS).fetchall()
    for number, payer, body in proofs:
        payee = msgspec.msgpack.decode(body, type=VoucherBody).payee
        if peer_id(payee) == payer:  # nobody pays itself
            db.execute("UPDATE evidence SET payer = ? WHERE id = ?", (peer_id(keys[0][0]), number))


_STEPS: Final[dict[int, Callable[[apsw.Connection, int], None]]] = {
    1: _rewrite, 2: _correct, 3: _number,
}  # fmt: skip
