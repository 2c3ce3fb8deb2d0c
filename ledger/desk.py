"""The in-memory half of the book: what a crash forgets, and nothing else.

A `Desk` is what buying, selling and syncing share. It knows no thread, clock or socket: a runner
executes transactions and calls back once they are durable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import apsw
import msgspec

from aivillage.ledger import exposure
from aivillage.ledger.books import (
    Pair,
    own_keys,
    own_proofs,
    peer_names,
    read_pair,
    read_pairs,
    start_boot,
)
from aivillage.ledger.payer import Wallet
from aivillage.ledger.signing import Signer
from aivillage.ledger.sync import Asked
from aivillage.protocols.errors import AivillageError, NodeError, PeerError
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds, peer_id, public_key
from aivillage.protocols.vouchers import (
    Equivocation,
    ReceiptRow,
    SignedBody,
    SyncReply,
    SyncRequest,
    VoucherBody,
    check_equivocation,
    decode_body,
    encode,
)

T = TypeVar("T")
Done = Callable[[], None]
Failed = Callable[[AivillageError], None]
Send = Callable[[bytes], None]


class Runner(Protocol):
    """Executes jobs in order, each all or nothing."""

    def submit(
        self, job: Callable[[apsw.Connection], T], done: Callable[[T], None], failed: Failed
    ) -> None:
        """`done(result)` once the job is durable, or `failed(error)` with nothing changed."""
        ...


class Clock(Protocol):
    def unix_ms(self) -> int: ...

    def monotonic_seconds(self) -> Seconds: ...


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Policy of one book. Amounts in micro-credits."""

    stranger_pool: MicroCredits = 0
    """What all strangers together may owe."""
    voucher_seconds: Seconds = 0.25
    settle_seconds: Seconds = 0.05
    """How long an ended attempt waits for others, to be signed for together."""
    receipt_seconds: Seconds = 1.0
    resend_seconds: Seconds = 5.0
    resend_seconds_max: Seconds = 60.0
    release_seconds: Seconds = 5.0
    """After the last sale an unused reservation is given back: what a crash would leave."""
    heal_seconds: Seconds = 60.0
    idle_seconds: Seconds = 60.0
    """A peer that is away and owes no answer leaves memory; its counters stay."""
    route_seconds: Seconds = 120.0
    """How long a transfer may wait on its way before it goes back."""
    pool_day: MicroCredits = 0
    """What strangers together are forgiven a day of what they took and did not pay."""
    debt_expiry_days: int = 0
    """A debt that has not moved for so long is written off; 0: never."""


@dataclass(slots=True)
class Sale:
    """An attempt that this node works on. `marks`: output hash by delivered amount, unpaid."""

    quote_hash: bytes
    ceiling: MicroCredits
    epoch: int
    delivered: MicroCredits = 0
    paid: MicroCredits = 0
    out_hash: bytes = b""
    marks: dict[MicroCredits, bytes] = field(default_factory=dict)
    open: bool = True
    lost: bool = False


@dataclass(slots=True)
class Purchase:
    """An attempt that this node pays for: accepted >= submitted >= signed, all cumulative."""

    quote_hash: bytes
    ceiling: MicroCredits
    accepted: MicroCredits = 0
    submitted: MicroCredits = 0
    signed: MicroCredits = 0
    out_hash: bytes = b""
    closing: bool = False
    closing_submitted: bool = False
    waiters: list[tuple[Done, Failed]] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Question:
    """A whole SYNC_REQ that waits for its answer."""

    epoch: int
    round: int
    asked: Asked


@dataclass(slots=True)
class Link:
    """One connection; frames and SYNC die with it."""

    send: Send
    epoch: int
    minor: int = 0
    round: int = 0
    asked_at: Seconds = 0.0
    answered_round: int = 0
    answer_at: Seconds = 0.0
    question: Question | None = None
    synced: bool = False
    listing: bool = False
    """All lanes are asked for by name: digests are not known to the peer, or did not agree."""
    request: dict[int, SyncRequest] = field(default_factory=dict)
    reply: dict[int, SyncReply] = field(default_factory=dict)
    attests: dict[int, list[bool]] = field(default_factory=dict)


@dataclass(slots=True)
class Partner:
    """One peer, in memory. `pair` mirrors the durable counters as last committed."""

    pair: Pair
    keys: tuple[bytes, ...]
    """The one in force first."""
    delivered: MicroCredits
    epoch: int
    link: Link | None = None
    sales: dict[AttemptId, Sale] = field(default_factory=dict)
    purchases: dict[AttemptId, Purchase] = field(default_factory=dict)
    receipts: deque[tuple[bytes, ReceiptRow]] = field(default_factory=deque)
    receipts_since: Seconds = 0.0
    wanted: MicroCredits = 0
    reserving: bool = False
    releasing: bool = False
    retry_at: Seconds = 0.0
    unpaid: MicroCredits = 0
    unpaid_since: Seconds | None = None
    ended_since: Seconds | None = None
    """When an attempt ended that is still to be signed for."""
    hurry: bool = False
    """Somebody waits for the next voucher."""
    signing: int = 0
    unconfirmed: int = 0
    resend_at: Seconds = 0.0
    resend_wait: Seconds = 0.0
    heal_at: Seconds = 0.0
    used_at: Seconds = 0.0

    @property
    def key(self) -> bytes:
        return self.keys[0]

    @property
    def is_idle(self) -> bool:
        """Nothing is under way with it, and nothing would be forgotten with it."""
        busy = self.link or self.sales or self.purchases or self.receipts or self.wanted
        waits = self.reserving or self.releasing or self.signing or self.unpaid_since is not None
        return not busy and not waits and self.delivered >= self.pair.reserved


_STRANGERS = ""
"""Their group; every other is the devices of one owner, under its id."""


class Desk:
    """Shared state of one boot of one node."""

    def __init__(
        self,
        db: apsw.Connection,
        signer: Signer,
        settings: Settings,
        clock: Clock,
        random_bytes: bytes,
        runner: Runner,
    ) -> None:
        """Starts a boot in a transaction of its own and reads the counters."""
        with db:
            self.epoch, lane = start_boot(db, clock.unix_ms(), random_bytes)
        self.settings = settings
        self.clock = clock
        self.signer = signer
        self.keys = own_keys(db)
        self.me: PeerId = peer_id(self.keys[-1])
        self.proofs = own_proofs(db)
        """Of my changes of key, the oldest first."""
        self.wallet = Wallet(signer, lane)
        self.refusing: AivillageError | None = None
        self.on_room: Callable[[PeerId], None] = lambda peer: None
        self.on_error: Failed = lambda error: None
        self.partners: dict[PeerId, Partner] = {}
        """Those who are here, or with whom something is under way."""
        self.met: set[PeerId] = set()
        """Those who synced since this boot began."""
        self.relieved: MicroCredits = exposure.relieved(db)
        self._runner = runner
        self._names = peer_names(db)
        self._keys: dict[PeerId, tuple[bytes, ...]] = {}
        for name, peer in self._names.items():
            self._keys[peer] = (public_key(name), *self._keys.get(peer, (public_key(peer),)))
        self._away: dict[PeerId, Pair] = {}
        self._shares: dict[str, dict[PeerId, MicroCredits]] = {}
        for pair in read_pairs(db):
            self._away[pair.peer] = pair
            self._count_share(pair)

    def name(self, peer: PeerId) -> PeerId:
        """The name under which the book has `peer`: the first key that it had."""
        return self._names.get(peer, peer)

    def knows(self, peer: PeerId) -> bool:
        """Whether the book has anything of `peer`, under any of its keys."""
        return peer in self._names or self.pair(peer) != Pair(peer)

    def keys_of(self, peer: PeerId) -> tuple[bytes, ...]:
        """All keys that the book has of `peer`, the one in force first."""
        name = self.name(peer)
        return self._keys.get(name) or (public_key(name),)

    def partner(self, peer: PeerId) -> Partner:
        peer = self._names.get(peer, peer)
        known = self.partners.get(peer)
        if known is None:
            pair = self._away.pop(peer, None) or Pair(peer)
            known = self.partners[peer] = self._partner(pair)
        known.used_at = self.now()
        return known

    def _partner(self, pair: Pair) -> Partner:
        # A crash counts all that was reserved as delivered.
        return Partner(pair, self.keys_of(pair.peer), delivered=pair.reserved, epoch=pair.epoch)

    def pair(self, peer: PeerId) -> Pair:
        """The counters as last committed, without making a partner of everybody asked about."""
        peer = self._names.get(peer, peer)
        partner = self.partners.get(peer)
        return partner.pair if partner else self._away.get(peer) or Pair(peer)

    def pairs(self) -> list[Pair]:
        """Of everybody in the book."""
        return [partner.pair for partner in self.partners.values()] + list(self._away.values())

    def keep(self, pair: Pair) -> None:
        """New counters, just committed."""
        self._count_share(pair)
        partner = self.partners.get(pair.peer)
        if partner is None:
            self._away[pair.peer] = pair
        else:
            partner.pair = pair

    def refresh(self, peers: Iterable[PeerId]) -> None:
        """Reads the counters of `peers` again, as of the next commit."""
        wanted = list(peers)

        def kept(pairs: list[Pair]) -> None:
            for pair in pairs:
                self.keep(pair)

        self.submit(lambda db: [read_pair(db, peer) for peer in wanted], kept)

    def succeed(self, peer: PeerId, key_peer: PeerId) -> None:
        """`peer`, by the name that the book has, goes by `key_peer` from now on. It is durable."""
        self._names[key_peer] = peer
        partner = self.partner(peer)
        self._keys[peer] = partner.keys = (public_key(key_peer), *partner.keys)

    def show(self, keys: Sequence[bytes], first: SignedBody, second: SignedBody) -> None:
        """Tells everybody who is here, the accused too, that a payer contradicted itself.

        `keys`: all that the payer ever had. Only what every version takes for a proof is sent: two
        bodies with one number.
        """
        one, other = (decode_body(signed.body, VoucherBody) for signed in (first, second))
        for key in keys:
            proof = Equivocation(key, first, second)
            try:
                check_equivocation(proof, self.signer.verify)
            except PeerError:
                continue  # signed by another of its keys
            if one.n == other.n:
                self._tell(encode(self.epoch, proof))
            return

    def _tell(self, blob: bytes) -> None:
        for partner in list(self.partners.values()):
            if partner.link is not None:
                partner.link.send(blob)

    def forget_idle(self) -> None:
        """Whoever is away and idle costs a row of counters from now on."""
        oldest = self.now() - self.settings.idle_seconds
        for peer, partner in list(self.partners.items()):
            if partner.used_at < oldest and partner.is_idle:
                del self.partners[peer]
                if partner.pair != Pair(peer):
                    self._away[peer] = partner.pair

    def _count_share(self, pair: Pair) -> None:
        group = _STRANGERS if not pair.known else pair.owner
        for name, shares in self._shares.items():
            if name != group:
                shares.pop(pair.peer, None)
        if group is not None:
            share = exposure.share_of(pair)
            shares = self._shares.setdefault(group, {})
            if share:
                shares[pair.peer] = share
            else:
                shares.pop(pair.peer, None)

    def others_share(self, pair: Pair) -> MicroCredits:
        """What the others take who share a limit with this peer; see `exposure.ceiling`."""
        if pair.known and pair.owner is None:
            return 0
        shares = self._shares.get(_STRANGERS if not pair.known else str(pair.owner), {})
        share = sum(shares.values()) - shares.get(pair.peer, 0)
        return share if pair.known else share - self.relieved

    def submit(
        self,
        job: Callable[[apsw.Connection], T],
        done: Callable[[T], None],
        failed: Failed | None = None,
    ) -> None:
        """Runs `job` durably. An error is told to `failed`; one of ours, or unheard, `on_error`."""

        def succeeded(result: T) -> None:
            self.refusing = None
            done(result)

        def refused(error: AivillageError) -> None:
            if error.code == "DISK_FULL":
                self.refusing = error
            if failed is None or isinstance(error, NodeError):
                self.on_error(error)
            if failed is not None:
                failed(error)

        self._runner.submit(job, succeeded, refused)

    def now(self) -> Seconds:
        return self.clock.monotonic_seconds()


def paired(
    job: Callable[[apsw.Connection], T], peer: PeerId
) -> Callable[[apsw.Connection], tuple[T, Pair]]:
    """`job`, then the pair's counters as it left them."""

    def run(db: apsw.Connection) -> tuple[T, Pair]:
        result = job(db)
        return result, read_pair(db, peer)

    return run
