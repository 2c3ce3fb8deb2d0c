"""Runs other people's jobs, and never further ahead of their pay than the owner allows."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from aivillage.models import registry
from aivillage.node.allowances import Allowances, unwelcome
from aivillage.node.config import Settings
from aivillage.node.events import Events
from aivillage.node.gate import Gate
from aivillage.node.gossip import send_or_drop
from aivillage.node.inputs import Inputs
from aivillage.node.links import Link
from aivillage.node.module_runs import OnCall
from aivillage.node.pricelist import PriceList, listed
from aivillage.node.sale import Sale, Till, beating, deadline_seconds
from aivillage.node.session_sales import Counter, SessionSales, is_paid_as_it_goes
from aivillage.node.steps import StepWriter
from aivillage.node.sub_jobs import Buy, SubJobs, buy_nothing
from aivillage.node.workers import Workers
from aivillage.protocols import messages
from aivillage.protocols.errors import (
    AivillageError,
    JobError,
    LedgerError,
    NodeError,
    PeerError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.messages import Call, OperationInfo, QuoteRequest
from aivillage.protocols.ports import Book, PartEvent, ProgressEvent, ResultEvent
from aivillage.protocols.pricing import Terms, Usage, dearest_unit, is_free, price
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId

ATTEMPTS_REMEMBERED: Final = 65_536
"""Against replayed calls; an attempt id is 16 random bytes of the buyer's."""
ROOM_SECONDS: Final = 15.0
"""A buyer that has not paid for this long while we wait for room gets no more; its slot is free."""
ROOM_CHECK_SECONDS: Final = 1.0
"""How long we rely on being told of room."""


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
        self._settings = settings
        self._prices = prices
        self._workers = workers
        self._book = book
        self._events = events
        self._nursery = nursery
        self._gate = gate
        self._sales: dict[tuple[Link, int], Sale] = {}  # ids begin anew on every link
        self._steps: dict[PeerId, StepWriter] = {}
        self._attempts: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.allowances = Allowances(settings, book)
        self.refusal: Callable[[], AivillageError | None] = lambda: None
        self.acquainted: Callable[[PeerId], Awaitable[None]] = _at_once
        """Returns once the owner's word on a peer that just came is in the book."""
        self.buy: Buy = buy_nothing
        """Where the sub-jobs of modules go."""
        self.by_node: dict[str, Callable[[Sale, Till], Awaitable[None]]] = {}
        self._sessions = SessionSales(
            workers, book, self.allowances,
            Counter(self._deliver, self._wait_for_room, self._pace, self._finish),
        )  # fmt: skip

    # ------------------------------------------------------------------ what we sell
    def operations(self) -> list[OperationInfo]:
        """What this node sells now, at the owner's prices."""
        if not self._settings.serve or self.refusal() is not None:
            return []
        known = [info for info in self.known_operations() if info.enabled]
        offered = [info for info in known if self._gate.offers(info.name)]
        return [x for x in offered if x.models or not registry.is_served_by_engine(x.name)]

    def known_operations(self) -> list[OperationInfo]:
        """Everything installed here, at the owner's prices, switched on or not."""
        return [self._prices.priced(operation) for operation in self._workers.operations()]

    def free_slots(self) -> int:
        return max(0, self._settings.slots - len(self._sales))

    def running(self) -> list[Sale]:
        return list(self._sales.values())

    # ------------------------------------------------------------------ messages
    def on_quote_request(self, link: Link, request: QuoteRequest) -> None:
        self._nursery.start_soon(self._answer_quote, link, request)

    def on_call(self, link: Link, call: Call) -> None:
        """Acknowledges at once or refuses; the work goes on in a task of its own."""
        try:
            sale = self._admit(link, call)
        except AivillageError as error:
            self._refuse(link, call.id, error)
            return
        self._sales[link, call.id] = sale
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

    def stop_for(self, peer: PeerId) -> None:
        """Its owner blocked a peer: what runs for it ends."""
        for sale in self.running():
            if sale.peer == peer:
                sale.stop(unwelcome())

    def on_list(self, link: Link, call_id: int) -> None:
        send_or_drop(link, messages.Operations(id=call_id, operations=tuple(self.operations())))

    def on_down(self, link: Link) -> None:
        """A lost buyer's work stops: nobody would pay for it."""
        self._steps.pop(link.peer, None)
        for sale in self.running():
            if sale.link is link:
                sale.scope.cancel()

    # ------------------------------------------------------------------ admission
    async def _answer_quote(self, link: Link, request: QuoteRequest) -> None:
        try:
            self._require_sold(request.operation)
            await self.acquainted(link.peer)
            self.allowances.require_welcome(link.peer)
            operation = self._workers.describe_for(request.operation, request.request)
            usage, seconds = await self._workers.estimate(request.operation, request.request)
            terms = self._terms(operation, link.peer)
            self._gate.require_today(link.peer)
            if not is_paid_as_it_goes(request.operation):
                self.allowances.require_deliverable(link.peer, price(terms, usage))
                self._gate.require_today(link.peer, price(listed(operation), usage))
            reply = messages.QuoteReply(
                id=request.id,
                quote=self._prices.quote(operation, terms, dict(usage), seconds),
                room_micro_credits=self._book.headroom(link.peer),
                queue_length=len(self._sales),
            )
        except AivillageError as error:
            self._refuse(link, request.id, error)
        except Exception as defect:  # one question must not fell the daemon
            self._events.emit("quote_crashed", level=40, peer=link.peer, error=repr(defect))
            self._refuse(link, request.id, NodeError("the seller failed"))
        else:
            send_or_drop(link, reply)

    def _require_sold(self, name: str) -> None:
        self._workers.describe(name)
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        if not self._settings.serve:
            raise RefusedError("this node serves nobody", code="NOT_OFFERED")
        self._gate.require_offered(name)

    def _terms(self, operation: OperationInfo, peer: PeerId) -> Terms:
        return self._prices.terms(operation, free=self._book.policy(peer).shared)

    def _admit(self, link: Link, call: Call) -> Sale:
        """Everything that can be said before any work.

        Raises:
            AivillageError: the call is refused, and why.
        """
        self._require_sold(call.operation)
        self.allowances.require_welcome(link.peer)
        self._gate.require_today(link.peer)
        operation = self._workers.describe_for(call.operation, call.request)
        if len(call.attempt) != 16 or (link, call.id) in self._sales:
            raise RequestError("an attempt has a fresh 16-byte id, a call a free one")
        if call.attempt in self._attempts:
            raise PeerError("this attempt was called before", code="REPLAYED")
        model = operation.models[0].name if operation.models else ""
        quote = self._prices.find(call.quote_hash, call.operation, model)
        if is_free(quote.terms) != is_free(self._terms(operation, link.peer)):
            raise RefusedError(  # a quote can be handed on, what is free only for some can not
                "this quote was not made for you as you stand with this node now",
                code="QUOTE_EXPIRED",
                next_step="ask for a new one",
            )
        self.allowances.require_credit(link.peer, dearest_unit(quote.terms))
        holders = [sale.peer for sale in self._sales.values()]
        self.allowances.take_slot(link.peer, holders, goes_on=bool(call.delivered))
        self._attempts[call.attempt] = None
        if len(self._attempts) > ATTEMPTS_REMEMBERED:
            self._attempts.popitem(last=False)
        attempt = AttemptId(call.attempt)
        self._book.begin_sale(link.peer, attempt, call.quote_hash, call.ceiling_micro_credits)
        return Sale(
            link=link,
            call=call,
            attempt=attempt,
            terms=quote.terms,
            listed=listed(operation),
            scope=trio.CancelScope(),
            steps=self._steps.setdefault(link.peer, StepWriter(link)),
            started=time.monotonic(),
            inputs=Inputs(taken=registry.takes_inputs(call.operation)),
        )

    # ------------------------------------------------------------------ work
    async def _serve(self, sale: Sale) -> None:
        """One attempt, from acknowledged to its typed end."""
        seconds = deadline_seconds(sale.call)
        error: AivillageError | None = None
        with sale.scope:
            try:
                with trio.fail_after(seconds):
                    await self._work(sale)
            except trio.TooSlowError:
                error = JobError(f"not done within {seconds:.0f} s", code="DEADLINE")
            except AivillageError as found:
                error = found
            except Exception as defect:  # one call must not fell its neighbours
                self._events.emit("sale_crashed", level=40, peer=sale.peer, error=repr(defect))
                error = NodeError("the seller failed")
        if sale.scope.cancelled_caught:
            error = sale.stopped or JobError("cancelled by the buyer", code="CANCELLED")
        self._end(sale, error)

    def _end(self, sale: Sale, error: AivillageError | None) -> None:
        del self._sales[sale.link, sale.call.id]
        try:
            self._book.end_sale(sale.peer, sale.attempt)
            sale.steps.flush()
        except Exception as defect:  # its buyer hears of the end all the same
            self._events.emit("sale_end_crashed", level=40, peer=sale.peer, error=repr(defect))
        self._events.emit(
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
        if serve := self.by_node.get(sale.call.operation):
            await serve(sale, Till(self._deliver, self._pace, self._finish))
        elif registry.is_served_by_engine(sale.call.operation):
            await self._sessions.generate(sale)
        elif registry.takes_inputs(sale.call.operation):
            await self._sessions.compute_stage(sale)
        else:
            await self._run_module(sale)

    async def _deliver(self, sale: Sale, usage: Usage, done: Usage, out_hash: bytes) -> None:
        """Waits until the attempt may have delivered `usage`, and counts it.

        Raises:
            RequestError: PRICE_ABOVE_CEILING, the buyer would not pay it.
            RefusedError: OWNER_LIMIT, it had what the owner lends a day.
            LedgerError: INSUFFICIENT_CREDITS, it did not pay for what it has.
        """
        amount = sale.price_of(usage, done)
        if amount > sale.call.ceiling_micro_credits:
            raise RequestError("the next unit is above the ceiling", code="PRICE_ABOVE_CEILING")
        self._gate.take(sale.peer, sale.worth_of(usage, done) - sale.worth)
        await self._wait_for_room(
            sale,
            amount - sale.amount,
            lambda: self._book.deliver(sale.peer, sale.attempt, amount, out_hash),
        )
        sale.delivered(usage, done)

    async def _wait_for_room(
        self, sale: Sale, amount: MicroCredits, fits: Callable[[], bool]
    ) -> None:
        """Returns once `fits`; the buyer hears meanwhile that we wait for it.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, it did not pay for what it has.
        """
        end = trio.current_time() + ROOM_SECONDS
        while not fits():
            if trio.current_time() >= end:
                raise LedgerError(
                    f"no payment made room for more within {ROOM_SECONDS:.0f} s",
                    next_step="it comes back as vouchers arrive, or is healed; try again later",
                )
            self._book.want_room(sale.peer, amount)
            with trio.move_on_after(ROOM_CHECK_SECONDS) as patience:
                await self._book.room_changed(sale.peer)
            if patience.cancelled_caught:  # not silence: the buyer would take us for lost
                note = "waiting for payment"
                send_or_drop(sale.link, messages.Progress(id=sale.call.id, done=0, note=note))

    async def _pace(self, sale: Sale, size_bytes: int) -> None:
        """Waits until the owner's cap on what leaves lets so much of an answer go."""
        seconds = self._gate.wait_seconds(size_bytes)
        if seconds > 0:
            note = "its owner limits what leaves that node"
            await beating(sale, note, functools.partial(trio.sleep, seconds))

    async def _run_module(self, sale: Sale) -> None:
        """A module's call: parts as they come; the result when its price may be delivered."""
        call = sale.call
        estimate, _ = await self._workers.estimate(call.operation, call.request)
        most = price(sale.terms, estimate)
        self.allowances.require_deliverable(sale.peer, most)
        self._gate.require_today(sale.peer, price(sale.listed, estimate))
        self.allowances.require_credit(sale.peer, most)
        # Before the work: who does not pay would have one run after the other, and its parts.
        await self._wait_for_room(sale, most, lambda: self._book.room(sale.peer) >= most)
        async with self._workers.run(
            call.operation,
            call.request,
            delivered=call.delivered,
            deadline_seconds=deadline_seconds(call),
            on_call=self._sub_jobs(sale, most),
        ) as events:
            async for event in events:
                await self._pace(sale, len(getattr(event, "body", b"")))
                if isinstance(event, ProgressEvent):
                    send_or_drop(
                        sale.link,
                        messages.Progress(
                            id=call.id, done=event.done, total=event.total, note=event.note
                        ),
                    )
                elif isinstance(event, PartEvent):
                    self._part(sale, event)
                elif isinstance(event, ResultEvent):
                    usage = await self._workers.meter(call.operation, call.request, event.body)
                    out_hash = sale.fold(event.body)
                    await self._deliver(sale, usage, {}, out_hash)
                    self._finish(sale, event.body, usage)
                    return
        raise JobError("the module ended without a result", code="JOB_FAILED")

    def _sub_jobs(self, sale: Sale, earns: MicroCredits) -> OnCall:
        """At our cost, so never for more than the sale can earn: a buyer names the ceiling."""
        sub_jobs = SubJobs(
            self.buy,
            parent=sale.attempt.hex(),
            ceiling=min(sale.call.ceiling_micro_credits, earns),
            deadline_seconds=deadline_seconds(sale.call),
        )

        async def call(operation: str, request: bytes, budget: int) -> bytes:
            work = functools.partial(sub_jobs, operation, request, budget)
            return await beating(sale, f"waiting for {operation}", work)

        return call

    def _part(self, sale: Sale, event: PartEvent) -> None:
        seq = len(sale.call.delivered) + sale.number
        out_hash = sale.fold(event.body)
        send_or_drop(
            sale.link,
            messages.Part(id=sale.call.id, seq=seq, body=event.body, hash8=out_hash[:8]),
        )

    def _finish(self, sale: Sale, result: bytes, usage: Usage) -> None:
        sale.steps.flush()
        send_or_drop(
            sale.link,
            messages.Finished(
                id=sale.call.id,
                attempt=sale.attempt,
                result=result,
                usage=dict(usage),
                out_hash=sale.out_hash,
                seconds=time.monotonic() - sale.started,
            ),
        )

    def _refuse(self, link: Link, call_id: int, error: AivillageError) -> None:
        self._events.emit("call_refused", peer=link.peer, code=error.code, reason=error.message)
        send_or_drop(
            link,
            messages.Failure(
                id=call_id, code=error.code, message=error.message, next_step=error.next_step
            ),
        )


async def _at_once(_peer: PeerId) -> None:
    """Everybody is as well known as they will be."""
