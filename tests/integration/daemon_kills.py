"""`python -m tests.integration.daemon_kills`: kill -9 under load, then add everything up.

Four daemons in one village buy small jobs from each other without a pause. Random ones are
killed at random moments and started again. At the end, when it is quiet: every audit is right,
the books of each pair mirror each other, the sum over all is zero, what was paid was earned,
nothing is in transit, and every job that was handed in is done or says why not.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import sys
import tempfile
import threading
import time
from typing import Any

from aivillage.protocols.errors import AivillageError
from tests.integration.daemons import Daemon, DaemonError, Yard, settled, wait_for

NAMES = ("ann", "bob", "cat", "dan")
FLAGS = ("--set", "heartbeat_seconds=0.5", "--set", "log_level=warning")
OPEN_JOBS_MAX = 4
"""Of one buyer: load enough to be always in the middle of something."""
SETTLE_SECONDS_MAX = 60.0
END_SECONDS_MAX = 90.0
AT_RISK_MAX = 20_000
"""Micro-credits, of each seller with each buyer: the exposure that a village gives."""


class Load:
    """Hands jobs to one daemon whenever it takes some, and remembers their ids."""

    def __init__(self, daemon: Daemon, others: list[Daemon], seed: int) -> None:
        self.daemon = daemon
        self.jobs: list[str] = []
        self._others = others
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _work(self) -> None:
        while not self._stop.wait(0.05):
            try:
                if self.daemon.ask("status")["jobs_running"] < OPEN_JOBS_MAX:
                    self.jobs.append(self._submit())
            except (AivillageError, OSError):
                continue  # it was just killed: another one is coming up in its place

    def _submit(self) -> str:
        dice = self._random
        # Half of the jobs name their seller, so that every pair trades both ways.
        peer = dice.choice(self._others).peer if dice.random() < 0.5 else ""
        parts = dice.choice((0, 3, 20))
        return self.daemon.submit(
            "mesh.noop", peer=peer, note="x", parts=parts, sleep_seconds=dice.random() * 0.6
        )


def run(kills: int, seed: int, settle_seconds_max: float = SETTLE_SECONDS_MAX) -> dict[str, Any]:
    """The summary; `ok` says whether everything adds up."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, Yard(pathlib.Path(folder)) as yard:
        daemons = yard.village(*NAMES, flags=FLAGS)
        yard.know_each_other(*daemons)
        loads = [
            Load(d, [o for o in daemons if o is not d], seed + i) for i, d in enumerate(daemons)
        ]
        began = time.monotonic()
        for load in loads:
            load.start()
        for _ in range(kills):
            time.sleep(dice.uniform(0.5, 3.0))
            victim = dice.choice(daemons)
            victim.kill()
            time.sleep(dice.uniform(0.0, 1.0))
            victim.restart()
        time.sleep(1.0)
        for load in loads:
            load.stop()
        load_seconds = time.monotonic() - began
        return _added_up(daemons, loads, settle_seconds_max) | {
            "kills": kills,
            "seed": seed,
            "load_seconds": round(load_seconds, 1),
            "tracebacks": sum("Traceback" in daemon.log.read_text() for daemon in daemons),
        }


def _added_up(
    daemons: list[Daemon], loads: list[Load], settle_seconds_max: float
) -> dict[str, Any]:
    wrong: list[str] = []
    try:
        wait_for(
            lambda: not any(daemon.ask("status")["jobs_running"] for daemon in daemons),
            END_SECONDS_MAX,
            "all jobs end",
        )
        settle_seconds = settled(daemons, settle_seconds_max)
    except DaemonError as error:
        wrong.append(str(error))
        settle_seconds = -1.0
    ends = [load.daemon.ask("job", job=job) for load in loads for job in load.jobs]
    wrong += [f"job {e['job']} is {e['state']}" for e in ends if not _has_ended(e)]
    balances = [daemon.ask("balance") for daemon in daemons]
    receipts = sum(e["receipt"]["price_micro_credits"] for e in ends if e["receipt"])
    spent = sum(balance["spent"] for balance in balances)
    at_risk = max(peer["at_risk"] for balance in balances for peer in balance["peers"])
    if at_risk > AT_RISK_MAX:
        wrong.append(f"{at_risk} at risk with one peer")
    reasons = collections.Counter(f"{e['code']}: {e['message']}" for e in ends if e["code"])
    return {
        "jobs": len(ends),
        "done": sum(end["state"] == "done" for end in ends),
        "failed": sum(end["state"] != "done" for end in ends),
        "reasons": dict(reasons.most_common(5)),
        "sum": sum(balance["net"] for balance in balances),
        "spent": spent,
        "receipts": receipts,
        "at_risk_max": at_risk,
        "settle_seconds": round(settle_seconds, 1),
        "wrong": wrong,
        "ok": not wrong,
    }


def _has_ended(end: dict[str, Any]) -> bool:
    return bool(end["state"] == "done" or (end["ended_unix"] and end["code"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--settled-within", type=float, default=SETTLE_SECONDS_MAX, metavar="SECONDS"
    )
    parser.add_argument("--json", action="store_true", help="only the summary")
    args = parser.parse_args()
    if not args.json:
        print(f"{len(NAMES)} daemons, {args.kills} kills, seed {args.seed}", flush=True)
    found = run(args.kills, args.seed, args.settled_within)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
