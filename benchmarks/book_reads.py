"""How long a book with a long past takes to read: favours, and one kind of entry.

    python benchmarks/book_reads.py [--quick] [--json]

`balance_favours_ms` and `favours_ms` are `balance` and the last 50 favours of a book with a million
of them (`--quick`: 100,000), each written through the triggers that keep their sums.
`history_kind_ms` asks a book of 100,000 payments (20,000) for a kind of which there is none:
without an index it would walk through all. The best of five, as the command line reads: a
connection of its own, one snapshot. `balance` of a million payments: `python benchmarks/ledger.py`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
from claims import Claims, main

from aivillage.ledger import books, exposure
from aivillage.ledger.books import Cause, Leg
from aivillage.ledger.queries import Movements
from aivillage.ledger.reader import read_balance, read_favours, read_history
from aivillage.protocols.types import peer_id

LARGE, SMALL = 1_000_000, 100_000
PEERS = [peer_id(number.to_bytes(32, "big")) for number in range(1, 101)]
RARE = Movements(kind="receive")
AT_MOST_MS = 50


def measure(claims: Claims, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        measure_favours(claims, folder, SMALL if args.quick else LARGE)
        measure_history(claims, folder, SMALL // 5 if args.quick else SMALL)


def measure_favours(claims: Claims, folder: Path, count: int) -> None:
    began = time.perf_counter()
    path = filled(folder / "favours.db", count, add_favours)
    claims.note("favours", count)
    claims.add("favours_build_s", time.perf_counter() - began)
    claims.add("balance_favours_ms", best_ms(lambda: read_balance(path)), at_most=AT_MOST_MS)
    claims.add("favours_ms", best_ms(lambda: read_favours(path)), at_most=AT_MOST_MS)


def measure_history(claims: Claims, folder: Path, count: int) -> None:
    path = filled(folder / "paid.db", count, add_payments)
    claims.note("entries", count)
    claims.add("history_kind_ms", best_ms(lambda: read_history(path, 50, RARE)), at_most=AT_MOST_MS)


def filled(path: Path, count: int, add: Callable[[apsw.Connection, range], None]) -> Path:
    """A book of all `PEERS` with `count` rows of what `add` adds."""
    with closing(apsw.Connection(str(path))) as db:
        books.configure(db)
        books.prepare(db, bytes(32), 1)
        with db:
            for peer in PEERS:
                exposure.certify(db, peer, 10**9, 10**6, 1)
        for start in range(0, count, 10_000):
            with db:
                add(db, range(start, min(start + 10_000, count)))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return path


def add_favours(db: apsw.Connection, numbers: range) -> None:
    """Both ways."""
    rows = [(n % 2, PEERS[n % 100], n.to_bytes(16, "big"), 1000, n) for n in numbers]
    db.executemany("INSERT INTO favour VALUES (?, ?, ?, ?, ?)", rows)


def add_payments(db: apsw.Connection, numbers: range) -> None:
    for n in numbers:
        legs = [Leg("peer", None, -1000), Leg("spent", n.to_bytes(16, "big"), 1000)]
        books.post(db, Cause(PEERS[n % 100], b"the lane of book", n + 1, b"", "pay"), legs, n)


def best_ms(call: Callable[[], Any], rounds: int = 5) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return min(took)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
