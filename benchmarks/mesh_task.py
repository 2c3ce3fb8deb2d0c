"""What one small paid job costs on the mesh: `mesh.noop` from a buyer node to a seller node.

    python benchmarks/mesh_task.py [--quick] [--json]

Two real nodes, each a process with ledger, jobs.db, quotes, verification and pay, over libp2p on
loopback. `p50_ms` and `p99_ms` are one job at a time, from the control socket of the buyer to its
checked answer; its voucher follows with those of other jobs, and the books must agree in the end.
`cold_ms` is the first one; `tasks_per_s_32` has 32 in flight; `late_over_early` is p50 after all
of these over p50 before them. CPU is that of both daemons and their workers, and by process. The
echo of a stock libp2p stream takes turns with the jobs, some milliseconds each, and a Ray task
where Ray is installed: what is compared saw the same machine.
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

WARM_UP = 100
"""Jobs, and tasks of Ray, before anything is timed."""
JOBS, ECHOES = 20, 50
"""In a turn: some 20 milliseconds each."""
NOOP = msgspec.msgpack.encode({"note": "bench"})


def measure(claims: Claims, args: argparse.Namespace) -> None:
    blocks = 6 if args.quick else 25
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 2) as nodes:
        with Client(nodes[0].where.socket).patient() as client:
            claims.add("cold_ms", one(client))
            for _ in range(WARM_UP):
                one(client)
            beside_echo(claims, client, nodes, blocks)
            claims.add("tasks_per_s_32", rate(client, 4 * blocks * JOBS, 32))
            late = statistics.median(one(client) for _ in range(blocks * JOBS))
            claims.add("late_over_early", late / claims.found["p50_ms"])
            beside_ray(claims, client, blocks)
        check_books(claims, nodes)


def beside_echo(claims: Claims, client: Client, nodes: list[NodeProcess], blocks: int) -> None:
    """Jobs and echoes in turns, so that a machine that slows down slows both."""
    took: list[float] = []
    echoes: list[float] = []
    with Echo() as echo:
        echo.some(ECHOES)
        before = cpu_by_process(nodes)
        for _ in range(blocks):
            took += [one(client) for _ in range(JOBS)]
            echoes += echo.some(ECHOES)
        after = cpu_by_process(nodes)
    took.sort()
    claims.add("p50_ms", statistics.median(took))
    claims.add("p99_ms", took[int(len(took) * 0.99)])
    spent = {part: 1000 * (after[part] - before[part]) / len(took) for part in after}
    claims.add("cpu_ms_per_task", sum(spent.values()), at_most=2.0)
    for part, milliseconds in spent.items():
        claims.add(f"cpu_ms_{part}", milliseconds)
    claims.add("stock_echo_ms", statistics.median(echoes))
    ratio = claims.found["p50_ms"] / claims.found["stock_echo_ms"]
    claims.add("p50_over_stock_echo", ratio, at_most=2.5)


def beside_ray(claims: Claims, client: Client, blocks: int) -> None:
    """The same with Ray's tasks, after: its own processes are never quite idle."""
    if importlib.util.find_spec("ray") is None:
        claims.note("ray", "not installed")
        return
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    task = ray.remote(lambda: None)

    def one_of_ray() -> float:
        began = time.perf_counter()
        ray.get(task.remote())
        return 1000 * (time.perf_counter() - began)

    for _ in range(WARM_UP):
        one_of_ray()
    took: list[float] = []
    tasks: list[float] = []
    for _ in range(blocks):
        took += [one(client) for _ in range(JOBS)]
        tasks += [one_of_ray() for _ in range(JOBS)]
    claims.add("ray_task_p50_ms", statistics.median(tasks))
    claims.add("p50_over_ray_task", statistics.median(took) / statistics.median(tasks))
    ray.shutdown()


class Echo:
    """A process that echoes over an untouched libp2p stream when it is asked to."""

    def __enter__(self) -> Echo:
        script = str(Path(__file__).with_name("link_echo.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, "--measure", "stock-in-turns"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def some(self, count: int) -> list[float]:
        """The milliseconds of each of so many."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._process.stdout.readline())
        return found


def submit(client: Client) -> int:
    call = client.next_id()
    client.send(messages.Submit(id=call, operation="mesh.noop", request=NOOP))
    return call


def one(client: Client) -> float:
    """Milliseconds of one job over the control socket."""
    began = time.perf_counter()
    call = submit(client)
    for _ in client.frames(call):
        pass
    return 1000 * (time.perf_counter() - began)


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


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
