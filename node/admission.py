"""What this node sells, what it says before it is called, and whom it lets in.

Everything that can be said before any work is said here: a call is refused and why, or there is a
sale of it with a slot or a place in the queue.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Awaitable, Callable, Container
from typing import Final

import msgspec
import trio

from aivillage.models import registry
from aivillage.node.allowances import Allowances
from aivillage.node.config import Settings
from aivillage.node.fair_queue import WEIGHT_MAX, Ask
from aivillage.node.gate import Gate
from aivillage.node.inputs import Inputs
from aivillage.node.links import Link
from aivillage.node.part_meter import at_once
from aivillage.node.places import Places
from aivillage.node.pricelist import PriceList, listed
from aivillage.node.resident import kind_of
from aivillage.node.sale import Sale, deadline_seconds
from aivillage.node.session_sales import is_paid_as_it_goes
from aivillage.node.steps import StepWriter
from aivillage.node.workers import Workers
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError, RequestError
from aivillage.protocols.messages import Call, OperationInfo, QuoteReply, QuoteRequest
from aivillage.protocols.passing import TICKET_BYTES
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Terms, Usage, dearest_unit, is_free, price
from aivillage.protocols.types import AttemptId, PeerId

ATTEMPTS_REMEMBERED: Final = 65_536
"""Against replayed calls; an attempt id is 16 random bytes of the buyer's."""


class Admission:
    """At the door of a seller."""

    def __init__(
        self,
        *,
        settings: Settings,
        prices: PriceList,
        workers: Workers,
        book: Book,
        gate: Gate,
        allowances: Allowances,
        places: Places,
    ) -> None:
        self._settings = settings
        self._prices = prices
        self._workers = workers
        self._book = book
        self._gate = gate
        self._allowances = allowances
        self._places = places
        self._attempts: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.steps: dict[PeerId, StepWriter] = {}
        self.refusal: Callable[[], AivillageError | None] = lambda: None
        self.acquainted: Callable[[PeerId], Awaitable[None]] = _at_once

    # ------------------------------------------------------------------ what we sell
    def operations(self) -> list[OperationInfo]:
        """What this node sells now, at the owner's prices."""
        if not self._settings.serve or self.refusal() is not None:
            return []
        known = [info for info in self.known_operations() if info.enabled]
        offered = [info for info in known if self._gate.offers(info.name)]
        return [x for x in offered if x.models or not registry.formats(x.name)]

    def known_operations(self) -> list[OperationInfo]:
        """Everything installed here, at the owner's prices, switched on or not."""
        return [self._prices.priced(operation) for operation in self._workers.operations()]

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

    # ------------------------------------------------------------------ before a call
    async def quote(self, link: Link, request: QuoteRequest) -> QuoteReply:
        """What it would cost, and how long it would wait.

        Raises:
            AivillageError: it would be refused, and why.
        """
        self._require_sold(request.operation)
        await self.acquainted(link.peer)
        self._allowances.require_welcome(link.peer)
        operation = self._workers.describe_for(request.operation, request.request)
        usage, seconds = await self._workers.estimate(request.operation, request.request)
        terms = self._terms(operation, link.peer)
        self._gate.require_today(link.peer)
        if not is_paid_as_it_goes(request.operation):
            ahead = at_once(request.operation, request.request, usage)
            self._allowances.require_deliverable(link.peer, price(terms, ahead))
            self._gate.require_today(link.peer, price(listed(operation), usage))
        ask = self._ask(link.peer, operation, terms, usage, seconds)
        queue = self._places.queue
        return QuoteReply(
            id=request.id,
            quote=self._prices.quote(operation, terms, dict(usage), seconds),
            room_micro_credits=self._book.headroom(link.peer),
            queue_length=queue.running + queue.waiting,
            slots=self._workers.at_once(operation, self._settings.slots),
            wait_seconds=self._places.wait_seconds(ask),
        )

    def _ask(
        self, peer: PeerId, operation: OperationInfo, terms: Terms, usage: Usage, seconds: float
    ) -> Ask:
        """A call of so much at most, as the queue sees it."""
        cost = max(1, price(listed(operation), usage))
        return Ask(
            number=self._places.number(),
            peer=peer,
            kind=kind_of(operation),
            cost=cost,
            weight=self._weight(peer, price(terms, usage), cost),
            guess_seconds=seconds,
        )

    def _weight(self, peer: PeerId, agreed: int, default: int) -> int:
        """Free work counts once, work at the default price twice, at three times it four times."""
        if any(peer.endswith(end) for end in self._settings.first_peers):
            return WEIGHT_MAX
        return min(WEIGHT_MAX, 1 + agreed // default)

    # ------------------------------------------------------------------ a call
    def admit(self, link: Link, call: Call, taken: Container[tuple[Link, int]]) -> Sale:
        """Everything that can be said before any work. `taken`: calls that are open.

        Raises:
            AivillageError: the call is refused, and why.
        """
        self._require_sold(call.operation)
        self._allowances.require_welcome(link.peer)
        self._gate.require_today(link.peer)
        operation = self._workers.describe_for(call.operation, call.request)
        if len(call.attempt) != 16 or (link, call.id) in taken:
            raise RequestError("an attempt has a fresh 16-byte id, a call a free one")
        if len(call.passing.fed_by) not in (0, TICKET_BYTES):
            raise RequestError(f"a ticket has {TICKET_BYTES} bytes")
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
        self._allowances.require_credit(link.peer, dearest_unit(quote.terms))
        usage, seconds = self._estimate(call, quote.estimate, quote.seconds)
        ask = self._ask(link.peer, operation, quote.terms, usage, seconds)
        ask = msgspec.structs.replace(ask, goes_on=bool(call.delivered))
        ticket = self._places.enter(ask, deadline_seconds(call))
        self._remember(call.attempt)
        attempt = AttemptId(call.attempt)
        self._book.begin_sale(link.peer, attempt, call.quote_hash, call.ceiling_micro_credits)
        return Sale(
            link=link,
            call=call,
            attempt=attempt,
            ticket=ticket,
            terms=quote.terms,
            listed=listed(operation),
            scope=trio.CancelScope(),
            steps=self.steps.setdefault(link.peer, StepWriter(link)),
            started=time.monotonic(),
            inputs=Inputs(
                taken=registry.takes_inputs(call.operation), is_shared=bool(call.passing.fed_by)
            ),
        )

    def _estimate(self, call: Call, quoted: Usage, seconds: float) -> tuple[Usage, float]:
        """Of this very request where we can say so at once; else of the one that was quoted."""
        module = self._workers.module(call.operation)
        if module is None:
            return quoted, seconds
        return module.estimate(unpack(module.Request, call.request), self._workers.machine)

    def _remember(self, attempt: bytes) -> None:
        self._attempts[attempt] = None
        if len(self._attempts) > ATTEMPTS_REMEMBERED:
            self._attempts.popitem(last=False)


async def _at_once(_peer: PeerId) -> None:
    """Everybody is as well known as they will be."""
