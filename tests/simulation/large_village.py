"""A village of up to a thousand nodes in one process, under virtual time.

What runs is the node's own code: links and their framing over the in-memory transport, villagers
(who dials whom), discovery, exchange, search, herald, switch, market, buyer, seller, the ledger
with real signatures, and the store of jobs. What is made up: the engine (scripted.py: a token is a
hash), clocks, the network's delays; SQLite lives in memory and has no thread, so what is written is
durable at once. Left out of each node: control socket, monitor, worker processes, the caretaker.
"""

from __future__ import annotations

import collections
import functools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import apsw
import msgspec
import trio
import trio.testing

from aivillage.ledger import books
from aivillage.ledger.core import Ledger
from aivillage.ledger.desk import Settings as LedgerSettings
from aivillage.ledger.ledger import NodeBook
from aivillage.ledger.signing import Ed25519Signer
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.mesh.noop import NoopRequest
from aivillage.node import daemon, identity, village
from aivillage.node.buyer import Buyer, Running
from aivillage.node.clearing import Clearing
from aivillage.node.config import Settings
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.exchange import Exchange
from aivillage.node.gate import Gate
from aivillage.node.guard import Tasks
from aivillage.node.herald import AD_SECONDS, Herald
from aivillage.node.jobs import Jobs, open_jobs
from aivillage.node.links import Link, LinkLimits, Links, open_links
from aivillage.node.market import Choice, Market
from aivillage.node.membership import VILLAGE_SETTING
from aivillage.node.pairs import Pairs
from aivillage.node.pricelist import PriceList
from aivillage.node.records import Work
from aivillage.node.seller import Seller
from aivillage.node.switch import Switch
from aivillage.node.trade import Attempts, Trade
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.node.villagers import Villagers
from aivillage.protocols import messages
from aivillage.protocols.codec import frame as framed
from aivillage.protocols.codec import pack
from aivillage.protocols.messages import VERSION_MINOR, Frame, OperationInfo, Submit
from aivillage.protocols.types import PeerId
from aivillage.protocols.vouchers import Voucher, decode
from tests.conftest import make_key
from tests.simulation.economy import Runner
from tests.simulation.mesh import certificate
from tests.simulation.scripted import Script, ScriptedWorkers

START_SECONDS = 1_800_000_000.0
COMMON, RARE = "mesh.noop", "inference.generate"
NEWS = ("Gossip", "OffersQuestion", "OffersAnswer")
"""What offers and ads travel in."""
TICK_SECONDS = 1.0
"""Of a ledger; the product's own is twenty times as often."""
NOTICED_SECONDS = 5.0
"""Half of the time that a job waits: who comes back is dialled, and says what it sells."""
GIVE_UP_SECONDS = 30.0
"""Of a search: three times what a job waits."""


class Clock:
    """The ledger's."""

    def unix_ms(self) -> int:
        return int(time.time() * 1000)

    def monotonic_seconds(self) -> float:
        return time.monotonic()


class Skilled(ScriptedWorkers):
    """Sells some of the operations only."""

    skills: tuple[str, ...] = ()
    hollow: tuple[str, ...] = ()
    """Offered only: nobody asks for a quote."""

    def operations(self) -> list[OperationInfo]:
        known = {each.name: each for each in super().operations()}
        hollow = (msgspec.structs.replace(known[COMMON], name=name) for name in self.hollow)
        return [*(known[name] for name in self.skills), *hollow]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One village."""

    size: int
    rare_sellers: int = 1
    seed: int = 1
    join_seconds: float = 0.05
    """Between two arrivals."""
    churn_an_hour: float = 0.2
    down_seconds: float = 300.0
    liars: int = 0
    """The last so many: they buy what they can, and what they sign never leaves them."""
    settings: Settings = field(
        default_factory=lambda: Settings(heartbeat_seconds=60.0, village_line_micro_credits=10**9)
    )


class Member:
    """One machine: what outlives its node, and the node while it runs."""

    def __init__(self, home: Village, index: int) -> None:
        self.home = home
        self.name = f"n{index}"
        self.key = make_key(index + 1)
        self.peer: PeerId = identity.peer_of(self.key)
        self.address = f"/memory/{self.name}/p2p/{self.peer}"
        self.skills = (COMMON, RARE) if 0 < index <= home.plan.rare_sellers else (COMMON,)
        self.hollow: tuple[str, ...] = ()
        self.lies = index >= home.plan.size - home.plan.liars
        self.sent, self.sent_bytes = collections.Counter[str](), 0
        self.up_since: float | None = None
        self.ended: trio.Event | None = None
        self.found_seconds: list[float] = []
        self.minor = VERSION_MINOR
        self.links: Links
        self.switch: Switch
        self.herald: Herald
        self.workers: Skilled
        self.jobs: Jobs
        self.ledger: Ledger
        self.discovery: Discovery
        self.villagers: Villagers
        self.exchange: Exchange
        self.buyer: Buyer
        self._db = books_in_memory(self.key)

    async def live(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until `scope` is cancelled: its streams break then, as a killed node's do."""
        plan, self.scope, self.ended = self.home.plan, trio.CancelScope(), trio.Event()
        with self.scope:
            async with self.home.network.open(self.name, self.peer) as wire:
                self.ledger = Ledger(
                    self._db, Ed25519Signer(self.key), LedgerSettings(), Clock(),
                    random.randbytes(8), Runner(self._db),
                )  # fmt: skip
                book, events = NodeBook(Path(), self.ledger), Events()
                papers = await daemon._papers(self.key, plan.settings, self.jobs, book)
                hello = functools.partial(self._hello, book, papers, wire.addresses)
                limits = LinkLimits(ping_seconds=plan.settings.heartbeat_seconds)
                async with (
                    open_links(wire, hello, limits=limits) as links,
                    trio.open_nursery() as nursery,
                ):
                    self.links = links
                    self._serve(nursery, book, events, papers)
                    self.up_since = trio.current_time()
                    task_status.started()
                    await trio.sleep_forever()
        self.ended.set()

    def stop(self) -> None:
        """From this moment it is not there: nobody gives it a job while it ends."""
        self.up_since = None
        self.scope.cancel()

    def could(self, operation: str, since: float) -> bool:
        """Whether it does it, and is there: ever since then, or for `NOTICED_SECONDS`."""
        if operation not in self.skills or self.up_since is None:
            return False
        now = trio.current_time()
        return now - max(since, self.up_since) >= min(NOTICED_SECONDS, now - since)

    def _hello(self, book: NodeBook, papers: Any, addresses: Callable[[], Any]) -> Any:
        membership, owners, grants = papers
        said = daemon._hello(book, membership, owners, grants, addresses)()
        return msgspec.structs.replace(said, minor=self.minor)

    def _serve(self, nursery: trio.Nursery, book: NodeBook, events: Events, papers: Any) -> None:
        """As `daemon.open_node` joins them."""
        links, settings, tasks = self.links, self.home.plan.settings, Tasks(nursery, events)
        membership, owners, grants = papers
        discovery = self.discovery = Discovery(self.key)
        villagers = self.villagers = Villagers(
            key=self.key, settings=settings, membership=membership, links=links, jobs=self.jobs,
            book=book, events=events, tasks=tasks, owners=owners, grants=grants,
            discovery=discovery,
        )  # fmt: skip
        exchange = self.exchange = Exchange(links, villagers, discovery, tasks, settings)
        workers = self.workers = self.home.workers_of(nursery, self)
        gate = Gate(self.jobs, (), events, lambda peer: peer)
        seller = Seller(
            settings=settings, prices=PriceList(self.key, 100, gate.floor_percent),
            workers=workers, book=book, events=events, nursery=nursery, gate=gate,
        )  # fmt: skip
        herald = self.herald = Herald(
            discovery, exchange, seller, links.transport.addresses, settings.offer_seconds
        )
        market = Market(links, discovery, book, herald.advertise)
        clearing = Clearing(book, villagers.hubs, events)
        market.clear, market.debt_of = clearing.try_clear, book.owed_by
        market.choose = self._timed(market.choose)  # type: ignore[method-assign]
        trade = Trade(
            self.jobs, book, market, discovery, workers, events, Attempts(), seller.places
        )
        self.buyer = Buyer(settings=settings, trade=trade, nursery=nursery)
        seller.door.acquainted = villagers.acquainted
        pairs = Pairs(book, tasks)
        self.switch = Switch(
            links, book, villagers, exchange, self.buyer, seller, herald, pairs, self
        )
        self._count()
        for service in (*villagers.services, *herald.services, self._tick):
            tasks.serve(service)

    def on_fetch(self, link: Link, fetch: messages.Fetch) -> None:
        """Nobody asks for blobs here."""

    async def _tick(self) -> None:
        while True:
            self.ledger.tick()
            await trio.sleep(TICK_SECONDS)

    def _timed(self, choose: Callable[..., Awaitable[Choice]]) -> Callable[..., Awaitable[Choice]]:
        async def timed(need: Any, excluded: Any) -> Choice:
            began = trio.current_time()
            choice = await choose(need, excluded)
            if need.operation == RARE:
                self.found_seconds.append(trio.current_time() - began)
            return choice

        return timed

    def _count(self) -> None:
        """What this node says, by kind."""
        up = self.links.on_up

        def on_up(link: Link) -> None:
            real_send = link.send

            def send(message: Frame, *, may_ride: bool = False) -> None:
                name = type(message).__name__
                self.sent[name] += 1
                if name in NEWS:
                    self.sent_bytes += len(framed(message))
                if self.lies and isinstance(message, messages.Ledger):
                    message = without_vouchers(message)
                real_send(message, may_ride=may_ride)

            link.send = send  # type: ignore[method-assign]
            up(link)

        self.links.on_up = on_up

    async def ask(self, operation: str) -> Running:
        """A job, to its end."""
        request: Any = NoopRequest(note="x", parts=1)
        if operation == RARE:
            request = GenerateRequest(prompt="hello there mesh", max_tokens=4)
        submit = Submit(id=1, operation=operation, request=pack(request))
        running = await self.buyer.submit(submit, lambda _frame: None)
        await running.ended.wait()
        return running


def without_vouchers(message: messages.Ledger) -> messages.Ledger:
    blobs = tuple(blob for blob in message.blobs if not isinstance(decode(blob)[1], Voucher))
    return msgspec.structs.replace(message, blobs=blobs)


def books_in_memory(key: Any) -> apsw.Connection:
    """A fresh ledger.db."""
    db = apsw.Connection(":memory:")
    books.prepare(db, Ed25519Signer(key).public_key, int(time.time() * 1000))
    return db


class Village:
    """Members and what they do. Needs virtual time: see `virtual_time`."""

    def __init__(self, plan: Plan, nursery: trio.Nursery) -> None:
        random.seed(plan.seed)
        self.plan = plan
        self.rng = random.Random(f"{plan.seed}/life")
        self.network = LoopbackNetwork(plan.seed, latency_seconds=0.02, jitter_seconds=0.02)
        self.members: list[Member] = []
        self.done = self.failed = self.nobody_could = self.left = self.stolen = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self._nursery = nursery
        self._busy: collections.Counter[str] = collections.Counter()
        self._all_back = trio.Event()
        self._infos: Any = None

    async def settle(self) -> None:
        """Everybody arrives, one after the other, with an invitation of the founder."""
        workers = ScriptedWorkers(self._nursery, Path(), Script())
        await workers.describe_all()
        self._infos = workers._infos
        for index in range(self.plan.size):
            member = Member(self, index)
            self.members.append(member)
            member.jobs = await self._nursery.start(_store)
            await self._invite(member)
            await self.start(member)
            await trio.sleep(self.plan.join_seconds)

    async def start(self, member: Member) -> None:
        if member.ended is not None:
            await member.ended.wait()
        await self._nursery.start(member.live)

    async def _invite(self, member: Member) -> None:
        founder = self.members[0]
        home = village.village_of(founder.peer)
        await member.jobs.set_setting(VILLAGE_SETTING, home)
        if member is not founder:
            await member.jobs.add_certificates(home, (certificate(founder, member.peer),))
            await member.jobs.saw_peer(founder.peer, (founder.address,))

    def workers_of(self, nursery: trio.Nursery, member: Member) -> Skilled:
        workers = Skilled(nursery, Path(), Script())
        workers._infos, workers.skills, workers.hollow = self._infos, member.skills, member.hollow
        return workers

    def present(self) -> list[Member]:
        return [member for member in self.members if member.up_since is not None]

    # ------------------------------------------------------------------ life
    async def churn(self) -> None:
        """Nodes go and come back; the founder stays."""
        while True:
            away = self.plan.churn_an_hour * (self.plan.size - 1) / 3600
            await trio.sleep(self.rng.expovariate(away))
            idle = [m for m in self.present()[1:] if not self._busy[m.name]]
            if idle:
                self._nursery.start_soon(self._away, self.rng.choice(idle))

    async def _away(self, member: Member) -> None:
        self.left += 1
        member.stop()
        with trio.move_on_after(self.rng.uniform(0.2, 1.8) * self.plan.down_seconds):
            await self._all_back.wait()
        await self.start(member)

    async def demand(self, jobs_per_second: float, rare_share: float) -> None:
        """Jobs of members at random."""
        while True:
            await trio.sleep(self.rng.expovariate(jobs_per_second))
            operation = RARE if self.rng.random() < rare_share else COMMON
            able = [m for m in self.present() if operation not in m.skills or operation == COMMON]
            self._nursery.start_soon(self._job, self.rng.choice(able), operation)

    async def greed(self, liar: Member) -> None:
        """One job after the other, for as long as anybody does them."""
        while True:
            running = await liar.ask(COMMON)
            self.stolen += running.error is None
            if running.error is not None:
                await trio.sleep(1)

    async def _job(self, member: Member, operation: str) -> None:
        self._busy[member.name] += 1
        began = trio.current_time()
        running = await member.ask(operation)
        self._busy[member.name] -= 1
        if running.error is None:
            self.done += 1
        elif not any(other.could(operation, began) for other in self.members if other != member):
            self.nobody_could += 1
        else:
            self.failed += 1
            self.errors[f"{operation} {running.error.code}"] += 1

    async def quiet(self) -> None:
        """Everybody is back, every job has ended, and what was signed has arrived.

        Who left between a voucher and its arrival is linked with who was to have it, as the next
        job of the two would.
        """
        self._all_back.set()
        while sum(self._busy.values()) or len(self.present()) < self.plan.size:
            await trio.sleep(1)
        await trio.sleep(5)
        by_peer = {member.peer: member for member in self.members}
        for member in self.members:
            for pair in member.ledger.desk.pairs():
                other = by_peer[pair.peer]
                if pair.balance + other.ledger.desk.pair(member.peer).balance:
                    await member.links.connect(other.address)
        await trio.sleep(5)

    async def find_cold(self, count: int) -> list[float]:
        """Seconds until a node hears of what another one sells, from when that one starts."""
        found: list[float] = []
        async with trio.open_nursery() as nursery:
            for number in range(min(count, (self.plan.size - 1) // 2)):
                seller, buyer = self.members[-1 - number], self.members[1 + number]
                seller.hollow = (f"cold.{number}",)
                seller.stop()
                nursery.start_soon(self._find, buyer, seller, found)
        return found

    async def _find(self, buyer: Member, seller: Member, found: list[float]) -> None:
        """As a market does for a job."""
        await trio.sleep(5)
        await self.start(seller)
        began, operation = trio.current_time(), seller.hollow[0]
        with trio.move_on_after(GIVE_UP_SECONDS):
            while not buyer.discovery.candidates(operation):
                news = buyer.discovery.next_news()
                buyer.herald.advertise(Work(operation))
                with trio.move_on_after(AD_SECONDS):
                    await news.wait()
        found.append(trio.current_time() - began)

    # ------------------------------------------------------------------ figures
    def sum_of_balances(self) -> int:
        return sum(p.balance for m in self.members for p in m.ledger.desk.pairs())

    def gains(self) -> Iterator[tuple[int, float]]:
        """For each liar and each honest node: what the one had of the other and did not pay, and
        the most that docs/security.md allows, both in micro-credits."""
        for liar in (m for m in self.members if m.lies):
            for victim in (m for m in self.members if not m.lies):
                view = victim.ledger.view(liar.peer)
                most = view.exposure * (1 + 1 / 4) + view.paid / 16
                if most:
                    yield view.delivered + view.written_off, most

    def clear_counts(self) -> None:
        for member in self.members:
            member.sent.clear()
            member.found_seconds.clear()
            member.sent_bytes = 0
        self.done = self.failed = 0

    def knows(self, operation: str) -> int:
        """Members present that hold an offer of it, or do it."""
        return sum(
            operation in m.skills or bool(m.discovery.candidates(operation)) for m in self.present()
        )

    def degrees(self) -> list[int]:
        return sorted(len(m.villagers.members()) for m in self.present())

    def sent(self, kinds: Iterable[str]) -> list[int]:
        """Messages of these kinds, by node."""
        return [sum(member.sent[kind] for kind in kinds) for member in self.members]

    def mean_view(self) -> float:
        return statistics.fmean(len(m.discovery.held()) for m in self.present())


async def _store(task_status: trio.TaskStatus[Jobs]) -> None:
    async with open_jobs(Path(":memory:")) as jobs:
        task_status.started(jobs)
        await trio.sleep_forever()


async def _inline(work: Callable[..., Any], *args: Any, **_options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*args)


def _unix_seconds() -> float:
    return START_SECONDS + trio.current_time()


@contextmanager
def virtual_time() -> Iterator[None]:
    """Clocks say what trio's says, and threads are plain calls."""
    with (
        mock.patch("time.time", _unix_seconds),
        mock.patch("time.monotonic", trio.current_time),
        mock.patch("trio.to_thread.run_sync", _inline),
    ):
        yield


def run(life: Callable[[], Awaitable[Any]]) -> Any:
    """`life` under a clock that jumps to the next thing to do."""

    async def in_virtual_time() -> Any:
        with virtual_time():
            return await life()

    return trio.run(in_virtual_time, clock=trio.testing.MockClock(autojump_threshold=0))
