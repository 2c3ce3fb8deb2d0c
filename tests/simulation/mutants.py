"""Planted bugs, by name, each with the invariant that must catch it.

They replace functions from here; the product has no switch for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from aivillage.ledger import books, core, desk, exposure, payee, selling, sync
from aivillage.protocols.vouchers import ReceiptRow, digest, lane_of
from tests.simulation.world import Runner


class EarlyRunner(Runner):
    """Lets results and bytes out before COMMIT."""

    def run(self, job: Any, done: Any, failed: Any) -> Callable[[], None]:
        result = job(self.node.db)
        done(result)
        return lambda: None


def _lanes_continued() -> AbstractContextManager[Any]:
    def start_boot(db: Any, at_ms: int, random_bytes: bytes) -> tuple[int, bytes]:
        row = books.one(db, "SELECT epoch, lane FROM boot ORDER BY epoch DESC LIMIT 1")
        epoch = max((row[0] if row else 0) + 1, at_ms)
        lane = row[1] if row else lane_of(epoch, random_bytes)
        db.execute("INSERT INTO boot VALUES (?, ?)", (epoch, lane))
        return epoch, lane

    return patch.object(desk, "start_boot", start_boot)


def _exposure_in_memory() -> AbstractContextManager[Any]:
    clean = desk.Desk._partner

    def forgets(self: Any, pair: Any) -> Any:
        partner = clean(self, pair)
        partner.delivered = min(pair.reserved, pair.paid)
        return partner

    return patch.object(desk.Desk, "_partner", forgets)


def _exposure_per_connection() -> AbstractContextManager[Any]:
    clean = core.Ledger.connected

    def connected(self: Any, peer: Any, epoch: int, send: Any) -> None:
        partner = self.desk.partner(peer)
        partner.delivered = min(partner.delivered, partner.pair.paid)
        clean(self, peer, epoch, send)

    return patch.object(core.Ledger, "connected", connected)


def _reservation_after_delivery() -> AbstractContextManager[Any]:
    clean = selling.Selling._reserve

    def reserve(self: Any, partner: Any) -> None:
        most = exposure.ceiling(partner.pair, 0, 0)
        partner.pair = partner.pair._replace(reserved=max(partner.pair.reserved, most))
        clean(self, partner)

    return patch.object(selling.Selling, "_reserve", reserve)


def _receipt_before_commit() -> AbstractContextManager[Any]:
    clean = selling.Selling.on_voucher

    def on_voucher(self: Any, partner: Any, voucher: Any) -> None:
        clean(self, partner, voucher)
        body = payee.msgspec.msgpack.decode(voucher.body, type=payee.VoucherBody)
        row = ReceiptRow(body.n, digest(voucher.body), True)
        partner.receipts.append((body.lane, row))
        partner.link.send(self.take_receipt(partner))

    return patch.object(selling.Selling, "on_voucher", on_voucher)


def _late_items_dropped() -> AbstractContextManager[Any]:
    clean = payee._label

    def label(db: Any, peer: Any, body: Any, voucher: Any, room: int) -> Any:
        row = books.one(db, "SELECT n FROM lane_in WHERE peer = ? AND lane = ?", (peer, body.lane))
        return [] if row and row[0] > body.n else clean(db, peer, body, voucher, room)

    return patch.object(payee, "_label", label)


def _forgives_every_gap() -> AbstractContextManager[Any]:
    def heal(db: Any, peer: Any, at_ms: int) -> Any:
        db.execute(
            "UPDATE peer SET written_off = max(written_off, reserved - paid) WHERE peer = ?",
            (peer,),
        )
        return books.read_pair(db, peer)

    return patch.object(exposure, "heal", heal)


def _no_stranger_pool() -> AbstractContextManager[Any]:
    def ceiling(pair: Any, pool: int, strangers: int) -> int:
        return pair.paid + pair.written_off + (pair.exposure if pair.known else 3 * pool)

    return patch.object(exposure, "ceiling", ceiling)


MUTANTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], tuple[str, ...]]] = {
    "voucher_before_commit": (nullcontext, ("I9",)),
    "receipt_before_commit": (_receipt_before_commit, ("I9",)),
    "exposure_in_memory": (_exposure_in_memory, ("I1", "I3")),
    "exposure_per_connection": (_exposure_per_connection, ("I1", "I3")),
    "reservation_not_durable": (_reservation_after_delivery, ("I1", "I3")),
    "lanes_continued_after_restore": (_lanes_continued, ("I10",)),
    "late_items_dropped": (_late_items_dropped, ("I12",)),
    "claims_unbounded": (
        lambda: patch.object(sync, "arrears_left", lambda db, peer: 1 << 40),
        ("I4",),
    ),
    "forgives_every_gap": (_forgives_every_gap, ("I2",)),
    "no_stranger_pool": (_no_stranger_pool, ("I3", "I14")),
}
NAMES = tuple(MUTANTS)


@contextmanager
def planted(name: str) -> Iterator[type[Runner]]:
    """The runner to use while the bug `name` ("" for none) is in place."""
    if not name:
        yield Runner
        return
    with MUTANTS[name][0]():
        yield EarlyRunner if name == "voucher_before_commit" else Runner
