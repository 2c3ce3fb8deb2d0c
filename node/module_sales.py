"""Sales of modules: one piece of work, parts as they come, the result when it may be delivered."""

from __future__ import annotations

import functools

from aivillage.node.allowances import Allowances
from aivillage.node.delivery import Delivery
from aivillage.node.gate import Gate
from aivillage.node.gossip import send_or_drop
from aivillage.node.module_runs import OnCall
from aivillage.node.part_meter import PartMeter, at_once
from aivillage.node.sale import Sale, beating, deadline_seconds
from aivillage.node.sub_jobs import Buy, SubJobs, buy_nothing
from aivillage.node.workers import Workers
from aivillage.protocols import messages
from aivillage.protocols.errors import JobError
from aivillage.protocols.ports import Book, PartEvent, ProgressEvent, ResultEvent
from aivillage.protocols.pricing import Usage, price
from aivillage.protocols.types import MicroCredits


class ModuleSales:
    """Serves them with the worker processes of `workers`."""

    def __init__(
        self, workers: Workers, book: Book, gate: Gate, allowances: Allowances, delivery: Delivery
    ) -> None:
        self._workers = workers
        self._book = book
        self._gate = gate
        self._allowances = allowances
        self._delivery = delivery
        self.buy: Buy = buy_nothing
        """Where the sub-jobs of modules go."""

    async def run(self, sale: Sale) -> None:
        """A module's call: parts as they come; the result when its price may be delivered."""
        call = sale.call
        estimate, _ = await self._workers.estimate(call.operation, call.request)
        most = price(sale.terms, estimate)
        ahead = price(sale.terms, at_once(call.operation, call.request, estimate))
        parts = PartMeter(call.operation, call.request, call.delivered)
        done = self._waived(sale, parts.usage)
        self._allowances.require_deliverable(sale.peer, ahead)
        self._gate.require_today(sale.peer, price(sale.listed, estimate))
        self._allowances.require_credit(sale.peer, most)
        # Before the work: who does not pay would have one run after the other, and its parts.
        await self._delivery.wait_for_room(sale, ahead, lambda: self._book.room(sale.peer) >= ahead)
        async with self._workers.run(
            call.operation,
            call.request,
            delivered=call.delivered,
            deadline_seconds=deadline_seconds(call),
            on_call=self._sub_jobs(sale, most),
        ) as events:
            async for event in events:
                await self._delivery.pace(sale, len(getattr(event, "body", b"")))
                if isinstance(event, ProgressEvent):
                    send_or_drop(
                        sale.link,
                        messages.Progress(
                            id=call.id, done=event.done, total=event.total, note=event.note
                        ),
                    )
                elif isinstance(event, PartEvent):
                    await self._part(sale, event, parts, done)
                elif isinstance(event, ResultEvent):
                    usage = await self._workers.meter(call.operation, call.request, event.body)
                    out_hash = sale.fold(event.body)
                    await self._delivery.deliver(sale, usage, done, out_hash)
                    self._delivery.finish(sale, event.body, usage)
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

    def _waived(self, sale: Sale, had: Usage) -> Usage:
        """What the buyer has paid elsewhere: only what it shows parts of."""
        return {unit: min(sale.call.done.get(unit, 0), count) for unit, count in had.items()}

    async def _part(self, sale: Sale, event: PartEvent, parts: PartMeter, done: Usage) -> None:
        """Leaves once its pay may be owed, where parts are paid."""
        seq = len(sale.call.delivered) + sale.number
        out_hash = sale.fold(event.body)
        parts.take(event.body)
        if parts.usage:
            await self._delivery.deliver(sale, parts.usage, done, out_hash)
        send_or_drop(
            sale.link,
            messages.Part(id=sale.call.id, seq=seq, body=event.body, hash8=out_hash[:8]),
        )
