"""The buyer's memory: what was accepted, and when to sign for it.

A voucher goes out when the unsigned work reaches half of the exposure that the seller grants,
when 16 attempts ended, soon after the first of them did, or after 250 ms.
"""

from __future__ import annotations

import apsw

from aivillage.ledger import payer
from aivillage.ledger.books import Pair
from aivillage.ledger.desk import Desk, Done, Failed, Partner, Purchase, paired
from aivillage.ledger.signing import verified_receipt
from aivillage.protocols.errors import (
    AivillageError,
    LedgerError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId
from aivillage.protocols.vouchers import (
    GIFT,
    HASH_BYTES,
    ITEMS_MAX,
    JOB,
    ROUTE_MINOR,
    Item,
    Receipt,
    Voucher,
    check_item,
    encode,
)

_NOTHING = bytes(HASH_BYTES)
"""The running hash before anything came."""
_RESEND_MAX = 64  # vouchers in one go; the rest waits for the next


class Buying:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._intents: dict[tuple[PeerId, AttemptId], payer.Intent] = {}
        """Those that are not stored yet: as many as attempts run."""

    def intend(
        self, peer: PeerId, attempt: AttemptId, quote_hash: bytes, ceiling: MicroCredits
    ) -> None:
        self.intend_soon(peer, attempt, quote_hash, ceiling)
        self.keep_intents()

    def intend_soon(
        self, peer: PeerId, attempt: AttemptId, quote_hash: bytes, ceiling: MicroCredits
    ) -> None:
        """For what may be over before the next tick, and is not owed piece by piece."""
        partner = self._desk.partner(peer)
        partner.purchases[attempt] = Purchase(quote_hash, ceiling)
        name, at_ms = partner.pair.peer, self._desk.clock.unix_ms()
        self._intents[name, attempt] = payer.Intent(name, attempt, quote_hash, ceiling, at_ms)

    def keep_intents(self) -> None:
        """Stores what was asked for and is not over: only that can be claimed after a crash."""
        if not self._intents:
            return
        kept, self._intents = self._intents, {}

        def job(db: apsw.Connection) -> None:
            for intent in kept.values():
                payer.intend(db, *intent)

        self._desk.submit(job, lambda _: None, lambda _: self._intend_again(kept))

    def _intend_again(self, kept: dict[tuple[PeerId, AttemptId], payer.Intent]) -> None:
        """They were not stored; those whose attempt is over meanwhile are not needed."""
        running = {
            key: intent
            for key, intent in kept.items()
            if (partner := self._desk.partners.get(key[0])) and key[1] in partner.purchases
        }
        self._intents = running | self._intents

    def accept(
        self, peer: PeerId, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        """Nothing is paid for an attempt that this boot does not know or that has ended.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, `amount` is above the attempt's ceiling;
                BAD_REQUEST, `attempt` is not 16 bytes or `out_hash` not 32.
        """
        partner = self._desk.partner(peer)
        self._accept(partner, attempt, amount, out_hash)
        if partner.unpaid * 2 >= partner.pair.received_exposure:
            self.flush(partner)

    def _accept(
        self, partner: Partner, attempt: AttemptId, amount: MicroCredits, out_hash: bytes
    ) -> None:
        check_item(attempt, out_hash)
        purchase = partner.purchases.get(attempt)
        if purchase is None or purchase.closing or amount <= purchase.accepted:
            return
        if amount > purchase.ceiling:
            raise LedgerError(f"{amount} micro-credits is above the ceiling {purchase.ceiling}")
        partner.unpaid += amount - purchase.accepted
        purchase.accepted, purchase.out_hash = amount, out_hash
        if partner.unpaid_since is None:
            partner.unpaid_since = self._desk.now()

    def settle(
        self,
        peer: PeerId,
        attempt: AttemptId,
        amount: MicroCredits,
        out_hash: bytes,
        done: Done,
        failed: Failed,
    ) -> None:
        """`done` once the final item is durable, or at once where nothing is to be signed.

        What was done for nothing (its ceiling was 0) is signed for too: the books tell who helped.
        """
        partner = self._desk.partner(peer)
        if not self._close(partner, attempt, amount, out_hash, (done, failed)):
            return done()
        partner.hurry = True
        if not partner.signing:
            self.flush(partner)
        return None

    def settle_soon(
        self,
        peer: PeerId,
        attempt: AttemptId,
        amount: MicroCredits,
        out_hash: bytes,
        failed: Failed,
    ) -> None:
        """As `settle`, but the voucher waits for other ends, as long as the exposure lets it."""
        partner = self._desk.partner(peer)
        if self._close(partner, attempt, amount, out_hash, (_unheard, failed)):
            much = partner.unpaid * 2 >= partner.pair.received_exposure
            if much or _ended(partner) >= ITEMS_MAX:
                self.flush(partner)

    def _close(
        self,
        partner: Partner,
        attempt: AttemptId,
        amount: MicroCredits,
        out_hash: bytes,
        waiter: tuple[Done, Failed],
    ) -> bool:
        """Nothing more is accepted of an attempt; whether its end is to be signed."""
        self._accept(partner, attempt, amount, out_hash)
        purchase = partner.purchases.get(attempt)
        if purchase is None:
            return False
        if purchase.ceiling == 0 and out_hash != _NOTHING:
            purchase.out_hash = out_hash
        elif purchase.accepted == 0:
            del partner.purchases[attempt]
            name = partner.pair.peer
            if self._intents.pop((name, attempt), None) is None:
                self._desk.submit(lambda db: payer.drop_intent(db, name, attempt), lambda _: None)
            return False
        purchase.closing = True
        purchase.waiters.append(waiter)
        if partner.ended_since is None:
            partner.ended_since = self._desk.now()
        return True

    def abandon(self, peer: PeerId, attempt: AttemptId, done: Done, failed: Failed) -> None:
        """Signs nothing more for `attempt`; `done` once no claim on it can be paid either."""
        partner = self._desk.partner(peer)
        purchase = partner.purchases.pop(attempt, None)
        if purchase is not None:
            partner.unpaid = max(0, partner.unpaid - (purchase.accepted - purchase.submitted))
            gone = LedgerError("the attempt was abandoned", code="CANCELLED")
            for _, settle_failed in purchase.waiters:
                settle_failed(gone)
        name = partner.pair.peer
        self._intents.pop((name, attempt), None)
        self._desk.submit(lambda db: payer.drop_intent(db, name, attempt), lambda _: done(), failed)

    def give(
        self, peer: PeerId, amount: MicroCredits, gift: bytes, done: Done, failed: Failed
    ) -> None:
        """A present: both books move, and nobody worked for it. `gift`: 16 bytes, its id.

        Fails with RequestError: the peer does not know presents, or `amount` is none.
        """
        partner = self._desk.partner(peer)
        if partner.link is None or partner.link.minor < ROUTE_MINOR:
            return failed(
                RefusedError(
                    f"{peer[-8:]} is not here, or its version does not know gifts",
                    code="NO_PEER",
                    next_step="try again when `aivillage-node peers` shows it connected",
                )
            )
        if amount < 1:
            return failed(RequestError("a gift is at least one micro-credit"))
        name, wallet, at_ms = partner.pair.peer, self._desk.wallet, self._desk.clock.unix_ms()
        item = Item(GIFT, gift, b"", amount, _NOTHING, True)

        def given(result: tuple[Voucher | None, Pair]) -> None:
            self._desk.keep(result[1])
            if result[0] is not None:
                self.send(partner, [result[0]])
            done()

        self._desk.submit(
            paired(lambda db: payer.make_voucher(db, wallet, name, [item], at_ms), name),
            given,
            failed,
        )
        return None

    def sign_ended(self) -> bool:
        """Signs for every attempt that ended, at once; whether there is anything unsigned."""
        partners = list(self._desk.partners.values())
        for partner in partners:
            if partner.ended_since is not None:
                self.flush(partner)
        return any(partner.signing for partner in partners)

    def flush(self, partner: Partner) -> None:
        """Signs for all that is accepted and unsigned, at most 16 attempts a voucher."""
        partner.unpaid, partner.unpaid_since, partner.ended_since = 0, None, None
        partner.hurry = False
        due = [
            (attempt, purchase)
            for attempt, purchase in partner.purchases.items()
            if purchase.accepted > purchase.submitted
            or (purchase.closing and not purchase.closing_submitted)
        ]
        for start in range(0, len(due), ITEMS_MAX):
            self._sign(partner, dict(due[start : start + ITEMS_MAX]))

    def _sign(self, partner: Partner, batch: dict[AttemptId, Purchase]) -> None:
        peer, wallet, at_ms = partner.pair.peer, self._desk.wallet, self._desk.clock.unix_ms()
        items, kept = [], {}
        for attempt, p in batch.items():
            p.submitted, p.closing_submitted = p.accepted, p.closing
            items.append(Item(JOB, attempt, p.quote_hash, p.accepted, p.out_hash, p.closing))
            if (intent := self._intents.pop((peer, attempt), None)) is not None:
                kept[peer, attempt] = intent
        needed = [kept[peer, a] for a, p in batch.items() if (peer, a) in kept and not p.closing]

        def job(db: apsw.Connection) -> Voucher | None:
            for intent in needed:
                payer.intend(db, *intent)
            return payer.make_voucher(db, wallet, peer, items, at_ms)

        def unsigned(error: AivillageError) -> None:
            self._intend_again(kept)
            self._unsigned(partner, batch, error)

        partner.signing += 1
        self._desk.submit(
            paired(job, peer),
            lambda result: self._signed(partner, items, *result),
            unsigned,
        )

    def _signed(
        self, partner: Partner, items: list[Item], voucher: Voucher | None, pair: Pair
    ) -> None:
        partner.signing -= 1
        self._desk.keep(pair)
        if voucher is not None:
            self.send(partner, [voucher])
        for item in items:
            purchase = partner.purchases.get(AttemptId(item.id))
            if purchase is None:
                continue
            purchase.signed = max(purchase.signed, item.amount)
            if item.final:
                del partner.purchases[AttemptId(item.id)]
                for done, _ in purchase.waiters:
                    done()
        if not partner.signing and (partner.hurry or _ended(partner) >= ITEMS_MAX):
            self.flush(partner)

    def _unsigned(
        self, partner: Partner, batch: dict[AttemptId, Purchase], error: AivillageError
    ) -> None:
        """Nothing was signed: what was accepted stays due, and an attempt may be settled again."""
        partner.signing -= 1
        partner.unpaid_since = self._desk.now()
        for attempt, purchase in batch.items():
            if partner.purchases.get(attempt) is not purchase:
                continue  # abandoned meanwhile
            partner.unpaid += purchase.submitted - purchase.signed
            purchase.submitted = purchase.signed
            purchase.closing = purchase.closing_submitted = False
            waiters, purchase.waiters = purchase.waiters, []
            for _, failed in waiters:
                failed(error)

    def send(self, partner: Partner, vouchers: list[Voucher]) -> None:
        """Durable vouchers only."""
        if partner.link is None:
            return
        self.expect_receipts(partner, partner.unconfirmed + len(vouchers))
        for voucher in vouchers:
            partner.link.send(encode(self._desk.epoch, voucher))

    def expect_receipts(self, partner: Partner, count: int) -> None:
        """`count` vouchers in all wait for a receipt; they go again once none came for a while."""
        if count < partner.unconfirmed or not partner.unconfirmed:
            partner.resend_wait = self._desk.settings.resend_seconds
            partner.resend_at = self._desk.now() + partner.resend_wait
        partner.unconfirmed = count

    def on_receipt(self, partner: Partner, receipt: Receipt) -> None:
        """Raises: PeerError: the receipt is forged."""
        peer, signer = partner.pair.peer, self._desk.signer
        body = verified_receipt(receipt, self._desk.keys, partner.keys, signer.verify)

        self._desk.submit(
            lambda db: payer.note_receipt(db, peer, body, receipt),
            lambda left: self.expect_receipts(partner, left),
        )

    def tick(self, partner: Partner) -> None:
        now, settings = self._desk.now(), self._desk.settings
        since = partner.unpaid_since
        ended = partner.ended_since
        is_due = since is not None and now - since >= settings.voucher_seconds
        if is_due or (ended is not None and now - ended >= settings.settle_seconds):
            self.flush(partner)
        if partner.link is not None and partner.unconfirmed and now >= partner.resend_at:
            partner.resend_wait = min(partner.resend_wait * 2, settings.resend_seconds_max)
            partner.resend_at = now + partner.resend_wait
            self._resend(partner)

    def _resend(self, partner: Partner) -> None:
        peer = partner.pair.peer

        def found(vouchers: list[Voucher]) -> None:
            partner.unconfirmed = len(vouchers)
            if partner.link is not None:
                for voucher in vouchers:
                    partner.link.send(encode(self._desk.epoch, voucher))

        self._desk.submit(lambda db: payer.unreceipted(db, peer, _RESEND_MAX), found)


def _ended(partner: Partner) -> int:
    """Attempts whose end is still to be signed for."""
    return sum(p.closing and not p.closing_submitted for p in partner.purchases.values())


def _unheard() -> None:
    """Nobody waits for it."""
