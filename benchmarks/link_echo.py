"""Echo between two processes: our links over patched libp2p, beside a stock libp2p stream.

Closed loop, one question at a time unless the name says otherwise. Loopback, two cores.
`--json` prints one flat JSON object as the last line; `--quick` takes under 50 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node.links import LinkLimits, open_links
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.messages import Hello, ListOperations, Operations, Step, StepItem

ECHO = "/bench/echo/1"
LIMITS = LinkLimits(questions_per_second=1_000_000, questions_burst=1_000_000)
"""A node reads 20 questions a second of one link: with that, it would be all that is measured."""


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def hello() -> Hello:
    return Hello(major=1, minor=0, agent="bench", boot_epoch=1, clock_unix_ms=0)


# ------------------------------------------------------------------ the other process


async def serve_links() -> None:
    async with (
        open_libp2p(key_of(2), "127.0.0.1:0") as transport,
        open_links(transport, hello, limits=LIMITS) as links,
    ):

        def answer(link: Any, frame: Any) -> None:
            if isinstance(frame, ListOperations):
                link.send(Operations(id=frame.id, operations=()))

        links.on_message = answer
        await announce(transport.addresses()[0])


async def serve_stock() -> None:
    host, listen = stock_host(2)

    async def echo(stream: Any) -> None:
        while data := await stream.read(65536):
            await stream.write(data)

    host.set_stream_handler(ECHO, echo)
    async with host.run(listen_addrs=listen):
        await announce(f"{host.get_addrs()[0]}")


async def announce(address: str, tell: Callable[[], Any] = time.process_time) -> None:
    """Prints the address, then answers each line on stdin: by default the CPU seconds so far."""
    sys.stdout.write(address + "\n")
    sys.stdout.flush()
    while await trio.to_thread.run_sync(sys.stdin.readline):
        sys.stdout.write(f"{tell()}\n")
        sys.stdout.flush()


def stock_host(number: int) -> tuple[Any, Any]:
    import multiaddr
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair

    listen = [multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]
    key_pair = create_new_key_pair(number.to_bytes(32, "big"))
    return new_host(key_pair=key_pair, listen_addrs=listen), listen


# ------------------------------------------------------------------ this process


class Other:
    """The serving process."""

    def __init__(self, role: str, script: str = __file__) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, "--serve", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()

    def cpu_seconds(self) -> float:
        return float(self.told())

    def told(self) -> str:
        """What it says of itself now."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


async def timed(call: Any, count: int, other: Other) -> dict[str, float]:
    for _ in range(50):
        await call()
    mine, theirs = time.process_time(), other.cpu_seconds()
    milliseconds = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        milliseconds.append((time.perf_counter() - began) * 1000)
    mine, theirs = time.process_time() - mine, other.cpu_seconds() - theirs
    milliseconds.sort()
    return {
        "p50_ms": statistics.median(milliseconds),
        "p99_ms": milliseconds[int(count * 0.99)],
        "cpu_ms_client": mine / count * 1000,
        "cpu_ms_server": theirs / count * 1000,
    }


async def measure_links(count: int) -> dict[str, float]:
    other = Other("links")
    figures: dict[str, float] = {}
    try:
        async with (
            open_libp2p(key_of(1), "127.0.0.1:0") as transport,
            open_links(transport, hello, limits=LIMITS) as links,
        ):
            began = time.perf_counter()
            link = await links.connect(other.address)
            figures["link_connect_ms"] = (time.perf_counter() - began) * 1000

            async def ask() -> None:
                await link.ask(ListOperations(id=link.next_id()), timeout_seconds=5)

            figures |= {f"link_{k}": v for k, v in (await timed(ask, count, other)).items()}
            figures["link_asks_per_second_32"] = await in_flight(ask, count)
            figures |= await steps(link, other)
    finally:
        other.stop()
    return figures


async def in_flight(ask: Any, count: int) -> float:
    async def some() -> None:
        for _ in range(count // 32):
            await ask()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(32):
            nursery.start_soon(some)
    return (count // 32) * 32 / (time.perf_counter() - began)


async def steps(link: Any, other: Other, seconds: float = 5.0) -> dict[str, float]:
    """100 steps a second of 32 sequences each: the share of a core that 3,200 tokens/s cost."""
    items = tuple(StepItem(2 * n, 7, (11,), " word", b"12345678") for n in range(32))
    mine, theirs = time.process_time(), other.cpu_seconds()
    began = trio.current_time()
    for seq in range(int(seconds * 100)):
        link.send(Step(seq=seq, items=items))
        await trio.sleep_until(began + (seq + 1) / 100)
    mine, theirs = time.process_time() - mine, other.cpu_seconds() - theirs
    return {"steps_core_sender": mine / seconds, "steps_core_receiver": theirs / seconds}


@asynccontextmanager
async def stock_stream(other: Other) -> AsyncIterator[tuple[Callable[[], Awaitable[None]], float]]:
    """What asks an untouched libp2p stream, and the milliseconds to connect."""
    import multiaddr
    from libp2p.peer.peerinfo import info_from_p2p_addr

    host, listen = stock_host(1)
    async with host.run(listen_addrs=listen):
        info = info_from_p2p_addr(multiaddr.Multiaddr(other.address))
        began = time.perf_counter()
        await host.connect(info)
        connect_ms = (time.perf_counter() - began) * 1000
        stream = await host.new_stream(info.peer_id, [ECHO])

        async def ask() -> None:
            await stream.write(bytes(64))
            await stream.read(65536)

        yield ask, connect_ms
        await host.close()


async def measure_stock(count: int) -> dict[str, float]:
    other = Other("stock")
    try:
        async with stock_stream(other) as (ask, connect_ms):
            figures = await timed(ask, count, other)
    finally:
        other.stop()
    return {"stock_connect_ms": connect_ms} | {f"stock_{k}": v for k, v in figures.items()}


async def stock_in_turns(_count: int) -> dict[str, float]:
    """For each line on stdin so many echoes; prints their milliseconds. So others have turns."""
    other = Other("stock")
    try:
        async with stock_stream(other) as (ask, _):
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                took = []
                for _ in range(int(line)):
                    began = time.perf_counter()
                    await ask()
                    took.append((time.perf_counter() - began) * 1000)
                sys.stdout.write(json.dumps(took) + "\n")
                sys.stdout.flush()
    finally:
        other.stop()
    return {}


def in_own_process(what: str, count: int) -> dict[str, float]:
    """Stock and patched cannot share a process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--measure", what, "--count", str(count)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


MEASURES = {"links": measure_links, "stock": measure_stock, "stock-in-turns": stock_in_turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", choices=["links", "stock"])
    parser.add_argument("--measure", choices=list(MEASURES))
    parser.add_argument("--count", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve_links if arguments.serve == "links" else serve_stock)
    elif arguments.measure:
        figures = trio.run(MEASURES[arguments.measure], arguments.count)
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        count = 2000 if arguments.quick else 10_000
        figures = in_own_process("stock", count) | in_own_process("links", count)
        for name, value in figures.items():
            sys.stdout.write(f"{name:28} {value:10.3f}\n")
        if arguments.json:
            sys.stdout.write(json.dumps({k: round(v, 4) for k, v in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
