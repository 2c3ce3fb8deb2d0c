"""A long line between two network namespaces: delay, loss, and a switch that cuts it. Root only.

The kernel of a small machine may have no `netem`, so the line is two TUN devices, one in each
namespace, and a thread that carries the packets between them, late and not all of them.

    with Wan(delay_seconds=0.05, loss=0.01) as wan:
        subprocess.run([*wan.inside("left"), "ping", wan.address("right")])
        with wan.cut():
            ...
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from typing import Self

from tests.integration import netns
from tests.integration.daemons import Daemon

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
PACKET_BYTES_MAX = 65_536
ADDRESSES = {"left": "10.78.0.1", "right": "10.78.0.2"}


def missing() -> str:
    """Why there can be no such line here; empty where there can."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    return netns.missing()


class Wan:
    """Two machines, `left` and `right`, far apart."""

    def __init__(self, *, delay_seconds: float, loss: float, seed: int = 0) -> None:
        self.carried = 0
        self.lost = 0
        self._delay_seconds = delay_seconds
        self._loss = loss
        self._random = random.Random(seed)
        self._is_cut = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._ends: list[int] = []

    def __enter__(self) -> Self:
        try:
            for name, address in ADDRESSES.items():
                space = self._space(name)
                netns.run("ip", "netns", "add", space)
                self._ends.append(_tun(space))
                for words in (
                    ("link", "set", "lo", "up"),
                    ("addr", "add", f"{address}/24", "dev", "wan0"),
                    ("link", "set", "wan0", "txqueuelen", "2000", "up"),
                ):
                    netns.run("ip", "-n", space, *words)
        except BaseException:
            self._clean()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._clean()

    def inside(self, name: str) -> tuple[str, ...]:
        """The words before a command that is to run on the machine `name`."""
        return "ip", "netns", "exec", self._space(name)

    def move(self, daemon: Daemon, name: str) -> Daemon:
        """The daemon is to run on the machine `name`."""
        daemon.launcher, daemon.host = self.inside(name), ADDRESSES[name]
        return daemon

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Meanwhile nothing arrives, and nobody is told."""
        self._is_cut = True
        try:
            yield
        finally:
            self._is_cut = False

    def _space(self, name: str) -> str:
        return f"aiv{os.getpid()}{name}"

    def _clean(self) -> None:
        for end in self._ends:
            os.close(end)
        for name in ADDRESSES:
            netns.run("ip", "netns", "del", self._space(name), check=False)

    def _carry(self) -> None:
        left, right = self._ends
        other = {left: right, right: left}
        under_way: list[tuple[float, int, int, bytes]] = []
        while not self._stop.is_set():
            wait = under_way[0][0] - time.monotonic() if under_way else 0.1
            readable, _, _ = select.select(self._ends, [], [], min(0.1, max(0.0, wait)))
            for end in readable:
                packet = os.read(end, PACKET_BYTES_MAX)
                if self._is_cut or self._random.random() < self._loss:
                    self.lost += 1
                    continue
                self.carried += 1
                due = time.monotonic() + self._delay_seconds
                heapq.heappush(under_way, (due, self.carried, other[end], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # that end's queue is full, as on a real line
                    os.write(end, packet)


def _tun(space: str) -> int:
    """The file of a new device `wan0` in a namespace. Only the thread that makes it goes there."""
    made: list[int] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{space}", encoding="ascii") as target:  # noqa: PTH123 its descriptor
            if libc.setns(target.fileno(), 0):
                return
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", b"wan0", IFF_TUN_NO_PI))
        made.append(end)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made, f"no TUN device in {space}"
    return made[0]
