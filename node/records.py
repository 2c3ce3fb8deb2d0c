"""How peers, and this machine, did so far: what we saw ourselves, kept over restarts.

Speed is of one kind of work, by what computes it: a peer that is fast at one model says nothing of
another, and one that got a new machine begins anew.
"""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

import apsw
import msgspec

from aivillage.models import registry
from aivillage.models.inference.stages import StageRequest
from aivillage.node.store import Store
from aivillage.node.store import Work as Writing
from aivillage.protocols.codec import unpack
from aivillage.protocols.types import PeerId

SMOOTHING: Final = 0.3
SPEEDS_MAX: Final = 64
"""Of one peer: it names its kernels itself, so the oldest one is forgotten."""

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS peer_speed(
  peer TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL, kernel TEXT NOT NULL,
  units_per_second REAL NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(peer, operation, model, kernel)) STRICT, WITHOUT ROWID;
"""


class Work(NamedTuple):
    """A kind of work whose units are alike. `model` is empty where there is none."""

    operation: str
    model: str = ""


class Speed(msgspec.Struct, frozen=True):
    """What one kernel class made of one kind of work, and when that was seen last."""

    units_per_second: float
    at: float


class Record(msgspec.Struct):
    """What we saw of a peer ourselves."""

    good: int = 0
    bad: int = 0
    speeds: dict[tuple[Work, str], Speed] = {}
    """By work and kernel class."""

    def rate(self, *, good: bool) -> None:
        """Adds one job."""
        self.good += good
        self.bad += not good

    def measure(self, work: Work, kernel: str, units_per_second: float) -> None:
        """Adds one good job's speed: an exponential mean."""
        if units_per_second <= 0:
            return
        key = work, kernel
        old = self.speeds.get(key)
        mean = old.units_per_second if old else units_per_second
        mean += SMOOTHING * (units_per_second - mean)
        self.speeds[key] = Speed(mean, time.time())
        if len(self.speeds) > SPEEDS_MAX:
            del self.speeds[min(self.speeds, key=lambda found: self.speeds[found].at)]

    def speed(self, work: Work) -> float:
        """Units a second, by the kernel class seen last; 0: never measured."""
        found = [speed for (done, _), speed in self.speeds.items() if done == work]
        return max(found, key=lambda speed: speed.at).units_per_second if found else 0.0

    @property
    def units_per_second(self) -> float:
        """Of whatever was measured last."""
        latest = max(self.speeds.values(), key=lambda speed: speed.at, default=None)
        return latest.units_per_second if latest else 0.0

    @property
    def failures(self) -> float:
        """The share that it failed; a few good jobs more than it had, so that one is forgiven."""
        return self.bad / (self.good + self.bad + 2)


def work_of(operation: str, request: bytes) -> Work:
    """The kind of work that a request is.

    Raises:
        RequestError: the request is none of the operation's.
    """
    if registry.formats(operation):
        wanted: Any = unpack(registry.of_models(operation).Request, request)
        return Work(operation, wanted.model)
    if registry.takes_inputs(operation):
        return Work(operation, unpack(StageRequest, request).model)
    return Work(operation)


class KnownPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer met before, and how it did."""

    id: PeerId
    addresses: tuple[str, ...]
    seen: float
    good: int
    bad: int


class PeerStore(Store):
    """The tables of jobs.db about peers."""

    async def saw_peer(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        await self._write(
            "INSERT INTO known_peer(id, addresses, seen) VALUES(?,?,?) ON CONFLICT(id) DO UPDATE"
            " SET addresses=excluded.addresses, seen=excluded.seen",
            (peer, msgspec.msgpack.encode(addresses), time.time()),
        )

    async def rename_peer(self, old: PeerId, new: PeerId) -> None:
        """What is known of a peer follows it to its next key."""

        def work(db: apsw.Connection) -> None:
            for table, column in (("known_peer", "id"), ("peer_speed", "peer")):
                sql = f"UPDATE OR REPLACE {table} SET {column}=? WHERE {column}=?"  # noqa: S608
                db.execute(sql, (new, old))

        await self.transaction(work)

    def rate_peer(self, peer: PeerId, record: Record) -> None:
        """Keeps what was counted and measured of a peer; of this machine only its speeds."""
        self.later(self._rating(peer, record))

    def rate_peer_seldom(self, peer: PeerId, record: Record) -> None:
        """The same after a good job, of which a kill may lose some."""
        self.seldom(("rating", peer), lambda: self._rating(peer, record))

    def _rating(self, peer: PeerId, record: Record) -> Writing[None]:
        rows = [
            (peer, *done, kernel, speed.units_per_second, speed.at)
            for (done, kernel), speed in record.speeds.items()
        ]
        counts = record.good, record.bad, peer

        def work(db: apsw.Connection) -> None:
            db.execute("UPDATE known_peer SET good=?, bad=? WHERE id=?", counts)
            db.execute("DELETE FROM peer_speed WHERE peer=?", (peer,))
            db.executemany("INSERT INTO peer_speed VALUES(?,?,?,?,?,?)", rows)

        return work

    async def known_peers(self) -> list[KnownPeer]:
        self._flush_seldom()
        rows = await self._read(
            "SELECT id, addresses, seen, good, bad FROM known_peer ORDER BY seen DESC LIMIT 1000"
        )
        return [
            KnownPeer(
                id=PeerId(row[0]),
                addresses=msgspec.msgpack.decode(row[1], type=tuple[str, ...]),
                seen=row[2],
                good=row[3],
                bad=row[4],
            )
            for row in rows
        ]

    async def records(self) -> dict[PeerId, Record]:
        """What former runs counted and measured."""
        found = {known.id: Record(known.good, known.bad) for known in await self.known_peers()}
        rows = await self._read(
            "SELECT peer, operation, model, kernel, units_per_second, at FROM peer_speed"
        )
        for peer, operation, model, kernel, speed, at in rows:
            record = found.setdefault(PeerId(peer), Record())
            record.speeds[Work(operation, model), kernel] = Speed(speed, at)
        return found
