"""Reads of a book without a daemon, for the command line: aiosqlite under plain asyncio.

Opens the file read-only, and gives exactly what the daemon gives: the queries are the same.
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import TypeVar

import aiosqlite

from aivillage.ledger.audit import AuditReport, audit
from aivillage.ledger.books import SCHEMA_VERSION
from aivillage.ledger.compare import View, view
from aivillage.ledger.queries import (
    ALL,
    Balance,
    Favour,
    HistoryRow,
    Movements,
    Query,
    balance,
    favours,
    find_peer,
    history,
)
from aivillage.protocols.envelope import is_signed_by
from aivillage.protocols.errors import ConfigError

T = TypeVar("T")


def read_balance(path: Path, stranger_pool: int = 0) -> Balance:
    """Raises: ConfigError: there is no ledger at `path`."""
    return read(path, balance(stranger_pool))


def read_history(path: Path, limit: int = 50, wanted: Movements = ALL) -> list[HistoryRow]:
    """Raises: ConfigError: there is no ledger at `path`. RequestError: no such peer."""
    return read(path, history(limit, wanted))


def read_view(path: Path, peer: str) -> View:
    """Raises: ConfigError: there is no ledger at `path`. RequestError: no such peer."""
    return read(path, _view(peer))


def _view(peer: str) -> Query[View]:
    found = yield from find_peer(peer)
    return (yield from view(found))


def read_favours(path: Path, limit: int = 50) -> list[Favour]:
    """Raises: ConfigError: there is no ledger at `path`."""
    return read(path, favours(limit))


def read_audit(path: Path) -> AuditReport:
    """Raises: ConfigError: there is no ledger at `path`."""
    return read(path, audit(is_signed_by))


def read(path: Path, query: Query[T]) -> T:
    """Any query, answered from one snapshot.

    Raises:
        ConfigError: there is no ledger at `path`, or it is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"there is no ledger at {path}", next_step="aivillage-node init")
    try:
        return asyncio.run(_answer(f"{path.absolute().as_uri()}?mode=ro", query))
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{path} cannot be read as a ledger: {error}", next_step="restore it from a backup"
        ) from None


async def _answer(uri: str, query: Query[T]) -> T:
    async with aiosqlite.connect(uri, uri=True, isolation_level=None) as db:
        await db.execute("PRAGMA query_only=1")
        await db.execute("BEGIN")
        ((version,),) = await db.execute_fetchall("PRAGMA user_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"the ledger is of version {version}; this program reads {SCHEMA_VERSION}",
                next_step="aivillage-node start brings an older one up to date",
            )
        sql, bindings = next(query)
        while True:
            rows = await db.execute_fetchall(sql, bindings)
            try:
                sql, bindings = query.send([tuple(row) for row in rows])
            except StopIteration as stop:
                answer: T = stop.value
                return answer
