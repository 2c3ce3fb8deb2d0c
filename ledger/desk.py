"""The in-memory half of the book: what a crash forgets, and nothing else.

A `Desk` is what buying, selling and syncing share. It knows no thread, clock or socket: a runner
executes transactions and calls back once they are durable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import apsw
import msgspec

from aivillage.ledger.books import Pair, read_pair, read_pairs, start_boot
from aivillage.ledger.payer import Wallet
from aivillage.ledger.signing import Signer
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId, Seconds, peer_id, public_key
from aivillage.protocols.vouchers import LaneState, ReceiptRow, SyncReply, SyncRequest

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
    receipt_seconds: Seconds = 1.0
    resend_seconds: Seconds = 5.0
    resend_seconds_max: Seconds = 60.0
    release_seconds: Seconds = 5.0
    """After the last sale an unused reservation is given back: what a crash would leave."""
    heal_seconds: Seconds = 60.0


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
    lanes: dict[tuple[bool, bytes], LaneState]


@dataclass(slots=True)
class Link:
    """One connection; frames and SYNC die with it."""

    send: Send
    epoch: int
    round: int = 0
    asked_at: Seconds = 0.0
    answered_round: int = 0
    answer_at: Seconds = 0.0
    question: Question | None = None
    synced: bool = False
    request: dict[int, SyncRequest] = field(default_factory=dict)
    reply: dict[int, SyncReply] = field(default_factory=dict)
    attests: dict[int, list[bool]] = field(default_factory=dict)


@dataclass(slots=True)
class Partner:
    """One peer, in memory. `pair` mirrors the durable counters as last committed."""

    pair: Pair
    key: bytes
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
    signing: int = 0
    unconfirmed: int = 0
    resend_at: Seconds = 0.0
    resend_wait: Seconds = 0.0
    heal_at: Seconds = 0.0


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
        self.me: PeerId = peer_id(signer.public_key)
        self.wallet = Wallet(signer, lane)
        self.refusing: AivillageError | None = None
        self.on_room: Callable[[PeerId], None] = lambda peer: None
        self.on_error: Failed = lambda error: None
        self.partners: dict[PeerId, Partner] = {}
        self._runner = runner
        for pair in read_pairs(db):
            self.partners[pair.peer] = self._partner(pair)

    def partner(self, peer: PeerId) -> Partner:
        known = self.partners.get(peer)
        if known is None:
            pair = Pair.of_stranger(peer)
            known = self.partners[peer] = self._partner(pair)
        return known

    def _partner(self, pair: Pair) -> Partner:
        # A crash counts all that was reserved as delivered.
        return Partner(pair, public_key(pair.peer), delivered=pair.reserved, epoch=pair.epoch)

    def submit(
        self,
        job: Callable[[apsw.Connection], T],
        done: Callable[[T], None],
        failed: Failed | None = None,
    ) -> None:
        """Runs `job` durably. An error is told to `on_error`, and to `failed` if given."""

        def succeeded(result: T) -> None:
            self.refusing = None
            done(result)

        def refused(error: AivillageError) -> None:
            if error.code == "DISK_FULL":
                self.refusing = error
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
