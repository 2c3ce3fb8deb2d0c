"""Reads of a book, as SQL text and a pure fold: the same for apsw and aiosqlite.

A query is a generator: it yields (SQL, bindings), is sent the rows, and returns its answer.
This file loads neither trio nor a database library.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import MicroCredits, PeerId

T = TypeVar("T")
Rows: TypeAlias = list[tuple[Any, ...]]
Query: TypeAlias = Generator[tuple[str, tuple[Any, ...]], Rows, T]


class _Connection(Protocol):
    def execute(self, statements: str, bindings: Any = ..., /) -> Any: ...


def run(db: _Connection, query: Query[T]) -> T:
    """Answers `query` from one snapshot of `db`."""
    db.execute("BEGIN")
    try:
        sql, bindings = next(query)
        while True:
            sql, bindings = query.send(db.execute(sql, bindings).fetchall())
    except StopIteration as stop:
        answer: T = stop.value
        return answer
    finally:
        db.execute("ROLLBACK")


class PeerBalance(msgspec.Struct, frozen=True, kw_only=True):
    """One peer, in micro-credits. `spendable`: what it owes me and what more it lets me owe.

    `in_transit`: what I signed and it has not confirmed. `at_risk`: delivered or reserved work
    that it has not signed for.
    """

    peer: PeerId
    net: MicroCredits
    spendable: MicroCredits
    in_transit: MicroCredits
    at_risk: MicroCredits
    line: MicroCredits
    received_line: MicroCredits


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """`net` = earned - spent. Credits with one peer are not credits with another."""

    net: MicroCredits
    earned: MicroCredits
    spent: MicroCredits
    at_risk: MicroCredits
    in_transit: MicroCredits
    peers: list[PeerBalance]


_EARNED = """
  SELECT coalesce(sum(CASE WHEN e.kind LIKE '%receive' THEN p.amount ELSE 0 END), 0),
         coalesce(sum(CASE WHEN e.kind LIKE '%pay' THEN p.amount ELSE 0 END), 0)
  FROM entry e JOIN posting p USING (seq) WHERE p.account = 'peer'
"""
# In transit: what was signed beyond the last receipt of each lane.
_PEERS = """
  SELECT peer, coalesce(amount, 0), max(0, reserved - paid - written_off),
    coalesce((SELECT sum(l.cum - coalesce((SELECT max(v.cum) FROM voucher_out v
        WHERE v.peer = l.peer AND v.lane = l.lane AND v.receipt IS NOT NULL), 0))
      FROM lane_out l WHERE l.peer = peer.peer), 0),
    CASE known WHEN 1 THEN line ELSE ? END, received_line
  FROM peer LEFT JOIN bal USING (peer) ORDER BY peer
"""


def balance(stranger_pool: MicroCredits = 0) -> Query[Balance]:
    """What this node has with everybody."""
    rows = yield _EARNED, ()
    earned, spent = rows[0]
    peers = [
        PeerBalance(
            peer=peer,
            net=net,
            spendable=max(0, received + net),
            in_transit=transit,
            at_risk=risk,
            line=line,
            received_line=received,
        )
        for peer, net, risk, transit, line, received in (yield _PEERS, (stranger_pool,))
    ]
    return Balance(
        net=earned + spent,
        earned=earned,
        spent=-spent,
        at_risk=sum(peer.at_risk for peer in peers),
        in_transit=sum(peer.in_transit for peer in peers),
        peers=peers,
    )


class HistoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt's part of one entry; `amount` is positive for earned, negative for spent.

    `attempt` is empty for money that no item explains. `account`: what the money was for.
    """

    seq: int
    at_ms: int
    kind: str
    peer: PeerId
    account: str
    attempt: bytes
    amount: MicroCredits


class Movements(msgspec.Struct, frozen=True, kw_only=True):
    """Which movements; empty and None let all pass. `peer`: its id, or the end of it.

    Times are unix milliseconds by this node's clock, both included.
    """

    peer: str = ""
    kind: str = ""
    since_ms: int | None = None
    until_ms: int | None = None


ALL: Final = Movements()
# CROSS JOIN fixes the order: entries first, their postings by key, and stop at the limit.
_HISTORY: Final = """
  SELECT e.seq, e.at_ms, e.kind, e.peer, p.account, coalesce(p.attempt, x''), -p.amount
  FROM entry e CROSS JOIN posting p ON p.seq = e.seq WHERE p.account <> 'peer' {where}
  ORDER BY {order} DESC, p.leg LIMIT ?
"""


def history(limit: int, wanted: Movements = ALL) -> Query[list[HistoryRow]]:
    """The last `limit` movements, newest first: in the book's order, or by time if times are asked.

    Raises:
        RequestError: BAD_REQUEST, no single peer is named so.
    """
    peer = (yield from find_peer(wanted.peer)) if wanted.peer else ""
    rows = yield movements_sql(wanted), (*_bindings(wanted, peer), limit)
    names = HistoryRow.__struct_fields__
    return [HistoryRow(**dict(zip(names, row, strict=True))) for row in rows]


def keys() -> Query[tuple[bytes, ...]]:
    """The keys that this book ever had, the one in force first."""
    rows = yield "SELECT public_key FROM identity ORDER BY n DESC", ()
    return tuple(key for (key,) in rows)


def movements_sql(wanted: Movements) -> str:
    """Walks the index of the peer where there is one, else that of the times, newest first."""
    by_time = not wanted.peer and (wanted.since_ms, wanted.until_ms) != (None, None)
    asked = (
        ("AND e.peer = ?", wanted.peer),
        ("AND e.at_ms >= ?", wanted.since_ms is not None),
        ("AND e.at_ms <= ?", wanted.until_ms is not None),
        ("AND e.kind = ?", wanted.kind),
    )
    where = " ".join(text for text, is_asked in asked if is_asked)
    return _HISTORY.format(where=where, order="e.at_ms DESC, e.seq" if by_time else "e.seq")


def _bindings(wanted: Movements, peer: str) -> tuple[Any, ...]:
    values = (peer or None, wanted.since_ms, wanted.until_ms, wanted.kind or None)
    return tuple(value for value in values if value is not None)


def find_peer(text: str) -> Query[PeerId]:
    """The one peer in the book whose id is, or ends with, `text`.

    Raises:
        RequestError: BAD_REQUEST, there is none, or there are several.
    """
    rows = yield "SELECT peer FROM peer", ()
    found = [peer for (peer,) in rows if text and peer.endswith(text)]
    if len(found) != 1:
        how = (
            f"{len(found)} peers in the book have ids" if found else "no peer in the book has an id"
        )
        raise RequestError(
            f"{how} that ends with {text!r}",
            code="BAD_REQUEST",
            next_step="`aivillage-node balance --json` lists them in full",
        )
    return PeerId(found[0])
