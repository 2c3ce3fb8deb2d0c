"""Whole nodes in this process, on the in-memory network: real ledgers, real workers.

async with villagers(tmp_path, "ann", "bob") as (ann, bob):
    done = await ann.submit("mesh.noop", note="hello")
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from aivillage.ledger.ledger import NodeBook, open_ledger
from aivillage.node import identity
from aivillage.node.buyer import Running
from aivillage.node.config import Origin, Settings
from aivillage.node.daemon import open_node, worker_settings
from aivillage.node.desk import Desk
from aivillage.node.jobs import open_jobs
from aivillage.node.paths import Paths
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.node.workers import Workers, open_workers
from aivillage.protocols.messages import Frame, Submit
from aivillage.protocols.types import PeerId
from tests.conftest import make_key


class Node(msgspec.Struct):
    """What a test needs of a node."""

    desk: Desk
    workers: Workers
    ledger: NodeBook
    heard: list[Frame] = []
    """What followed the node's jobs."""

    @property
    def peer(self) -> PeerId:
        return self.desk.villagers.peer

    async def begin(self, name: str, *, to: str = "", **request: Any) -> Running:
        """Submits a job of operation `name`. What `Submit` has, such as `local=True`, goes by
        name; the rest is the request's.
        """
        own = {"local", "mesh", "prefer", "deadline_seconds", "ceiling_micro_credits"}
        submit = {field: request.pop(field) for field in list(request) if field in own}
        body = msgspec.msgpack.encode(request)
        submission = Submit(id=1, operation=name, request=body, peer=to or None, **submit)
        return await self.desk.buyer.submit(submission, self.heard.append)

    async def submit(self, name: str, **request: Any) -> Running:
        """Submits a job and waits for its end."""
        running = await self.begin(name, **request)
        with trio.fail_after(60):
            await running.ended.wait()
        return running

    async def done(self, name: str, **request: Any) -> tuple[Any, Any]:
        """(result, receipt) of a job that has to succeed."""
        running = await self.submit(name, **request)
        assert running.error is None, running.error
        return (
            msgspec.msgpack.decode(running.pursuit.result or b""),
            running.pursuit.receipt(),
        )

    async def net(self) -> int:
        return (await self.ledger.balance()).net

    async def offers_of(self, *operations: str) -> None:
        """Returns once somebody offers each of `operations`."""
        with trio.fail_after(20):
            while not all(self.desk.discovery.candidates(name) for name in operations):
                await trio.sleep(0.02)

    async def lends_to(self, other: Node) -> None:
        """Returns once the two are linked and this one knows the other as a member."""
        await other.desk.links.connect(self.desk.links.transport.addresses()[0])
        with trio.fail_after(20):
            while self.ledger.headroom(other.peer) <= 0:
                await trio.sleep(0.02)


@asynccontextmanager
async def opened(
    network: LoopbackNetwork, folder: Path, name: str, number: int, **settings: Any
) -> AsyncIterator[Node]:
    """A node called `name`; its identity is key `number`."""
    key = make_key(number)
    places = Paths(folder / name, folder / name / "s", folder / "cache")
    places.data_dir.mkdir(parents=True, exist_ok=True)
    chosen = Settings(**({"offer_seconds": 1.0, "verify_percent_max": 0} | settings))
    origins = [Origin(key, getattr(chosen, key), "test") for key in Settings.__struct_fields__]
    async with AsyncExitStack() as stack:
        jobs = await stack.enter_async_context(open_jobs(places.jobs))
        ledger = await stack.enter_async_context(open_ledger(places.ledger, key))
        workers = await stack.enter_async_context(
            open_workers(
                worker_settings(chosen), cache_folder=places.cache, scratch_folder=places.scratch
            )
        )
        transport = await stack.enter_async_context(network.open(name, identity.peer_of(key)))
        desk = await stack.enter_async_context(
            open_node(key, chosen, origins, places, jobs, ledger, workers, transport)
        )
        yield Node(desk, workers, ledger)


@asynccontextmanager
async def villagers(
    folder: Path, *names: str, of: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> AsyncIterator[list[Node]]:
    """Nodes of one village, founded by the first. `of` has settings of single ones."""
    network = LoopbackNetwork()
    async with AsyncExitStack() as stack:
        nodes = []
        for number, name in enumerate(names, start=1):
            own = settings | (of or {}).get(name, {})
            node = await stack.enter_async_context(opened(network, folder, name, number, **own))
            if nodes:
                first = nodes[0].desk
                token = await first.villagers.joining.invite(
                    tuple(first.links.transport.addresses()), None
                )
                await node.desk.villagers.joining.join(token)
            nodes.append(node)
        yield nodes
