"""`python -m tests.integration.serving_soak`: requests without a pause, then nothing may be left.

Two buyers ask one seller with a real engine for more answers than it has slots; some are cancelled
while they wait or stream, and the engine's worker is killed now and then. At the end every request
was answered or refused with a reason, the same request always got the same answer, the books are
exact, and daemons hold no more slots, sessions, tasks, descriptors or memory than when they were
warm.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time
from typing import Any

import msgspec

from aivillage.cli.client import Client
from aivillage.protocols import messages
from aivillage.protocols.messages import Frame
from tests.integration.daemons import Daemon, DaemonError, Yard, settled, wait_for

OPERATION = "inference.generate"
FLAGS = ("--set", "heartbeat_seconds=2", "--set", "log_level=warning")
OPEN_MAX = 20
"""Of each buyer: with both, five times the slots."""
DIFFERENT = 24
"""So many different requests, each many times."""
CANCELLED_SHARE = 0.2
WARM_SHARE = 0.2
"""What is held is compared with what was held after this part of the requests."""
RSS_GROWN_MB_MAX = 24.0
"""Of a daemon over 1,000 requests: caches that have a bound fill up; a leak of sessions is more."""
DESCRIPTORS_MORE_MAX = 4
TASKS_MORE_MAX = 8
"""A link's writer or a write to a store may be under way."""
END_SECONDS_MAX = 90.0


class Load:
    """One buyer's requests, on one connection."""

    def __init__(self, buyer: Daemon, seller: str, count: int, seed: int) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self.answers: dict[int, set[str]] = collections.defaultdict(set)
        self.reasons: collections.Counter[str] = collections.Counter()
        self._buyer, self._seller, self._left = buyer, seller, count
        self._dice = random.Random(seed)
        self._open: dict[int, tuple[int, int]] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)

    @property
    def ended(self) -> int:
        return sum(self.ends.values())

    def _run(self) -> None:
        with self._buyer.client() as client:
            client.patient()
            while self._left or self._open:
                while self._left and len(self._open) < OPEN_MAX:
                    self._submit(client)
                self._take(client, client.receive())

    def _submit(self, client: Client) -> None:
        """Some are given up after so many frames: while they wait, or in the middle."""
        self._left -= 1
        call, number = client.next_id(), self._dice.randrange(DIFFERENT)
        gives_up = self._dice.random() < CANCELLED_SHARE
        self._open[call] = number, self._dice.randint(1, 6) if gives_up else -1
        request = {
            "prompt": f"Tell me of {number}.", "max_tokens": 2 + number % 7,
            "temperature": 1.0, "seed": number,
        }  # fmt: skip
        client.send(
            messages.Submit(
                id=call, operation=OPERATION, request=msgspec.msgpack.encode(request),
                peer=self._seller, mesh=True, deadline_seconds=120.0,
            )
        )  # fmt: skip

    def _take(self, client: Client, frame: Frame) -> None:
        call = getattr(frame, "id", 0)
        if call not in self._open:
            return
        number, frames_left = self._open[call]
        if isinstance(frame, messages.Answer):
            self.ends["answered"] += 1
            self.answers[number].add(frame.value["result"]["text"])
            del self._open[call]
        elif isinstance(frame, messages.Failure):
            self.ends[frame.code] += 1
            self.reasons[f"{frame.code}: {frame.message}"] += 1
            del self._open[call]
        else:
            self._open[call] = number, frames_left - 1
            if frames_left == 1:
                client.send(messages.Cancel(id=call))


def held(daemon: Daemon) -> dict[str, float]:
    """What a leak would show in."""
    status = daemon.ask("status")
    return {
        "rss_mb": status["rss_mb"],
        "tasks": status["tasks"],
        "descriptors": len(list(pathlib.Path(f"/proc/{daemon.pid}/fd").iterdir())),
    }


def run(requests: int, kills: int, seed: int) -> dict[str, Any]:
    """The summary; `ok` says whether everything adds up."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Yard(pathlib.Path(folder)) as yard:
        daemons = yard.village("seller", "ann", "bob", flags=FLAGS)
        yard.know_each_other(*daemons)
        seller, buyers = daemons[0], daemons[1:]
        loads = [
            Load(buyer, seller.peer, requests // len(buyers), seed + n)
            for n, buyer in enumerate(buyers)
        ]
        began = time.monotonic()
        for load in loads:
            load.thread.start()
        warm, killed = _disturb(seller, daemons, loads, requests, kills, random.Random(seed))
        wrong = [f"a buyer of {load.ended} requests hangs" for load in loads if not _ends(load)]
        seconds = time.monotonic() - began
        wrong += _what_is_wrong(daemons, loads, warm)
        ends = sum((load.ends for load in loads), collections.Counter[str]())
        reasons = sum((load.reasons for load in loads), collections.Counter[str]())
        return {
            "requests": requests,
            "ended": sum(ends.values()),
            "ends": dict(ends),
            "reasons": dict(reasons.most_common(6)),
            "kills": killed,
            "seed": seed,
            "seconds": round(seconds, 1),
            "warm": warm,
            "held": {daemon.name: held(daemon) for daemon in daemons},
            "tracebacks": sum("Traceback" in daemon.log.read_text() for daemon in daemons),
            "wrong": wrong,
            "ok": not wrong and sum(ends.values()) == requests and ends["answered"] > requests / 4,
        }


def _disturb(
    seller: Daemon,
    daemons: list[Daemon],
    loads: list[Load],
    requests: int,
    kills: int,
    dice: random.Random,
) -> tuple[dict[str, dict[str, float]], int]:
    """Kills the engine's worker now and then; also what was held when everything was warm."""
    warm: dict[str, dict[str, float]] = {}
    moments = sorted(dice.sample(range(requests // 10, requests), kills))
    killed, last, moved = 0, 0, time.monotonic()
    while any(load.thread.is_alive() for load in loads):
        ended = sum(load.ended for load in loads)
        if not warm and ended >= requests * WARM_SHARE:
            warm = {daemon.name: held(daemon) for daemon in daemons}
        if moments and ended >= moments[0]:
            engines = seller.ask("status")["engines"]
            if engines:
                os.kill(engines[0]["pid"], signal.SIGKILL)
                moments.pop(0)
                killed += 1
        if ended > last:
            last, moved = ended, time.monotonic()
        if time.monotonic() - moved > END_SECONDS_MAX:
            break  # somebody waits for ever; the summary says who
        time.sleep(0.05)
    return warm, killed


def _ends(load: Load) -> bool:
    load.thread.join(1.0)
    return not load.thread.is_alive()


def _what_is_wrong(
    daemons: list[Daemon], loads: list[Load], warm: dict[str, dict[str, float]]
) -> list[str]:
    wrong = []
    try:
        wait_for(lambda: not _left_over(daemons), 30, lambda: _left_over(daemons))
        settled(daemons, 30)
    except DaemonError as error:
        wrong.append(str(error))
    answers: dict[int, set[str]] = collections.defaultdict(set)
    for load in loads:
        for number, texts in load.answers.items():
            answers[number] |= texts
    wrong += [f"request {n} has {len(t)} answers" for n, t in answers.items() if len(t) > 1]
    for daemon in daemons:
        now, before = held(daemon), warm.get(daemon.name, held(daemon))
        limits = {"rss_mb": RSS_GROWN_MB_MAX, "tasks": TASKS_MORE_MAX}
        limits["descriptors"] = DESCRIPTORS_MORE_MAX
        wrong += [
            f"{daemon.name} has {now[key]} {key}, {before[key]} when it was warm"
            for key, most in limits.items()
            if now[key] > before[key] + most
        ]
    return wrong


def _left_over(daemons: list[Daemon]) -> str:
    """What should be over and is not; empty where nothing is."""
    found = []
    for daemon in daemons:
        status = daemon.ask("status")
        if status["jobs_running"]:
            found.append(f"{daemon.name}: {status['jobs_running']} jobs")
    status = daemons[0].ask("status")
    found += [f"{status[key]} {key}" for key in ("sales_running", "sales_waiting") if status[key]]
    found += [
        f"{e['sessions']} sessions of {e['model']}" for e in status["engines"] if e["sessions"]
    ]
    if status["slots_free"] != 8:
        found.append(f"{status['slots_free']} of 8 slots are free")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    found = run(args.requests, args.kills, args.seed)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
