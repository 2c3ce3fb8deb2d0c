"""Reads of a book, as SQL text and a pure fold: the same for apsw and aiosqlite.

A query is a generator: it yields (SQL, bindings), is sent the rows, and returns its answer.
This file loads neither trio nor a database library.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec

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

    `attempt` is empty for money that no item explains.
    """

    seq: int
    at_ms: int
    kind: str
    peer: PeerId
    attempt: bytes
    amount: MicroCredits


_HISTORY = """
  SELECT e.seq, e.at_ms, e.kind, e.peer, coalesce(p.attempt, x''), -p.amount
  FROM entry e JOIN posting p USING (seq) WHERE p.account <> 'peer'
  ORDER BY e.seq DESC, p.leg LIMIT ?
"""


def history(limit: int) -> Query[list[HistoryRow]]:
    """The last `limit` movements, newest first."""
    rows = yield _HISTORY, (limit,)
    names = HistoryRow.__struct_fields__
    return [HistoryRow(**dict(zip(names, row, strict=True))) for row in rows]


def keys() -> Query[tuple[bytes, ...]]:
    """The keys that this book ever had, the one in force first."""
    rows = yield "SELECT public_key FROM identity ORDER BY n DESC", ()
    return tuple(key for (key,) in rows)
