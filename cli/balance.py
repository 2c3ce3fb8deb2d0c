"""How `balance` looks: the sums, then a line for each peer, devices of one owner together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

from aivillage.cli import show
from aivillage.protocols.types import as_credits

_PARTS: Final = (
    ("gifts", "gifts", 1),
    ("unlabelled", "unexplained", 1),
    ("routed", "on their way around rings", -1),
    ("written_off", "written off", -1),
    ("doubtful", "of that owed all the same", 1),
)
"""Field, its words, and how it counts in the net."""


def show_balance(found: dict[str, Any]) -> None:
    """What a person sees; `--json` has every field."""
    print(f"net         {as_credits(found['net']):>14} credits ({_parts(found)})")
    print(f"in transit  {as_credits(found['in_transit']):>14} signed by me, not yet confirmed")
    print(
        f"at risk     {as_credits(found['at_risk']):>14} reserved or delivered, not yet signed for"
    )
    if found["held"] > found["at_risk"]:
        held = as_credits(found["held"] - found["at_risk"])
        print(f"held        {held:>14} in transfers of mine that are open")
    if found["peers"]:
        print()
        columns = ("peer", "owes me", "I can spend there", "through others", "may owe me", "")
        show.table([*_rows(found["peers"])], columns)


def _parts(found: dict[str, Any]) -> str:
    parts = [f"earned {as_credits(found['earned'])}", f"spent {as_credits(found['spent'])}"]
    parts += [
        f"{words} {as_credits(sign * found[name])}" for name, words, sign in _PARTS if found[name]
    ]
    return ", ".join(parts)


def _rows(peers: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for owner, group in itertools.groupby(peers, key=lambda peer: peer["owner"]):
        devices = [*group]
        if not owner:
            yield from (_row(peer) for peer in devices)
            continue
        net = sum(peer["net"] for peer in devices)
        spendable = sum(peer["spendable"] for peer in devices)
        line = max(peer["line"] for peer in devices)  # they share it
        together = (as_credits(net), as_credits(spendable), "", as_credits(line))
        yield (f"owner {show.short(owner)}", *together, f"{len(devices)} devices")
        yield from (_row(peer, indent="  ") for peer in devices)


def _row(peer: dict[str, Any], indent: str = "") -> tuple[str, ...]:
    amounts = (peer[name] for name in ("net", "spendable", "through_others", "line"))
    return (
        indent + show.short(peer["peer"]),
        *(as_credits(amount) for amount in amounts),
        "; ".join(_notes(peer)),
    )


def _notes(peer: dict[str, Any]) -> Iterator[str]:
    if peer["blocked"]:
        yield "blocked"
    if peer["shared"]:
        yield "pays nothing here"
    if peer["doubtful"]:
        yield f"{as_credits(peer['doubtful'])} written off"
    if peer["helped_me"]:
        yield f"helped me for nothing: {as_credits(peer['helped_me'])}"
    if peer["helped_it"]:
        yield f"I helped it for nothing: {as_credits(peer['helped_it'])}"
    if peer["proofs"]:
        yield proofs(peer)


def proofs(peer: dict[str, Any]) -> str:
    """What it signed and cannot both be true."""
    count = peer["proofs"]
    return f"contradicted itself: {count} proof{'s' if count > 1 else ''}"
