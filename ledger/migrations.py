"""A book of an older version becomes one of this version, entry by entry, in one transaction.

The old rows are written anew under today's rules, so a book that breaks them is refused, not
carried along. The chain of entries keeps its hashes: what was signed or hashed never changes.
"""

from __future__ import annotations

import importlib.resources
from typing import Final

import apsw

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
  CASE known WHEN 1 THEN exposure END, received_line, received_exposure, epoch, reserved, paid,
  written_off, arrears, allowance_ms, healed_ms FROM old_peer;
INSERT INTO posting SELECT * FROM old_posting;
INSERT INTO entry SELECT * FROM old_entry ORDER BY seq;
INSERT INTO receipt SELECT * FROM old_receipt;
INSERT INTO voucher_out SELECT * FROM old_voucher_out ORDER BY rowid;
INSERT INTO voucher_in SELECT * FROM old_voucher_in ORDER BY rowid;
INSERT INTO item SELECT * FROM old_item;
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
_STEPS: Final = {1: (2, _FROM_1)}


def schema() -> str:
    """Today's schema, as SQL."""
    return importlib.resources.files("aivillage.ledger").joinpath("schema.sql").read_text("utf-8")


def migrate(db: apsw.Connection, version: int, wanted: int, at_ms: int) -> None:
    """Brings a book of an older version to `wanted`; all of it, or nothing.

    Raises:
        apsw.Error: the old book breaks the rules of the new one, or the disk is full.
    """
    while version in _STEPS and version != wanted:
        version, copy = _STEPS[version]
        db.execute("PRAGMA foreign_keys=OFF")
        try:
            with db:
                _rewrite(db, copy, at_ms)
                db.execute(f"PRAGMA user_version = {version}")
        finally:
            db.execute("PRAGMA foreign_keys=ON")


def _rewrite(db: apsw.Connection, copy: str, at_ms: int) -> None:
    found = db.execute(
        "SELECT type, name FROM sqlite_schema WHERE type IN ('trigger', 'index') AND sql NOT NULL"
    ).fetchall()
    for kind, name in found:
        db.execute(f"DROP {kind} {name}")
    for table in _RENAMED:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    db.execute(schema())
    for statement in copy.split(";\n"):
        bindings = (at_ms,) if "?1" in statement else ()
        db.execute(statement, bindings)
    for table in reversed(_RENAMED):
        db.execute(f"DROP TABLE old_{table}")
