"""What the book of a daemon says, read from its file: also while it runs, hangs or is dead."""

from __future__ import annotations

import pathlib
from typing import Any

import apsw

from tests.integration.daemons import Daemon


def rows(daemon: Daemon, sql: str, *bindings: Any) -> list[tuple[Any, ...]]:
    """Over a connection that cannot write."""
    return rows_of(daemon.data_dir / "ledger.db", sql, *bindings)


def rows_of(path: pathlib.Path, sql: str, *bindings: Any) -> list[tuple[Any, ...]]:
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    db = apsw.Connection(f"{path.absolute().as_uri()}?mode=ro", flags=flags)
    try:
        db.set_busy_timeout(5000)
        return list(db.execute(sql, bindings))
    finally:
        db.close()


def net(daemon: Daemon) -> int:
    """What others owe it less what it owes."""
    return sum(amount for (amount,) in rows(daemon, "SELECT amount FROM bal"))


def owed(daemon: Daemon, peer: str) -> int:
    """What `peer` owes `daemon`, by the latter's book; negative where it is the other way."""
    found = rows(daemon, "SELECT amount FROM bal WHERE peer = ?", peer)
    return int(found[0][0]) if found else 0


def transfers(daemon: Daemon, state: str) -> list[bytes]:
    """Those of others that came to it and are in this state now."""
    found = rows(daemon, "SELECT xid FROM transfer WHERE state = ?", state)
    return [xid for (xid,) in found]


def passed_on(daemon: Daemon, xid: bytes) -> int:
    """How many vouchers of its own move this transfer: to the next, or back."""
    return len(rows(daemon, "SELECT 1 FROM item WHERE mine = 1 AND id = ?", xid))


def came(daemon: Daemon, xid: bytes) -> int:
    """How many vouchers of others that it booked move this transfer."""
    return len(rows(daemon, "SELECT 1 FROM item WHERE mine = 0 AND id = ?", xid))


def rings(daemon: Daemon, state: str) -> dict[bytes, int]:
    """Those that it started, and how much each moves."""
    return dict(rows(daemon, "SELECT xid, amount FROM route WHERE state = ?", state))
