"""Many books in one thread under one seed: virtual time, a bad network, crashes, liars.

Nodes run the product's core. What is simulated is all around it: the runner with its crash
points, clocks, links whose frames die with them, and the work that the credits are for.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import apsw
import msgspec

from aivillage.ledger import books
from aivillage.ledger.compaction import Cursor, compact
from aivillage.ledger.core import Ledger
from aivillage.ledger.desk import Settings
from aivillage.ledger.store import Store
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.types import AttemptId, PeerId, peer_id
from aivillage.protocols.vouchers import decode
from tests.simulation import households, liars

STEP_SECONDS = 0.25
LINE, EXPOSURE, POOL, CEILING, UNIT_MAX = 600, 60, 20, 40, 10
START_MS = 1_700_000_000_000


class CrashError(BaseException):
    """The process is gone at this point. Not an Exception: product code must not catch it."""


class BrokenError(AssertionError):
    """An invariant does not hold; the message starts with its name."""


def broken(name: str, detail: str) -> BrokenError:
    return BrokenError(f"{name}: {detail}")


class FakeSigner:
    """Unforgeable among those who do not read other people's secrets; 30 times faster."""

    secrets: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self, secret: bytes) -> None:
        self.public_key = hashlib.sha256(secret).digest()
        self._secret = self.secrets[self.public_key] = hashlib.sha256(b"s" + secret).digest()

    def sign(self, prefixed: bytes) -> bytes:
        return b"\x01" + hashlib.blake2b(prefixed, key=self._secret).digest()

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
        secret = self.secrets.get(public_key, b"?")
        return signature == b"\x01" + hashlib.blake2b(prefixed, key=secret).digest()


@dataclass
class Rates:
    """Chances per step, drawn per seed; each is off in about a third of the seeds."""

    loss: float
    duplicate: float
    delay_steps: int
    partition: float
    crash_before_commit: float
    crash_after_commit: float
    crash_sending: float
    crash_idle: float
    lost_tail: float
    restore: float
    clock_jump: float
    commit: float
    transfer: float
    compact: float
    disk_full: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> Rates:
        def maybe(most: float) -> float:
            return 0.0 if rng.random() < 1 / 3 else rng.uniform(most / 10, most)

        crash = [maybe(0.03) for _ in range(4)]
        return cls(
            maybe(0.25), maybe(0.2), int(maybe(10)), maybe(0.05), *crash,
            lost_tail=maybe(0.5) if rng.random() < 0.4 else 0.0,
            restore=maybe(0.5) if rng.random() < 0.4 else 0.0,
            clock_jump=maybe(0.02), commit=rng.uniform(0.2, 1.0), transfer=maybe(0.6),
            compact=maybe(0.02),
        )  # fmt: skip

    def calm(self) -> None:
        """Ends all faults."""
        for name in vars(self):
            setattr(self, name, 0)
        self.commit = 1.0


class Disk:
    """A node's connection as its writer sees it: at COMMIT a node may die, or find no room."""

    def __init__(self, node: Node) -> None:
        self._node, self._db = node, node.db

    def execute(self, sql: str, *bindings: Any) -> Any:
        return self._db.execute(sql, *bindings) if sql != "COMMIT" else self._commit()

    def _commit(self) -> Any:
        world = self._node.world
        if world.chance(world.rates.disk_full):
            raise apsw.FullError("no room")
        if world.chance(world.rates.crash_before_commit):
            self._db.execute("ROLLBACK")
            raise CrashError("before commit")
        done = self._db.execute("COMMIT")
        self._node.committed()
        if world.chance(world.rates.crash_after_commit):
            raise CrashError("after commit")
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class Runner(Store):
    """The product's writer, inline: its groups, savepoints and failures, without its thread."""

    def __init__(self, node: Node) -> None:
        super().__init__(cast("apsw.Connection", Disk(node)))
        self.on_fatal = node.fails

    @property
    def waiting(self) -> bool:
        return not self._jobs.empty()

    @property
    def queued(self) -> int:
        return self._jobs.qsize()

    def flush(self) -> None:
        """What is queued now, as one group; what that leads to is for the next."""
        if self.waiting:
            self._run_group(self._take()[0])

    def _hand_back(self, replies: list[Callable[[], None]]) -> None:
        for reply in replies:
            reply()


@dataclass
class Clock:
    world: World
    skew_ms: int = 0

    def unix_ms(self) -> int:
        return START_MS + int(self.world.now * 1000) + self.skew_ms

    def monotonic_seconds(self) -> float:
        return self.world.now


@dataclass
class Work:
    """One attempt as the world sees it: it survives what the nodes forget."""

    buyer: Node
    seller: Node
    attempt: AttemptId
    delivered: int = 0
    accepted: int = 0
    over: bool = False


class Node:
    def __init__(self, world: World, index: int, lie: str) -> None:
        self.world, self.index, self.lie = world, index, lie
        self.signer = FakeSigner(f"{world.seed}/{index}".encode())
        self.id: PeerId = peer_id(self.signer.public_key)
        self.clock = Clock(world)
        self.db = self.open_db()
        books.prepare(self.db, self.signer.public_key, self.clock.unix_ms())
        self.lossless = True
        self.delivered: dict[PeerId, int] = {}
        self.received: dict[PeerId, int] = {}
        """What each did for this node, and what it did for each: as it happened."""
        self.changes: list[tuple[PeerId, PeerId, bytes]] = []
        """Of its key: the former and the next. `id` stays its first name."""
        self.tail: deque[bytes] = deque(maxlen=4)
        self.backups: list[bytes] = []
        self.boots = 0
        self.up = True
        self.boot()

    def open_db(self) -> apsw.Connection:
        """Its disk; a simulation of disks brings its own."""
        db = apsw.Connection(":memory:")
        db.execute("PRAGMA foreign_keys=ON")
        return db

    def start_again(self) -> None:
        """What a dead node finds on its disk; nothing is lost but memory."""

    @property
    def honest(self) -> bool:
        return not self.lie

    def boot(self) -> None:
        self.up = True
        self.boots += 1
        self.runner = self.world.runner_type(self)
        self.ledger = Ledger(
            self.db, self.signer, self.world.settings, self.clock,
            self.world.rng.randbytes(8), self.runner,
        )  # fmt: skip
        self.ledger.desk.on_error = self.fails
        if self.lie == "stops":
            self.ledger.routing.step = lambda: lambda db: []  # type: ignore[method-assign]

    def fails(self, error: AivillageError) -> None:
        # A full disk is met by every step, and nothing comes of it. A liar that lost its tail and
        # is shown what it signed against itself cannot adopt that: its own loss, nobody else's.
        if self.honest and error.code != "DISK_FULL":
            raise broken("I0", f"a step of node {self.index} failed: {error}")

    def knows_key(self, peer: Node) -> bool:
        return self.ledger.desk.keys_of(peer.id)[0] == peer.signer.public_key

    def committed(self) -> None:
        rates = self.world.rates
        if rates.lost_tail or self.lie == "forgets":
            self.tail.append(self.db.serialize("main"))
        if rates.restore and self.world.chance(0.01):
            self.backups = [*self.backups[-2:], self.db.serialize("main")]

    def lose(self, image: bytes) -> None:
        """The disk is an older one from now on."""
        self.db = apsw.Connection(":memory:")
        self.db.deserialize("main", image)
        self.db.execute("PRAGMA foreign_keys=ON")
        self.lossless = False
        self.tail.clear()
        # Backups of a time that the node no longer knows do not exist for it.
        self.backups = [backup for backup in self.backups if backup == image]


@dataclass
class Frame:
    due: int
    link: int
    source: Node
    target: Node
    blob: bytes | None
    work: Work | None = None
    amount: int = 0


@dataclass
class World:
    seed: int
    runner_type: type[Runner] = Runner
    node_type: Callable[[World, int, str], Node] = Node
    with_liars: bool = True
    settings: Settings = field(
        default_factory=lambda: Settings(
            stranger_pool=POOL, heal_seconds=10.0, idle_seconds=5.0, route_seconds=20.0
        )
    )
    size: int = 0
    """Nodes; 0: as many as the seed says."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.rates = Rates.draw(self.rng)
        # Of a sequence of its own: the others' are as they were.
        self.rates.disk_full = random.Random(f"disk {self.seed}").choice((0.0, 0.0, 0.02, 0.1))
        self.step, self.now = 0, 0.0
        self.links: dict[tuple[int, int], int] = {}
        self.link_count = 0
        self.apart: set[tuple[int, int]] = set()
        self.frames: list[Frame] = []
        self.signed: dict[tuple[PeerId, PeerId, bytes, int], bytes] = {}
        self.crashes = self.vouchers = self.restores = self.jumped_seconds = 0
        liar_count = self.rng.choice((0, 0, 1, 2)) if self.with_liars else 0
        lies = [self.rng.choice(liars.LIES) for _ in range(liar_count)]
        self.heard: list[bytes] = []
        if not self.size:
            days = households.expiry_days(self.seed)
            self.settings = msgspec.structs.replace(self.settings, debt_expiry_days=days)
        self.members = [
            self.node_type(self, index, lies[index] if index < len(lies) else "")
            for index in range(self.size or self.rng.choice((3, 4, 4, 5, 6)))
        ]
        """Without the sybils: each is drawn as often as any other."""
        names = liars.sybils(self.seed) if self.with_liars and not self.size else []
        self.sybils = [
            self.node_type(self, len(self.members) + n, lie) for n, lie in enumerate(names)
        ]
        self.nodes = self.members + self.sybils
        self.work: list[Work] = []
        self.household: tuple[Node, ...] = ()
        """Devices of one owner."""
        self.write_offs = self.rekeys = 0.0
        self.first_names: dict[PeerId, PeerId] = {}
        if not self.size:
            households.draw(self)
        self._set_lines()

    def _set_lines(self) -> None:
        """Members know each other, but in some seeds the last ones are strangers to everybody."""
        strangers = self.members[-1:] if self.chance(0.3) else []
        if strangers and len(self.members) > 4:
            strangers = self.members[-random.Random(self.seed).randint(1, 3) :]
        for node in self.nodes:
            for peer in self.members:
                if peer is node or peer in strangers:
                    continue
                nothing = lambda *_: None  # noqa: E731
                owner = households.owner_of(self, peer)
                node.ledger.certify(peer.id, (LINE, EXPOSURE), owner, nothing, nothing)
                node.ledger.set_received(peer.id, (LINE, EXPOSURE), nothing, nothing)
            self.flush(node)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    # network

    def connect(self, a: Node, b: Node) -> None:
        for node, peer in ((a, b), (b, a)):
            self.guard(node, lambda node=node, peer=peer: households.tell_changes(node, peer))
        if not (a.up and b.up and a.knows_key(b) and b.knows_key(a)):
            return
        self.link_count += 1
        number = self.link_count
        self.links[a.index, b.index] = number
        for node, peer in ((a, b), (b, a)):
            self.guard(
                node,
                lambda node=node, peer=peer: node.ledger.connected(
                    peer.id, peer.ledger.desk.epoch, self.sender(node, peer, number), 1
                ),
            )

    def disconnect(self, a: Node, b: Node) -> None:
        if self.links.pop((a.index, b.index), None):
            for node, peer in ((a, b), (b, a)):
                node.ledger.disconnected(peer.id)

    def linked(self, a: Node, b: Node) -> int:
        low, high = sorted((a.index, b.index))
        return self.links.get((low, high), 0)

    def sender(self, node: Node, peer: Node, link: int) -> Callable[[bytes], None]:
        def send(blob: bytes) -> None:
            if self.chance(self.rates.crash_sending):
                raise CrashError("while sending")
            if node.honest:
                self.watch(node, peer, blob)
            else:
                blob = liars.twist(self, node, peer, blob)
            self.post(Frame(0, link, node, peer, blob))

        return send

    def watch(self, node: Node, peer: Node, blob: bytes) -> None:
        """I9 and I10, on everything that an honest node puts on the wire."""
        from tests.simulation import invariants

        invariants.on_wire(self, node, peer, decode(blob)[1])

    def post(self, frame: Frame) -> None:
        if self.chance(self.rates.loss):
            return
        for _ in range(2 if self.chance(self.rates.duplicate) else 1):
            delay = self.rng.randint(0, self.rates.delay_steps) if self.rates.delay_steps else 0
            self.frames.append(Frame(**{**vars(frame), "due": self.step + 1 + delay}))

    def arrive(self) -> None:
        due = [frame for frame in self.frames if frame.due <= self.step]
        self.frames = [frame for frame in self.frames if frame.due > self.step]
        for frame in due:
            if self.linked(frame.source, frame.target) == frame.link:
                self.guard(frame.target, lambda frame=frame: self.take(frame))

    def take(self, frame: Frame) -> None:
        if frame.work is not None:
            self.accept(frame.work, frame.amount)
            return
        assert frame.blob is not None
        try:
            frame.target.ledger.receive(frame.source.id, frame.blob)
        except PeerError as error:
            if frame.source.honest:
                raise broken("I0", f"an honest blob was refused: {error}") from error

    # life and death

    def guard(self, node: Node, action: Callable[[], None]) -> None:
        if not node.up:
            return
        try:
            action()
        except CrashError:
            self.crash(node)

    def flush(self, node: Node) -> None:
        self.guard(node, node.runner.flush)

    def crash(self, node: Node) -> None:
        self.crashes += 1
        node.up = False
        if node.db.in_transaction:
            node.db.execute("ROLLBACK")
        for peer in self.nodes:
            if peer is not node and self.linked(node, peer):
                low, high = sorted((node, peer), key=lambda other: other.index)
                self.links.pop((low.index, high.index))
                if peer.up:
                    peer.ledger.disconnected(node.id)

    def revive(self, node: Node) -> None:
        if node.tail and (node.lie == "forgets" or self.chance(self.rates.lost_tail)):
            node.lose(node.tail[0])
        elif node.backups and self.chance(self.rates.restore):
            self.restores += 1
            node.lose(self.rng.choice(node.backups))
        node.start_again()
        households.change_key(self, node)
        node.boot()

    # work

    def begin(self, buyer: Node, seller: Node) -> None:
        if not (buyer.up and seller.up and self.linked(buyer, seller)):
            return
        attempt = AttemptId(self.rng.randbytes(16))
        quote = attempt * 2
        buying = buyer.ledger.buying
        intend = buying.intend_soon if is_small(attempt) else buying.intend
        intend(seller.id, attempt, quote, CEILING)
        seller.ledger.selling.begin_sale(buyer.id, attempt, quote, CEILING)
        self.work.append(Work(buyer, seller, attempt))

    def deliver(self, work: Work) -> None:
        buyer, seller = work.buyer, work.seller
        unit = self.rng.randint(1, UNIT_MAX)
        amount = min(CEILING, work.delivered + unit)
        if amount == work.delivered:
            return
        selling = seller.ledger.selling
        if not selling.deliver(buyer.id, work.attempt, amount, out_hash(work.attempt, amount)):
            selling.want_room(buyer.id, UNIT_MAX)
            return
        increase = amount - work.delivered
        seller.delivered[buyer.id] = seller.delivered.get(buyer.id, 0) + increase
        work.delivered = amount
        frame = Frame(0, self.linked(buyer, seller), seller, buyer, None, work, amount)
        self.post(frame)

    def accept(self, work: Work, amount: int) -> None:
        buyer = work.buyer
        known = work.attempt in buyer.ledger.desk.partner(work.seller.id).purchases
        if work.over or not known or amount <= work.accepted:
            return
        done = buyer.received.get(work.seller.id, 0)
        buyer.received[work.seller.id] = done + amount - work.accepted
        work.accepted = amount
        if buyer.lie != "never_pays":
            mark = out_hash(work.attempt, amount)
            buyer.ledger.buying.accept(work.seller.id, work.attempt, amount, mark)

    def end(self, work: Work) -> None:
        buyer, seller = work.buyer, work.seller
        work.over = True
        if buyer.up and buyer.lie != "never_pays":
            mark = out_hash(work.attempt, work.accepted)
            due = (seller.id, work.attempt, work.accepted, mark)
            buying = buyer.ledger.buying
            if is_small(work.attempt):
                self.guard(buyer, lambda: buying.settle_soon(*due, lambda _: None))
            else:
                self.guard(buyer, lambda: buying.settle(*due, lambda: None, lambda _: None))
        if seller.up:
            seller.ledger.selling.end_sale(buyer.id, work.attempt)

    def trade(self) -> None:
        for _ in range(2):
            if self.chance(0.5):
                self.begin(*self.rng.sample(self.members, 2))
        for work in self.work:
            both = work.buyer.up and work.seller.up and self.linked(work.buyer, work.seller)
            if both and self.chance(0.5):
                self.guard(work.seller, lambda work=work: self.deliver(work))
            if self.chance(0.08):
                self.end(work)
        self.work = [work for work in self.work if not work.over]

    # time

    def faults(self) -> None:
        for a in self.nodes:
            if a.up and (self.chance(self.rates.crash_idle) or liars.wants_to_crash(self, a)):
                self.crash(a)
            if not a.up and (self.chance(0.3) or not self.rates.crash_idle):
                self.revive(a)
            if self.chance(self.rates.clock_jump):
                ahead_only = self.rates.restore or self.rates.lost_tail or a.lie == "forgets"
                self.jumped_seconds += 100
                a.clock.skew_ms += self.rng.randint(0 if ahead_only else -100_000, 100_000)
            if a.up and self.chance(self.rates.compact):
                self.compact(a)
        for a in self.nodes:
            for b in self.nodes[a.index + 1 :]:
                if self.chance(self.rates.partition):
                    self.disconnect(a, b)
                apart = (a.index, b.index) in self.apart or self.linked(a, b)
                apart = apart or (a in self.sybils and b in self.sybils)
                if a.up and b.up and not apart and self.chance(0.3):
                    self.connect(a, b)

    def compact(self, node: Node) -> None:
        at_ms = node.clock.unix_ms()
        for cursor in (Cursor("in"), Cursor("out")):
            node.ledger.desk.submit(lambda db, c=cursor: compact(db, c, at_ms), lambda _: None)

    def advance(self) -> None:
        self.step += 1
        self.now += STEP_SECONDS
        self.faults()
        self.arrive()
        for node in self.nodes:
            self.guard(node, node.ledger.tick)
            if self.chance(self.rates.commit):
                self.flush(node)


def is_small(attempt: bytes) -> bool:
    """Half of all work is bought as small jobs are: nobody waits for its intent or its voucher."""
    return bool(attempt[0] & 1)


def out_hash(attempt: bytes, amount: int) -> bytes:
    return hashlib.sha256(attempt + amount.to_bytes(8, "big")).digest()
