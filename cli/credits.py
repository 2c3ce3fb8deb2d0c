"""balance, audit: asked of the daemon, else read from the ledger itself, as history always is."""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from aivillage.cli import show
from aivillage.cli.balance import proofs, show_balance
from aivillage.cli.client import NoDaemonError
from aivillage.cli.node import amount, connect, places
from aivillage.cli.times import unix_ms
from aivillage.protocols.errors import EXIT_AUDIT, EXIT_OK, RequestError
from aivillage.protocols.types import as_credits

if TYPE_CHECKING:
    from aivillage.ledger.queries import Balance, HistoryRow

_COLUMNS: Final = ("seq", "at", "kind", "peer", "account", "attempt", "amount_micro_credits")


def _ask(args: argparse.Namespace, what: str, read: Callable[[], Any]) -> Any:
    """The daemon's answer, or that of the file: the queries behind both are the same."""
    try:
        with connect(args) as client:
            return client.ask(what)
    except NoDaemonError:
        return msgspec.to_builtins(read())


def balance(args: argparse.Namespace) -> int:
    found = _ask(args, "balance", lambda: _read_balance(args))
    if args.json:
        show.as_json(found)
        return 0
    show_balance(found)
    return 0


def _read_balance(args: argparse.Namespace) -> Balance:
    """From the file, with the strangers' pool that a daemon would have here."""
    from aivillage.ledger import reader
    from aivillage.node import config

    where = places(args)
    settings, _ = config.load(where.data_dir, {})
    return reader.read_balance(where.ledger, settings.stranger_pool_micro_credits)


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
    """Read from the file itself, whether or not a daemon runs: any number of rows."""
    found = _movements(args)
    if args.json:
        show.as_json([msgspec.to_builtins(row) | {"attempt": row.attempt.hex()} for row in found])
    elif args.csv:
        _as_csv(found)
    else:
        _as_table(found)
    return 0


def _movements(args: argparse.Namespace) -> list[HistoryRow]:
    from aivillage.ledger import reader
    from aivillage.ledger.queries import Movements

    if args.limit < 1:
        raise RequestError(
            f"{args.limit} rows cannot be shown", code="BAD_REQUEST", next_step="--limit 50"
        )
    wanted = Movements(
        peer=args.peer,
        kind=args.kind,
        since_ms=args.since and unix_ms(args.since),
        until_ms=args.until and unix_ms(args.until, end=True),
    )
    return reader.read_history(places(args).ledger, args.limit, wanted)


def _as_csv(found: Sequence[HistoryRow]) -> None:
    """RFC 4180: a header, commas, lines that end with CR LF. Times in UTC."""
    lines = csv.writer(sys.stdout)
    lines.writerow(_COLUMNS)
    for row in found:
        at = datetime.fromtimestamp(row.at_ms / 1000, UTC).isoformat()
        attempt = row.attempt.hex()
        lines.writerow((row.seq, at, row.kind, row.peer, row.account, attempt, row.amount))


def _as_table(found: Sequence[HistoryRow]) -> None:
    show.table(
        [
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(rows[0].at_ms / 1000)),
                rows[0].kind,
                show.short(rows[0].peer),
                rows[0].attempt.hex()[:8],
                as_credits(sum(row.amount for row in rows)),
                len(rows),
            )
            for rows in _by_attempt(found)
        ],
        ("when", "what", "peer", "attempt", "credits", "vouchers"),
    )


def _by_attempt(found: Sequence[HistoryRow]) -> list[list[HistoryRow]]:
    """A person thinks of a job, not of each voucher in it; `--json` and `--csv` have them all."""
    groups = itertools.groupby(found, key=lambda row: (row.kind, row.peer, row.attempt))
    return [list(rows) for _, rows in groups]


def audit(args: argparse.Namespace) -> int:
    """Exit 7 where the book is wrong, and the first entry that is."""
    from aivillage.ledger import reader

    if args.peer:
        return _compare(args)

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
    if not args.json:
        _name_liars(args)
    return EXIT_OK if found["ok"] else EXIT_AUDIT


def _name_liars(args: argparse.Namespace) -> None:
    """A book can be right about somebody who is not."""
    found = _ask(args, "balance", lambda: _read_balance(args))
    for peer in found["peers"]:
        if peer["proofs"]:
            print(f"{show.short(peer['peer'])} {proofs(peer)}")


def _compare(args: argparse.Namespace) -> int:
    """Exit 7 where this book and the peer's say different things, and the gravest of them."""
    with connect(args) as client:
        found = client.ask("audit_peer", peer=args.peer)
    if args.json:
        show.as_json(found)
    elif found["agree"]:
        print(f"both books agree, {as_credits(found['in_transit'])} credits in transit")
    else:
        print(f"THE BOOKS DIFFER: {found['first']}")
    if found["left_out"]:
        show.note(f"{found['left_out']} lanes of old boots did not fit, and were not compared")
    return EXIT_OK if found["agree"] else EXIT_AUDIT
