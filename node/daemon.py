"""Read this file first: every service of the node, in the order in which it starts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage import __version__
from aivillage.ledger.desk import Settings as LedgerSettings
from aivillage.ledger.ledger import NodeBook, open_ledger
from aivillage.node import identity, lock, rotation, village_key
from aivillage.node.addresses import Addresses
from aivillage.node.blob_library import Library
from aivillage.node.buyer import Buyer
from aivillage.node.caretaker import Caretaker
from aivillage.node.clearing import Clearing
from aivillage.node.config import Origin, Settings
from aivillage.node.control import Control, Handler, open_control
from aivillage.node.desk import Desk
from aivillage.node.detours import Detours
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.exchange import Exchange
from aivillage.node.gate import Gate, open_gate
from aivillage.node.grants import Grants
from aivillage.node.guard import Tasks
from aivillage.node.herald import Herald
from aivillage.node.home import Home
from aivillage.node.jobs import Jobs, open_jobs
from aivillage.node.limits_desk import LimitsDesk
from aivillage.node.links import LinkLimits, Links, open_links
from aivillage.node.maps import open_maps
from aivillage.node.market import Market
from aivillage.node.membership import Membership
from aivillage.node.models_desk import ModelsDesk
from aivillage.node.monitor import Monitor
from aivillage.node.owners import Owners
from aivillage.node.pairs import Pairs
from aivillage.node.paths import Paths
from aivillage.node.people_desk import PeopleDesk
from aivillage.node.pricelist import PriceList
from aivillage.node.replication import open_replicator
from aivillage.node.reputation_desk import ReputationDesk
from aivillage.node.seller import Seller
from aivillage.node.switch import Switch
from aivillage.node.trade import Attempts, Trade
from aivillage.node.villagers import Villagers
from aivillage.node.worker_process import WorkerLimits
from aivillage.node.workers import Workers, WorkerSettings, open_workers
from aivillage.protocols.messages import SUCCESSIONS_MAX, VERSION_MAJOR, VERSION_MINOR, Hello
from aivillage.protocols.ports import Transport
from aivillage.protocols.types import PeerId

ENGINE_SLOTS_MAX: Final = 8
"""What an engine holds; further sessions hear BUSY, other operations use the owner's `slots`."""


async def run(
    settings: Settings,
    origins: list[Origin],
    paths: Paths,
    ready: Callable[[Desk], None],
    *,
    join: str | None = None,
) -> None:
    """Serves until a signal or `aivillage-node stop`; `ready` is called once everything does.

    Raises:
        ConfigError: something on this machine is wrong; nothing was changed.
    """
    from aivillage.node.transport.libp2p import open_libp2p

    os.umask(0o077)  # whatever this node writes is its owner's: books, jobs, blobs
    async with AsyncExitStack() as stack:
        stack.enter_context(lock.held(paths.data_dir))
        await rotation.settle(paths)
        key = identity.load(paths.data_dir)
        jobs = await stack.enter_async_context(open_jobs(paths.jobs))
        policy = ledger_settings(settings)
        ledger = await stack.enter_async_context(open_ledger(paths.ledger, key, settings=policy))
        workers = await stack.enter_async_context(
            open_workers(
                worker_settings(settings, paths.models),
                cache_folder=paths.cache,
                scratch_folder=paths.scratch,
            )
        )
        shared_key = village_key.load(paths.data_dir)
        transport = await stack.enter_async_context(open_libp2p(key, settings.listen, shared_key))
        desk = await stack.enter_async_context(
            open_node(key, settings, origins, paths, jobs, ledger, workers, transport)
        )
        desk.villagers.joining.keep_key = partial(village_key.store, paths.data_dir)
        if join is not None:
            await desk.villagers.joining.join(join)
        ready(desk)
        await _stopped(desk.stop)


@asynccontextmanager
async def open_node(
    key: Ed25519PrivateKey,
    settings: Settings,
    origins: list[Origin],
    paths: Paths,
    jobs: Jobs,
    ledger: NodeBook,
    workers: Workers,
    transport: Transport,
) -> AsyncIterator[Desk]:
    """The services between stores and network, on any transport."""
    events, monitor, stop = Events(), Monitor(paths.data_dir), trio.Event()
    gate = await _gate(jobs, ledger, paths, events)
    membership, owners, grants = await _papers(key, settings, jobs, ledger)
    detours = Detours(transport, settings, events)
    hello = _hello(ledger, membership, owners, grants, detours.addresses)
    async with _links(transport, hello, settings) as links, trio.open_nursery() as nursery:
        tasks = _tasks(nursery, events)
        discovery = Discovery(key, await jobs.records())
        villagers = Villagers(
            key=key, settings=settings, membership=membership, links=links, jobs=jobs,
            book=ledger, events=events, tasks=tasks, owners=owners, grants=grants,
            discovery=discovery,
        )  # fmt: skip
        exchange = Exchange(links, villagers, discovery, tasks, settings)
        prices = PriceList(key, settings.price_percent, gate.floor_percent)
        seller = Seller(
            settings=settings, prices=prices, workers=workers, book=ledger, events=events,
            nursery=nursery, gate=gate,
        )  # fmt: skip
        herald = Herald(discovery, exchange, seller, detours.addresses, settings.offer_seconds)
        market = Market(links, discovery, ledger, herald.advertise)
        clearing = Clearing(ledger, villagers.hubs, events, settings.netting_seconds)
        market.clear, market.debt_of = clearing.try_clear, ledger.owed_by
        trade = Trade(jobs, ledger, market, discovery, workers, events, Attempts(), seller.places)
        buyer = Buyer(settings=settings, trade=trade, nursery=nursery)
        seller.modules.buy, seller.door.acquainted = buyer.buy, villagers.acquainted
        market.home = Home(workers, discovery, buyer, seller).facts
        detours.join(links, villagers, herald, seller, jobs, ledger, tasks)
        _close_and_open(gate, monitor, ledger, buyer, seller, herald, tasks)
        replicator = await open_replicator(settings, trade, buyer, villagers, tasks)
        pairs = Pairs(ledger, tasks)
        blobs = Library(settings, paths, trade, buyer, seller, gate, villagers, replicator, tasks)
        switch = Switch(links, ledger, villagers, exchange, buyer, seller, herald, pairs, blobs)
        keeper = Caretaker(ledger, jobs, events, (seller.taken, buyer.running))
        desk = Desk(
            origins=origins, paths=paths, links=links, villagers=villagers, discovery=discovery,
            seller=seller, buyer=buyer, jobs=jobs, ledger=ledger, monitor=monitor, events=events,
            stop=stop, blobs=blobs, addresses=detours.addresses, clearing=clearing,
            owners=owners, grants=grants, pairs=pairs, detours=detours, replicator=replicator,
        )  # fmt: skip
        maps = await open_maps(settings, trade, buyer, nursery)  # before anybody can submit
        people = PeopleDesk(desk, keeper, settings.village_exposure_micro_credits)
        own, held = LimitsDesk(gate, desk, settings, prices, workers), ModelsDesk(prices, workers)
        handlers = _handlers(desk, people, maps, own, held, ReputationDesk(desk))
        async with open_control(paths.socket, Control(handlers, buyer, hello, events)):
            tasks.serve(clearing.run, keeper.run, *villagers.services, *herald.services)
            yield desk
            switch.farewell()
        nursery.cancel_scope.cancel()


def _tasks(nursery: trio.Nursery, events: Events) -> Tasks:
    tasks = Tasks(nursery, events)
    tasks.serve(events.write_together)
    return tasks


class _Answers(Protocol):
    def handlers(self) -> dict[str, Handler]: ...


def _handlers(*desks: _Answers) -> dict[str, Handler]:
    return {name: answer for desk in desks for name, answer in desk.handlers().items()}


def _links(
    transport: Transport, hello: Callable[[], Hello], settings: Settings
) -> AbstractAsyncContextManager[Links]:
    return open_links(transport, hello, limits=LinkLimits(ping_seconds=settings.heartbeat_seconds))


def _close_and_open(
    gate: Gate,
    monitor: Monitor,
    ledger: NodeBook,
    buyer: Buyer,
    seller: Seller,
    herald: Herald,
    tasks: Tasks,
) -> None:
    """What is wrong with this machine stops all work; the owner's limits only that for others."""
    buyer.refusal = lambda: monitor.refusal() or ledger.refusing
    seller.door.refusal = lambda: buyer.refusal() or gate.refusal()
    gate.running, gate.on_change = seller.taken, herald.hurry
    tasks.serve(gate.run, monitor.run)


async def _gate(jobs: Jobs, ledger: NodeBook, paths: Paths, events: Events) -> Gate:
    """With what the owner said in former runs. A changed key is the same peer."""

    def whose(peer: PeerId) -> PeerId:
        return ledger.names_of(peer)[-1] if ledger.policy(peer).known else PeerId("")

    return await open_gate(jobs, (paths.blobs, paths.scratch), events, whose)


async def _papers(
    key: Ed25519PrivateKey, settings: Settings, jobs: Jobs, ledger: NodeBook
) -> tuple[Membership, Owners, Grants]:
    """What a former run joined, and was given."""
    membership, owners = Membership(ledger.names[-1], jobs), Owners(ledger, jobs)
    grants = Grants(key, settings, membership, ledger, jobs)
    for papers in (membership, owners, grants):
        await papers.load()
    return membership, owners, grants


def ledger_settings(settings: Settings) -> LedgerSettings:
    return LedgerSettings(
        stranger_pool=settings.stranger_pool_micro_credits,
        pool_day=settings.stranger_day_micro_credits,
        debt_expiry_days=settings.debt_expiry_days,
    )


def worker_settings(settings: Settings, library: Path | None = None) -> WorkerSettings:
    return WorkerSettings(
        enabled=settings.enable,
        dev_mode=settings.dev_mode,
        idle_exit_seconds=settings.worker_idle_seconds,
        module_workers_max=settings.module_workers,
        engine_slots=min(settings.slots, ENGINE_SLOTS_MAX),
        ray_address=settings.ray_address if settings.executor == "ray" else "",
        models_memory_bytes_max=settings.models_memory_mb << 20,
        engine=settings.engine,
        device=settings.device,
        gpu_memory_bytes_max=settings.gpu_memory_mb << 20,
        stands_by=settings.stage_stand_by,
        limits=WorkerLimits(
            memory_bytes_max=settings.worker_memory_mb << 20,
            nice=settings.worker_nice,
            cores=settings.worker_cores,
            threads=settings.worker_threads,
            library=str(library) if library else "",
        ),
    )


def _hello(
    ledger: NodeBook,
    membership: Membership,
    owners: Owners,
    grants: Grants,
    addresses: Addresses,
) -> Callable[[], Hello]:
    """What we say first on every link: as it is at that moment."""
    return lambda: Hello(
        major=VERSION_MAJOR,
        minor=VERSION_MINOR,
        agent=f"aivillage/{__version__}",
        boot_epoch=ledger.epoch,
        clock_unix_ms=int(time.time() * 1000),
        certificates=membership.certificates,
        addresses=addresses(),
        successions=ledger.proofs[-SUCCESSIONS_MAX:],
        owner_certificate=owners.certificate,
        grants=grants.said(),
    )


async def _stopped(stop: trio.Event) -> None:
    """Returns at the first SIGINT or SIGTERM, or when the owner asks."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def by_signal() -> None:
                async for _ in signals:
                    stop.set()

            nursery.start_soon(by_signal)
            await stop.wait()
            nursery.cancel_scope.cancel()
