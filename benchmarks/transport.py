"""What our transport does between two processes, beside raw TCP in the same run.

    python benchmarks/transport.py [--quick] [--json]

Loopback, one connection: TCP, Noise and Yamux through node/transport/libp2p.py. Times are medians
of a round; the best round is the figure and the worst is `_worst`, since a busy machine only ever
adds. CPU is that of both processes. `churn_*` is what connecting and disconnecting so often leaves
behind at the side that was dialled; `hang_noticed_s` (not with --quick) is a link whose peer stands
still. `private_*` is the same in a village with a pre-shared key.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio
from claims import Claims, main
from link_echo import ECHO, Other, announce, hello, key_of

from aivillage.node.links import LinkLimits, open_links
from aivillage.node.transport.libp2p import Libp2pTransport, open_libp2p
from aivillage.protocols.errors import PeerError

SINK: Final = "/bench/sink/1"
BULK_BYTES: Final = 64_000_000
CHUNK: Final = bytes(1 << 20)
SMALL: Final = bytes(64)
READ_BYTES: Final = 1 << 20
VILLAGE_KEY: Final = bytes(range(32))
ROUNDS: Final = 5
CLIENTS: Final = 10
"""Hanging up takes the library 0.2 s, so they take turns at it."""


# ------------------------------------------------------------------ the other process


async def echo(read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Any]) -> None:
    while data := await read():
        await write(data)


async def sink(read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Any]) -> None:
    """Swallows a bulk, then says so."""
    left = BULK_BYTES
    while left > 0 and (data := await read()):
        left -= len(data)
    await write(b"!")


async def serve_libp2p(village_key: bytes | None = None) -> None:
    async with (
        open_libp2p(key_of(2), "127.0.0.1:0", village_key) as transport,
        open_links(transport, hello, limits=LinkLimits()),
    ):
        for protocol, answer in ((ECHO, echo), (SINK, sink)):

            async def handle(stream: Any, answer: Any = answer) -> None:
                await answer(functools.partial(stream.read, READ_BYTES), stream.write)

            transport.serve(protocol, handle)
        await announce(transport.addresses()[0], state)


async def serve_tcp() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        answer = echo if await stream.receive_some(1) == b"e" else sink
        await answer(functools.partial(stream.receive_some, READ_BYTES), stream.send_all)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            functools.partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        )
        await announce(str(listeners[0].socket.getsockname()[1]), state)
        nursery.cancel_scope.cancel()


def state() -> str:
    """What this process costs, as JSON."""
    return json.dumps(
        {
            "cpu_s": time.process_time(),
            "rss_mb": resource_mb(),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
        }
    )


def resource_mb() -> float:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize() / 1e6


class Server(Other):
    def __init__(self, role: str) -> None:
        super().__init__(role, __file__)

    def state(self) -> dict[str, float]:
        told: dict[str, float] = json.loads(self.told())
        return told


# ------------------------------------------------------------------ this process


class Rounds:
    """Figures of several rounds; the best of each is claimed, the worst told."""

    def __init__(self, prefix: str = "", found: dict[str, list[float]] | None = None) -> None:
        self.prefix = prefix
        self.found: dict[str, list[float]] = {} if found is None else found

    def add(self, key: str, value: float) -> None:
        self.found.setdefault(self.prefix + key, []).append(value)

    def tell(self, claims: Claims, key: str, **bar: float) -> float:
        best, worst = min(self.found[key]), max(self.found[key])
        if "at_least" in bar or key.endswith(("per_s", "per_cpu_s")):
            best, worst = worst, best
        claims.add(key, best, **bar)
        claims.add(f"{key}_worst", worst)
        return best


async def timed_ms(call: Callable[[], Awaitable[Any]], count: int) -> float:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


async def timed_bulk(
    rounds: Rounds, name: str, write: Callable[[bytes], Any], end: Callable[[], Any], other: Server
) -> None:
    """64 MB one way, to the word that all of it was read."""
    wall, cpu = time.perf_counter(), time.process_time() + other.state()["cpu_s"]
    for at in range(0, BULK_BYTES, len(CHUNK)):
        await write(CHUNK[: BULK_BYTES - at])
    assert await end() == b"!"
    wall = time.perf_counter() - wall
    cpu = time.process_time() + other.state()["cpu_s"] - cpu
    rounds.add(f"{name}_mb_per_s", BULK_BYTES / wall / 1e6)
    rounds.add(f"{name}_mb_per_cpu_s", BULK_BYTES / cpu / 1e6)


async def round_of_ours(rounds: Rounds, transport: Libp2pTransport, other: Server, n: int) -> None:
    async def connect() -> None:
        nonlocal connect_s
        began = time.perf_counter()
        await transport.dial(other.address)
        connect_s.append(time.perf_counter() - began)
        await transport.hang_up(peer)

    peer = await transport.dial(other.address)
    await transport.hang_up(peer)
    connect_s: list[float] = []
    for _ in range(10):
        await connect()
    rounds.add("connect_ms", 1000 * statistics.median(connect_s))
    await transport.dial(other.address)
    streams: list[Any] = []

    async def open_one() -> None:
        streams.append(await transport.open_stream(peer, ECHO))

    rounds.add("stream_ms", await timed_ms(open_one, 50))
    stream = streams[0]

    async def ask() -> None:
        await stream.write(SMALL)
        await stream.read(READ_BYTES)

    rounds.add("echo_ms", await timed_ms(ask, n))
    for stream in streams:
        await stream.close()
    bulk = await transport.open_stream(peer, SINK)
    await timed_bulk(rounds, "bulk", bulk.write, functools.partial(bulk.read, 1), other)
    await transport.hang_up(peer)


async def round_of_tcp(rounds: Rounds, other: Server, n: int) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", int(other.address))
    await stream.send_all(b"e")

    async def ask() -> None:
        await stream.send_all(SMALL)
        await stream.receive_some(READ_BYTES)

    rounds.add("tcp_echo_ms", await timed_ms(ask, n))
    await stream.aclose()
    bulk = await trio.open_tcp_stream("127.0.0.1", int(other.address))
    await bulk.send_all(b"s")
    await timed_bulk(rounds, "tcp", bulk.send_all, functools.partial(bulk.receive_some, 1), other)
    await bulk.aclose()


async def churn(claims: Claims, other: Server, count: int) -> None:
    """Whatever the first connections leave behind is there; more must add nothing."""

    async def cycles(client: int, count: int) -> None:
        async with open_libp2p(key_of(10 + client), "127.0.0.1:0") as transport:
            for _ in range(count):
                await transport.hang_up(await transport.dial(other.address))

    async def after(count: int) -> dict[str, float]:
        async with trio.open_nursery() as nursery:
            for client in range(CLIENTS):
                nursery.start_soon(cycles, client, count // CLIENTS)
        await trio.sleep(1.5)
        return other.state()

    before, then = await after(5 * CLIENTS), await after(count)
    claims.note("churn_connections", count)
    claims.add("churn_rss_mb", then["rss_mb"] - before["rss_mb"], at_most=20)
    claims.add("churn_files", then["files"] - before["files"], at_most=0)
    claims.add("churn_tasks", then["tasks"] - before["tasks"], at_most=0)


async def kill_noticed(transport: Libp2pTransport, other: Server) -> float:
    """Seconds from SIGKILL until a reader knows."""
    stream = await transport.open_stream(await transport.dial(other.address), ECHO)
    began = time.perf_counter()
    other.process.kill()
    try:
        with trio.fail_after(60):
            await stream.read(1)
    except PeerError:
        return time.perf_counter() - began
    raise SystemExit("a killed peer ended its stream in good order")


async def hang_noticed(transport: Libp2pTransport) -> float:
    """Seconds from SIGSTOP until the link is given up."""
    other = Server("libp2p")
    try:
        async with open_links(transport, hello, limits=LinkLimits()) as links:
            link = await links.connect(other.address)
            os.kill(other.process.pid, signal.SIGSTOP)
            began = time.perf_counter()
            with trio.fail_after(90):
                await link.ended.wait()
            return time.perf_counter() - began
    finally:
        other.stop()


async def measured(claims: Claims, *, quick: bool) -> None:
    rounds, ours, tcp = Rounds(), Server("libp2p"), Server("tcp")
    private, village = Rounds("private_", rounds.found), Server("private")
    try:
        async with (
            open_libp2p(key_of(1), "127.0.0.1:0") as transport,
            open_libp2p(key_of(1), "127.0.0.1:0", VILLAGE_KEY) as villager,
        ):
            for _ in range(3 if quick else ROUNDS):
                await round_of_ours(rounds, transport, ours, 500 if quick else 2000)
                await round_of_ours(private, villager, village, 500 if quick else 2000)
                await round_of_tcp(rounds, tcp, 500 if quick else 2000)
            tell(claims, rounds)
            await churn(claims, ours, 200 if quick else 1000)
            claims.add("kill_noticed_s", await kill_noticed(transport, ours), at_most=1)
            if not quick:
                claims.add("hang_noticed_s", await hang_noticed(transport), at_most=35)
    finally:
        for other in (ours, village, tcp):
            other.stop()


def tell(claims: Claims, rounds: Rounds) -> None:
    rounds.tell(claims, "connect_ms", at_most=25)
    rounds.tell(claims, "stream_ms", at_most=3)
    echo_ms = rounds.tell(claims, "echo_ms", at_most=0.7)
    bulk = rounds.tell(claims, "bulk_mb_per_s", at_least=120)
    rounds.tell(claims, "bulk_mb_per_cpu_s", at_least=200)
    tcp_echo_ms = rounds.tell(claims, "tcp_echo_ms")
    tcp_bulk = rounds.tell(claims, "tcp_mb_per_s")
    claims.add("echo_over_tcp", echo_ms / tcp_echo_ms, at_most=9)
    claims.add("bulk_over_tcp", bulk / tcp_bulk, at_least=0.075)
    for key in ("connect_ms", "echo_ms", "bulk_mb_per_cpu_s"):
        rounds.tell(claims, f"private_{key}")
    claims.add("private_bulk_over_open", rounds.tell(claims, "private_bulk_mb_per_s") / bulk)


def measure(claims: Claims, args: argparse.Namespace) -> None:
    trio.run(functools.partial(measured, claims, quick=args.quick))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        private = functools.partial(serve_libp2p, VILLAGE_KEY)
        trio.run({"libp2p": serve_libp2p, "private": private, "tcp": serve_tcp}[sys.argv[2]])
    else:
        sys.exit(main(measure, __doc__ or ""))
