"""grant, grants: what a village guarantees for its members."""

from __future__ import annotations

import argparse
import time
from typing import Any

from aivillage.cli import show
from aivillage.cli.node import amount, connect
from aivillage.protocols.types import as_credits


def grant(args: argparse.Namespace) -> int:
    """Issues one; the token is for a holder that is not here."""
    with connect(args) as client:
        found = client.ask(
            "grant", peer=args.peer, amount_micro_credits=amount(args.credits), days=args.days
        )
    if args.json:
        show.as_json(found)
        return 0
    print(found["token"])
    if found["sent"]:
        show.note(f"sent to {show.short(found['holder'])}; the token is a copy")
    else:
        show.note(f"{show.short(found['holder'])} is not here. On its machine:")
        show.note("  aivillage-node grants import TOKEN")
    return 0


def grants(args: argparse.Namespace) -> int:
    """Lists them; `import` takes one first."""
    with connect(args) as client:
        if args.action == "import":
            found = client.ask("grants_import", token=args.token)
        else:
            found = client.ask("grants")
    if args.json:
        show.as_json(found)
        return 0
    rows = [_row("issued", one, one["holder"]) for one in found["issued"]]
    rows += [_row("held", one, one["issuer"]) for one in found["held"]]
    show.table(rows, ("what", "to or from", "credits", "until"))
    return 0


def _row(what: str, one: dict[str, Any], other: str) -> tuple[str, ...]:
    until = time.strftime("%Y-%m-%d", time.localtime(one["not_after_unix_ms"] / 1000))
    return what, show.short(other), as_credits(one["amount_micro_credits"]), until
