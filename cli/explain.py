"""explain: why a job cost what it cost, from the files themselves, whether or not a daemon runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec

from aivillage.cli import show
from aivillage.cli.client import NoDaemonError
from aivillage.cli.node import connect, places
from aivillage.node.paths import Paths
from aivillage.protocols.errors import EXIT_AUDIT, EXIT_OK, AivillageError
from aivillage.protocols.types import AttemptId, JobId, as_credits

if TYPE_CHECKING:
    from aivillage.ledger.signed import Signed
    from aivillage.node.explain import Explained, Explanation, Kept, Line


def explain(args: argparse.Namespace) -> int:
    """Exit 7 where what is stored, what was signed and what is recomputed contradict each other."""
    from aivillage.node.attempts import kept_job
    from aivillage.node.explain import explain as explain_rows
    from aivillage.node.explain import needs_a_worker

    where = places(args)
    signed = _signed(where, kept_job(where.jobs, args.job.lower()))
    # Once more: a job may be running, and what is signed was stored before, so it is there by now.
    kept = kept_job(where.jobs, args.job.lower())
    if needs_a_worker(kept.job):
        kept = kept._replace(metered=_metered(args, kept.job.id))
    found = explain_rows(kept, signed)
    if args.json:
        show.as_json(msgspec.to_builtins(found))
    else:
        _say(found)
    return EXIT_OK if found.ok else EXIT_AUDIT


def _signed(where: Paths, kept: Kept) -> dict[AttemptId, Signed]:
    from aivillage.ledger import reader
    from aivillage.ledger.signed import signed_for

    asked = [(attempt.seller, AttemptId(attempt.id)) for attempt in kept.attempts]
    return reader.read(where.ledger, signed_for(asked)) if asked and not kept.job.local else {}


def _metered(args: argparse.Namespace, job: JobId) -> dict[str, int] | None:
    """By the running node's workers; None where none runs, or the module is off or fails."""
    try:
        with connect(args) as client:
            found: dict[str, int] = client.ask("usage", job=job)
            return found
    except NoDaemonError:
        return None
    except AivillageError as error:
        show.note(f"its usage was not counted: {error.message}")
        return None


def _say(found: Explanation) -> None:
    print(f"job {found.job}: {found.operation}, {found.state}")
    if found.local:
        print("cost nothing: done on this machine")
        return
    if not found.attempts:
        print("cost nothing: nobody began it")
        return
    for number, attempt in enumerate(found.attempts, 1):
        _say_attempt(number, attempt)
    total = found.sum_micro_credits
    recomputed = "cannot be recomputed in full" if total is None else as_credits(total)
    print()
    show.pairs(
        {
            "recomputed": recomputed,
            "stored": as_credits(found.stored_micro_credits),
            "signed": as_credits(found.signed_micro_credits),
        }
    )


def _say_attempt(number: int, attempt: Explained) -> None:
    engine = f", {attempt.kernel} (identical: {attempt.identical})" if attempt.kernel else ""
    outcome = show.one_line(attempt.outcome + engine)
    print(f"\nattempt {number} ({attempt.attempt[:8]}) by {show.short(attempt.seller)}: {outcome}")
    print(f"  quote {attempt.quote_hash[:16]} {_QUOTES.get(attempt.quote, attempt.quote)}".rstrip())
    for line in attempt.lines:
        print(f"  {show.one_line(_line(line))}")
    if attempt.sum_micro_credits is not None:
        print(f"  sum: {as_credits(attempt.sum_micro_credits)} credits")
    print(f"  {_paid(attempt)}")
    if attempt.note:
        print(f"  note: {show.one_line(attempt.note)}")
    for fault in attempt.faults:
        print(f"  WRONG: {fault}")


_QUOTES = {
    "signed": "is signed by this seller",
    "not stored": "none stored: an older version of this program began the attempt",
}


def _line(line: Line) -> str:
    paid = line.count - line.waived
    waived = f" ({line.count} less {line.waived} that an earlier attempt delivered)"
    return (
        f"{line.unit.replace('_', ' ')}: {paid}{waived if line.waived else ''}"
        f" x {as_credits(line.price_micro_credits)} = {as_credits(line.amount_micro_credits)}"
    )


def _paid(attempt: Explained) -> str:
    signed = attempt.signed
    arrears = ""
    if signed.arrears_micro_credits:
        arrears = f" and {as_credits(signed.arrears_micro_credits)} on a claim after a crash"
    if not (signed.amount_micro_credits or signed.final or arrears):
        return "signed: nothing"
    answer = "no receipt yet"
    if signed.receipt:
        answer = "receipt given, " + (
            "output attested" if signed.attested else "output not attested"
        )
    last = ", final" if signed.final else ""
    return f"signed: {as_credits(signed.amount_micro_credits)}{last}{arrears}; {answer}"
