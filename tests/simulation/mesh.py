"""A mesh in one process: real services, real books, real jobs.db; the wires are in memory.

Real time with short settings, since the books have threads. `tamper` rewrites what a node says,
frame by frame: that is how a node is made to lie.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from aivillage.ledger.ledger import NodeBook, open_ledger
from aivillage.models.inference.generate import GenerateRequest, GenerateResult
from aivillage.node import config, identity, village
from aivillage.node.buyer import Running
from aivillage.node.config import Origin, Settings
from aivillage.node.daemon import open_node, worker_settings
from aivillage.node.desk import Desk
from aivillage.node.jobs import open_jobs
from aivillage.node.links import Link
from aivillage.node.membership import VILLAGE_SETTING
from aivillage.node.paths import Paths
from aivillage.node.records import Work
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.messages import Frame, Submit
from aivillage.protocols.types import MicroCredits, PeerId
from tests.conftest import make_key
from tests.simulation.scripted import Script, ScriptedWorkers

NOOP = Work("mesh.noop")
PRICE = 269
"""Micro-credits of one quad or token."""
Tamper = Callable[[Frame], Sequence[Frame]]
QUICK: dict[str, Any] = {"heartbeat_seconds": 1.0, "offer_seconds": 0.2, "verify_percent_max": 0}
"""Nobody does results again by itself: tests of verification ask for it."""


def honest(frame: Frame) -> Sequence[Frame]:
    return (frame,)


class Node:
    """One node and what a test may do to it. `desk` is there while it runs."""

    def __init__(self, name: str, number: int, folder: Path, settings: Settings) -> None:
        self.name = name
        self.key = make_key(number)
        self.peer: PeerId = identity.peer_of(self.key)
        self.settings = settings
        self.paths = Paths(folder, folder / "s", folder / "cache")
        self.script = Script()
        self.workers: type[ScriptedWorkers] = ScriptedWorkers
        self.tamper: Tamper = honest
        self.heard: list[Frame] = []
        self.desk: Desk
        self.scope = trio.CancelScope()
        self.closed = trio.Event()
        self.leave = trio.Event()
        """Set, it ends the node in good order; `stop` only cancels it."""

    def origins(self) -> list[Origin]:
        return [Origin(key, getattr(self.settings, key), "default") for key in config.describe()]

    @property
    def ledger(self) -> NodeBook:
        return self.desk.ledger

    @property
    def address(self) -> str:
        return f"/memory/{self.name}/p2p/{self.peer}"

    @asynccontextmanager
    async def _open(self, network: LoopbackNetwork, founder: Node | None) -> AsyncIterator[Desk]:
        self.paths.data_dir.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            jobs = await stack.enter_async_context(open_jobs(self.paths.jobs))
            if founder is not None:
                await jobs.set_setting(VILLAGE_SETTING, village.village_of(founder.peer))
                if founder is not self:
                    await jobs.add_certificates(
                        village.village_of(founder.peer), (certificate(founder, self.peer),)
                    )
            book = await stack.enter_async_context(open_ledger(self.paths.ledger, self.key))
            nursery = await stack.enter_async_context(trio.open_nursery())
            workers = self.workers(
                nursery, self.paths.scratch, self.script, worker_settings(self.settings)
            )
            await workers.describe_all()
            wire = await stack.enter_async_context(network.open(self.name, self.peer))
            yield await stack.enter_async_context(
                open_node(
                    self.key, self.settings, self.origins(), self.paths, jobs, book, workers, wire
                )
            )

    async def live(
        self,
        network: LoopbackNetwork,
        founder: Node | None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs until `stop`."""
        self.scope, self.closed, self.leave = trio.CancelScope(), trio.Event(), trio.Event()
        try:
            with self.scope:
                async with self._open(network, founder) as self.desk:
                    self._wiretap()
                    task_status.started()
                    await self.leave.wait()
        finally:
            self.closed.set()

    async def stop(self) -> None:
        self.scope.cancel()
        await self.closed.wait()

    def _wiretap(self) -> None:
        """From now on all links say what `tamper` makes of it, and note what they hear."""
        links = self.desk.links
        up, message = links.on_up, links.on_message

        def on_up(link: Link) -> None:
            real_send = link.send

            def send(frame: Frame, *, may_ride: bool = False) -> None:
                for said in self.tamper(frame):
                    real_send(said, may_ride=may_ride)

            link.send = send  # type: ignore[method-assign]
            up(link)

        def on_message(link: Link, frame: Frame) -> None:
            self.heard.append(frame)
            message(link, frame)

        links.on_up, links.on_message = on_up, on_message

    # ------------------------------------------------------------------ as a buyer
    def has_measured(self, peer: PeerId, units_per_second: float) -> None:
        """As if it had done everything at this speed so far."""
        record = self.desk.discovery.record_of(peer)
        record.speeds.clear()
        for work in (Work("inference.generate", GenerateRequest(prompt="x").model), NOOP):
            record.measure(work, "", units_per_second)

    async def submit(
        self,
        prompt: str = "hello there mesh",
        *,
        tokens: int = 8,
        ceiling: MicroCredits | None = None,
        deadline: float | None = None,
        peer: PeerId | None = None,
        mesh: bool = False,
        stand_by: bool = False,
        say: Callable[[Frame], None] = lambda _frame: None,
        operation: str = "inference.generate",
        request: bytes | None = None,
    ) -> Running:
        body = pack(GenerateRequest(prompt=prompt, max_tokens=tokens))
        submit = Submit(
            id=1,
            operation=operation,
            request=body if request is None else request,
            ceiling_micro_credits=ceiling,
            deadline_seconds=deadline,
            peer=peer,
            mesh=mesh,
            stand_by=stand_by,
        )
        return await self.desk.buyer.submit(submit, say)

    async def ask(self, prompt: str = "hello there mesh", **options: Any) -> Running:
        """A job, to its end."""
        running = await self.submit(prompt, **options)
        with trio.fail_after(20):
            await running.ended.wait()
        return running

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for _, found, fields in self.desk.events.recent if found == name]


class Mesh:
    """Nodes by name; the first one is the village's founder."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.network = LoopbackNetwork()
        self.nodes: list[Node] = []
        self._folder = folder
        self._nursery = nursery

    async def add(
        self,
        name: str,
        *,
        stranger: bool = False,
        workers: type[ScriptedWorkers] = ScriptedWorkers,
        **settings: Any,
    ) -> Node:
        number = len(self.nodes) + 1
        choices = Settings(**(QUICK | settings))
        node = Node(name, number, self._folder / name, choices)
        node.workers = workers
        self.nodes.append(node)
        await self.start(node, stranger=stranger)
        return node

    async def start(self, node: Node, *, stranger: bool = False) -> None:
        founder = None if stranger else self.nodes[0]
        await self._nursery.start(node.live, self.network, founder)

    async def link(self, one: Node, other: Node) -> None:
        await one.desk.links.connect(other.address)

    async def knows(self, buyer: Node, *sellers: Node, operation: str = "mesh.noop") -> None:
        """Links the buyer with all, and returns when it has heard what they offer."""
        for seller in sellers:
            await self.link(buyer, seller)
        wanted = {seller.peer for seller in sellers}
        await until(lambda: wanted <= {c.peer for c in buyer.desk.discovery.candidates(operation)})
        await until(lambda: all(seller.ledger.view(buyer.peer).line for seller in sellers))


@asynccontextmanager
async def open_mesh(folder: Path) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(folder, nursery)
        try:
            yield mesh
        finally:
            nursery.cancel_scope.cancel()


def certificate(founder: Node, guest: PeerId) -> bytes:
    now = int(time.time() * 1000)
    token = village.make_invite(founder.key, village.village_of(founder.peer), (), 10**8, now)
    return village.redeem(founder.key, token, guest, now)[1]


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


def result_of(running: Running) -> GenerateResult:
    assert running.error is None, running.error
    return unpack(GenerateResult, running.pursuit.result or b"")


def price_of(prompt: str, tokens: int) -> MicroCredits:
    """What an undisturbed job costs."""
    return PRICE * (-(-len(prompt.encode()) // 4) + tokens)


async def settled(buyer: Node, seller: Node, amount: MicroCredits) -> None:
    """Both books come to say that the buyer owes exactly `amount`, and both pass their audit."""

    def views() -> tuple[MicroCredits, MicroCredits]:
        return (
            buyer.ledger.view(seller.peer).owed_by_me,
            seller.ledger.view(buyer.peer).owed_to_me,
        )

    with trio.move_on_after(2):
        while views() != (amount, amount):
            await trio.sleep(0.005)
    assert views() == (amount, amount)
    for node in (buyer, seller):
        report = await node.ledger.audit()
        assert report.ok, report.first_error
    assert (await buyer.ledger.balance()).net + (await seller.ledger.balance()).net == 0 or (
        len(buyer.ledger.views()) > 1 or len(seller.ledger.views()) > 1
    )


@contextmanager
def without(node: Node, *kinds: type[Any]) -> Any:
    """Meanwhile `node` says nothing of these kinds."""
    before = node.tamper
    node.tamper = lambda frame: () if isinstance(frame, kinds) else before(frame)
    yield
    node.tamper = before
