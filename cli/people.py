"""The owner's word on people: trust, block, share, gift, release, write-off; and compact."""

from __future__ import annotations

import argparse
import time
from typing import Any

from aivillage.cli import show
from aivillage.cli.node import amount, connect
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import as_credits


def _ask(args: argparse.Namespace, what: str, **more: Any) -> Any:
    """The daemon's answer; as JSON it is printed at once."""
    with connect(args) as client:
        found = client.patient().ask(what, **more)
    if args.json:
        show.as_json(found)
    return found


def trust(args: argparse.Namespace) -> int:
    """The owner's line for a peer, or back to what the village says."""
    if (args.limit is None) != args.village:
        raise RequestError(
            "trust takes either a limit or --village",
            next_step="aivillage-node trust PEER 5, or: aivillage-node trust PEER --village",
        )
    if args.village and args.exposure:
        raise RequestError("with --village the exposure is the village's", next_step="leave it out")
    wanted: dict[str, Any] = {"by_village": True} if args.village else {"line": amount(args.limit)}
    if args.exposure:
        wanted["exposure"] = amount(args.exposure)
    found = _ask(args, "trust", peer=args.peer, **wanted)
    if not args.json:
        _show_word(found)
    return 0


def _show_word(found: dict[str, Any]) -> None:
    peer = show.short(found["peer"])
    if found["blocked"]:
        print(f"{peer} is blocked: no work, no credit, no transfers for it")
    else:
        unsigned, free = as_credits(found["exposure"]), ", and pays nothing for work"
        print(
            f"{peer} may owe you {as_credits(found['line'])} credits, {unsigned} of it unsigned"
            f"{free if found['shared'] else ''}"
        )
    if not found["told"]:
        show.note("It is not here now; it hears so when it comes.")


def block(args: argparse.Namespace) -> int:
    found = _ask(args, "block", peer=args.peer)
    if not args.json:
        _show_word(found)
    return 0


def unblock(args: argparse.Namespace) -> int:
    """What it owed, and what it never signed for, is as it was."""
    found = _ask(args, "block", peer=args.peer, stop=True)
    if not args.json:
        _show_word(found)
    return 0


def share(args: argparse.Namespace) -> int:
    """Free work for these people, or no longer."""
    found = _ask(args, "share", peers=args.peers, stop=args.stop)
    if not args.json:
        for word in found:
            _show_word(word)
    return 0


def gift(args: argparse.Namespace) -> int:
    found = _ask(args, "gift", peer=args.peer, amount=amount(args.credits))
    if not args.json:
        print(
            f"gave {show.short(found['peer'])} {as_credits(found['amount'])} credits;"
            f" you owe it {as_credits(found['owed_by_me'])} now"
        )
    return 0


def release(args: argparse.Namespace) -> int:
    """Gives up a transfer or a gap; without a name it lists the transfers that are open."""
    if args.transfer and args.peer:
        raise RequestError("one at a time", next_step="a transfer, or --peer PEER")
    if args.peer:
        found = _ask(args, "release_gap", peer=args.peer)
        what = f"work for {show.short(found['peer'])} that was never signed for"
    elif args.transfer:
        found = _ask(args, "release", transfer=args.transfer)
        what = f"transfer {found['transfer'][:8]}; should it come back after all, it is yours again"
    else:
        return _list_transfers(args)
    if not args.json:
        print(f"gave up {as_credits(found['cost'])} credits: {what}")
    return 0


def _list_transfers(args: argparse.Namespace) -> int:
    found = _ask(args, "transfers")
    if not args.json:
        show.table(
            [
                (
                    transfer["xid"][:12],
                    as_credits(transfer["amount"]),
                    show.ago(transfer["started_ms"] / 1000),
                    ", ".join(show.short(peer) for peer in transfer["peers"]),
                )
                for transfer in found
            ],
            ("transfer", "credits", "begun", "through"),
        )
    return 0


def write_off(args: argparse.Namespace) -> int:
    """A debt that is no longer counted on; the peer owes it all the same."""
    more = {} if args.credits is None else {"amount": amount(args.credits)}
    found = _ask(args, "write_off", peer=args.peer, reason=args.reason, **more)
    if not args.json:
        print(
            f"wrote off {as_credits(found['cost'])} credits that {show.short(found['peer'])} owes"
        )
    return 0


def favours(args: argparse.Namespace) -> int:
    """Work for nothing, both ways; read from the file itself."""
    import msgspec

    from aivillage.cli.node import places
    from aivillage.ledger import reader

    found = [
        msgspec.to_builtins(row) | {"attempt": row.attempt.hex()}
        for row in reader.read_favours(places(args).ledger, args.limit)
    ]
    if args.json:
        show.as_json(found)
        return 0
    show.table(
        [
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["at_ms"] / 1000)),
                "it helped me" if row["mine"] else "I helped it",
                show.short(row["peer"]),
                row["attempt"][:8],
                as_credits(row["worth"]),
            )
            for row in found
        ],
        ("when", "who", "peer", "attempt", "worth in credits"),
    )
    return 0


def compact(args: argparse.Namespace) -> int:
    found = _ask(args, "compact")
    if not args.json:
        print(
            f"looked at {found['looked']} vouchers and dropped {found['vouchers']} that later ones"
            f" repeat, {found['receipts']} receipts and {found['intents']} stale intents,"
            f" in {found['seconds']:.1f} s; every proof is still there"
        )
    return 0
