"""Villages of real daemons for benchmarks, and what their processes cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from aivillage.cli.village_process import NodeProcess


@contextlib.contextmanager
def village(folder: Path, count: int, *flags: str) -> Iterator[list[NodeProcess]]:
    """`count` daemons that know each other's offers; the first founded the village."""
    nodes = [NodeProcess(f"n{number}", folder) for number in range(count)]
    try:
        nodes[0].start(*flags)
        for node in nodes[1:]:
            node.start("--join", nodes[0].ask("invite")["token"], *flags)
        deadline = time.monotonic() + 20
        while sum(bool(peer["offers"]) for peer in nodes[0].ask("peers")) < count - 1:
            if time.monotonic() > deadline:
                raise SystemExit("the offers did not come")
            time.sleep(0.05)
        yield nodes
    finally:
        for node in nodes:
            node.stop()
            node.kill()


def cpu_seconds(nodes: list[NodeProcess]) -> float:
    """User and system time of all daemons and their workers so far."""
    total = 0.0
    for node in nodes:
        daemon = psutil.Process(node.pid)
        for process in (daemon, *daemon.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker may just have ended
                times = process.cpu_times()
                total += times.user + times.system
    return total


def cpu_by_process(nodes: list[NodeProcess]) -> dict[str, float]:
    """Seconds so far of the buyer, which is the first node, of the seller, and of all workers."""
    buyer, seller = (psutil.Process(node.pid) for node in nodes)
    found = {"buyer": _seconds(buyer), "seller": _seconds(seller)}
    workers = (*buyer.children(recursive=True), *seller.children(recursive=True))
    return found | {"workers": sum(map(_seconds, workers))}


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
