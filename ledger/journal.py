"""The whole book as a beancount journal, for a second opinion by somebody else's program.

Text goes out entry by entry, so memory does not grow with the book.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aivillage.ledger.queries import Query
from aivillage.protocols.types import MicroCredits, PeerId

COMMODITY: Final = "MESH"
PEERS: Final = "Assets:Mesh:"
"""Then the peer's id. What I owe it is a negative asset: one account per peer, not two."""
ACCOUNTS: Final[dict[str, str]] = {
    "earned": "Income:Mesh:Earned",
    "spent": "Expenses:Mesh:Spent",
    "gift": "Expenses:Mesh:Gift",
    "writeoff": "Expenses:Mesh:Writeoff",
    "doubtful": "Assets:MeshDoubtful",
    "routed": "Equity:Mesh:Routed",
    "unlabelled": "Equity:Mesh:Unlabelled",
}
"""An account that is not here becomes `Equity:Mesh:` and its own name."""

_PAGE: Final = 1000
_ENTRIES: Final = """
  SELECT seq, at_ms, kind, peer, lane, n FROM entry WHERE seq > ? ORDER BY seq LIMIT ?
"""
_LEGS: Final = """
  SELECT seq, account, attempt, amount FROM posting WHERE seq BETWEEN ? AND ? ORDER BY seq, leg
"""
_USED: Final = """
  SELECT DISTINCT p.account, CASE p.account WHEN 'peer' THEN e.peer ELSE '' END
  FROM entry e CROSS JOIN posting p ON p.seq = e.seq
"""
_EPOCH: Final = "1970-01-01"  # before every entry, whatever the clock once said
_HEADER: Final = f"""\
option "title" "AIVillage"
option "operating_currency" "{COMMODITY}"

{_EPOCH} commodity {COMMODITY}
  name: "AIVillage credit: 1 TFLOP of model arithmetic"

"""


def beancount(write: Callable[[str], Any]) -> Query[int]:
    """Hands the journal to `write`, piece by piece; returns the number of entries."""
    write(_HEADER)
    used = yield _USED, ()
    for name in sorted({account_name(account, peer) for account, peer in used}):
        write(f"{_EPOCH} open {name} {COMMODITY}\n")
    count = last = latest_ms = 0
    while page := (yield _ENTRIES, (last, _PAGE)):
        legs = _grouped((yield _LEGS, (page[0][0], page[-1][0])))
        for row in page:
            write(_transaction(row, legs.get(row[0], [])))
        count, last = count + len(page), page[-1][0]
        latest_ms = max(latest_ms, *(row[1] for row in page))
    write("\n")
    for peer, amount in (yield "SELECT peer, amount FROM bal ORDER BY peer", ()):
        write(_assertion(peer, amount, latest_ms))
    return count


def account_name(account: str, peer: PeerId) -> str:
    """The journal's name for an account of the book."""
    if account == "peer":
        return PEERS + peer
    words = re.findall(r"[A-Za-z0-9]+", account)
    return ACCOUNTS.get(account) or "Equity:Mesh:" + "-".join(word.capitalize() for word in words)


def decimal(amount: MicroCredits) -> str:
    """Credits to the last micro-credit, without a float.

    >>> decimal(-269)
    '-0.000269'
    """
    whole, micro = divmod(abs(amount), 1_000_000)
    return f"{'-' if amount < 0 else ''}{whole}.{micro:06d}"


def _grouped(rows: Sequence[tuple[Any, ...]]) -> dict[int, list[tuple[Any, ...]]]:
    legs: dict[int, list[tuple[Any, ...]]] = {}
    for seq, *leg in rows:
        legs.setdefault(seq, []).append(tuple(leg))
    return legs


def _time(at_ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)


def _transaction(entry: tuple[Any, ...], legs: Sequence[tuple[Any, ...]]) -> str:
    seq, at_ms, kind, peer, lane, n = entry
    at = _time(at_ms)
    lines = [
        "",
        f'{at:%Y-%m-%d} * "{peer}" "{kind}"',
        f"  seq: {seq}",
        f'  kind: "{kind}"',
        f'  at: "{at.isoformat(timespec="milliseconds")}"',
    ]
    if lane:  # a correction of one's own has no voucher
        lines += [f'  lane: "{lane.hex()}"', f"  voucher_n: {n}"]
    for account, attempt, amount in legs:
        lines.append(f"  {account_name(account, peer)}  {decimal(amount)} {COMMODITY}")
        if attempt:
            lines.append(f'    attempt: "{attempt.hex()}"')
    return "\n".join(lines) + "\n"


def _assertion(peer: PeerId, amount: MicroCredits, latest_ms: int) -> str:
    """Of the morning after. `~ 0`: beancount lets the last digit pass otherwise."""
    day = _time(latest_ms) + timedelta(days=1)
    return f"{day:%Y-%m-%d} balance {PEERS}{peer} {decimal(amount)} ~ 0 {COMMODITY}\n"
