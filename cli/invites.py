"""invite: a token for people to join by, as text or QR code; the list of them; taking one back."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import Any

from aivillage.cli import show
from aivillage.cli.node import amount, connect
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import as_credits

QR_BORDER = 2
"""Modules of quiet around it; cameras ask for some."""


def invite(args: argparse.Namespace) -> int:
    if args.list and args.revoke:
        raise RequestError("one at a time", next_step="--list, or --revoke ID")
    if args.list:
        return _list(args)
    if args.revoke:
        return _revoke(args)
    wanted: dict[str, Any] = {"uses": args.uses, "days": args.days, "note": args.note}
    if args.line:
        wanted["line_micro_credits"] = amount(args.line)
    with connect(args) as client:
        found = client.ask("invite", **wanted)
    if args.json:
        show.as_json(found)
        return 0
    if args.qr:
        _print_code(qr_code(found["token"]))
    print(found["token"])
    people = "one person" if args.uses == 1 else f"{args.uses} people"
    show.note(f"Good for {people} and {args.days} days; whoever has it can join. On their machine:")
    show.note("  aivillage-node start --join TOKEN")
    return 0


def _print_code(picture: str) -> None:
    print(picture)
    width = picture.index("\n")
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < width:
        show.note(f"The code is {width} columns wide: more than the terminal. Widen it.")


def qr_code(token: str) -> str:
    """The token as a QR code of half blocks, light on dark terminals too.

    Raises:
        RequestError: BAD_REQUEST, it is longer than a code can be.
    """
    import segno

    try:
        code = segno.make(token, error="l", micro=False)
    except segno.DataOverflowError:
        raise RequestError(
            f"{len(token)} characters are too many for a QR code",
            next_step="hand it on as text, or announce fewer addresses",
        ) from None
    rows = [[bool(dark) for dark in row] for row in code.matrix_iter(border=QR_BORDER)]
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))
    # A light module is drawn, a dark one is the ground: as codes look on a dark terminal.
    blocks = {(False, False): "\u2588", (False, True): "\u2580", (True, False): "\u2584"}
    return "\n".join(
        "".join(blocks.get(pair, " ") for pair in zip(upper, lower, strict=True))
        for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    )


def _list(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("invites")
    if args.json:
        show.as_json(found)
        return 0
    show.table(
        [_row(one) for one in found], ("id", "state", "uses", "until", "line", "who", "note")
    )
    return 0


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["id"],
        one["state"],
        f"{one['uses_left']} of {one['uses']} left",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(one["ends_unix"])),
        as_credits(one["line_micro_credits"]),
        ", ".join(show.short(guest["peer"]) for guest in one["guests"]),
        one["note"],
    )


def _revoke(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("invite_revoke", id=args.revoke)
    if args.json:
        show.as_json(found)
    else:
        print(f"revoked {found['id']}; the {len(found['guests'])} who came by it are members still")
    return 0
