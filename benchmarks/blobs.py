"""How fast a blob comes from one member and from two, and what is paid twice.

    python benchmarks/blobs.py [--quick] [--json]

Three real nodes on this machine, each a process with ledger, quotes, vouchers and books; the blob
is random, each chunk hashed by its seller and its buyer, the whole once more. All share this
machine's cores and disk, so a rate here says what the software costs, not what a network gives.
`kill_s` is a fetch from both in which one is SIGKILLed at half of it, `two_members_s` the same
undisturbed; `paid_twice_fraction` is what all fetches paid beyond their chunks. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from claims import Claims, main
from processes import sum_when_settled, village, wait_for_offers

from aivillage.cli.fetching import fetch
from aivillage.cli.village_process import NodeProcess
from aivillage.models.mesh.fetch import FetchRequest
from aivillage.node.blobs import Blobs
from aivillage.protocols.messages import Progress
from aivillage.protocols.types import Cid

MIB = 1 << 20
PRICE = 100


def measure(claims: Claims, args: argparse.Namespace) -> None:
    size, rounds = (64, 1) if args.quick else (256, 3)
    found: dict[str, list[float]] = {"one_member_s": [], "two_members_s": [], "kill_s": []}
    paid = 0
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 3) as nodes:
        body = os.urandom(size * MIB)
        cid = store_of(nodes[0]).put(body)
        for _ in range(rounds):
            one = fetched(nodes, cid)
            store_of(nodes[1]).put(body)
            two = fetched(nodes, cid)
            killed = fetched(nodes, cid, kill_at=size * MIB // 2)
            for key, (seconds, cost) in zip(found, (one, two, killed), strict=True):
                found[key].append(seconds)
                paid += cost
            nodes[1].start()
            store_of(nodes[1]).remove(cid)
        claims.note("sum_micro_credits", sum_when_settled(nodes))
    medians = {key: statistics.median(values) for key, values in found.items()}
    for key, value in medians.items():
        claims.add(key, value)
    claims.add("one_member_mib_per_s", size / medians["one_member_s"])
    claims.add("two_members_mib_per_s", size / medians["two_members_s"])
    chunks = 3 * rounds * size
    claims.add("paid_twice_fraction", paid / PRICE / chunks - 1, at_most=0.05)
    claims.note("mebibytes", size)
    claims.note("load", round(os.getloadavg()[0], 1))


def store_of(node: NodeProcess) -> Blobs:
    return Blobs(node.where.blobs, bytes_max=1 << 40, store_bytes_max=1 << 40)


def fetched(nodes: list[NodeProcess], cid: Cid, kill_at: int = 0) -> tuple[float, int]:
    """Seconds and micro-credits of one fetch by the last node; then the blob is gone again."""
    buyer = nodes[-1]
    wait_for_offers(buyer, len(nodes) - 1)
    killed = False

    def watch(frame: Progress) -> None:
        nonlocal killed
        if kill_at and not killed and frame.done >= kill_at:
            killed = True
            nodes[1].kill()

    began = time.perf_counter()
    receipt = fetch(buyer.where, FetchRequest(cid=cid.hex()), None, watch)["receipt"]
    seconds = time.perf_counter() - began
    store_of(buyer).get(cid, verify=True)
    store_of(buyer).remove(cid)
    return seconds, int(receipt["price_micro_credits"])


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
