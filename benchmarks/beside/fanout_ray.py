"""The runs of benchmarks/fanout.py on Ray: run by it, with a Python that has Ray and no AIVillage.

One JSON object as the last line: Ray's version, the rounds, and small tasks a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster


def measure(
    tasks: int, seconds: float, kill_at: float, places: int, small: int, rounds: int
) -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": places})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        found = [one_round(cluster, tasks, seconds, kill_at, places) for _ in range(rounds)]
        cluster.add_node(num_cpus=places)
        mapped(tasks, 0.2)
        took = mapped(small, 0.0)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {"version": ray.__version__, "rounds": found, "small_tasks_per_s": small / took}


def one_round(
    cluster: Cluster, tasks: int, seconds: float, kill_at: float, places: int
) -> dict[str, float]:
    """Undisturbed, then with one of the two nodes killed."""
    node = cluster.add_node(num_cpus=places)
    cluster.wait_for_nodes()
    mapped(tasks, 0.2)  # every place has a warm worker
    makespan = mapped(tasks, seconds)
    killer = threading.Timer(kill_at, lambda: kill(node))
    killer.start()
    killed = mapped(tasks, seconds)
    killer.join()
    cluster.remove_node(node, allow_graceful=False)
    return {"makespan_s": makespan, "kill_makespan_s": killed, "kill_extra_s": killed - makespan}


def kill(node: Any) -> None:
    """SIGKILL to the node and its workers at once: the machine is gone."""
    roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
    for pid in [*roots, *(below for root in roots for below in descendants(root))]:
        with contextlib.suppress(ProcessLookupError):  # one of the others took it along
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


@ray.remote(num_cpus=1)
def work(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number


def mapped(count: int, seconds: float) -> float:
    began = time.perf_counter()
    found = ray.get([work.remote(number, seconds) for number in range(count)])
    took = time.perf_counter() - began
    if found != list(range(count)):
        raise SystemExit(f"not what was asked: {found}")
    return took


if __name__ == "__main__":
    words = sys.argv[1:]
    print(
        json.dumps(measure(int(words[0]), float(words[1]), float(words[2]), *map(int, words[3:])))
    )
