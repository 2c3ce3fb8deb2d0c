"""Why a job went where it went, or would go: every candidate, term by term."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TextIO

from aivillage.cli import show
from aivillage.cli.client import Client
from aivillage.protocols.messages import Submit
from aivillage.protocols.types import as_credits

TERMS = ("score", "work", "wait", "distance", "failures", "owes_us", "price")
HEADINGS = ("candidate", "score", "work", "wait", "away", "failures", "owes us", "price")


def dry_run(args: argparse.Namespace, client: Client, wanted: Submit) -> int:
    """What would be chosen; peers are asked for quotes, and nothing is bought."""
    found = client.patient().ask(
        "choose",
        operation=wanted.operation,
        request=wanted.request,
        ceiling_micro_credits=wanted.ceiling_micro_credits,
        peer=wanted.peer,
        local=wanted.local,
        mesh=wanted.mesh,
        prefer=wanted.prefer,
        draft=wanted.draft,
    )
    if args.json:
        show.as_json(found)
    else:
        table(found)
    return 0


def of_job(client: Client, job: str) -> list[dict[str, Any]]:
    """One choice an attempt; those of a job that its owner kept here had none."""
    attempts = client.ask("job", job=job)["attempts"]
    return [attempt["choice"] for attempt in attempts if attempt["choice"]]


def table(choice: dict[str, Any], out: TextIO | None = None) -> None:
    """`out`: standard output, unless said."""
    out = out or sys.stdout
    rate = as_credits(choice["micro_credits_a_second"])
    print(show.one_line(choice["why"]), file=out)
    print(f"in seconds; {choice['prefer']}: {rate} credits count as one", file=out)
    rows = [_row(one) for one in choice["candidates"]]
    show.table(rows, (*HEADINGS, "credits", "outcome"), out)
    if choice["left_out"]:
        print(f"and {choice['left_out']} more", file=out)


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    name = "here" if one["here"] else show.short(one["peer"])
    terms = (f"{one['seconds'][term]:.3f}" for term in TERMS)
    return (name, *terms, as_credits(one["price_micro_credits"]), one["outcome"])
