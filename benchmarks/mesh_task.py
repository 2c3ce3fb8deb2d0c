"""What one small paid job costs on the mesh: `mesh.noop` from a buyer node to a seller node.

    python benchmarks/mesh_task.py [--quick] [--json]

Two real nodes, each a process with ledger, jobs.db, quotes, verification and pay, over libp2p on
loopback. `p50_ms` and `p99_ms` are one job at a time, from the control socket of the buyer to its
checked answer; its voucher follows with those of other jobs, and the books must agree in the end.
`cold_ms` is the first one; `tasks_per_s_32` has 32 in flight; `late_over_early` is p50 after all
of these over p50 before them. CPU is that of both daemons and their workers, and by process. The
goal is `p50_over_stock_echo` of 2.5; twice that fails. Beside it in the same run: the echo of a
stock libp2p stream, and a Ray task where Ray is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from claims import Claims, main
from processes import cpu_by_process, sum_when_settled, village

from aivillage.cli.client import Client
from aivillage.cli.village_process import NodeProcess
from aivillage.protocols import messages

NOOP = msgspec.msgpack.encode({"note": "bench"})


def measure(claims: Claims, args: argparse.Namespace) -> None:
    rounds = 60 if args.quick else 500
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 2) as nodes:
        buyer = nodes[0]
        with Client(buyer.where.socket).patient() as client:
            claims.add("cold_ms", 1000 * one(client))
            for _ in range(10):
                one(client)
            before = cpu_by_process(nodes)
            took = sorted(1000 * one(client) for _ in range(rounds))
            claims.add("p50_ms", statistics.median(took))
            claims.add("p99_ms", took[int(len(took) * 0.99)])
            after = cpu_by_process(nodes)
            spent = {part: 1000 * (after[part] - before[part]) / rounds for part in after}
            claims.add("cpu_ms_per_task", sum(spent.values()), at_most=2.0)
            for part, milliseconds in spent.items():
                claims.add(f"cpu_ms_{part}", milliseconds)
            claims.add("tasks_per_s_32", rate(client, 4 * rounds, 32))
            late = statistics.median(1000 * one(client) for _ in range(rounds))
            claims.add("late_over_early", late / claims.found["p50_ms"])
        check_books(claims, nodes)
    echo = stock_echo_ms(4 * rounds)
    claims.add("stock_echo_ms", echo)
    claims.add("p50_over_stock_echo", claims.found["p50_ms"] / echo, at_most=2.5)
    measure_ray(claims, rounds)


def submit(client: Client) -> int:
    call = client.next_id()
    client.send(messages.Submit(id=call, operation="mesh.noop", request=NOOP))
    return call


def one(client: Client) -> float:
    """Seconds of one job over the control socket."""
    began = time.perf_counter()
    call = submit(client)
    for _ in client.frames(call):
        pass
    return time.perf_counter() - began


def rate(client: Client, total: int, in_flight: int) -> float:
    """Jobs a second with `in_flight` of them under way all the time."""
    began, started, ended = time.perf_counter(), 0, 0
    while ended < total:
        while started < total and started - ended < in_flight:
            submit(client)
            started += 1
        frame = client.receive()
        if isinstance(frame, messages.Failure):
            raise SystemExit(f"a job failed: {frame}")
        ended += isinstance(frame, messages.Answer)
    return total / (time.perf_counter() - began)


def check_books(claims: Claims, nodes: list[NodeProcess]) -> None:
    """A fast job that is not paid would be no job."""
    claims.note("sum_micro_credits", sum_when_settled(nodes))
    claims.note("paid_micro_credits", -nodes[0].ask("balance")["net"])


def stock_echo_ms(rounds: int) -> float:
    """p50 of a small echo over an untouched libp2p stream, from the other benchmark."""
    script = str(Path(__file__).with_name("link_echo.py"))
    command = [sys.executable, "-W", "ignore", script, "--measure", "stock", "--count", str(rounds)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(json.loads(printed.strip().splitlines()[-1])["stock_p50_ms"])


def measure_ray(claims: Claims, rounds: int) -> None:
    if importlib.util.find_spec("ray") is None:
        claims.note("ray", "not installed")
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    task = ray.remote(lambda: None)
    for _ in range(10):
        ray.get(task.remote())
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        ray.get(task.remote())
        took.append(1000 * (time.perf_counter() - began))
    claims.add("ray_task_p50_ms", statistics.median(took))
    claims.add("p50_over_ray_task", claims.found["p50_ms"] / statistics.median(took))
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
