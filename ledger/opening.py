"""The book's file: opened or made by the daemon, read by whoever may."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, TypeVar

import apsw

from aivillage.ledger import books
from aivillage.ledger.desk import Clock
from aivillage.ledger.queries import Query, run
from aivillage.ledger.signing import Ed25519Signer
from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import Seconds

T = TypeVar("T")
_PRIVATE: Final = 0o600


class SystemClock:
    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_seconds(self) -> Seconds:
        return time.monotonic()


def read_file(path: Path, query: Query[T]) -> T:
    """Answers `query` from a book that is there, and up to date."""
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        db.execute("PRAGMA query_only=1")
        return run(db, query)
    finally:
        db.close()


def _keep_private(path: Path) -> None:
    """The owner alone may read it; SQLite gives its side files the mode of the database."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE))
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.chmod(_PRIVATE)


def open_file(path: Path, signer: Ed25519Signer, clock: Clock) -> apsw.Connection:
    """The book of `signer` in `path`, made if missing, brought up to date.

    Raises:
        ConfigError: CONFIG, the file is no ledger, or another key's.
    """
    try:
        _keep_private(path)
        db = apsw.Connection(str(path))
    except (OSError, apsw.CantOpenError) as error:
        raise ConfigError(f"cannot open {path}: {error}", next_step="check the folder") from None
    try:
        db.set_busy_timeout(5000)
        books.configure(db)
        books.prepare(db, signer.public_key, clock.unix_ms())
    except ConfigError:
        db.close()
        raise
    except apsw.Error as error:
        db.close()
        raise unusable(path, error) from None
    return db


def unusable(path: Path, error: apsw.Error) -> ConfigError:
    damaged = apsw.NotADBError | apsw.CorruptError | apsw.SQLError | apsw.ConstraintError
    if isinstance(error, damaged):
        message = f"{path} is not a ledger, or a damaged one: {error}"
        return ConfigError(message, next_step="restore it from a backup")
    return ConfigError(f"{path} cannot be opened: {error}", next_step="is the disk full, or slow?")
