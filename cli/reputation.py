"""reputation: who did how well here, in words, and the way back for whom it did not go well."""

from __future__ import annotations

import argparse
import time
from typing import Any

from aivillage.cli import show
from aivillage.cli.node import connect
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import as_credits


def reputation(args: argparse.Namespace) -> int:
    """Explains; `--forgive` first ends what is held against one peer."""
    if args.forgive and not args.peer:
        raise RequestError("whom?", next_step="aivillage-node reputation --forgive PEER")
    with connect(args) as client:
        if args.forgive:
            found = client.ask("forgive", peer=args.peer)
        else:
            found = client.ask("reputation", **({"peer": args.peer} if args.peer else {}))
    if args.json:
        show.as_json(found)
        return 0
    for line in explained(found, time.time()):
        print(show.plain(line))
    return 0


def explained(found: dict[str, Any], now: float) -> list[str]:
    """The whole answer, a line a fact."""
    lines = []
    for peer in found["peers"]:
        lines.append(show.short(peer["peer"]))
        lines += [f"  {line}" for row in peer["results"] for line in _row(row, now)]
        lines += [f"  {_evidence(one)}" for one in peer["evidence"]]
        if not peer["results"]:
            lines.append("  nothing of it was used here yet")
    return (lines or ["nobody did anything for this node yet"]) + _spending(found["spending"])


def _row(row: dict[str, Any], now: float) -> list[str]:
    """One operation, model and kernel class."""
    what = " ".join(filter(None, (row["operation"], row["model"])))
    counts = f"{row['done']} done, {row['checked']} done again, {row['failed']} wrong"
    if row["unsettled"]:
        counts += f", {row['unsettled']} disputed without a verdict"
    lines = [f"{what}: {counts}"]
    if row["kernel"]:
        lines.append(f"  kernel class {row['kernel']}")
    if row["until"] > now:
        times = "the first time" if row["faults"] == 1 else f"time {row['faults']}"
        lines.append(
            f"  cut off since {_clock(row['since'])} until {_clock(row['until'])}, for {times}; "
            "then, or after `reputation --forgive`, it gets jobs again"
        )
    elif row["faults"]:
        lines.append(f"  was cut off until {_clock(row['until'])}; back, under full checks")
    lines.append(f"  {_next(row)}")
    return lines


def _next(row: dict[str, Any]) -> str:
    if not row["kernel"]:
        return "nothing of it can be compared: it names no kernel class"
    if row["chance"] >= 1:
        return f"every result is done again: {row['count']} right in a row, trusted from 10"
    return (
        f"{row['count']} right in a row: one in {round(1 / row['chance'])} is done again, at random"
    )


def _evidence(one: dict[str, Any]) -> str:
    return f"{_clock(one['at_unix'])} job {one['job'][:8]}: {one['reason']}"


def _spending(found: dict[str, Any]) -> list[str]:
    """What checks cost, so that nobody is surprised."""
    cost, beside = found["checks_micro_credits"], found["jobs_micro_credits"]
    lines = [
        (
            f"checks cost {as_credits(cost)} credits beside {as_credits(beside)} for jobs "
            f"({found['checks_percent']} %) within 30 days; "
            f"{as_credits(found['room_micro_credits'])} more is allowed now "
            f"(verify_percent_max {found['verify_percent_max']})"
        )
    ]
    if found["trusted_checks_percent"]:
        share = found["trusted_checks_percent"]
        lines.append(
            f"of that at trusted peers, since the start: {share} % of what their jobs cost"
        )
    lines += [f"not checked since the start, {n}: {why}" for why, n in found["unchecked"].items()]
    return lines


def _clock(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix))
