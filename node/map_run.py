"""One map on its way: does what the state machine in fanout.py says, and tells it the outcome."""

from __future__ import annotations

import secrets
import time
from typing import Final

import msgspec
import trio

from aivillage.node.buyer import Buyer, Running
from aivillage.node.fanout import (
    HERE,
    Begin,
    Drop,
    Effect,
    Ended,
    Event,
    Fault,
    GiveUp,
    Offered,
    Plan,
    Seen,
    State,
    Stop,
    Tick,
    step,
)
from aivillage.node.jobs import JobRow
from aivillage.node.map_store import REDUCE_LINE, MapRow, MapStore, Tally, line_of, parent_of
from aivillage.node.offers import terms_offered
from aivillage.node.one_try import Had, OneTry
from aivillage.node.pricelist import listed
from aivillage.node.records import work_of
from aivillage.node.trade import Trade
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.messages import Frame
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import JobId, MicroCredits

EVENTS_MAX: Final = 256
"""More than tries that can end at once; who finds it full waits."""
TICK_SECONDS: Final = 0.1
SIGHT_SECONDS: Final = 1.0
"""Between looks at who is there; news is looked at sooner."""
WORKERS_MAX: Final = 64
"""Of the best: no map has more tasks under way at once."""


class MapRun:
    """Runs in the nursery that `run` opens; `ended` is set when there is nothing left to do."""

    def __init__(
        self, row: MapRow, store: MapStore, trade: Trade, buyer: Buyer, places_here: int
    ) -> None:
        self.row = row
        self.ended = trio.Event()
        self._before = Tally(total=0, done=0, failed=0)
        self.state = State(plan=_no_plan(row), moved_at=trio.current_time())
        self._operation = row.operation
        self._model = ""
        """Of the first line: a map is offered to whoever does that, at its price."""
        self._store = store
        self._trade = trade
        self._buyer = buyer
        self._places_here = places_here
        self._tries: dict[int, Running] = {}
        self._dropped: set[int] = set()
        self._had: dict[int, Had] = {}
        self._said, self._heard = trio.open_memory_channel[Event](EVENTS_MAX)
        self._is_stopped = False

    async def load(self) -> None:
        """What is left to do, and what earlier runs spent and were given."""
        store, row = self._store, self.row
        self._before = await store.tally(row)
        lines = await store.open_lines(row)
        if lines:
            first = await store.request(row, next(iter(lines)))
            self._model = work_of(row.operation, first).model
        self._plan(lines, await store.spent(row))
        for job in await store.leftovers(row):
            earlier = OneTry(job, self._trade, _unheard)
            await earlier.restore()
            self._had[line_of(job.parent)] = earlier.had()

    def _plan(self, tasks: dict[int, Usage], spent: MicroCredits) -> None:
        plan = msgspec.structs.replace(self.state.plan, tasks=tasks, order=tuple(tasks))
        self.state = State(plan=plan, moved_at=trio.current_time(), spent=spent)

    async def run(self) -> None:
        """Every task to its end, or until `stop`."""
        await self._until_ended()

    async def reduce(self, operation: str, usage: Usage) -> None:
        """One more task of another operation, within what the others left of the budget."""
        self._before = self.tally()
        self._operation, self._model = operation, ""
        self._plan({REDUCE_LINE: usage}, self.state.spent)
        await self._until_ended()

    def tally(self) -> Tally:
        """How far it is now, the reduction left out."""
        before, state = self._before, self.state
        if REDUCE_LINE in state.plan.tasks:
            return before
        done, failed = before.done + state.done, before.failed + state.failed
        return Tally(total=before.total, done=done, failed=failed)

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        """What runs is cancelled: what it delivered is paid, and the rest is not begun."""
        self._is_stopped = True

    async def _until_ended(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while not self.state.ended:
                event = await self._heard.receive()
                self.state, effects = step(self.state, event, trio.current_time())
                await self._do(effects, nursery)
            nursery.cancel_scope.cancel()

    async def _do(self, effects: tuple[Effect, ...], nursery: trio.Nursery) -> None:
        given_up = [e for e in effects if isinstance(e, GiveUp)]
        for effect in effects:
            if isinstance(effect, Begin):
                nursery.start_soon(self._try, effect)
            elif isinstance(effect, Drop):
                self._drop(effect.number)
        if given_up:
            ends = [(e.line, e.fault.code, e.fault.message) for e in given_up]
            await self._store.failed(self.row, ends)

    # ------------------------------------------------------------------ who is there
    async def _watch(self) -> None:
        """Tells who does it, whenever that may have changed, and that time passes."""
        while True:
            news, until = self._trade.discovery.next_news(), trio.current_time() + SIGHT_SECONDS
            await self._said.send(Seen(self._offered()))
            while not news.is_set() and trio.current_time() < until:
                await trio.sleep(TICK_SECONDS)
                await self._said.send(Stop() if self._is_stopped else Tick())

    def _offered(self) -> tuple[Offered, ...]:
        trade = self._trade
        here = Offered(
            peer=HERE,
            terms=listed(trade.workers.describe(self._operation)),
            places=self._places_here,
        )
        found = trade.discovery.candidates(self._operation, self._model)
        welcome = [c for c in found if not trade.book.policy(c.peer).blocked]
        return (
            here,
            *(
                Offered(
                    peer=candidate.peer,
                    terms=terms_offered(candidate.offered, self._model),
                    places=candidate.slots,
                )
                for candidate in welcome[:WORKERS_MAX]
            ),
        )

    # ------------------------------------------------------------------ one try
    async def _try(self, begin: Begin) -> None:
        """A job of its own, to its end; whatever becomes of it, the state machine hears it."""
        spent, fault = 0, None
        try:
            running = await self._begin(begin)
        except AivillageError as error:  # this node takes no work now
            fault = Fault(error.code, error.message)
        else:
            spent, fault = await self._followed(begin, running)
        await self._said.send(Ended(number=begin.number, spent=spent, fault=fault))

    async def _followed(self, begin: Begin, running: Running) -> tuple[MicroCredits, Fault | None]:
        self._tries[begin.number] = running
        if begin.number in self._dropped:
            self._buyer.cancel(running.pursuit.row.id)
        await running.ended.wait()
        del self._tries[begin.number]
        pursuit, error = running.pursuit, running.error
        if error is None:
            self._had.pop(begin.line, None)
            return pursuit.spent, None
        if isinstance(pursuit, OneTry) and pursuit.output.bodies:
            self._had[begin.line] = pursuit.had()
        return pursuit.spent, Fault(error.code, error.message)

    async def _begin(self, begin: Begin) -> Running:
        row = JobRow(
            id=JobId(secrets.token_hex(16)),
            operation=self._operation,
            request=await self._store.request(self.row, begin.line),
            state="new",
            ceiling=begin.ceiling,
            deadline=None,
            peer=begin.peer,
            created=time.time(),
            local=begin.peer == HERE,
            parent=parent_of(self.row, begin.line),
        )
        if row.local:
            return await self._buyer.take(row)
        pursuit = OneTry(row, self._trade, _unheard)
        if (had := self._had.pop(begin.line, None)) is not None:
            pursuit.go_on_from(had)
        return await self._buyer.take(row, pursuit)

    def _drop(self, number: int) -> None:
        self._dropped.add(number)
        running = self._tries.get(number)
        if running is not None:
            self._buyer.cancel(running.pursuit.row.id)


def _no_plan(row: MapRow) -> Plan:
    return Plan(tasks={}, order=(), budget=row.budget, each=row.each, parallel=row.parallel)


def _unheard(_frame: Frame) -> None:
    """A map shows how many are done, not what each says on its way."""
