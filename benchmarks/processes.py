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


def wait_for_offers(buyer: NodeProcess, count: int) -> None:
    """Returns once the buyer is linked with so many peers that offer something.

    Raises:
        SystemExit: not within 30 s.
    """
    deadline = time.monotonic() + 30
    while sum(peer["connected"] and bool(peer["offers"]) for peer in buyer.ask("peers")) < count:
        if time.monotonic() > deadline:
            raise SystemExit("the members did not come")
        time.sleep(0.05)


def sum_when_settled(nodes: list[NodeProcess]) -> int:
    """Of all balances, once nothing is in transit; what it is after 20 s if it never is."""
    deadline = time.monotonic() + 20
    while True:
        balances = [node.ask("balance") for node in nodes]
        found = sum(balance["net"] for balance in balances)
        quiet = not found and not any(balance["in_transit"] for balance in balances)
        if quiet or time.monotonic() > deadline:
            return int(found)
        time.sleep(0.2)


def cpu_by_process(nodes: list[NodeProcess]) -> dict[str, float]:
    """Seconds so far of the buyer, which is the first node, of the seller, and of all workers."""
    buyer, seller = (psutil.Process(node.pid) for node in nodes)
    found = {"buyer": _seconds(buyer), "seller": _seconds(seller)}
    workers = (*buyer.children(recursive=True), *seller.children(recursive=True))
    return found | {"workers": sum(map(_seconds, workers))}


def _seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):  # a worker may just have ended
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
