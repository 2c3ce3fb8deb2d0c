"""A village of product ledgers over days of virtual time: who buys what from whom, and who cheats.

Only `Ledger` moves money. What is made up here is the life around it: demand, the hours that
members give, the choice of a seller, and the attempts to clear a line that is used up. Steps are
durable at once and frames arrive in order; tests/simulation/world.py has the faults.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import apsw

from aivillage.ledger import books, transfers
from aivillage.ledger.core import Ledger
from aivillage.ledger.desk import Settings
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import AttemptId, PeerId, peer_id
from tests.simulation.world import START_MS, FakeSigner, out_hash

HOUR_SECONDS = 3600.0
CREDIT = 1_000_000
KINDS = ("noop", "chat", "long")
KIND_WEIGHTS = (0.30, 0.67, 0.03)
NOOP, CHAT_LEAST, CHAT_MOST, LONG = 10, 20_000, 60_000, 1_000_000
MEAN_JOB = 56_803
"""Micro-credits, of the mix above."""
SPREAD = 0.8
"""Sigma of the lognormal sizes of members: the largest of 30 is about five times the median."""
BIG_SHARE = 3
"""One server in three, the fastest ones, can run a long job."""
OWING, LENDING = 4, 2
"""Peers that are tried as the first of a ring: with debts to the buyer, and without."""
SELLERS_TRIED = 3


@dataclass(frozen=True)
class Plan:
    """One village. Shares are of its members; amounts in micro-credits."""

    size: int = 30
    days: int = 14
    load: float = 0.6
    """What honest members ask for a day, over what they serve a day."""
    free: float = 0.0
    """Never serve, and pay by promise until their lines are used up."""
    poor: float = 0.2
    """Serve a tenth, ask for as much as others do."""
    line: int = 10 * CREDIT
    exposure: int = 20_000
    clearing: str = "none"
    """`none`; `rings` when a line is used up; `hub`: a treasury too; `early`: each hour too."""
    hub_lines: int = 10
    """The treasury's lines, both ways, over those of a member."""
    choice: str = "random"
    """Of a seller: `random`, or `debtor`: who owes the buyer most, then at random."""
    jobs_per_day: float = 20.0
    free_demand: float = 1.0
    """What a free-rider asks for, over what a member does."""
    pool: int = 0
    pool_day: int = 0
    seed: int = 1


class Runner:
    """A transaction is durable when `submit` returns."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db

    def submit(self, job: Any, done: Any, failed: Any) -> None:
        self.db.execute("BEGIN")
        try:
            result = job(self.db)
        except AivillageError as error:
            self.db.execute("ROLLBACK")
            failed(error)
            return
        self.db.execute("COMMIT")
        done(result)


@dataclass(eq=False)
class Member:
    """One node and its owner's habits."""

    index: int
    role: str
    ledger: Ledger
    db: apsw.Connection
    supply: float = 0.0
    """Micro-credits of work a day that it does for others."""
    left: float = 0.0
    demand: float = 0.0
    """Jobs a day."""
    is_big: bool = False
    asked: int = 0
    done: int = 0
    got: int = 0
    served: int = 0
    refused: dict[str, int] = field(default_factory=lambda: {"line": 0, "busy": 0})

    @property
    def id(self) -> PeerId:
        return self.ledger.desk.me

    def owes(self, other: Member) -> int:
        return max(0, -self.ledger.desk.pair(other.id).balance)

    def headroom(self, buyer: Member) -> int:
        """What `buyer` may still come to owe here."""
        return self.ledger.selling.headroom(buyer.id)


class Village:
    """Members, their links, and a clock that only `pass_hour` moves."""

    def __init__(self, plan: Plan, roles: Sequence[str]) -> None:
        self.plan = plan
        self.rng = random.Random(f"{plan.seed}/choices")
        self.now = 0.0
        self.frames: deque[tuple[Member, Member, bytes]] = deque()
        self.linked: set[tuple[int, int]] = set()
        self.members: list[Member] = []
        self.rings = self.rings_refunded = self.ring_amount = self.saved = 0
        for role in roles:
            self.add(role)
        self.hub = self._add_hub() if plan.clearing in {"hub", "early"} else None

    # who is here

    def unix_ms(self) -> int:
        return START_MS + int(self.now * 1000)

    def monotonic_seconds(self) -> float:
        return self.now

    def stranger(self, role: str) -> Member:
        """A new identity that nobody certified."""
        signer = FakeSigner(f"{self.plan.seed}/{len(self.members)}".encode())
        db = apsw.Connection(":memory:")
        books.prepare(db, signer.public_key, self.unix_ms())
        settings = Settings(stranger_pool=self.plan.pool, pool_day=self.plan.pool_day)
        ledger = Ledger(db, signer, settings, self, self.rng.randbytes(8), Runner(db))
        assert ledger.desk.me == peer_id(signer.public_key)
        member = Member(len(self.members), role, ledger, db)
        self.members.append(member)
        return member

    def add(self, role: str, owner: str | None = None) -> Member:
        """A member with a certificate, known to all; `owner`: whose device it is."""
        known = list(self.members)
        member = self.stranger(role)
        for other in known:
            grant(other, member, (self.plan.line, self.plan.exposure), owner)
            grant(member, other, (self.plan.line, self.plan.exposure))
        return member

    def _add_hub(self) -> Member:
        hub, amounts = self.stranger("hub"), (self.plan.hub_lines * self.plan.line,)
        for other in self.members[:-1]:
            grant(other, hub, (*amounts, self.plan.exposure))
            grant(hub, other, (*amounts, self.plan.exposure))
        return hub

    def of(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]

    # links

    def link(self, a: Member, b: Member) -> None:
        low, high = sorted((a.index, b.index))
        if (low, high) not in self.linked:
            self.linked.add((low, high))
            for node, peer in ((a, b), (b, a)):
                node.ledger.connected(peer.id, peer.ledger.desk.epoch, self._sender(node, peer), 1)
            self.pump()

    def _sender(self, node: Member, peer: Member) -> Callable[[bytes], None]:
        return lambda blob: self.frames.append((node, peer, blob))

    def pump(self) -> None:
        while self.frames:
            source, target, blob = self.frames.popleft()
            target.ledger.receive(source.id, blob)

    def give_receipts(self, payee: Member, payer: Member) -> None:
        partner = payee.ledger.desk.partner(payer.id)
        while blob := payee.ledger.selling.take_receipt(partner):
            self.frames.append((payee, payer, blob))
        self.pump()

    # work

    def work(self, buyer: Member, seller: Member, amount: int, *, pays: bool = True) -> int:
        """One job through both ledgers; what was delivered. Who does not pay never signs."""
        self.link(buyer, seller)
        attempt = AttemptId(self.rng.randbytes(16))
        buying, selling = buyer.ledger.buying, seller.ledger.selling
        buying.intend(seller.id, attempt, attempt * 2, amount)
        selling.begin_sale(buyer.id, attempt, attempt * 2, amount)
        delivered = 0
        while delivered < amount:
            unit = max(1, min(seller.ledger.view(buyer.id).exposure, amount - delivered))
            selling.want_room(buyer.id, unit)
            step = min(selling.room(buyer.id), amount - delivered)
            if step <= 0:
                break
            delivered += step
            mark = out_hash(attempt, delivered)
            assert selling.deliver(buyer.id, attempt, delivered, mark)
            if pays:
                buying.accept(seller.id, attempt, delivered, mark)
                self.pump()
        if pays:
            mark = out_hash(attempt, delivered)
            buying.settle(seller.id, attempt, delivered, mark, lambda: None, _impossible)
            self.pump()
            self.give_receipts(seller, buyer)
        selling.end_sale(buyer.id, attempt)
        seller.left -= delivered
        seller.served += delivered
        buyer.got += delivered
        return delivered

    def buy(self, buyer: Member, kind: str, amount: int) -> None:
        """Finds a seller who is free and lends enough, clearing a line for it; or is refused."""
        buyer.asked += 1
        able = [
            seller
            for seller in self.members
            if seller.left > 0 and seller is not buyer and (kind != "long" or seller.is_big)
        ]
        self.rng.shuffle(able)
        if self.plan.choice == "debtor":
            able.sort(key=lambda seller: -seller.owes(buyer))
        seller = _lender(buyer, able, amount)
        if seller is None and self.clear_one(buyer, able, amount):
            seller = _lender(buyer, able, amount)
            self.saved += 1
        if seller is None:
            buyer.refused["line" if able else "busy"] += 1
            return
        assert self.work(buyer, seller, amount) == amount
        buyer.done += 1

    # clearing

    def clear_one(self, buyer: Member, able: list[Member], amount: int) -> bool:
        """Whether some seller lends `amount` after the rings that this begins."""
        if self.plan.clearing == "none":
            return False
        tried = sorted(able, key=lambda one: -one.headroom(buyer))[:SELLERS_TRIED]
        return any(
            self.clear(buyer, seller, short) >= short
            for seller in tried
            if (short := amount - seller.headroom(buyer)) <= buyer.owes(seller)
        )

    def clear(self, debtor: Member, creditor: Member, wanted: int, lending: int = LENDING) -> int:
        """Moves debts of up to `wanted` away from `creditor`; returns how much moved."""
        moved, step = 0, self.plan.exposure // transfers.STEPS_PER_EXPOSURE
        for middle in self.middles(debtor, creditor, lending):
            while moved < wanted:
                amount = min(wanted - moved, step, debtor.owes(creditor))
                if not self.ring(debtor, (middle, creditor), amount):
                    break
                moved += amount
        return moved

    def middles(self, debtor: Member, creditor: Member, lending: int) -> Iterator[Member]:
        """Who owes the debtor, most first; then who lends it most; then the treasury."""
        by_id = {member.id: member for member in self.members}
        pairs = [
            pair
            for pair in debtor.ledger.desk.pairs()
            if pair.known and pair.peer != creditor.id and by_id[pair.peer] is not self.hub
        ]
        pairs.sort(key=lambda pair: (-pair.balance, pair.peer))
        owing = [pair for pair in pairs if pair.balance > 0]
        others = sorted(pairs[len(owing) :], key=lambda p: -(p.received_line + p.balance))
        yield from (by_id[pair.peer] for pair in owing[:OWING] + others[:lending])
        if self.hub is not None:
            yield self.hub

    def ring(self, starter: Member, others: Sequence[Member], amount: int) -> bool:
        """Whether the transfer came back to `starter`: one ring, through real vouchers."""
        if amount < 1:
            return False
        hops = list(zip((starter, *others), (*others, starter), strict=True))
        for payer, payee in hops:
            self.link(payer, payee)
        ends: list[str] = []
        starter.ledger.routing.on_end = lambda _xid, state: ends.append(state)
        peers, random_bytes = [other.id for other in others], self.rng.randbytes(8)
        starter.ledger.routing.start(peers, amount, random_bytes, lambda _: None, _not_now)
        self.pump()
        for payer, payee in hops:
            self.give_receipts(payee, payer)
            self.give_receipts(payer, payee)
        is_closed = ends == ["closed"]
        self.rings += is_closed
        self.rings_refunded += ends == ["refunded"]
        self.ring_amount += amount if is_closed else 0
        return is_closed

    def clear_early(self) -> None:
        """Who has used more than half of a line moves one exposure of it away, if that works."""
        people = self.of("honest", "poor", "free")
        for debtor in people:
            for creditor in people:
                pair = debtor.ledger.desk.pair(creditor.id)
                if -pair.balance * 2 > pair.received_line:
                    self.clear(debtor, creditor, self.plan.exposure, lending=0)

    # time

    def pass_hour(self) -> None:
        self.now += HOUR_SECONDS
        for member in self.members:
            member.ledger.tick()
        self.pump()

    def new_day(self) -> None:
        """Hours that were not used are gone; a job that runs past midnight takes tomorrow's."""
        for member in self.members:
            member.left = min(member.left + member.supply, member.supply)

    def live(self) -> None:
        """All days of the plan."""
        for _ in range(self.plan.days):
            self.new_day()
            jobs = deque(sorted(self._jobs_of_day()))
            for hour in range(24):
                while jobs and jobs[0][0] < hour + 1:
                    _, index, kind, amount = jobs.popleft()
                    self.buy(self.members[index], kind, amount)
                if self.plan.clearing == "early":
                    self.clear_early()
                self.pass_hour()

    def _jobs_of_day(self) -> Iterator[tuple[float, int, str, int]]:
        """(hour, buyer, kind, amount): the same for every policy under one seed."""
        day = int(self.now // (24 * HOUR_SECONDS))
        for member in self.members:
            rng = random.Random(f"{self.plan.seed}/{member.index}/{day}")
            hour = rng.expovariate(member.demand / 24) if member.demand else 24.0
            while hour < 24:
                (kind,) = rng.choices(KINDS, KIND_WEIGHTS)
                chat = rng.randint(CHAT_LEAST, CHAT_MOST)
                yield hour, member.index, kind, {"noop": NOOP, "chat": chat, "long": LONG}[kind]
                hour += rng.expovariate(member.demand / 24)


def _lender(buyer: Member, able: Iterable[Member], amount: int) -> Member | None:
    return next((one for one in able if one.headroom(buyer) >= amount), None)


def _impossible(error: AivillageError) -> None:
    raise AssertionError(error)


def _not_now(_error: AivillageError) -> None:
    """A ring that was not begun: nothing moved."""


def grant(
    lender: Member, borrower: Member, amounts: tuple[int, int], owner: str | None = None
) -> None:
    """`amounts`: line and exposure."""
    lender.ledger.certify(borrower.id, amounts, owner, lambda: None, _impossible)
    borrower.ledger.set_received(lender.id, amounts, lambda: None, _impossible)


def settle(plan: Plan) -> Village:
    """The village of `plan`: who its members are, what they ask for and what they serve."""
    free, poor = round(plan.free * plan.size), round(plan.poor * plan.size)
    roles = ["free"] * free + ["poor"] * min(poor, plan.size - free)
    roles += ["honest"] * (plan.size - len(roles))
    random.Random(f"{plan.seed}/roles").shuffle(roles)
    village = Village(plan, roles)
    people = village.of("free", "poor", "honest")
    rng = random.Random(f"{plan.seed}/sizes")
    sizes = [min(5.0, rng.lognormvariate(0, SPREAD)) for _ in people]
    mean = sum(sizes) / len(sizes)
    for member, size in zip(people, sizes, strict=True):
        relative = size / mean if member.role == "honest" else 1.0
        asks = plan.free_demand if member.role == "free" else relative
        member.demand = plan.jobs_per_day * asks
        member.supply = {"honest": relative, "poor": 0.1, "free": 0.0}[member.role]
    wanted = sum(one.demand * MEAN_JOB for one in village.of("honest", "poor"))
    scale = wanted / plan.load / sum(one.supply for one in people)
    for member in people:
        member.supply *= scale
    serving = sorted((one for one in people if one.supply), key=lambda one: -one.supply)
    for member in serving[: max(2, len(serving) // BIG_SHARE)]:
        member.is_big = True
    return village


# ---------------------------------------------------------------- what came of it


def extracted(village: Village, takers: Iterable[Member]) -> int:
    """What all others did for `takers` and got nothing back for, by the books of the others."""
    taking = list(takers)
    views = [
        other.ledger.view(taker.id)
        for other in village.members
        if other not in taking
        for taker in taking
    ]
    return sum(view.owed_to_me + max(0, view.delivered - view.paid) for view in views)


def bound(village: Village, takers: Iterable[Member], days: int) -> int:
    """The most that `takers` can extract, however many they are: lines and allowances only.

    To a known peer, or to all devices of one owner: the line; of what was written off because it
    was never signed for, 1/16 of what was paid and a quarter of the exposure a day. To all
    strangers together: the pool, and what is forgiven a day.
    """
    taking, total = list(takers), 0
    for other in village.members:
        if other in taking:
            continue
        lines: dict[str, int] = {}
        for taker in taking:
            pair = other.ledger.desk.pair(taker.id)
            group = (pair.owner or pair.peer) if pair.known else "strangers"
            if pair.known:
                lines[group] = pair.line
                total += pair.paid // 16 + pair.exposure // 4 * days
            else:
                lines[group] = village.plan.pool + village.plan.pool_day * days
        total += sum(lines.values())
    return total


def sum_of_balances(village: Village) -> int:
    """0, always: what one is owed another owes."""
    return sum(pair.balance for one in village.members for pair in one.ledger.desk.pairs())


def mirror_faults(village: Village) -> int:
    """Pairs of books that do not say the same."""
    return sum(
        a.ledger.desk.pair(b.id).balance + b.ledger.desk.pair(a.id).balance != 0
        for a in village.members
        for b in village.members[: a.index]
    )


def drain(village: Village, taker: Member, sellers: Iterable[Member], *, signs: bool) -> int:
    """`taker` buys from everybody what it is given, and serves nothing."""
    taken = 0
    for seller in sellers:
        while room := seller.headroom(taker):
            got = village.work(taker, seller, room, pays=signs)
            taken += got
            if got < room or not signs:
                break
    return taken
