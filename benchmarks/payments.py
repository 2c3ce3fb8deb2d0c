"""Two crowds of nodes that pay each other, each crowd in a process of its own.

The books are the product's (`open_ledger`: real files, `synchronous=FULL`, real Ed25519). What
joins the processes is a socket pair instead of links; a request goes ahead of each payment, so
that the seller works on the attempt, delivers it and can attest. An eager crowd gives a receipt as
soon as a voucher is booked, one signature each; the others leave that to the book, as the daemon
does: one for up to 32 vouchers within a second.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.ledger import NodeBook, open_ledger
from aivillage.protocols.types import AttemptId, PeerId, peer_id

QUOTE, OUT = b"q" * 32, b"o" * 32
AMOUNT = 100
LINE, EXPOSURE = 10**12, 10**6
WARM_JOBS = 4
STANDING = AttemptId(bytes(16))
"""A sale that stays open: a seller at work gives no room back."""
_HEAD = struct.Struct("<HHB")  # size, pair, kind
_HELLO, _REQUEST, _BLOB = range(3)


class Crowd(NamedTuple):
    """`payers` times `payees` pairs, each with `depth` payments in flight, `jobs` one by one."""

    payers: int
    payees: int
    depth: int
    jobs: int
    eager: bool = True

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(payer, payee) for payer in range(self.payers) for payee in range(self.payees)]


class Outcome(NamedTuple):
    """`cpu_seconds`: of the payers' process and of the payees'."""

    seconds: float
    latencies: list[float]
    cpu_seconds: tuple[float, float]


def key_of(side: str, number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(side.encode()[:4].ljust(30) + b"%02d" % number)


@functools.cache
def name_of(side: str, number: int) -> PeerId:
    return peer_id(key_of(side, number).public_key().public_bytes_raw())


def book_path(folder: Path, side: str, number: int) -> Path:
    return folder / f"{side}{number}" / "ledger.db"


class Wire:
    """Frames of all pairs over one socket; what is said in one turn of the loop goes in one."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._out = bytearray()
        self._filled = trio.Event()

    def say(self, pair: int, kind: int, body: bytes) -> None:
        self._out += _HEAD.pack(len(body), pair, kind) + body
        self._filled.set()

    async def write(self) -> None:
        while True:
            await self._filled.wait()
            out, self._out, self._filled = self._out, bytearray(), trio.Event()
            await self._stream.send_all(out)

    async def frames(self) -> Any:
        held = bytearray()
        async for some in self._stream:
            held += some
            at = 0
            while len(held) - at >= _HEAD.size:
                size, pair, kind = _HEAD.unpack_from(held, at)
                end = at + _HEAD.size + size
                if end > len(held):
                    break
                yield pair, kind, bytes(held[at + _HEAD.size : end])
                at = end
            del held[:at]


class Side:
    """One process: its books, and for each pair the peer on the other side."""

    def __init__(self, crowd: Crowd, folder: Path, wire: Wire) -> None:
        self.crowd, self.folder, self.wire = crowd, folder, wire
        self.pairs = crowd.pairs
        self.books: list[NodeBook] = []

    async def open(self, stack: AsyncExitStack, side: str, count: int) -> None:
        for number in range(count):
            path = book_path(self.folder, side, number)
            path.parent.mkdir()
            book = await stack.enter_async_context(open_ledger(path, key_of(side, number)))
            self.books.append(book)

    def say_hello(self) -> None:
        for pair, (mine, _) in enumerate(self.ends()):
            self.wire.say(pair, _HELLO, self.books[mine].epoch.to_bytes(8, "big"))

    def connect(self, pair: int, hello: bytes) -> None:
        book, peer = self.at(pair)
        book.connected(
            peer,
            int.from_bytes(hello, "big"),
            lambda blob: self.wire.say(pair, _BLOB, blob),
            minor=1,
        )

    def ends(self) -> list[tuple[int, int]]:
        raise NotImplementedError

    def at(self, pair: int) -> tuple[NodeBook, PeerId]:
        raise NotImplementedError


class Payers(Side):
    def __init__(self, crowd: Crowd, folder: Path, wire: Wire) -> None:
        super().__init__(crowd, folder, wire)
        self.receipts = [trio.Event() for _ in crowd.pairs]
        self.latencies: list[float] = []

    def ends(self) -> list[tuple[int, int]]:
        return self.pairs

    def at(self, pair: int) -> tuple[NodeBook, PeerId]:
        payer, payee = self.pairs[pair]
        return self.books[payer], name_of("payee", payee)

    async def listen(self) -> None:
        async for pair, kind, body in self.wire.frames():
            if kind == _HELLO:
                self.connect(pair, body)
                continue
            book, peer = self.at(pair)
            book.receive(peer, body)  # once both are in sync, a receipt: it raises on a forged one
            self.receipts[pair].set()
            self.receipts[pair] = trio.Event()

    async def synced(self) -> None:
        while not all(  # noqa: ASYNC110 - the book has no event for it
            book.view(peer).synced for book, peer in map(self.at, range(len(self.pairs)))
        ):
            await trio.sleep(0.01)

    async def pay(self, jobs: int, first: int) -> None:
        """All pairs at once, `depth` lanes of work each."""
        async with trio.open_nursery() as nursery:
            for pair in range(len(self.pairs)):
                for strand in range(self.crowd.depth):
                    nursery.start_soon(self._pay_one_by_one, pair, strand, range(first, jobs))

    async def _pay_one_by_one(self, pair: int, strand: int, numbers: range) -> None:
        book, peer = self.at(pair)
        for number in numbers:
            attempt = AttemptId(struct.pack("<QII", number + 1, strand, pair))
            self.wire.say(pair, _REQUEST, attempt)
            book.intend(peer, attempt, QUOTE, AMOUNT)
            receipt, began = self.receipts[pair], time.perf_counter()
            await book.settle(peer, attempt, AMOUNT, OUT)
            if self.crowd.depth == 1 and self.crowd.eager:
                await receipt.wait()
            self.latencies.append(time.perf_counter() - began)

    async def all_receipted(self) -> None:
        for book in self.books:
            while (await book.balance()).in_transit:  # noqa: ASYNC110 - nor for this
                await trio.sleep(0.02)


class Payees(Side):
    def ends(self) -> list[tuple[int, int]]:
        return [(payee, payer) for payer, payee in self.pairs]

    def at(self, pair: int) -> tuple[NodeBook, PeerId]:
        payer, payee = self.pairs[pair]
        return self.books[payee], name_of("payer", payer)

    async def trust(self) -> None:
        for pair in range(len(self.pairs)):
            book, peer = self.at(pair)
            await book.set_line(peer, LINE, EXPOSURE)

    async def listen(self, nursery: trio.Nursery) -> None:
        async for pair, kind, body in self.wire.frames():
            book, peer = self.at(pair)
            if kind == _HELLO:
                self.connect(pair, body)
                book.begin_sale(peer, STANDING, QUOTE, AMOUNT)
                book.want_room(peer, EXPOSURE // 8)
                if self.crowd.eager:
                    nursery.start_soon(self._give_receipts, pair)
            elif kind == _REQUEST:
                attempt = AttemptId(body)
                book.begin_sale(peer, attempt, QUOTE, AMOUNT)
                book.want_room(peer, AMOUNT * self.crowd.depth)
                book.deliver(peer, attempt, AMOUNT, OUT)
            else:
                book.receive(peer, body)

    async def _give_receipts(self, pair: int) -> None:
        book, peer = self.at(pair)
        while True:
            await book.room_changed(peer)
            while blob := book.take_receipt(peer):
                self.wire.say(pair, _BLOB, blob)


async def _payers(crowd: Crowd, folder: Path, sock: socket.socket, main: Connection) -> None:
    payers = Payers(crowd, folder, Wire(sock))
    async with AsyncExitStack() as stack:
        await payers.open(stack, "payer", crowd.payers)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(payers.wire.write)
            nursery.start_soon(payers.listen)
            payers.say_hello()
            await payers.synced()
            await payers.pay(WARM_JOBS, 0)
            payers.latencies.clear()
            await _tell(main, "begin")
            began = time.perf_counter()
            await payers.pay(WARM_JOBS + crowd.jobs, WARM_JOBS)
            if crowd.depth > 1 or not crowd.eager:
                await payers.all_receipted()
            await _tell(main, (time.perf_counter() - began, payers.latencies))
            await payers.all_receipted()
            nursery.cancel_scope.cancel()


async def _payees(crowd: Crowd, folder: Path, sock: socket.socket, main: Connection) -> None:
    payees = Payees(crowd, folder, Wire(sock))
    async with AsyncExitStack() as stack:
        await payees.open(stack, "payee", crowd.payees)
        await payees.trust()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(payees.wire.write)
            nursery.start_soon(payees.listen, nursery)
            payees.say_hello()
            await trio.to_thread.run_sync(main.recv)
            nursery.cancel_scope.cancel()


async def _tell(main: Connection, what: Any) -> None:
    """And waits for a word, so that nothing happens while processor time is read."""
    main.send(what)
    await trio.to_thread.run_sync(main.recv)


def _run(side: Any, *args: Any) -> None:
    trio.run(side, *args)


def measured(crowd: Crowd, folder: Path) -> Outcome:
    """Both processes, from the first job after warming to the last receipt."""
    with _started(crowd, folder) as (processes, payers, payees):
        payers.recv()
        before = _cpu_seconds(processes)
        payers.send("go")
        seconds, latencies = payers.recv()
        after = _cpu_seconds(processes)
        payers.send("end")
        processes[0].join(60)
        payees.send("end")
        processes[1].join(60)
    if any(process.exitcode for process in processes):
        raise SystemExit("a side of the payments failed")
    cpu = (after[0] - before[0], after[1] - before[1])
    return Outcome(seconds, latencies, cpu)


@contextlib.contextmanager
def _started(crowd: Crowd, folder: Path) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    ends, pipes = socket.socketpair(), [context.Pipe(), context.Pipe()]
    with ends[0], ends[1]:
        processes = [
            context.Process(target=_run, args=(side, crowd, folder, end, pipe[1]))
            for side, end, pipe in zip((_payers, _payees), ends, pipes, strict=True)
        ]
        for process, pipe in zip(processes, pipes, strict=True):
            process.start()
            pipe[1].close()  # so that a dead side ends `recv`
    try:
        yield processes, pipes[0][0], pipes[1][0]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _cpu_seconds(processes: list[Any]) -> list[float]:
    found = [psutil.Process(process.pid).cpu_times() for process in processes]
    return [times.user + times.system for times in found]
