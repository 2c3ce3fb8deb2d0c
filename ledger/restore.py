"""A book that comes back from a backup: made fit for this program, and careful until it synced.

Both work on a file that no node has open.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apsw

from aivillage.ledger import books
from aivillage.protocols.errors import ConfigError


def bring_up_to_date(path: Path, public_key: bytes, at_ms: int) -> None:
    """Makes the book of an older version one of this version; `public_key` must be its own.

    Raises:
        ConfigError: it is no book, a newer one, another key's, or damaged.
    """
    _change(path, lambda db: books.prepare(db, public_key, at_ms))


def mark(path: Path) -> None:
    """From now on nothing is delivered to a peer on credit before this node has synced with it.

    What the book has forgotten, its peers may have been paid or promised.

    Raises:
        ConfigError: the file is no book, or cannot be written.
    """

    def unsynced(db: apsw.Connection) -> None:
        with db:
            db.execute("UPDATE peer SET unsynced = 1")

    _change(path, unsynced)


def _change(path: Path, work: Callable[[apsw.Connection], None]) -> None:
    """The whole change is in the file alone afterwards, so that it can be moved."""
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            db.execute("PRAGMA trusted_schema=OFF")
            db.execute("PRAGMA journal_mode=DELETE").fetchall()
            db.execute("PRAGMA synchronous=FULL")
            work(db)
        finally:
            db.close()
    except apsw.Error as error:
        raise ConfigError(
            f"{path.name} is no ledger, or a damaged one: {error}", next_step="take another backup"
        ) from None
