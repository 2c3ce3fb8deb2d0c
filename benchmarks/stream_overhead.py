"""What the mesh adds to a stream of tokens: to the first one, and to the gap between two.

    python benchmarks/stream_overhead.py [--quick] [--json]

The same prompt, in turn: from the engine itself (a worker of this process) and over the mesh (two
real daemons, credits on, seen at the buyer's control socket). Overheads are differences of medians
and of 99th percentiles. Beside it, in the same run, bare libp2p: a stock stream that carries a
64-byte frame at the engine's own pace, and how late its frames are. `core_share_3200_tokens_per_s`
is what 32 sequences of 100 tokens a second cost the dearer side of a link, in step frames.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import trio
from claims import Claims, main
from link_echo import ECHO, stock_host
from processes import village

from aivillage.cli.client import Client
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols import messages

PROMPT = "Tell me about the sea."
TOKENS = 32
REQUEST = msgspec.msgpack.encode({"prompt": PROMPT, "max_tokens": TOKENS})


class Arm:
    """Milliseconds to the first token, and between tokens, of several answers."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []

    def add(self, began: float, arrivals: list[float]) -> None:
        self.first.append(1000 * (arrivals[0] - began))
        self.gaps += [1000 * (b - a) for a, b in itertools.pairwise(arrivals)]

    def p99_gap(self) -> float:
        return sorted(self.gaps)[int(len(self.gaps) * 0.99)]


def measure(claims: Claims, args: argparse.Namespace) -> None:
    rounds = 3 if args.quick else 20
    with tempfile.TemporaryDirectory() as folder, village(Path(folder), 2) as nodes:
        engine, mesh = trio.run(both, Path(folder), nodes[0].where.socket, rounds)
    claims.add("engine_first_token_ms_p50", statistics.median(engine.first))
    claims.add("engine_gap_ms_p50", statistics.median(engine.gaps))
    claims.add("engine_gap_ms_p99", engine.p99_gap())
    first = statistics.median(mesh.first) - statistics.median(engine.first)
    claims.add("first_token_overhead_ms_p50", first)
    claims.add("first_token_overhead_ms_p99", max(mesh.first) - max(engine.first))
    gap = statistics.median(mesh.gaps) - statistics.median(engine.gaps)
    claims.add("token_gap_overhead_ms_p50", gap, at_most=2.0)
    late = bare_lateness_ms(statistics.median(engine.gaps), 100 if args.quick else 500)
    claims.add("bare_libp2p_frame_ms_p50", statistics.median(late))
    bare_p99 = late[int(len(late) * 0.99)]
    claims.add("bare_libp2p_frame_ms_p99", bare_p99)
    worst = mesh.p99_gap() - engine.p99_gap()
    claims.add("token_gap_overhead_ms_p99", worst, at_most=bare_p99 + 3)
    claims.add("core_share_3200_tokens_per_s", core_share(), at_most=0.15)


def core_share() -> float:
    """Of the side that pays more, from the other benchmark."""
    script = str(Path(__file__).with_name("link_echo.py"))
    command = [sys.executable, "-W", "ignore", script, "--measure", "links", "--count", "100"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(printed.strip().splitlines()[-1])
    return max(float(found["steps_core_sender"]), float(found["steps_core_receiver"]))


async def both(folder: Path, socket: Path, rounds: int) -> tuple[Arm, Arm]:
    """Answers by turns, so that a noisy minute hits both."""
    engine, mesh = Arm(), Arm()
    cache = Path(folder) / "cache"
    async with open_workers(
        WorkerSettings(), cache_folder=cache, scratch_folder=folder / "scratch"
    ) as workers:
        client = await workers.engine("inference.generate")
        for number in range(rounds + 1):
            arrivals, began = [], time.perf_counter()
            async with client.open_session(REQUEST) as session:
                session.allow(10_000)
                async for frame in session:
                    arrivals += [time.perf_counter()] * bool(frame.token_ids)
                    if frame.finished:
                        break
            if number:  # the first of each loads and warms
                engine.add(began, arrivals)
            began, arrivals = await trio.to_thread.run_sync(over_mesh, socket)
            if number:
                mesh.add(began, arrivals)
    return engine, mesh


def over_mesh(socket: Path) -> tuple[float, list[float]]:
    with Client(socket).patient() as client:
        began, arrivals = time.perf_counter(), list[float]()
        call = client.next_id()
        client.send(messages.Submit(id=call, operation="inference.generate", request=REQUEST))
        for frame in client.frames(call):
            arrivals += [time.perf_counter()] * isinstance(frame, messages.Text)
        return began, arrivals


# ------------------------------------------------------------------ bare libp2p


def bare_lateness_ms(pace_ms: float, frames: int) -> list[float]:
    """Sorted milliseconds from write to read of each frame, both clocks being this machine's."""
    command = [sys.executable, "-W", "ignore", __file__, "--serve-bare", str(pace_ms), str(frames)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        late = trio.run(read_bare, other.stdout.readline().strip(), frames)
        other.kill()
    return sorted(late)


async def serve_bare(pace_ms: float, frames: int) -> None:
    host, listen = stock_host(2)

    async def pour(stream: Any) -> None:
        await stream.read(1)
        for _ in range(frames):
            await stream.write(time.monotonic_ns().to_bytes(8, "big") + bytes(56))
            await trio.sleep(pace_ms / 1000)

    host.set_stream_handler(ECHO, pour)
    async with host.run(listen_addrs=listen):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


async def read_bare(address: str, frames: int) -> list[float]:
    import multiaddr
    from libp2p.peer.peerinfo import info_from_p2p_addr

    host, listen = stock_host(1)
    late = []
    async with host.run(listen_addrs=listen):
        info = info_from_p2p_addr(multiaddr.Multiaddr(address))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [ECHO])
        await stream.write(b"!")
        buffer = b""
        while len(late) < frames:
            buffer += await stream.read(65536)
            while len(buffer) >= 64:
                written = int.from_bytes(buffer[:8], "big")
                late.append((time.monotonic_ns() - written) / 1e6)
                buffer = buffer[64:]
    return late


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-bare"]:
        trio.run(serve_bare, float(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main(measure, __doc__ or ""))
