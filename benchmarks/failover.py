"""A seller killed in the middle of an answer: how long until the next token, and is it the same?

    python benchmarks/failover.py [--quick] [--json]

A buyer and two sellers, each a real daemon with the packaged model. The one that answers is killed
with SIGKILL, workers included, at a random token; then it comes back for the next seed.

`recover_s` is the time from the kill to the first further token where the stand-in has the model
loaded. Of it `notice_s` goes by until the buyer says that the seller is gone, with what was
delivered stored and signed for; the rest is a quote, a call, and reading prompt and delivered part
again. `cold_recover_s`: the stand-in has not loaded the model. `silent_recover_s`: the seller is
stopped, not killed, as by a cut cable: no closed connection tells of it. `identical_fraction` is
against an undisturbed run, token for token and to the micro-credit, in one kernel class;
`books_exact` is 1 where all books agree in the end and sum to 0.

Elsewhere, not measured here: patched Petals goes on after 3.1 s, stock Petals never.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from claims import Claims, main
from yard import books_exact, known

from aivillage.protocols import messages
from tests.integration.daemons import Daemon, DaemonError, Yard

FLAGS = ("--set", "offer_seconds=2")
TOKENS = 48
PROMPT = "Explain in a few sentences why the sky is blue, and why the evening sky is red."
OPERATION: Final = "inference.generate"
REQUEST: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS}
LONG: dict[str, Any] = REQUEST | {"max_tokens": 160}
"""The other one loads for several seconds of it."""
RECOVER_SECONDS, GOAL_SECONDS = 2.0, 0.5
SILENT_SECONDS = 6.0
"""2 s of quiet, 2 s for a sign of life, then as above."""


class Lost(NamedTuple):
    """One answer whose first seller was lost."""

    answer: dict[str, Any]
    victim: Daemon
    notice_seconds: float
    recover_seconds: float


def measure(claims: Claims, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, Yard(Path(folder)) as yard:
        buyer, *sellers = nodes = yard.village("buyer", "one", "two", flags=FLAGS)
        known(buyer, sellers, OPERATION)
        warm(buyer, sellers)
        wanted = answer_of(buyer, sellers[0])
        runs = [warm_run(seed, buyer, sellers) for seed in range(3 if args.quick else 20)]
        silent, cold, stood_by = [], [], []
        for seed in range(1 if args.quick else 3):
            silent.append(warm_run(seed, buyer, sellers, signal.SIGSTOP))
            cold.append(cold_run(silent[-1].victim, buyer, sellers))
        if not args.quick:
            stood_by = [stand_by_run(buyer, sellers) for _ in range(3)]
        tell(claims, runs)
        silent_s = statistics.median(run.recover_seconds for run in silent)
        claims.add("silent_recover_s", silent_s, at_most=SILENT_SECONDS)
        claims.add("cold_recover_s", statistics.median(run.recover_seconds for run in cold))
        same = [is_same(run.answer, wanted) for run in (*runs, *silent, *cold)]
        if stood_by:
            stand_by_s = statistics.median(run.recover_seconds for run in stood_by)
            claims.add("stand_by_recover_s", stand_by_s, at_most=RECOVER_SECONDS)
            wanted = answer_of(buyer, sellers[0], LONG)
            same += [is_same(run.answer, wanted) for run in stood_by]
        claims.add("identical_fraction", statistics.mean(same), at_least=1.0)
        claims.note("identical_said", sorted({run.answer["receipt"]["identical"] for run in runs}))
        claims.add("books_exact", books_exact(nodes), at_least=1)


def tell(claims: Claims, runs: list[Lost]) -> None:
    took = sorted(run.recover_seconds for run in runs)
    claims.note("seeds", len(runs))
    claims.add("recover_s_min", took[0])
    claims.add("recover_s_p50", statistics.median(took))
    claims.add("recover_s_p95", took[-(-95 * len(took) // 100) - 1], at_most=RECOVER_SECONDS)
    claims.add("recover_s_max", took[-1])
    claims.note("recover_s_goal", GOAL_SECONDS)
    claims.add("notice_s_p50", statistics.median(run.notice_seconds for run in runs))


def warm_run(
    seed: int, buyer: Daemon, sellers: list[Daemon], how: signal.Signals = signal.SIGKILL
) -> Lost:
    """One answer whose seller is lost at a random token; it is back after, and cold."""
    warm(buyer, sellers)
    run = lost_at(random.Random(seed).randrange(1, TOKENS - 8), buyer, sellers, how)
    back(run.victim, buyer, sellers)
    return run


def cold_run(cold: Daemon, buyer: Daemon, sellers: list[Daemon]) -> Lost:
    """As `warm_run`, with a stand-in that starts while the other one answers."""
    cold.kill()

    def start_it() -> None:
        cold.restart()
        known(buyer, sellers, OPERATION)

    run = lost_at(2, buyer, sellers, signal.SIGKILL, start_it)
    back(run.victim, buyer, sellers)
    return run


def stand_by_run(buyer: Daemon, sellers: list[Daemon]) -> Lost:
    """A long answer begun where nobody has the model loaded, by a job with `--stand-by`."""
    for seller in sellers:
        seller.kill()
        seller.restart()
    known(buyer, sellers, OPERATION)
    run = lost_at(2, buyer, sellers, signal.SIGKILL, request=LONG, stand_by=True)
    back(run.victim, buyer, sellers)
    return run


def lost_at(
    text_count: int,
    buyer: Daemon,
    sellers: list[Daemon],
    how: signal.Signals,
    just_before: Callable[[], None] = lambda: None,
    *,
    request: dict[str, Any] = REQUEST,
    stand_by: bool = False,
) -> Lost:
    """One answer; its seller is lost when that many pieces of text have come.

    With a stand-by, that many after it has said that it is ready.
    """
    pieces, victim, lost, noticed, recovered = 0, sellers[0], 0.0, 0.0, 0.0
    waits = stand_by
    for frame in buyer.follow(OPERATION, stand_by=stand_by, **request):
        if isinstance(frame, messages.Answer):
            if not recovered:
                raise DaemonError(f"nobody went on: {frame.value['receipt']}")
            return Lost(frame.value, victim, noticed - lost, recovered - lost)
        if isinstance(frame, messages.Progress) and lost and "is gone" in frame.note:
            noticed = time.monotonic()
        if isinstance(frame, messages.Progress) and "stands by" in frame.note:
            waits = False
        if isinstance(frame, messages.Text) and not waits:
            pieces += 1
            if noticed and not recovered:
                recovered = time.monotonic()
            if pieces == text_count:
                victim = next(s for s in sellers if s.peer == seller_now(buyer))
                just_before()
                lost = time.monotonic()
                os.killpg(victim.pid, how)
    raise DaemonError("frames end with an answer or an error")


def seller_now(buyer: Daemon) -> str:
    job = buyer.ask("jobs", limit=1)[0]["job"]
    return str(buyer.ask("job", job=job)["attempts"][-1]["seller"])


def back(victim: Daemon, buyer: Daemon, sellers: list[Daemon]) -> None:
    """It is killed, workers included, if it was not yet, then started again and known again."""
    os.killpg(victim.pid, signal.SIGKILL)
    victim.kill()
    victim.restart()
    known(buyer, sellers, OPERATION)


def warm(buyer: Daemon, sellers: list[Daemon]) -> None:
    """Both have the model loaded: two cores load at the same time."""
    short = REQUEST | {"max_tokens": 1}
    jobs = [buyer.submit(OPERATION, peer=seller.peer, **short) for seller in sellers]
    for job in jobs:
        buyer.job_ended(job, 120)


def answer_of(buyer: Daemon, seller: Daemon, request: dict[str, Any] = REQUEST) -> dict[str, Any]:
    """The undisturbed answer of one seller."""
    for frame in buyer.follow(OPERATION, peer=seller.peer, **request):
        if isinstance(frame, messages.Answer):
            return dict(frame.value)
    raise DaemonError("frames end with an answer or an error")


def is_same(answer: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Token for token, for the same price, and by two sellers."""
    bills = {found["receipt"]["price_micro_credits"] for found in (answer, wanted)}
    same = answer["result"] == wanted["result"]
    return same and len(bills) == 1 and len(answer["receipt"]["sellers"]) == 2


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
