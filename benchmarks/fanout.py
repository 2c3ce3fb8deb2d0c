"""What `map` makes of two machines, and of one of them dying: 16 tasks of half a second.

    python benchmarks/fanout.py [--quick] [--json]
    RAY_PYTHON=/path/to/python python benchmarks/fanout.py    the same on Ray beside it

Two real nodes of four places each: the buyer, which works too, and a peer; each a process with
ledger, jobs.db, quotes, verification and pay. A run is timed on the buyer's control socket, from
the first question to the last result. `makespan_s` is undisturbed (1.0 is perfect),
`kill_makespan_s` with the peer SIGKILLed at 0.7 s, each the median of the rounds; of these 1.5 is
perfect, since four tasks begin anew when the buyer's own are done, and `kill_lost_s` is what was
lost beyond it. `kill_extra_s` is the difference to the same round undisturbed: least for who is
slow undisturbed, and 0.5 for who is perfect twice. `small_tasks_per_s` are tasks that do nothing.
All places have worked once before. The same is done on two Ray nodes of four CPUs by
beside/fanout_ray.py, in turn and never at the same time, where this Python or that of RAY_PYTHON
has Ray. A ratio is told only where Ray lost a fifth of a second at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from claims import Claims, main
from processes import sum_when_settled, village, wait_for_offers

from aivillage.cli.client import Client
from aivillage.cli.village_process import NodeProcess

TASKS, SECONDS, KILL_AT_SECONDS, PLACES = 16, 0.5, 0.7, 4
PERFECT_KILLED_SECONDS = 1.5
SMALL = 400
NOISE_SECONDS = 0.2
FLAGS = ("--set", f"slots={PLACES}", "--set", f"module_workers={PLACES}")


def measure(claims: Claims, args: argparse.Namespace) -> None:
    rounds = 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 2, *FLAGS) as nodes:
        found = [one_round(nodes) for _ in range(rounds)]
        mapped(nodes[0], TASKS, 0.2)
        small = mapped(nodes[0], SMALL, 0.0)
        claims.note("sum_micro_credits", sum_when_settled(nodes))
    for key, value in medians(found).items():
        claims.add(key, value)
    claims.add("kill_lost_s", claims.found["kill_makespan_s"] - PERFECT_KILLED_SECONDS)
    claims.add("small_tasks_per_s", SMALL / small)
    compare(claims, rounds)


def one_round(nodes: list[NodeProcess]) -> dict[str, float]:
    """Undisturbed, then with a kill; both nodes are there again afterwards."""
    buyer, peer = nodes
    mapped(buyer, TASKS, 0.2)  # every place has a warm worker
    makespan = mapped(buyer, TASKS, SECONDS)
    killer = threading.Timer(KILL_AT_SECONDS, peer.kill)
    killer.start()
    killed = mapped(buyer, TASKS, SECONDS)
    killer.join()
    peer.start(*FLAGS)
    wait_for_offers(buyer, 1)
    return {"makespan_s": makespan, "kill_makespan_s": killed, "kill_extra_s": killed - makespan}


def mapped(buyer: NodeProcess, count: int, seconds: float) -> float:
    """How long a map of `count` sleeping tasks takes; all of them must be done, in order."""
    began = time.perf_counter()
    with Client(buyer.where.socket) as client:
        name = client.ask("map_new", operation="mesh.noop")["map"]
        lines = [
            (n, json.dumps({"note": str(n), "sleep_seconds": seconds})) for n in range(1, count + 1)
        ]
        client.ask("map_add", map=name, lines=lines)
        client.ask("map_start", map=name)
        while client.ask("map_wait", map=name, seconds=10)["state"] == "running":
            pass
        results = ends(client, name)
    took = time.perf_counter() - began
    if [line.get("result", {}).get("note") for line in results] != [
        str(n) for n in range(1, count + 1)
    ]:
        raise SystemExit(f"not what was asked: {results}")
    return took


def ends(client: Client, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while page := client.ask("map_lines", map=name, after=len(found))["lines"]:
        found += page
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def compare(claims: Claims, rounds: int) -> None:
    """The same on Ray, where there is one."""
    here = sys.executable if importlib.util.find_spec("ray") else ""
    python = os.environ.get("RAY_PYTHON", here)
    if not python:
        claims.note("ray", "not installed; RAY_PYTHON names a Python that has it")
        return
    script = str(Path(__file__).parent / "beside" / "fanout_ray.py")
    numbers = (TASKS, SECONDS, KILL_AT_SECONDS, PLACES, SMALL, rounds)
    command = [python, script, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        raise SystemExit(f"Ray failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    claims.note("ray", found["version"])
    ray = medians(found["rounds"])
    for key, value in ray.items():
        claims.add(f"ray_{key}", value)
    claims.add("ray_small_tasks_per_s", found["small_tasks_per_s"])
    ours = claims.found
    claims.add("makespan_over_ray", ours["makespan_s"] / ray["makespan_s"], at_most=1.0)
    killed = ours["kill_makespan_s"] / ray["kill_makespan_s"]
    claims.add("kill_makespan_over_ray", killed, at_most=1.0)
    ratio(claims, "kill_extra_over_ray", ours["kill_extra_s"], ray["kill_extra_s"])
    ray_lost = ray["kill_makespan_s"] - PERFECT_KILLED_SECONDS
    ratio(claims, "kill_lost_over_ray", ours["kill_lost_s"], ray_lost)


def ratio(claims: Claims, name: str, ours: float, ray: float) -> None:
    """None of noise, which would flatter or blame by chance."""
    if ray >= NOISE_SECONDS:
        claims.add(name, ours / ray, at_most=1.0)
    else:
        claims.note(name, "none: Ray lost next to nothing")


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
