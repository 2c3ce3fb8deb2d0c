"""One boot of one book: the ledger that both the daemon and the simulator run.

It has no thread, clock or socket of its own. Plain calls touch memory; what must last goes to
the runner as a transaction, and bytes leave only from the callback that follows its commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import apsw
import msgspec

from aivillage.ledger import corrections, exposure, sync, transfers
from aivillage.ledger.books import Pair, keep_evidence, succeed
from aivillage.ledger.buying import Buying
from aivillage.ledger.desk import (
    Clock,
    Desk,
    Done,
    Failed,
    Link,
    Partner,
    Question,
    Runner,
    Send,
    Settings,
)
from aivillage.ledger.routing import Routing
from aivillage.ledger.selling import Selling
from aivillage.ledger.signing import Signer, verified_voucher
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, peer_id
from aivillage.protocols.vouchers import (
    PARTS_MAX,
    STRANGER_PARTS_MAX,
    Equivocation,
    Message,
    Receipt,
    SyncDigest,
    SyncReply,
    SyncRequest,
    Voucher,
    bad,
    check_equivocation,
    decode,
    encode,
    pack_reply,
    pack_request,
)

ROUND_SECONDS: Final = 1.0
DIGEST_MINOR: Final = 1
"""Peers of this minor version and later know digests."""
_PairJob = Callable[[apsw.Connection, PeerId], Pair]


class PartnerView(msgspec.Struct, frozen=True, kw_only=True):
    """How this node stands with one peer, in micro-credits. For `status`."""

    peer: PeerId
    known: bool
    line: MicroCredits
    exposure: MicroCredits
    received_line: MicroCredits
    owed_to_me: MicroCredits
    owed_by_me: MicroCredits
    delivered: MicroCredits
    paid: MicroCredits
    written_off: MicroCredits
    routed: MicroCredits
    room: MicroCredits
    connected: bool
    synced: bool
    blocked: bool
    shared: bool
    owner: str


class Ledger:
    """Buying, selling and syncing over one desk."""

    def __init__(
        self,
        db: apsw.Connection,
        signer: Signer,
        settings: Settings,
        clock: Clock,
        random_bytes: bytes,
        runner: Runner,
    ) -> None:
        """Starts a boot: `db` is this book's, prepared, and `runner` does not run on it yet."""
        self.desk = Desk(db, signer, settings, clock, random_bytes, runner)
        self.buying = Buying(self.desk)
        self.routing = Routing(self.desk, self.buying, waiting=bool(transfers.pending(db)))
        self.selling = Selling(self.desk, self.routing)
        self._upkeep_at: Seconds = self.desk.now() + settings.heal_seconds

    # policy

    def certify(
        self,
        peer: PeerId,
        amounts: tuple[MicroCredits, MicroCredits],
        owner: str | None,
        done: Done,
        failed: Failed,
    ) -> None:
        """`amounts`: line and exposure by the village; `owner`: whose device it is."""
        at_ms = self.desk.clock.unix_ms()
        self._change(
            peer,
            lambda db, name: exposure.certify(db, name, *amounts, at_ms, owner=owner),
            done,
            failed,
        )

    def decree(self, peer: PeerId, word: exposure.Word, done: Done, failed: Failed) -> None:
        """The owner's own word on a peer."""
        at_ms = self.desk.clock.unix_ms()
        self._change(peer, lambda db, name: exposure.decree(db, name, word, at_ms), done, failed)

    def forgive_gap(self, peer: PeerId, done: Done, failed: Failed) -> None:
        """Gives up what was delivered to `peer` and never signed for."""
        self._change(peer, exposure.forgive_gap, done, failed)

    def succeed(
        self, peer: PeerId, key_peer: PeerId, proof: bytes, done: Done, failed: Failed
    ) -> None:
        """`peer` goes by another key from now on; the former key signed `proof`, as was checked."""
        at_ms = self.desk.clock.unix_ms()

        def succeeded(is_new: bool) -> None:
            if is_new:
                self.desk.succeed(self.desk.name(peer), key_peer)
            done()

        self.desk.submit(lambda db: succeed(db, peer, key_peer, proof, at_ms), succeeded, failed)

    def set_received(
        self, peer: PeerId, amounts: tuple[MicroCredits, MicroCredits], done: Done, failed: Failed
    ) -> None:
        """`amounts`: the line and exposure that `peer` grants."""
        self._change(peer, lambda db, name: exposure.set_received(db, name, *amounts), done, failed)

    def _change(self, peer: PeerId, job: _PairJob, done: Done, failed: Failed) -> None:
        name = self.desk.name(peer)

        def changed(pair: Pair) -> None:
            self.desk.keep(pair)
            self.desk.on_room(name)
            done()

        self.desk.submit(lambda db: job(db, name), changed, failed)

    # links

    def connected(self, peer: PeerId, peer_epoch: int, send: Send, minor: int = 0) -> None:
        """`minor`: the version that its hello says."""
        partner = self.desk.partner(peer)
        partner.link = Link(send, peer_epoch, minor, listing=minor < DIGEST_MINOR)
        self._see_epoch(partner, peer_epoch)
        self._ask(partner, partner.link)

    def disconnected(self, peer: PeerId) -> None:
        self.desk.partner(peer).link = None

    def receive(self, peer: PeerId, blob: bytes) -> None:
        """Raises: PeerError: the blob is malformed or forged."""
        partner = self.desk.partner(peer)
        link = partner.link
        epoch, message = decode(blob)
        if link is None or epoch < partner.epoch:
            return  # written by a boot of the peer that has ended: it resends what matters
        if epoch > partner.epoch:
            self._see_epoch(partner, epoch)
            self._ask(partner, link)
        self._dispatch(partner, link, epoch, message)

    def _dispatch(self, partner: Partner, link: Link, epoch: int, message: Message) -> None:
        match message:
            case Voucher():
                self.selling.on_voucher(partner, message)
            case Receipt():
                self.buying.on_receipt(partner, message)
            case SyncRequest():
                self._on_request(partner, link, epoch, message)
            case SyncDigest():
                self._on_digest(partner, link, epoch, message)
            case SyncReply():
                self._on_reply(partner, link, epoch, message)
            case Equivocation():
                self._on_equivocation(message)

    def _see_epoch(self, partner: Partner, epoch: int) -> None:
        if epoch > partner.epoch:
            partner.epoch = epoch
            self.selling.lose_sales(partner, epoch)

    def _on_equivocation(self, proof: Equivocation) -> None:
        """Kept, and passed on once. Against this node itself: a copy of it signs somewhere."""
        payer, at_ms = peer_id(proof.payer), self.desk.clock.unix_ms()
        is_mine = proof.payer in self.desk.keys
        accused = Pair(peer_id(self.desk.keys[0])) if is_mine else self.desk.pair(payer)
        if not (is_mine or accused.known or accused.paid):
            return  # keys are free: proofs about strangers would fill the disk
        body = check_equivocation(proof, self.desk.signer.verify)
        first, second = proof.first, proof.second
        bodies = (first.body, first.signature, second.body, second.signature)

        def kept(is_new: bool) -> None:
            if is_new:
                self.desk.show((proof.payer,), first, second)

        self.desk.submit(
            lambda db: keep_evidence(db, accused.peer, (body.lane, body.n), bodies, at_ms), kept
        )

    # sync

    def _ask(self, partner: Partner, link: Link) -> None:
        link.round += 1
        link.reply.clear()
        link.attests.clear()
        link.asked_at, link.synced = self.desk.now(), False
        peer, number = partner.pair.peer, link.round
        epochs = sync.ALL if link.listing else sync.Epochs(self.desk.epoch, partner.epoch)

        def job(db: apsw.Connection) -> list[bytes]:
            lanes = sync.own_lanes(db, peer, epochs)
            if link.listing:
                return pack_request(self.desk.epoch, number, lanes)
            digests = sync.digests(db, peer, epochs)
            return [encode(self.desk.epoch, SyncDigest(number, *digests, tuple(lanes)))]

        def ready(blobs: list[bytes]) -> None:
            if partner.link is link and link.round == number:
                for blob in blobs:
                    link.send(blob)

        self.desk.submit(job, ready)

    def _on_request(self, partner: Partner, link: Link, epoch: int, message: SyncRequest) -> None:
        if message.round <= link.answered_round:
            return
        if message.parts > (PARTS_MAX if partner.pair.known else STRANGER_PARTS_MAX):
            raise bad("has a SYNC of too many parts")
        if any(part.round != message.round for part in link.request.values()):
            link.request.clear()
        link.request[message.part] = message
        if len(link.request) < message.parts:
            return
        lanes = {
            (state.mine, state.lane): state
            for part in link.request.values()
            for state in part.lanes
        }
        link.request.clear()
        link.answered_round = message.round
        link.question = Question(epoch, message.round, sync.Asked(lanes))
        self._answer_if_due(partner, link)

    def _on_digest(self, partner: Partner, link: Link, epoch: int, message: SyncDigest) -> None:
        if message.round > link.answered_round:
            link.answered_round = message.round
            lanes = {(state.mine, state.lane): state for state in message.lanes}
            asked = sync.Asked(lanes, (message.mine, message.yours))
            link.question = Question(epoch, message.round, asked)
            self._answer_if_due(partner, link)

    def _answer_if_due(self, partner: Partner, link: Link) -> None:
        """One round a second: what comes sooner waits, and the newest takes its place."""
        question, now = link.question, self.desk.now()
        if question is None or now < link.answer_at:
            return
        link.question, link.answer_at = None, now + ROUND_SECONDS
        peer, epochs = partner.pair.peer, sync.Epochs(self.desk.epoch, question.epoch)

        def ready(answer: sync.Answer) -> None:
            self.desk.keep(answer.pair)
            if partner.link is link:
                self._answer(partner, link, (question.epoch, question.round), answer)

        self.desk.submit(lambda db: sync.answer(db, peer, epochs, question.asked), ready)

    def _answer(
        self, partner: Partner, link: Link, answers: tuple[int, int], answer: sync.Answer
    ) -> None:
        claims = self.selling.claims(partner)
        blobs = pack_reply(
            self.desk.epoch, answers, answer.mine, answer.yours, claims, more=answer.more
        )
        self.buying.expect_receipts(partner, answer.unconfirmed)
        for blob in blobs:
            link.send(blob)

    def _on_reply(self, partner: Partner, link: Link, epoch: int, message: SyncReply) -> None:
        if message.answers != self.desk.epoch or message.round != link.round or link.synced:
            return
        signer = self.desk.signer
        attests = [self.selling.check(partner, voucher) for voucher in message.mine]
        for voucher in message.yours:
            verified_voucher(voucher, self.desk.keys, partner.keys, signer.verify)
        link.reply[message.part] = message
        link.attests[message.part] = attests
        if len(link.reply) == message.parts:
            self._heal(partner, link, _whole(link, epoch))

    def _heal(self, partner: Partner, link: Link, reply: sync.Reply) -> None:
        peer, wallet = partner.pair.peer, self.desk.wallet
        running, delivered = frozenset(partner.purchases), partner.delivered
        at_ms = self.desk.clock.unix_ms()
        number = link.round

        def job(db: apsw.Connection) -> sync.Healed:
            healed = sync.apply_reply(db, wallet, peer, reply, running, at_ms)
            exposure.settle_gap(db, peer, delivered)
            return healed

        def done(healed: sync.Healed) -> None:
            self.selling.booked(partner, healed.booked, healed.pair)
            self.buying.send(partner, healed.arrears)
            self.buying.expect_receipts(partner, healed.unconfirmed)
            if partner.link is not link or link.round != number:
                return
            if reply.more:
                link.listing = True
                self._ask(partner, link)
            else:
                link.synced = True
                self.desk.met.add(peer)

        self.desk.submit(job, done)

    # time

    def tick(self) -> None:
        """Does what has become due: unsigned work, lone receipts, resends, healing."""
        now, wait = self.desk.now(), self.desk.settings.resend_seconds
        for partner in list(self.desk.partners.values()):
            self.buying.tick(partner)
            self.selling.tick(partner)
            link = partner.link
            if link is not None:
                self._answer_if_due(partner, link)
            if link is not None and not link.synced and now - link.asked_at >= wait:
                self._ask(partner, link)

        self.buying.keep_intents()
        self.routing.tick()
        self.desk.forget_idle()
        if now >= self._upkeep_at:
            self._upkeep_at = now + self.desk.settings.heal_seconds
            self._upkeep()

    def _upkeep(self) -> None:
        """What the owner forgives by the day."""
        settings, at_ms = self.desk.settings, self.desk.clock.unix_ms()

        def kept(relieved: MicroCredits) -> None:
            self.desk.relieved = relieved

        def job(db: apsw.Connection) -> MicroCredits:
            corrections.write_back(db, at_ms)
            if settings.debt_expiry_days:
                corrections.expire(db, settings.debt_expiry_days, at_ms)
            return exposure.relieve_pool(db, settings.pool_day, at_ms) if settings.pool_day else 0

        self.desk.submit(job, kept)

    def wind_down(self) -> None:
        """Signs for what was accepted and gives back unused reservations, before a clean stop."""
        for partner in list(self.desk.partners.values()):
            self.buying.flush(partner)
            self.selling.heal(partner)
        self.buying.keep_intents()

    def balance_with(self, peer: PeerId) -> MicroCredits:
        """What `peer` owes me, less what I owe it; work that ended counts, signed for or not."""
        partner = self.desk.partners.get(self.desk.name(peer))
        ended = partner.purchases.values() if partner else ()
        return self.desk.pair(peer).balance - sum(p.accepted - p.signed for p in ended if p.closing)

    def view(self, peer: PeerId) -> PartnerView:
        name, pool = self.desk.name(peer), self.desk.settings.stranger_pool
        partner, pair = self.desk.partners.get(name), self.desk.pair(peer)
        balance = self.balance_with(peer)
        return PartnerView(
            peer=peer,
            known=bool(pair.known),
            line=exposure.line_of(pair, pool),
            exposure=exposure.exposure_of(pair, pool),
            received_line=pair.received_line,
            owed_to_me=max(0, balance),
            owed_by_me=max(0, -balance),
            delivered=partner.delivered if partner else pair.reserved,
            paid=pair.paid,
            written_off=pair.written_off,
            routed=pair.routed,
            room=self.selling.room(peer) if partner else 0,
            connected=partner is not None and partner.link is not None,
            synced=partner is not None and partner.link is not None and partner.link.synced,
            blocked=bool(pair.blocked),
            shared=bool(pair.shared),
            owner=pair.owner or "",
        )


def _whole(link: Link, epoch: int) -> sync.Reply:
    parts = [link.reply[index] for index in sorted(link.reply)]
    attests = [flag for index in sorted(link.attests) for flag in link.attests[index]]
    link.reply.clear()
    link.attests.clear()
    mine = [voucher for part in parts for voucher in part.mine]
    return sync.Reply(
        epoch=epoch,
        more=parts[-1].more,
        mine=list(zip(mine, attests, strict=True)),
        yours=[voucher for part in parts for voucher in part.yours],
        claims=[claim for part in parts for claim in part.claims],
    )
