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
    that it has not signed for. `held`: that and what transfers of mine may still make it owe.
    `through_others`: at most so much of what others owe or lend me could be moved there.
    `doubtful`: the part of `net` that was written off. `helped_me`, `helped_it`: what work for
    nothing was worth. `proofs`: how often it contradicted itself in writing. `owner`: whose
    device it is.
    """

    peer: PeerId
    net: MicroCredits
    spendable: MicroCredits
    in_transit: MicroCredits
    at_risk: MicroCredits
    line: MicroCredits
    received_line: MicroCredits
    exposure: MicroCredits = 0
    held: MicroCredits = 0
    through_others: MicroCredits = 0
    doubtful: MicroCredits = 0
    helped_me: MicroCredits = 0
    helped_it: MicroCredits = 0
    proofs: int = 0
    known: bool = False
    blocked: bool = False
    shared: bool = False
    owner: str = ""


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """All debts, both ways. Credits with one peer are not credits with another.

    `net` = earned - spent + gifts + unlabelled - routed - (written_off - doubtful). `gifts`:
    received less given. `routed`: sent around rings and not yet back. `written_off`: what debts
    and transfers that I gave up cost; `doubtful`: the part of it that is owed all the same.
    `held`: transfers of mine that are open, and `at_risk`.
    """

    net: MicroCredits
    earned: MicroCredits
    spent: MicroCredits
    at_risk: MicroCredits
    in_transit: MicroCredits
    peers: list[PeerBalance]
    held: MicroCredits = 0
    gifts: MicroCredits = 0
    unlabelled: MicroCredits = 0
    routed: MicroCredits = 0
    written_off: MicroCredits = 0
    doubtful: MicroCredits = 0


_ACCOUNTS = "SELECT account, amount FROM account"
_HELD = "SELECT coalesce(sum(amount), 0) FROM route WHERE xid IN (SELECT xid FROM route_hop)"
_EVIDENCE = "SELECT payer, count(*) FROM evidence GROUP BY payer"
_FAVOURED = "SELECT peer, mine, worth FROM favour_sum"
_DOUBTFUL = """
  SELECT e.peer, -sum(p.amount) FROM entry e JOIN posting p USING (seq)
  WHERE e.lane = x'' AND p.account = 'doubtful' GROUP BY e.peer
"""
_PEERS = """
  SELECT peer, coalesce(amount, 0), max(0, reserved - paid - written_off),
    coalesce((SELECT sum(cum - confirmed) FROM lane_out l WHERE l.peer = peer.peer), 0),
    coalesce((SELECT sum(h.amount) FROM route_hop h WHERE h.peer = peer.peer), 0),
    CASE known WHEN 1 THEN line ELSE ?1 END, CASE known WHEN 1 THEN exposure ELSE ?1 END,
    received_line, known, blocked, shared, coalesce(owner, '')
  FROM peer LEFT JOIN bal USING (peer) ORDER BY owner, peer
"""


def balance(stranger_pool: MicroCredits = 0) -> Query[Balance]:
    """What this node has with everybody; reads sums that are kept, however long the history."""
    sums: dict[str, int] = dict((yield _ACCOUNTS, ()))
    ((open_rings,),) = yield _HELD, ()
    rows = yield _PEERS, (stranger_pool,)
    doubtful: dict[str, int] = dict((yield _DOUBTFUL, ())) if sums.get("doubtful") else {}
    proofs: dict[str, int] = dict((yield _EVIDENCE, ()))
    helped = {(peer, mine): worth for peer, mine, worth in (yield _FAVOURED, ())}
    peers = [
        PeerBalance(
            peer=row[0],
            net=row[1],
            at_risk=row[2],
            in_transit=row[3],
            held=row[2] + row[4],
            line=row[5],
            exposure=row[6],
            received_line=row[7],
            spendable=max(0, row[7] + row[1]),
            known=bool(row[8]),
            blocked=bool(row[9]),
            shared=bool(row[10]),
            owner=row[11],
            doubtful=doubtful.get(row[0], 0),
            helped_me=helped.get((row[0], 1), 0),
            helped_it=helped.get((row[0], 0), 0),
            proofs=proofs.get(row[0], 0),
        )
        for row in rows
    ]
    at_risk = sum(peer.at_risk for peer in peers)
    return Balance(
        net=sums.get("peer", 0),
        earned=-sums.get("earned", 0),
        spent=sums.get("spent", 0),
        at_risk=at_risk,
        in_transit=sum(peer.in_transit for peer in peers),
        peers=_with_ways(peers),
        held=open_rings + at_risk,
        gifts=-sums.get("gift", 0),
        unlabelled=-sums.get("unlabelled", 0),
        routed=sums.get("routed", 0),
        written_off=sums.get("writeoff", 0),
        doubtful=-sums.get("doubtful", 0),
    )


def _with_ways(peers: list[PeerBalance]) -> list[PeerBalance]:
    """Adds what could come to each through others: they pay it, and it owes me instead."""
    on_the_way = {
        peer.peer: peer.spendable
        for peer in peers
        if peer.known and not peer.blocked and peer.exposure
    }
    total = sum(on_the_way.values())
    return [
        msgspec.structs.replace(
            peer,
            through_others=max(
                0, min(total - on_the_way[peer.peer], peer.line - peer.net - peer.held)
            ),
        )
        if peer.peer in on_the_way
        else peer
        for peer in peers
    ]


class OpenTransfer(msgspec.Struct, frozen=True, kw_only=True):
    """A transfer that I started and that has not ended."""

    xid: bytes
    amount: MicroCredits
    started_ms: int
    peers: list[PeerId]


# CROSS JOIN fixes the order: few transfers are open, and all that ever were stay in the book.
_OPEN = """
  SELECT r.xid, r.amount, r.started_ms, h.peer FROM route_hop h CROSS JOIN route r USING (xid)
  ORDER BY h.xid, h.peer
"""


def open_transfers() -> Query[list[OpenTransfer]]:
    """Those of mine that wait to come back, the oldest first."""
    found: dict[bytes, OpenTransfer] = {}
    for xid, amount, started_ms, peer in (yield _OPEN, ()):
        transfer = found.setdefault(
            xid, OpenTransfer(xid=xid, amount=amount, started_ms=started_ms, peers=[])
        )
        transfer.peers.append(peer)
    return sorted(found.values(), key=lambda transfer: transfer.started_ms)


class Favour(msgspec.Struct, frozen=True, kw_only=True):
    """Work for nothing. `mine`: it was done for me. `worth`: at the default prices."""

    at_ms: int
    mine: bool
    peer: PeerId
    attempt: bytes
    worth: MicroCredits


_FAVOURS = """
  SELECT at_ms, mine, peer, attempt, worth FROM favour
  ORDER BY at_ms DESC, attempt DESC LIMIT ?
"""


def favours(limit: int) -> Query[list[Favour]]:
    """The last `limit` favours, newest first."""
    return [
        Favour(at_ms=at_ms, mine=bool(mine), peer=peer, attempt=attempt, worth=worth)
        for at_ms, mine, peer, attempt, worth in (yield _FAVOURS, (limit,))
    ]


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
    """The last `limit` movements, newest first: in the book's order, or by time.

    By time where a time is asked for, or a kind of no one peer: both have an index.

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
    """Walks the index of the peer if one is asked for, else of the kind or the times."""
    by_time = not wanted.peer and (
        bool(wanted.kind) or (wanted.since_ms, wanted.until_ms) != (None, None)
    )
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


_NAMES: Final = "SELECT peer, peer FROM peer UNION ALL SELECT key_peer, peer FROM peer_key"


def find_peer(text: str) -> Query[PeerId]:
    """The one peer in the book of whom an id, an earlier or a later one, is or ends with `text`.

    Raises:
        RequestError: BAD_REQUEST, there is none, or there are several.
    """
    rows = yield _NAMES, ()
    found = {peer for name, peer in rows if text and name.endswith(text)}
    if len(found) != 1:
        how = (
            f"{len(found)} peers in the book have ids" if found else "no peer in the book has an id"
        )
        raise RequestError(
            f"{how} that ends with {text!r}",
            code="BAD_REQUEST",
            next_step="`aivillage-node balance --json` lists them in full",
        )
    return PeerId(found.pop())
