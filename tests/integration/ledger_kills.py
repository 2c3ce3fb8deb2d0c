"""Kills real ledger processes at random and then counts the money.

A buyer and a seller, each one process with its own file (synchronous=FULL), talk over loopback
TCP. The parent kills one or the other with SIGKILL, starts it again, and at the end asks both
whether what was paid is what was earned.

    python -m tests.integration.ledger_kills --kills 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import reader
from aivillage.ledger.ledger import NodeBook, open_ledger
from aivillage.protocols.types import AttemptId, peer_id

KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    for number, name in enumerate(("buyer", "seller"), 1)
}
IDS = {name: peer_id(key.public_key().public_bytes_raw()) for name, key in KEYS.items()}
OTHER = {"buyer": "seller", "seller": "buyer"}
ROOT = Path(__file__).resolve().parents[2]
LINE, EXPOSURE, UNIT, UNITS = 1 << 40, 4_000, 100, 20
BLOB, CALL, CHUNK, END = range(4)
STILL_SECONDS = 1.0
"""As long as a receipt waits for other traffic: what still ran has moved the books by then."""


# ---------------------------------------------------------------- one process


class Wire:
    """Length-prefixed frames: kind, attempt or nothing, body."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._send, self._queue = trio.open_memory_channel[bytes](10_000)
        self._rest = b""

    def put(self, kind: int, body: bytes) -> None:
        self._send.send_nowait((len(body) + 1).to_bytes(4, "big") + bytes([kind]) + body)

    async def pump(self) -> None:
        async for frame in self._queue:
            await self._stream.send_all(frame)

    async def take(self) -> tuple[int, bytes]:
        size = int.from_bytes(await self._exactly(4), "big")
        frame = await self._exactly(size)
        return frame[0], frame[1:]

    async def _exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            more = await self._stream.receive_some(65536)
            if not more:
                raise trio.BrokenResourceError
            self._rest += more
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


async def serve(name: str, folder: Path, port: int) -> None:
    """One boot of one side, for as long as it lives. The seller listens, the buyer dials."""
    async with open_ledger(folder / f"{name}.db", KEYS[name]) as book:
        await book.set_line(IDS[OTHER[name]], LINE, EXPOSURE)
        await book.set_received(IDS[OTHER[name]], LINE, EXPOSURE)
        if name == "seller":
            # Each kill leaves a gap, and the exposure would soon stop all trade: kills of the idle.
            await book.forgive_gap(IDS["buyer"])
        (folder / f"{name}.ready").write_text(str(os.getpid()))
        if name == "seller":
            await trio.serve_tcp(partial(meet, book, name, folder), port, host="127.0.0.1")
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await trio.sleep(0.02)
                continue
            await meet(book, name, folder, stream)


async def meet(book: NodeBook, name: str, folder: Path, stream: trio.SocketStream) -> None:
    """One connection: boot epochs first, then blobs and work, until it breaks."""
    wire, peer = Wire(stream), IDS[OTHER[name]]
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(wire.pump)
            wire.put(BLOB, book.epoch.to_bytes(8, "big"))
            _, epoch = await wire.take()
            book.connected(peer, int.from_bytes(epoch, "big"), partial(wire.put, BLOB))
            if name == "buyer":
                nursery.start_soon(buy, book, wire, folder)
            await listen(book, name, wire, nursery)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        book.disconnected(peer)


async def listen(book: NodeBook, name: str, wire: Wire, nursery: trio.Nursery) -> None:
    peer = IDS[OTHER[name]]
    while True:
        kind, body = await wire.take()
        if kind == BLOB:
            book.receive(peer, body)
        elif kind == CALL:
            nursery.start_soon(sell, book, wire, AttemptId(body))
        elif kind == CHUNK:
            amount = int.from_bytes(body[16:], "big")
            book.accept(peer, AttemptId(body[:16]), amount, body[:16] * 2)
            if amount == UNIT * UNITS:
                await book.settle(peer, AttemptId(body[:16]), amount, body[:16] * 2)
                wire.put(END, body[:16])
        elif kind == END:
            book.end_sale(peer, AttemptId(body))


async def buy(book: NodeBook, wire: Wire, folder: Path) -> None:
    while not (folder / "stop").exists():
        attempt = AttemptId(os.urandom(16))
        book.intend(IDS["seller"], attempt, attempt * 2, UNIT * UNITS)
        wire.put(CALL, attempt)
        await trio.sleep(0.02)


async def sell(book: NodeBook, wire: Wire, attempt: AttemptId) -> None:
    peer = IDS["buyer"]
    book.begin_sale(peer, attempt, attempt * 2, UNIT * UNITS)
    for amount in range(UNIT, UNIT * UNITS + 1, UNIT):
        while not book.deliver(peer, attempt, amount, attempt * 2):
            book.want_room(peer, UNIT)
            with trio.move_on_after(0.5):
                await book.room_changed(peer)
        wire.put(CHUNK, attempt + amount.to_bytes(8, "big"))
        await trio.lowlevel.checkpoint()


# ---------------------------------------------------------------- the parent


class Side:
    def __init__(self, name: str, folder: Path, port: int) -> None:
        self.name, self.folder, self.port = name, folder, port
        self.start()

    def start(self) -> None:
        side = (self.name, str(self.folder), str(self.port))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.ledger_kills", "--side", *side],
            cwd=ROOT,
        )

    def ready(self) -> bool:
        mark = self.folder / f"{self.name}.ready"
        if self.process.poll() is not None:
            raise RuntimeError(f"the {self.name} died by itself: {self.process.returncode}")
        return mark.exists() and mark.read_text() == str(self.process.pid)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def wait_for(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds} s for {what}")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settled(folder: Path) -> bool:
    """Both books say the same and nothing is in transit."""
    buyer, seller = (reader.read_balance(folder / f"{name}.db") for name in ("buyer", "seller"))
    return buyer.spent == seller.earned and buyer.in_transit == 0


def settle(folder: Path, seconds_max: float) -> float:
    """Seconds from now, when no more work is begun, until both books agree and go on to.

    What still runs now ends within that time too. Books that agree for a moment while work goes on
    have not settled: the last change counts, after which nothing moved for `STILL_SECONDS`.
    """
    began = time.monotonic()
    agreed: float | None = None
    while agreed is None or time.monotonic() - agreed < STILL_SECONDS:
        if not settled(folder):
            agreed = None
        elif agreed is None:
            agreed = time.monotonic()
        if agreed is None and time.monotonic() - began > seconds_max:
            raise RuntimeError(f"waited {seconds_max} s for both books to agree")
        time.sleep(0.02)
    return agreed - began


def run(kills: int, seed: int, settle_seconds_max: float = 60.0) -> dict[str, Any]:
    """Kills, restarts, waits for quiet, and returns the sums."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        sides = [Side(side, folder, port) for side in ("buyer", "seller")]
        started = time.monotonic()
        try:
            for _ in range(kills):
                victim = rng.choice(sides)
                wait_for(victim.ready, 30, f"the {victim.name}")
                time.sleep(rng.uniform(0, 0.4))
                victim.kill()
                victim.start()
            for side in sides:
                wait_for(side.ready, 30, f"the {side.name}")
            time.sleep(1)  # of trade after the last kill
            (folder / "stop").touch()
            loaded = time.monotonic() - started
            return summary(folder, kills, loaded, settle(folder, settle_seconds_max))
        finally:
            for side in sides:
                side.kill()


def summary(folder: Path, kills: int, seconds: float, settle_seconds: float) -> dict[str, Any]:
    paths = [folder / f"{name}.db" for name in ("buyer", "seller")]
    buyer, seller = (reader.read_balance(path) for path in paths)
    audits = [reader.read_audit(path) for path in paths]
    return {
        "kills": kills,
        "paid": buyer.spent,
        "earned": seller.earned,
        "balances": [buyer.net, seller.net],
        "at_risk": seller.at_risk,
        "vouchers": audits[0].vouchers,
        "audit_ok": all(report.ok for report in audits),
        "first_error": next((report.first_error for report in audits if not report.ok), ""),
        "seconds": round(seconds, 1),
        "settle_seconds": round(settle_seconds, 2),
        # Fewer vouchers than kills: trade had stopped, and it was idle books that died.
        "ok": buyer.spent == seller.earned > 0
        and audits[0].vouchers > kills
        and buyer.net == -seller.net
        and all(report.ok for report in audits),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settled-within", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--side", nargs=3)
    options = parser.parse_args()
    if options.side:
        name, folder, port = options.side
        trio.run(serve, name, Path(folder), int(port))
        return 0
    result = run(options.kills, options.seed, options.settled_within)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
