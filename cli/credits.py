"""balance, history, audit: asked of the daemon; without one, read from the ledger itself."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from aivillage.cli import show
from aivillage.cli.client import NoDaemonError
from aivillage.cli.node import amount, connect, places
from aivillage.protocols.errors import EXIT_AUDIT, EXIT_OK
from aivillage.protocols.types import as_credits

ANSWER_ROWS_MAX: Final = 2000
"""As many as the daemon's answer holds."""


def _ask(args: argparse.Namespace, what: str, read: Callable[[], Any], **more: Any) -> Any:
    """The daemon's answer, or that of the file: the queries behind both are the same."""
    if more.get("limit", 1) > ANSWER_ROWS_MAX:
        return msgspec.to_builtins(read())
    try:
        with connect(args) as client:
            return client.ask(what, **more)
    except NoDaemonError:
        return msgspec.to_builtins(read())


def balance(args: argparse.Namespace) -> int:
    from aivillage.ledger import reader

    found = _ask(args, "balance", lambda: reader.read_balance(places(args).ledger))
    if args.json:
        show.as_json(found)
        return 0
    print(f"net         {as_credits(found['net']):>14} credits (earned minus spent)")
    print(f"in transit  {as_credits(found['in_transit']):>14} signed by me, not yet confirmed")
    print(f"at risk     {as_credits(found['at_risk']):>14} delivered by me, not yet signed for")
    if found["peers"]:
        print()
    show.table(
        [
            (
                show.short(peer["peer"]),
                as_credits(peer["net"]),
                as_credits(peer["spendable"]),
                as_credits(peer["line"]),
            )
            for peer in found["peers"]
        ],
        ("peer", "owes me", "I can spend there", "may owe me"),
    )
    return 0


def settle(args: argparse.Namespace) -> int:
    """Pays what I owe one peer with what others owe or lend me."""
    more = {} if args.credits is None else {"micro_credits": amount(args.credits)}
    with connect(args) as client:
        found = client.patient().ask("settle", peer=args.peer, **more)
    if args.json:
        show.as_json(found)
        return 0
    through = ", ".join(show.short(peer) for peer in found["through"])
    print(
        f"moved {as_credits(found['amount'])} of {as_credits(found['asked'])} credits:"
        f" {show.short(found['peer'])} is paid by {through}"
    )
    return 0


def history(args: argparse.Namespace) -> int:
    from aivillage.ledger import reader

    found = _ask(
        args,
        "history",
        lambda: [
            msgspec.to_builtins(row) | {"attempt": row.attempt.hex()}
            for row in reader.read_history(places(args).ledger, args.limit)
        ],
        limit=args.limit,
    )
    if args.json:
        show.as_json(found)
        return 0
    show.table(
        [
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rows[0]["at_ms"] / 1000)),
                rows[0]["kind"],
                show.short(rows[0]["peer"]),
                rows[0]["attempt"][:8],
                as_credits(sum(row["amount"] for row in rows)),
                len(rows),
            )
            for rows in _by_attempt(found)
        ],
        ("when", "what", "peer", "attempt", "credits", "vouchers"),
    )
    return 0


def _by_attempt(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A person thinks of a job, not of each voucher in it; `--json` has them all."""
    same = ("kind", "peer", "attempt")
    groups = itertools.groupby(found, key=lambda row: tuple(row[name] for name in same))
    return [list(rows) for _, rows in groups]


def audit(args: argparse.Namespace) -> int:
    """Exit 7 where the book is wrong, and the first entry that is."""
    from aivillage.ledger import reader

    found = _ask(args, "audit", lambda: reader.read_audit(places(args).ledger))
    if args.json:
        show.as_json(found)
    elif found["ok"]:
        print(
            f"the book is right: {found['entries']} entries, {found['vouchers']} vouchers,"
            f" {found['receipts']} receipts, every signature checked"
        )
    else:
        print(f"THE BOOK IS WRONG: {found['first_error']}")
    return EXIT_OK if found["ok"] else EXIT_AUDIT
