"""The seller's memory: what is being worked on, how much room is left, receipts to give."""

from __future__ import annotations

import apsw
import msgspec

from aivillage.ledger import exposure, payee, transfers
from aivillage.ledger.books import Pair
from aivillage.ledger.desk import Desk, Partner, Sale, paired
from aivillage.ledger.routing import Routing
from aivillage.ledger.signing import verified_voucher
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId
from aivillage.protocols.vouchers import (
    ARREARS,
    CLAIMS_MAX,
    JOB,
    RECEIPT_ROWS_MAX,
    REFUND,
    ROUTE,
    SERVICE,
    Claim,
    Item,
    Receipt,
    ReceiptBody,
    ReceiptRow,
    Voucher,
    encode,
    receipt_prefixed,
)

_ENDED_MAX = 256  # unpaid ended sales a peer, kept to attest late vouchers and to claim
_RETRY_SECONDS = 1.0  # after a reservation that could not be stored


class Selling:
    def __init__(self, desk: Desk, routing: Routing) -> None:
        self._desk = desk
        self._routing = routing

    def begin_sale(
        self, peer: PeerId, attempt: AttemptId, quote_hash: bytes, ceiling: MicroCredits
    ) -> None:
        partner = self._desk.partner(peer)
        partner.sales.setdefault(attempt, Sale(quote_hash, ceiling, partner.epoch))

    def room(self, peer: PeerId) -> MicroCredits:
        partner = self._desk.partner(peer)
        if partner.releasing or self._desk.refusing or partner.pair.unsynced:
            return 0  # after a restored backup only SYNC says what it may still owe
        return max(0, partner.pair.reserved - partner.delivered)

    def headroom(self, peer: PeerId) -> MicroCredits:
        partner, pool = self._desk.partner(peer), self._desk.settings.stranger_pool
        pair = partner.pair
        unsigned = max(0, partner.delivered - pair.paid - pair.written_off)
        others = self._desk.others_share(pair)
        left = exposure.line_of(pair, pool) - pair.balance - pair.routed - unsigned
        left = min(left, left - others if pair.known else pool - others)
        return 0 if pair.unsynced else max(0, left)

    def want_room(self, peer: PeerId, amount: MicroCredits) -> None:
        partner, pool = self._desk.partner(peer), self._desk.settings.stranger_pool
        pair = partner.pair
        ahead = exposure.exposure_of(pair, pool) // 16
        if pair.reserved - partner.delivered >= amount + ahead or partner.reserving:
            partner.wanted = max(partner.wanted, amount) if partner.reserving else 0
            return
        partner.wanted = amount
        if self._desk.now() < partner.retry_at:
            return  # `tick` tries again: a disk that is full must not be asked in a loop
        most = exposure.ceiling(pair, pool, self._desk.others_share(pair))
        if most >= partner.delivered + amount and most > pair.reserved:
            self._reserve(partner)

    def _reserve(self, partner: Partner) -> None:
        peer, delivered, unit = partner.pair.peer, partner.delivered, partner.wanted
        pool = self._desk.settings.stranger_pool
        partner.reserving = True

        def reserved(pair: Pair) -> None:
            partner.reserving = False
            self._desk.keep(pair)
            if pair.reserved - partner.delivered >= partner.wanted:
                partner.wanted = 0
            self._desk.on_room(peer)

        def failed(error: AivillageError) -> None:
            partner.reserving = False
            partner.retry_at = self._desk.now() + _RETRY_SECONDS
            self._desk.on_room(peer)

        self._desk.submit(
            lambda db: exposure.reserve(db, peer, delivered, unit, pool), reserved, failed
        )

    def deliver(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> bool:
        partner = self._desk.partner(peer)
        sale = partner.sales.get(attempt)
        if sale is None or not sale.open or amount > sale.ceiling:
            return False
        increase = amount - sale.delivered
        if increase <= 0:
            if not sale.ceiling:  # for nothing: its end is signed for, and attested, all the same
                sale.marks[0] = out_hash
            return True
        if increase > self.room(peer):
            return False
        partner.delivered += increase
        sale.delivered, sale.out_hash = amount, out_hash
        sale.marks[amount] = out_hash
        return True

    def end_sale(self, peer: PeerId, attempt: AttemptId) -> None:
        partner = self._desk.partner(peer)
        sale = partner.sales.get(attempt)
        if sale is None:
            return
        sale.open = False
        if sale.delivered <= sale.paid and not sale.marks:
            del partner.sales[attempt]
        ended = [key for key, other in partner.sales.items() if not other.open]
        for key in ended[:-_ENDED_MAX]:
            del partner.sales[key]
        partner.heal_at = self._desk.now() + self._desk.settings.release_seconds

    def lose_sales(self, partner: Partner, epoch: int) -> None:
        """The buyer restarted: what it asked for before is ended and will be claimed."""
        for sale in partner.sales.values():
            if sale.epoch < epoch:
                sale.open, sale.lost = False, True
        partner.heal_at = self._desk.now() + self._desk.settings.release_seconds

    def claims(self, partner: Partner) -> list[Claim]:
        lost = [
            Claim(attempt, sale.quote_hash, sale.delivered, sale.out_hash)
            for attempt, sale in partner.sales.items()
            if sale.lost and sale.delivered > sale.paid
        ]
        return lost[-CLAIMS_MAX:]

    # vouchers

    def check(self, partner: Partner, voucher: Voucher) -> bool:
        """Whether a receipt may attest all items. Raises: PeerError: the voucher is forged."""
        signer = self._desk.signer
        verified_voucher(voucher, partner.keys, self._desk.keys, signer.verify)
        return all(_attests(partner, item) for item in voucher.items)

    def on_voucher(self, partner: Partner, voucher: Voucher) -> None:
        """Raises: PeerError: the voucher is forged."""
        attest = self.check(partner, voucher)
        peer, delivered, at_ms = partner.pair.peer, partner.delivered, self._desk.clock.unix_ms()
        moves = any(item.kind in {ROUTE, REFUND} for item in voucher.items)
        advance = self._routing.step() if moves else None

        def job(db: apsw.Connection) -> tuple[payee.Booked, list[transfers.Sent]]:
            booked = payee.book_voucher(db, peer, voucher, "receive", attest=attest, at_ms=at_ms)
            exposure.settle_gap(db, peer, delivered)
            return booked, advance(db) if advance is not None else []

        def done(result: tuple[tuple[payee.Booked, list[transfers.Sent]], Pair]) -> None:
            (booked, sent), pair = result
            self._routing.sent(sent)
            self.booked(partner, [booked], pair)

        self._desk.submit(paired(job, peer), done)

    def booked(self, partner: Partner, all_booked: list[payee.Booked], pair: Pair) -> None:
        """Durable now: gives receipts, counts what was paid, and uses the room that this made."""
        self._desk.keep(pair)
        for booked in all_booked:
            if booked.receipt is not None:
                if not partner.receipts:
                    partner.receipts_since = self._desk.now()
                partner.receipts.append((booked.lane, booked.receipt))
            if booked.proof is not None:
                self._desk.show(partner.keys, *booked.proof)
            for item in booked.items:
                _count(partner, item)
            self._routing.booked(partner, booked.items)
        if partner.wanted:
            self.want_room(pair.peer, partner.wanted)
        self._desk.on_room(pair.peer)

    def take_receipt(self, partner: Partner) -> bytes | None:
        if not partner.receipts:
            return None
        lane = partner.receipts[0][0]
        rows: list[ReceiptRow] = []
        while partner.receipts and partner.receipts[0][0] == lane and len(rows) < RECEIPT_ROWS_MAX:
            rows.append(partner.receipts.popleft()[1])
        partner.receipts_since = self._desk.now()
        body = msgspec.msgpack.encode(ReceiptBody(partner.key, lane, tuple(rows)))
        receipt = Receipt(body, self._desk.signer.sign(receipt_prefixed(body)))
        return encode(self._desk.epoch, receipt)

    def tick(self, partner: Partner) -> None:
        now, settings = self._desk.now(), self._desk.settings
        if partner.link is not None and now - partner.receipts_since >= settings.receipt_seconds:
            while blob := self.take_receipt(partner):
                partner.link.send(blob)
        if partner.retry_at and now >= partner.retry_at:
            partner.retry_at = 0.0
            if partner.wanted:
                self.want_room(partner.pair.peer, partner.wanted)
        idle = not any(sale.open for sale in partner.sales.values())
        if idle and now >= partner.heal_at:
            partner.heal_at = now + settings.heal_seconds
            self.heal(partner)

    def heal(self, partner: Partner) -> None:
        """Gives back what was not used, then writes off what the rules allow of the gap."""
        pair = partner.pair
        busy = partner.reserving or partner.releasing
        if busy or pair.reserved <= pair.paid + pair.written_off:
            return
        peer, delivered, at_ms = pair.peer, partner.delivered, self._desk.clock.unix_ms()
        partner.releasing = True  # until it is durable nothing may be delivered against it

        def job(db: apsw.Connection) -> Pair:
            exposure.release(db, peer, delivered)
            return exposure.heal(db, peer, at_ms)

        def healed(after: Pair) -> None:
            partner.releasing = False
            self._desk.keep(after)
            self._desk.on_room(peer)

        def failed(error: AivillageError) -> None:
            partner.releasing = False
            self._desk.on_room(peer)

        self._desk.submit(job, healed, failed)


def _attests(partner: Partner, item: Item) -> bool:
    if item.kind not in SERVICE:
        return True  # no work to know of
    sale = partner.sales.get(AttemptId(item.id))
    if sale is None or item.quote_hash != sale.quote_hash:
        return False
    return sale.marks.get(item.amount) == item.out_hash


def _count(partner: Partner, item: Item) -> None:
    attempt = AttemptId(item.id)
    sale = partner.sales.get(attempt)
    if sale is None:
        return
    if item.kind == JOB:
        sale.paid = max(sale.paid, item.amount)
        sale.marks = {amount: mark for amount, mark in sale.marks.items() if amount >= sale.paid}
    if item.final or item.kind == ARREARS:
        del partner.sales[attempt]
