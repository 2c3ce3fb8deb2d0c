"""Read this file first: every service of the node, in the order in which it starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import trio

from aivillage import __version__
from aivillage.ledger.desk import Settings as LedgerSettings
from aivillage.ledger.ledger import open_ledger
from aivillage.node import identity
from aivillage.node.buyer import Buyer
from aivillage.node.config import Origin, Settings
from aivillage.node.control import Control, open_control
from aivillage.node.desk import Desk
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.gossip import Gossiper
from aivillage.node.herald import Herald
from aivillage.node.jobs import open_jobs
from aivillage.node.links import LinkLimits, open_links
from aivillage.node.market import Market
from aivillage.node.monitor import Monitor
from aivillage.node.paths import Paths
from aivillage.node.pricelist import PriceList
from aivillage.node.pursuit import Trade
from aivillage.node.seller import Seller
from aivillage.node.switch import Switch
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.villagers import Membership, Villagers
from aivillage.node.workers import WorkerSettings, open_workers
from aivillage.protocols.messages import VERSION_MAJOR, VERSION_MINOR, Hello

STOP_SECONDS: Final = 10.0


async def run(
    settings: Settings, origins: list[Origin], paths: Paths, ready: Callable[[Desk], None]
) -> None:
    """Serves until a signal or `aivillage-node stop`; `ready` is called when all of it does.

    Raises:
        ConfigError: something on this machine is wrong; nothing was changed.
    """
    key, started = identity.load(paths.data_dir), time.time()
    peer, stop, events = identity.peer_of(key), trio.Event(), Events()
    monitor = Monitor(paths.data_dir)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        jobs = await enter(open_jobs(paths.jobs))
        pool = LedgerSettings(stranger_pool=settings.stranger_pool_micro_credits)
        ledger = await enter(open_ledger(paths.ledger, key, settings=pool))
        workers = await enter(
            open_workers(
                WorkerSettings(
                    enabled=settings.enable,
                    dev_mode=settings.dev_mode,
                    idle_exit_seconds=settings.worker_idle_seconds,
                    engine_slots=settings.slots,
                ),
                cache_folder=paths.cache,
                scratch_folder=paths.scratch,
            )
        )
        transport = await enter(open_libp2p(key, settings.listen))
        membership = Membership(peer, jobs)
        await membership.load()

        def hello() -> Hello:
            return Hello(
                major=VERSION_MAJOR,
                minor=VERSION_MINOR,
                agent=f"aivillage/{__version__}",
                boot_epoch=ledger.epoch,
                clock_unix_ms=int(time.time() * 1000),
                certificates=membership.certificates,
                addresses=transport.addresses(),
            )

        limits = LinkLimits(ping_seconds=settings.heartbeat_seconds)
        links = await enter(open_links(transport, hello, limits=limits))
        nursery = await enter(trio.open_nursery())
        villagers = Villagers(
            key=key, settings=settings, membership=membership, links=links, jobs=jobs,
            book=ledger, events=events, nursery=nursery,
        )  # fmt: skip
        discovery = Discovery(key)
        gossiper = Gossiper(links.all, discovery.accept)
        seller = Seller(
            settings=settings, prices=PriceList(key, settings.price_percent), workers=workers,
            book=ledger, events=events, nursery=nursery,
        )  # fmt: skip
        herald = Herald(
            discovery=discovery, gossiper=gossiper, seller=seller, links=links,
            offer_seconds=settings.offer_seconds,
        )  # fmt: skip
        market = Market(links, discovery, ledger, herald.advertise)
        trade = Trade(
            jobs=jobs, book=ledger, market=market, discovery=discovery, workers=workers,
            events=events, attempts={},
        )  # fmt: skip
        buyer = Buyer(settings=settings, trade=trade, nursery=nursery)
        buyer.refusal = seller.refusal = lambda: monitor.refusal() or ledger.refusing
        Switch(
            links=links, book=ledger, villagers=villagers, gossiper=gossiper, buyer=buyer,
            seller=seller, news=herald.news_for,
        )  # fmt: skip
        desk = Desk(
            origins=origins, paths=paths, links=links, villagers=villagers, discovery=discovery,
            seller=seller, buyer=buyer, jobs=jobs, ledger=ledger, monitor=monitor, events=events,
            stop=stop, started=started,
        )  # fmt: skip
        await enter(open_control(paths.socket, Control(desk.handlers(), buyer, hello, events)))
        for service in (monitor.run, villagers.keep_in_touch, herald.run, buyer.resume):
            nursery.start_soon(service)
        ready(desk)
        await _stopped(stop)
        nursery.cancel_scope.cancel()


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
