"""Runs other people's jobs, and never further ahead of their pay than the owner allows.

Whom it lets in is `admission.py`'s, whose turn it is `places.py`'s, what may leave `delivery.py`'s;
how an engine's answer and a module's run are sold, `session_sales.py`'s and `module_sales.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import trio

from aivillage.models import registry
from aivillage.node.admission import Admission
from aivillage.node.allowances import Allowances, unwelcome
from aivillage.node.config import Settings
from aivillage.node.delivery import Delivery
from aivillage.node.events import Events
from aivillage.node.gate import Gate
from aivillage.node.gossip import send_or_drop
from aivillage.node.links import Link
from aivillage.node.module_sales import ModuleSales
from aivillage.node.places import Places
from aivillage.node.pricelist import PriceList
from aivillage.node.resident import kind_of_model
from aivillage.node.sale import Sale, Till, beating, deadline_seconds
from aivillage.node.session_sales import SessionSales
from aivillage.node.workers import Workers
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError, JobError, NodeError
from aivillage.protocols.messages import Call, OperationInfo, QuoteRequest
from aivillage.protocols.ports import Book
from aivillage.protocols.types import PeerId


class Seller:
    """Answers quotes and calls. One task per call, all in the nursery given."""

    def __init__(
        self,
        *,
        settings: Settings,
        prices: PriceList,
        workers: Workers,
        book: Book,
        events: Events,
        nursery: trio.Nursery,
        gate: Gate,
    ) -> None:
        self._book = book
        self._workers = workers
        self._events = events
        self._nursery = nursery
        self._sales: dict[tuple[Link, int], Sale] = {}  # ids begin anew on every link
        self._fed_by: dict[bytes, Sale] = {}
        """By the ticket that lets a neighbour feed them."""
        self.allowances = Allowances(book)
        self.places = Places(settings, workers.places_of)
        self.door = Admission(
            settings=settings, prices=prices, workers=workers, book=book, gate=gate,
            allowances=self.allowances, places=self.places,
        )  # fmt: skip
        self.delivery = Delivery(book, gate)
        self.by_node: dict[str, Callable[[Sale, Till], Awaitable[None]]] = {}
        self.sessions = SessionSales(workers, book, self.allowances, self.delivery)
        self.modules = ModuleSales(workers, book, gate, self.allowances, self.delivery)

    def operations(self) -> list[OperationInfo]:
        """What this node sells now, at the owner's prices."""
        return self.door.operations()

    def known_operations(self) -> list[OperationInfo]:
        """Everything installed here, at the owner's prices, switched on or not."""
        return self.door.known_operations()

    def refusal(self) -> AivillageError | None:
        """Why it takes nothing now."""
        return self.door.refusal()

    def free_slots(self) -> int:
        """Calls that would begin at once; of models, of the one that has most room."""
        engines = [x for x in self.operations() if registry.is_served_by_engine(x.name)]
        kinds = {kind_of_model(model.name) for each in engines for model in each.models}
        queue = self.places.queue
        most = max(map(queue.free, kinds), default=queue.bounds.places)
        return min(self.places.free_slots(), most)

    def engines(self) -> list[dict[str, object]]:
        """The loaded models, and how full each is."""
        return self._workers.engines()

    def taken(self) -> list[Sale]:
        """All that were let in, begun or not."""
        return list(self._sales.values())

    def running(self) -> list[Sale]:
        return [sale for sale in self._sales.values() if sale.ticket.begun]

    # ------------------------------------------------------------------ messages
    def on_quote_request(self, link: Link, request: QuoteRequest) -> None:
        self._nursery.start_soon(self._answer_quote, link, request)

    async def _answer_quote(self, link: Link, request: QuoteRequest) -> None:
        try:
            reply = await self.door.quote(link, request)
        except AivillageError as error:
            self._refuse(link, request.id, error)
        except Exception as defect:  # one question must not fell the daemon
            self._events.emit("quote_crashed", level=40, peer=link.peer, error=repr(defect))
            self._refuse(link, request.id, NodeError("the seller failed"))
        else:
            send_or_drop(link, reply)

    def on_call(self, link: Link, call: Call) -> None:
        """Acknowledges at once or refuses; the work goes on in a task of its own."""
        try:
            sale = self.door.admit(link, call, self._sales)
        except AivillageError as error:
            self._refuse(link, call.id, error)
            return
        self._sales[link, call.id] = sale
        if call.passing.fed_by:
            self._fed_by[call.passing.fed_by] = sale
        send_or_drop(link, messages.Accepted(id=call.id), may_ride=True)
        self._nursery.start_soon(self._serve, sale)

    def on_cancel(self, link: Link, call_id: int) -> None:
        sale = self._sales.get((link, call_id))
        if sale is not None:
            sale.scope.cancel()

    def on_input(self, link: Link, frame: messages.Input) -> None:
        """Of an ended call it is late; to one that takes none, or out of turn, it is a fault."""
        sale = self._sales.get((link, frame.id))
        if sale is not None:
            try:
                sale.inputs.put(frame)
            except AivillageError as error:
                sale.stop(error)

    def on_passed(self, _link: Link, frame: messages.Passed) -> None:
        """By the stage before, whoever that is: the ticket tells. Of an ended call it is late."""
        sale = self._fed_by.get(frame.ticket)
        if sale is not None:
            sale.inputs.pass_in(frame)

    def stop_for(self, peer: PeerId) -> None:
        """Its owner blocked a peer: what runs for it ends."""
        for sale in self.taken():
            if sale.peer == peer:
                sale.stop(unwelcome())

    def on_list(self, link: Link, call_id: int) -> None:
        send_or_drop(link, messages.Operations(id=call_id, operations=tuple(self.operations())))

    def on_down(self, link: Link) -> None:
        """A lost buyer's work stops: nobody would pay for it."""
        self.door.steps.pop(link.peer, None)
        for sale in self.taken():
            if sale.link is link:
                sale.scope.cancel()

    # ------------------------------------------------------------------ work
    async def _serve(self, sale: Sale) -> None:
        """One attempt, from acknowledged to its typed end."""
        seconds = deadline_seconds(sale.call)
        error: AivillageError | None = None
        sale.scope.deadline = trio.current_time() + seconds
        with sale.scope:
            try:
                await self._work(sale)
            except AivillageError as found:
                error = found
            except Exception as defect:  # one call must not fell its neighbours
                self._events.emit("sale_crashed", level=40, peer=sale.peer, error=repr(defect))
                error = NodeError("the seller failed")
        if sale.scope.cancelled_caught:
            error = sale.stopped or self._why_cut(sale, seconds)
        self._end(sale, error)

    def _why_cut(self, sale: Sale, seconds: float) -> AivillageError:
        """Its scope has one end for both: its buyer wants it no more, or its time is over."""
        if trio.current_time() < sale.scope.deadline:
            return JobError("cancelled by the buyer", code="CANCELLED")
        if not sale.ticket.begun:
            return self.places.too_long("its turn did not come before its deadline")
        return JobError(f"not done within {seconds:.0f} s", code="DEADLINE")

    def _end(self, sale: Sale, error: AivillageError | None) -> None:
        del self._sales[sale.link, sale.call.id]
        if self._fed_by.get(sale.call.passing.fed_by) is sale:
            del self._fed_by[sale.call.passing.fed_by]
        sale.ticket.leave(sale.worth)
        try:
            self._book.end_sale(sale.peer, sale.attempt)
            sale.steps.flush()
        except Exception as defect:  # its buyer hears of the end all the same
            self._events.emit("sale_end_crashed", level=40, peer=sale.peer, error=repr(defect))
        self._events.emit_often(
            "sale_ended",
            peer=sale.peer,
            operation=sale.call.operation,
            attempt=sale.attempt.hex(),
            micro_credits=sale.amount,
            outcome=error.code if error else "finished",
            seconds=round(time.monotonic() - sale.started, 3),
        )
        if sale.is_free and sale.worth:
            self._nursery.start_soon(self._note_favour, sale)
        if error is not None:
            self._refuse(sale.link, sale.call.id, error)

    async def _note_favour(self, sale: Sale) -> None:
        """The books tell who helped whom, also where nobody pays."""
        try:
            await self._book.favour(sale.peer, sale.attempt, sale.worth, mine=False)
        except AivillageError as error:
            self._events.emit("favour_not_noted", level=30, peer=sale.peer, reason=str(error))

    async def _work(self, sale: Sale) -> None:
        operation = sale.call.operation
        if not sale.ticket.begun:
            await self._wait_for_turn(sale)
        if serve := self.by_node.get(operation):
            await serve(sale, self.delivery.till)
        elif registry.is_served_by_engine(operation):
            await self.sessions.generate(sale)
        elif registry.takes_inputs(operation):
            await self.sessions.compute_stage(sale)
        else:
            await self.modules.run(sale)

    async def _wait_for_turn(self, sale: Sale) -> None:
        """Returns once it has a slot; the buyer hears at once that it waits, and how long it may.

        Raises:
            RefusedError: BUSY, it waited as long as any may, or others had less here.
        """
        seconds = self.places.wait_seconds(sale.ticket.ask)
        note = f"waiting for a slot, some {seconds:.0f} s"
        send_or_drop(sale.link, messages.Progress(id=sale.call.id, done=0, note=note))
        await beating(sale, note, sale.ticket.turn)
        if not registry.is_served_by_engine(sale.call.operation):
            send_or_drop(sale.link, messages.Started(id=sale.call.id))  # an engine says it itself

    def _refuse(self, link: Link, call_id: int, error: AivillageError) -> None:
        self._events.emit("call_refused", peer=link.peer, code=error.code, reason=error.message)
        send_or_drop(
            link,
            messages.Failure(
                id=call_id,
                code=error.code,
                message=error.message,
                next_step=error.next_step,
                retry_after_seconds=error.retry_after_seconds,
            ),
        )
