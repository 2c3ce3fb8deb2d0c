"""Planted bugs, by name, each with the invariant or the scene that must catch it.

They replace functions from here; the product has no switch for them. `make mutants` plants all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

from aivillage.ledger import (
    books,
    compaction,
    core,
    desk,
    exposure,
    payee,
    payer,
    routing,
    selling,
    sync,
    transfers,
)
from aivillage.protocols.vouchers import GIFT, REFUND, ROUTE, ReceiptRow, digest, lane_of
from tests.simulation.edits import edited, reworded, together, unguarded
from tests.simulation.world import BrokenError, Runner

Plant = Callable[[], AbstractContextManager[Any]]


class EarlyRunner(Runner):
    """Lets results and bytes out before COMMIT."""

    noticed: BrokenError | None = None

    def _run(self, job: Any) -> Callable[[], None]:
        try:
            job.done(job.run(self._db))
        except BrokenError as error:  # for the check, not for the writer
            self.noticed = error
        return lambda: None

    def flush(self) -> None:
        super().flush()
        if self.noticed is not None:
            raise self.noticed


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

    def connected(self: Any, peer: Any, *how: Any) -> None:
        partner = self.desk.partner(peer)
        partner.delivered = min(partner.delivered, partner.pair.paid)
        clean(self, peer, *how)

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


def _epoch(rule: Callable[[int, bytes], int]) -> AbstractContextManager[Any]:
    def start_boot(db: Any, at_ms: int, random_bytes: bytes) -> tuple[int, bytes]:
        epoch = rule(at_ms, random_bytes)
        lane = lane_of(epoch, random_bytes)
        db.execute("INSERT INTO boot VALUES (?, ?)", (epoch, lane))
        return epoch, lane

    return together(unguarded("boot_rises"), patch.object(desk, "start_boot", start_boot))


def _late_items_dropped() -> AbstractContextManager[Any]:
    clean = payee._label

    def label(db: Any, peer: Any, voucher: Any, items: Any, room: int) -> Any:
        lane, n, _ = voucher
        row = books.one(db, "SELECT n FROM lane_in WHERE peer = ? AND lane = ?", (peer, lane))
        return [] if row and row[0] > n else clean(db, peer, voucher, items, room)

    return patch.object(payee, "_label", label)


def _delta() -> AbstractContextManager[Any]:
    """A voucher says what it adds, not what is owed in all."""
    return together(
        edited(payer, "make_voucher", ("cum + total, root_of", "total, root_of")),
        edited(payer, "_keep", ("cum = excluded.cum", "cum = cum + excluded.cum")),
        edited(payer, "adopt", ("max(0, body.cum - row[1])", "body.cum")),
        edited(payee, "_book", ("cum = max(old.cum, body.cum)", "cum = old.cum + body.cum")),
        patch.object(payee, "_rival", lambda *_: None),
        patch.object(payee, "_says_nothing", lambda *_, **__: False),
    )


def _sign_twice() -> AbstractContextManager[Any]:
    return together(
        unguarded("lane_out_rises"),
        edited(payer, "make_voucher", ("n + 1, cum", "max(n, 1), cum")),
        edited(payer, "_insert", ("INSERT INTO voucher_out", "INSERT OR REPLACE INTO voucher_out")),
    )


def _two_transactions_in_a_middle() -> AbstractContextManager[Any]:
    """Booked in one; what is to be passed on is known to memory until the next."""
    clean_take, clean_booked = transfers.take, routing.Routing.booked

    def take(db: Any, peer: Any, item: Any, increase: int, at_ms: int) -> None:
        if item.kind != ROUTE or item.route[0] in books.own_keys(db):
            clean_take(db, peer, item, increase, at_ms)

    def booked(self: Any, partner: Any, items: Any) -> None:
        peer, advance, at_ms = partner.pair.peer, self.step(), self._desk.clock.unix_ms()

        def job(db: Any) -> Any:
            for item in items:
                if item.kind == ROUTE:
                    clean_take(db, peer, item, item.amount, at_ms)
            return advance(db)

        self._desk.submit(job, self.sent)
        clean_booked(self, partner, items)

    return together(
        patch.object(transfers, "take", take), patch.object(routing.Routing, "booked", booked)
    )


def _forward_while_unsynced() -> AbstractContextManager[Any]:
    linked = ("synced = link is not None and link.synced and", "return link is not None and")
    return edited(routing.Routing, "_is_ready", linked)


def _route_risk_in_memory() -> AbstractContextManager[Any]:
    clean = desk.Desk.__init__

    def init(self: Any, db: Any, *rest: Any) -> None:
        db.execute("DELETE FROM route_hop")
        clean(self, db, *rest)

    return patch.object(desk.Desk, "__init__", init)


def _one_way_sync(side: str) -> AbstractContextManager[Any]:
    return edited(sync, "answer", (f"{side} = _", f"{side} = [] and _"))


def _counts_as_pay(*kinds: int) -> AbstractContextManager[Any]:
    also = payee.SERVICE | {*kinds}
    return together(patch.object(payee, "SERVICE", also), patch.object(payer, "SERVICE", also))


def _drops_proofs() -> AbstractContextManager[Any]:
    return reworded(compaction, "_SUPERSEDED", ("i.voucher = v.id", "i.voucher = 0"))


def _pay_on_arrival() -> AbstractContextManager[Any]:
    clean = selling.Selling.on_voucher

    def on_voucher(self: Any, partner: Any, voucher: Any) -> None:
        clean(self, partner, voucher)
        for item in voucher.items:
            sale = partner.sales.get(item.id)
            if sale is not None and item.kind in payee.SERVICE:
                paid = partner.pair.paid + max(0, item.amount - sale.paid)
                partner.pair = partner.pair._replace(paid=paid)

    return patch.object(selling.Selling, "on_voucher", on_voucher)


class Mutant(NamedTuple):
    """`killed_by`: first words of what must break. `seeds`: where it did, looked at first.

    `scene`: the directed scene that breaks; the swarm need not.
    """

    plant: Plant
    killed_by: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    scene: str = ""


def _may_forward(words: str, instead: str = "") -> Plant:
    return lambda: edited(transfers, "_may_forward", (words, instead))


MUTANTS: dict[str, Mutant] = {
    "voucher_before_commit": Mutant(nullcontext, ("I9",)),
    "receipt_before_commit": Mutant(_receipt_before_commit, ("I9",)),
    "exposure_in_memory": Mutant(_exposure_in_memory, ("I1", "I3"), (2,)),
    "exposure_per_connection": Mutant(_exposure_per_connection, ("I1", "I3"), (2,)),
    "exposure_per_attempt": Mutant(
        lambda: edited(
            selling.Selling,
            "deliver",
            ("partner.delivered += increase", "partner.delivered = max(partner.delivered, amount)"),
        ),
        ("I1", "I3"),
        (1,),
    ),
    "reservation_not_durable": Mutant(_reservation_after_delivery, ("I1", "I3"), (5,)),
    "reservation_below_the_dearest_unit": Mutant(
        lambda: edited(exposure, "reserve", ("max(unit, ", "min(unit, ")), ("live",)
    ),
    "lanes_continued_after_restore": Mutant(_lanes_continued, ("I10",)),
    "random_epoch": Mutant(
        lambda: _epoch(lambda at_ms, some: at_ms + int.from_bytes(some[:4], "big")), ("live",)
    ),
    "epoch_is_the_clock": Mutant(
        lambda: _epoch(lambda at_ms, some: at_ms),
        ("live", "I0"),
        scene="an_epoch_rises_though_the_clock_went_back",
    ),
    "no_fence": Mutant(
        lambda: edited(core.Ledger, "receive", (" or epoch < partner.epoch", "")),
        ("I11",),
        scene="a_frame_of_an_old_boot_is_not_heard",
    ),
    "no_sync": Mutant(
        lambda: edited(
            sync,
            "answer",
            ("yours = _", "yours = [] and _"),
            ("mine = _", "mine = [] and _"),
            ("else:  # what", "elif False:  # what"),
        ),
        ("I11", "I12"),
    ),
    "sync_shows_only_its_own": Mutant(lambda: _one_way_sync("yours"), ("I11", "I12")),
    "delta_not_cumulative": Mutant(_delta, ("I11", "I12")),
    "sign_twice": Mutant(_sign_twice, ("I10",)),
    "sign_twice_with_the_schema": Mutant(
        lambda: edited(payer, "make_voucher", ("n + 1, cum", "max(n, 1), cum")), ("I0",)
    ),
    "late_items_dropped": Mutant(_late_items_dropped, ("I12",), (1,)),
    "items_beyond_cum": Mutant(
        lambda: together(
            unguarded("attr BETWEEN 0 AND cum", "service BETWEEN 0 AND cum"),
            edited(payee, "_label", (" or increase > room", "")),
        ),
        ("I8",),
    ),
    "pay_from_cum": Mutant(lambda: _counts_as_pay(ROUTE, REFUND, GIFT), ("I8",)),
    "gift_counts_as_pay": Mutant(lambda: _counts_as_pay(GIFT), ("I8",)),
    "no_unlabelled_rule": Mutant(
        lambda: edited(payee, "seal", ("(rest, peer", "(0, peer")),
        ("I12",),
        scene="money_without_items_counts_in_the_end",
    ),
    "claims_unbounded": Mutant(
        lambda: patch.object(sync, "arrears_left", lambda db, peer: 1 << 40), ("I4",), (131,)
    ),
    "forgives_every_gap": Mutant(
        lambda: edited(
            exposure,
            "heal",
            ("budget = pair.paid // RHO + day - pair.written_off", "budget = 1 << 40"),
        ),
        ("I2",),
    ),
    "no_stranger_pool": Mutant(
        lambda: edited(
            exposure,
            "ceiling",
            ("min(most, pair.paid + pool - others - max(0, pair.balance))", "most + 2 * pool"),
        ),
        ("I3", "I14"),
        (2,),
    ),
    "pool_for_each_stranger": Mutant(
        lambda: together(
            patch.object(exposure, "others_share", lambda db, pair: 0),
            patch.object(desk.Desk, "others_share", lambda self, pair: 0),
        ),
        ("I3",),
        (2,),
    ),
    "skip_limit": Mutant(
        lambda: edited(exposure, "ceiling", (", line_left)", ", AMOUNT_MAX)")),
        ("I14",),
        scene="nobody_works_beyond_the_line",
    ),
    "compaction_drops_a_proof": Mutant(
        lambda: together(unguarded("voucher_in_stays", "voucher_out_stays"), _drops_proofs()),
        ("audit", "I12"),
        scene="proofs_survive_compaction",
    ),
    "compaction_drops_a_proof_with_the_schema": Mutant(
        _drops_proofs, ("I0",), scene="proofs_survive_compaction"
    ),
    "two_transactions_in_a_middle": Mutant(_two_transactions_in_a_middle, ("I13",), (1,)),
    "forward_while_unsynced": Mutant(
        _forward_while_unsynced, ("I7",), scene="a_restored_middle_asks_before_it_passes_on"
    ),
    "route_risk_in_memory": Mutant(
        _route_risk_in_memory, ("I6",), scene="what_is_at_risk_survives_a_restart"
    ),
    "one_exposure_per_ring": Mutant(
        lambda: edited(
            transfers, "_require_risk", (" or pair.routed + amount > pair.exposure", "")
        ),
        ("I6",),
        scene="rings_through_one_peer_share_its_exposure",
    ),
    "refund_not_passed_back": Mutant(
        lambda: patch.object(transfers, "_heed_refund", lambda db, xid: None),
        ("I13", "T"),
        scene="a_refund_is_passed_back",
    ),
    "ring_pays_one_side": Mutant(
        lambda: edited(
            transfers,
            "_take_step",
            (
                "voucher = sign(target, item)",
                "voucher = None if kind == ROUTE else sign(target, item)",
            ),
        ),
        ("I7",),
    ),
    "expired_is_forwarded": Mutant(
        lambda: edited(transfers, "_step", ("not is_late and ", "")),
        ("T",),
        scene="an_expired_transfer_goes_back",
    ),
    "a_late_end_is_ignored": Mutant(
        lambda: edited(
            transfers, "_end", ('found[0] not in {"open", "released"}', 'found[0] != "open"')
        ),
        ("T",),
        scene="what_was_given_up_and_comes_back_is_no_loss",
    ),
    "a_ring_ends_twice": Mutant(
        lambda: together(
            unguarded("route_ends"),
            edited(transfers, "_end", ('found[0] not in {"open", "released"}', "False")),
        ),
        ("T",),
        scene="a_ring_ends_once",
    ),
    "a_ring_ends_twice_with_the_schema": Mutant(
        lambda: edited(transfers, "_end", ('found[0] not in {"open", "released"}', "False")),
        ("I0",),
        scene="a_ring_ends_once",
    ),
    "no_line_check": Mutant(
        _may_forward("and _owed_by_owner(db, previous) <= previous.line", ""),
        ("I14",),
        scene="a_peer_owes_no_more_than_its_line",
    ),
    "each_device_has_a_line": Mutant(
        _may_forward("_owed_by_owner(db, previous)", "previous.owed"),
        ("I14",),
        scene="devices_of_one_owner_share_its_line_in_transfers",
    ),
    "next_line_ignored": Mutant(
        _may_forward("and amount - after.balance <= after.received_line", ""),
        ("I14",),
        scene="nobody_passes_on_more_than_the_next_lends",
    ),
    "held_refund_passed_back": Mutant(
        lambda: patch.object(transfers, "_is_worth_it", lambda db, transfer: True),
        ("I14",),
        scene="refunds_at_once_stay_within_line_and_exposure",
    ),
    "ring_closed_with_less": Mutant(
        lambda: edited(transfers, "_is_whole", (" or found[0] != item.amount", "")),
        ("T",),
        scene="a_ring_is_not_closed_with_less",
    ),
    "one_id_passed_on_twice": Mutant(
        lambda: reworded(transfers, "_RECALLED", ("o.state <> 'waiting'", "0")),
        ("T",),
        scene="one_id_of_two_neighbours_is_passed_on_once",
    ),
    "liars_are_served": Mutant(
        _may_forward("and liar is None", ""), ("T",), scene="a_proven_liar_has_nothing_passed_on"
    ),
}
NAMES = tuple(MUTANTS)

SURVIVORS: dict[str, tuple[Plant, str]] = {
    "pay_counts_on_arrival": (
        _pay_on_arrival,
        "memory only asks; the reservation reads the file, after the voucher's own step",
    ),
    "only_ends_are_sent_again": (
        lambda: reworded(payer, "_OPEN", ("AND voucher = v.id)", "AND voucher = v.id AND final)")),
        "SYNC on the next connection shows the rest, both ways",
    ),
}
"""Bugs of other designs that do no harm in this one, and why.

A third cannot be planted: no tombstone. No lane is opened before its first voucher, so there is
nothing that a late duplicate could open again.
"""


@contextmanager
def planted(name: str) -> Iterator[type[Runner]]:
    """The runner to use while the bug `name` ("" for none) is in place."""
    if not name:
        yield Runner
        return
    plant = MUTANTS[name].plant if name in MUTANTS else SURVIVORS[name][0]
    with plant():
        yield EarlyRunner if name == "voucher_before_commit" else Runner
