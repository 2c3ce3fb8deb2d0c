"""Sales that an engine's session serves: paid unit by unit, as far as room allows.

A session that is fed (`inference.stage`) computes an input only once the pay of what it will give
may be owed, so that whoever does not pay has nothing computed for long.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Final

from aivillage.models import registry
from aivillage.models.inference import stages
from aivillage.models.inference.generate import (
    GenerateRequest,
    Piece,
    joined,
    piece_of,
    prompt_bytes,
)
from aivillage.models.inference.generate import usage as units
from aivillage.models.inference.logprobs import require_size
from aivillage.models.inference.stages import StageInput, StageOutput, StageRequest, StageResult
from aivillage.node.allowances import Allowances
from aivillage.node.delivery import Delivery
from aivillage.node.engines import EngineClient, EngineSession, Scopes
from aivillage.node.gossip import send_or_drop
from aivillage.node.inputs import Fed
from aivillage.node.links import Link
from aivillage.node.sale import Sale, beating
from aivillage.node.workers import Workers
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import JobError
from aivillage.protocols.job import token_bytes
from aivillage.protocols.messages import StepItem
from aivillage.protocols.passing import PASSED_MINOR
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Usage, dearest_unit, price
from aivillage.protocols.types import AMOUNT_MAX, PeerId

LOOKAHEAD_UNITS: Final = 32
"""The engine may compute one prompt slice ahead of what may be delivered."""


def is_paid_as_it_goes(operation: str) -> bool:
    """Whether its sales are sessions of an engine."""
    return registry.is_served_by_engine(operation) or registry.takes_inputs(operation)


class SessionSales:
    """Serves them with the resident engines of `workers`."""

    def __init__(
        self, workers: Workers, book: Book, allowances: Allowances, delivery: Delivery
    ) -> None:
        self._workers = workers
        self._book = book
        self._allowances = allowances
        self._delivery = delivery
        self._scopes = Scopes()
        self.link_to: Callable[[PeerId], Link | None] = lambda _peer: None

    async def compute_stage(self, sale: Sale) -> None:
        """Computes input by input until the buyer says that there are no more.

        Raises:
            AivillageError: an input is wrong, is not paid, or does not come.
        """
        request = unpack(StageRequest, sale.call.request)
        stages.shape_of(request)
        load = self._workers.stage_ahead if request.ahead else self._workers.stage
        engine = await self._loaded(sale, functools.partial(load, request))
        if request.ahead:  # nothing is computed, and nothing owed
            self._finish_stage(sale, StageResult())
            return
        layer_tokens = head_tokens = 0
        async with engine.open_session(sale.call.request) as session:
            while (item := await sale.inputs.next()) is not None:
                fed = unpack(StageInput, item.body)
                more = stages.used_by(stages.rows_of(fed, request), fed.draws, request)
                layer_tokens, head_tokens = layer_tokens + more[0], head_tokens + more[1]
                usage = stages.units(layer_tokens, head_tokens)
                await self._room_for(sale, usage)
                session.feed(item.body)
                output = (await anext(session)).body
                await self._delivery.pace(sale, len(output))
                seq = sale.number
                out_hash = sale.fold(output)
                await self._delivery.deliver(sale, usage, {}, out_hash)
                part = messages.Part(
                    id=sale.call.id, seq=seq, body=output, hash8=out_hash[:8],
                    passed=self._passed_on(sale, item, fed, output),
                    fed8=stages.input_hash8(fed) if item.is_passed else b"",
                )  # fmt: skip
                send_or_drop(sale.link, part)
        self._finish_stage(sale, StageResult(layer_tokens=layer_tokens, head_tokens=head_tokens))

    def _passed_on(self, sale: Sale, item: Fed, fed: StageInput, output: bytes) -> bool:
        """Whether the next stage was handed what this one gave; its buyer gets it in any case."""
        passing = sale.call.passing
        link = self.link_to(PeerId(passing.to)) if item.hops and passing.to else None
        if link is None or link.hello.minor < PASSED_MINOR:
            return False
        draws = item.draws if item.hops == 1 else 0
        body = pack(StageInput(fed.position, (), unpack(StageOutput, output).states, draws))
        passed = messages.Passed(
            ticket=passing.by, seq=item.seq, body=body, hops=item.hops - 1, draws=item.draws
        )
        return send_or_drop(link, passed)

    def _finish_stage(self, sale: Sale, result: StageResult) -> None:
        whole = pack(result)
        sale.fold(whole)
        self._delivery.finish(sale, whole, stages.units(result.layer_tokens, result.head_tokens))

    async def _room_for(self, sale: Sale, usage: Usage) -> None:
        """Returns once so much in all could be delivered."""
        more = sale.price_of(usage, {}) - sale.amount
        if more and not sale.is_free:
            await self._delivery.wait_for_room(
                sale, more, lambda: self._book.room(sale.peer) >= more
            )

    async def generate(self, sale: Sale) -> None:
        """Streams an engine session, unit by unit, as far as pay allows."""
        call = sale.call
        delivered = [unpack(Piece, body) for body in call.delivered]
        ids = [token for piece in delivered for token in piece.token_ids]
        request = unpack(GenerateRequest, call.request)
        for piece in delivered:
            require_size(piece.logprobs, len(piece.token_ids), request.logprobs)
        asked_bytes = prompt_bytes(request)
        had = units(asked_bytes, len(ids)) if ids else {}
        done = self._waived(sale, had)
        unit = dearest_unit(sale.terms)
        await self._delivery.wait_for_room(sale, unit, lambda: self._book.room(sale.peer) >= unit)
        engine = await self._loaded(sale, functools.partial(self._workers.engine, request.model))
        scope = self._scopes.of(sale.peer)
        async with engine.open_session(call.request, tuple(ids), scope=scope) as session:
            self._allow(sale, session, sum(had.values()))
            async for frame in session:
                if frame.error:
                    raise JobError(frame.error, code="JOB_FAILED")
                first = len(ids)
                ids += frame.token_ids
                delivered.append(piece_of(frame))
                usage = units(frame.read_bytes, len(ids))
                mark = frame.fingerprint if call.fingerprints else b""
                body = token_bytes(frame.token_ids) + mark + frame.logprobs
                await self._delivery.pace(sale, len(body) + len(frame.text.encode()))
                out_hash = sale.fold(body)
                await self._delivery.deliver(sale, usage, done, out_hash)
                sale.steps.add(
                    StepItem(call.id, first, frame.token_ids, frame.text, out_hash[:8],
                             frame.read_bytes, mark, frame.logprobs)
                )  # fmt: skip
                self._allow(sale, session, sum(usage.values()))
                if frame.finished:
                    whole = pack(joined(request, delivered, frame.finished))
                    await self._delivery.pace(sale, len(whole))
                    self._delivery.finish(sale, whole, usage)
                    return
        raise JobError("the engine stopped before the end", code="JOB_FAILED")

    def _waived(self, sale: Sale, had: Usage) -> Usage:
        """What the buyer has paid elsewhere, it says: only what it shows tokens of, within bounds.

        Raises:
            RefusedError: OWNER_LIMIT, we read enough for this peer that nobody pays us for.
        """
        done = {unit: min(sale.call.done.get(unit, 0), count) for unit, count in had.items()}
        self._allowances.take_reading(sale.peer, price(sale.terms, done))
        return done

    async def _loaded(
        self, sale: Sale, load: Callable[[], Awaitable[EngineClient]]
    ) -> EngineClient:
        """The engine, loaded; the buyer gets a sign of life every two seconds until then."""
        engine = await beating(sale, "loading the model", load)
        if engine.is_full:  # what this node rechecks has slots too, for moments
            await beating(sale, "its slot reads another answer", engine.has_room)
        sale.ticket.works()
        info = engine.info
        started = messages.Started(
            id=sale.call.id, kernel_class=info.kernel_class, identical=info.identical
        )
        send_or_drop(sale.link, started)
        return engine

    def _allow(self, sale: Sale, session: EngineSession, units_made: int) -> None:
        """Beyond `units_made`, never more than one delivery may hold: it would wait for ever."""
        if sale.is_free:  # no delivery waits
            session.allow(AMOUNT_MAX)
            return
        dearest = dearest_unit(sale.terms)
        at_once = max(1, self._book.policy(sale.peer).exposure // dearest)
        room = self._book.room(sale.peer) // dearest
        session.allow(units_made + max(room, min(LOOKAHEAD_UNITS, at_once)))
