"""Why a job cost what it cost, worked out anew from what was stored: pure over rows.

Nothing here trusts a stored sum. Prices come from the quote that the seller signed, usage from the
request and what was accepted, and what was signed from the book; where two of them contradict each
other, that is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from aivillage.ledger.signed import Signed
from aivillage.models import registry
from aivillage.models.inference import stages
from aivillage.models.inference.generate import BYTES_PER_QUAD, Piece
from aivillage.models.mesh.fetch import UNIT
from aivillage.node.jobs import AttemptRow, JobRow
from aivillage.node.part_meter import PartMeter
from aivillage.node.pricelist import quote_hash, read_quote
from aivillage.node.records import work_of
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import AivillageError, PeerError, RequestError
from aivillage.protocols.messages import Quote
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import AttemptId, MicroCredits, PeerId

NO_MATCH: Final = "does not match the signed quote"
QuoteState = Literal["signed", "not stored", "does not match the signed quote"]


class Kept(NamedTuple):
    """A job as jobs.db has it; `bodies` is the accepted output by attempt, in order.

    `metered`: usage of the result, where another package's module had to count it elsewhere.
    """

    job: JobRow
    attempts: Sequence[AttemptRow]
    bodies: Mapping[bytes, Sequence[bytes]]
    metered: Usage | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One unit: of `count`, `waived` came from an earlier attempt; the rest x price = amount."""

    unit: str
    count: int
    waived: int
    price_micro_credits: MicroCredits
    amount_micro_credits: MicroCredits


class Paid(msgspec.Struct, frozen=True, kw_only=True):
    """What was signed for one attempt; `receipt` and `attested` are of its last vouchers.

    Of the amount, `recovered` was forgotten by this node: the seller showed it the vouchers.
    """

    amount_micro_credits: MicroCredits
    arrears_micro_credits: MicroCredits
    recovered_micro_credits: MicroCredits
    final: bool
    receipt: bool
    attested: bool


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. `sum_micro_credits` is None where it cannot be recomputed; `note` says why."""

    attempt: str
    seller: PeerId
    outcome: str
    kernel: str
    identical: str
    quote: QuoteState
    quote_hash: str
    lines: tuple[Line, ...]
    sum_micro_credits: MicroCredits | None
    stored_micro_credits: MicroCredits
    signed: Paid
    note: str
    faults: tuple[str, ...]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The whole job; `sum_micro_credits` is None where one attempt's is."""

    job: str
    operation: str
    state: str
    local: bool
    attempts: tuple[Explained, ...]
    sum_micro_credits: MicroCredits | None
    stored_micro_credits: MicroCredits
    signed_micro_credits: MicroCredits
    ok: bool


def explain(kept: Kept, signed: Mapping[AttemptId, Signed]) -> Explanation:
    """Everything about the job that can be recomputed here."""
    job = kept.job
    found: tuple[Explained, ...] = ()
    if not job.local:
        found = tuple(
            _attempt(kept, a, signed.get(AttemptId(a.id), Signed())) for a in kept.attempts
        )
    sums = [attempt.sum_micro_credits for attempt in found]
    return Explanation(
        job=job.id,
        operation=job.operation,
        state=job.state,
        local=bool(job.local),
        attempts=found,
        sum_micro_credits=None if None in sums else sum(n for n in sums if n is not None),
        stored_micro_credits=sum(a.stored_micro_credits for a in found),
        signed_micro_credits=sum(
            a.signed.amount_micro_credits + a.signed.arrears_micro_credits for a in found
        ),
        ok=not any(attempt.faults for attempt in found),
    )


class _CannotError(Exception):
    """Why something cannot be recomputed here."""


def _attempt(kept: Kept, row: AttemptRow, signed: Signed) -> Explained:
    state, quote = _quote(kept.job, row, signed)
    faults = [f"the stored quote {NO_MATCH}"] if state == NO_MATCH else []
    lines: tuple[Line, ...] = ()
    total: MicroCredits | None = None
    note = ""
    try:
        lines = _lines(quote, _usage(kept, row), _done(row))
        total = sum(line.amount_micro_credits for line in lines)
    except _CannotError as error:
        note = str(error)
    paid = _paid(signed)
    if total is not None:
        faults += _contradictions(row, total, paid)
    return Explained(
        attempt=row.id.hex(),
        seller=row.seller,
        outcome=row.outcome or "running",
        kernel=row.kernel,
        identical=row.identical,
        quote=state,
        quote_hash=quote_hash(row.quote).hex() if row.quote else "",
        lines=lines,
        sum_micro_credits=total,
        stored_micro_credits=row.price,
        signed=paid,
        note=note or _missing(row, total, paid),
        faults=tuple(faults),
    )


# ------------------------------------------------------------------ terms


def _model(job: JobRow) -> str:
    """Of a request that cannot be read it is not known, and its bill cannot be recomputed."""
    try:
        return work_of(job.operation, job.request).model
    except RequestError:
        return ""


def _quote(job: JobRow, row: AttemptRow, signed: Signed) -> tuple[QuoteState, Quote | None]:
    """The stored quote, if its seller signed it and the vouchers name it."""
    if not row.quote:
        return "not stored", None
    quote = _quote_of(job.operation, row, _model(job))
    if quote is None and registry.is_served_by_engine(job.operation):
        quote = _quote_of(stages.OPERATION, row)  # its model was split over several sellers
    if quote is None:
        return NO_MATCH, None
    named = {item.quote_hash for item in signed.items} | {signed.intended or quote_hash(row.quote)}
    return ("signed", quote) if named == {quote_hash(row.quote)} else (NO_MATCH, None)


def _quote_of(operation: str, row: AttemptRow, model: str = "") -> Quote | None:
    try:
        return read_quote(row.quote, row.seller, operation, model)
    except PeerError:
        return None


def _lines(quote: Quote | None, used: Usage, done: Usage) -> tuple[Line, ...]:
    if quote is not None and quote.operation == stages.OPERATION:
        raise _CannotError("a stage is paid as its rows come; they are not kept")
    if quote is None:
        if not any(used.values()):
            return ()  # nothing costs nothing at any price
        raise _CannotError("without a signed quote its prices are not known")
    prices = quote.terms.prices_micro_credits
    if missing := set(used) - set(prices):
        raise _CannotError(f"the quote has no price for {', '.join(sorted(missing))}")
    return tuple(
        Line(
            unit=unit,
            count=count,
            waived=min(count, done.get(unit, 0)),
            price_micro_credits=prices[unit],
            amount_micro_credits=prices[unit] * max(0, count - done.get(unit, 0)),
        )
        for unit, count in used.items()
    )


# ------------------------------------------------------------------ usage


def _usage(kept: Kept, row: AttemptRow) -> Usage:
    """What the job had when the attempt ended, by our own meter.

    Raises:
        _CannotError: what it takes is not here.
    """
    job = kept.job
    if registry.is_done_by_node(job.operation):  # many attempts at once, each with its own chunks
        return {UNIT: len(kept.bodies.get(row.id, ()))}
    if row.outcome == "done":
        return _metered(job) if kept.metered is None else kept.metered
    bodies = kept.bodies.get(row.id, ())
    if registry.paid_by_parts(job.operation) is not None and (bodies or not row.price):
        return _parts(kept, row)
    if not registry.is_served_by_engine(job.operation):
        if row.price:
            raise _CannotError("what it delivered is not here any more")
        return {}  # the parts of other modules are paid with their result
    if row.price and not bodies:
        raise _CannotError("what it delivered was thrown away, so it cannot be counted again")
    return _pieces(bodies, _done(row)) if bodies else {}


def _parts(kept: Kept, row: AttemptRow) -> Usage:
    """Of all parts that were there when the attempt ended, its own the last of them."""
    found: list[bytes] = []
    try:
        for attempt, bodies in kept.bodies.items():
            found += bodies
            if attempt == row.id:
                return PartMeter(kept.job.operation, kept.job.request, found).usage
    except AivillageError as error:
        raise _CannotError(f"a stored part cannot be read: {error.message}") from None
    return {}


def needs_a_worker(job: JobRow) -> bool:
    """Whether what the job took can only be told by another package's code."""
    return not job.local and job.result is not None and registry.built_in(job.operation) is None


def _metered(job: JobRow) -> Usage:
    module = registry.built_in(job.operation)
    if module is None:
        raise _CannotError(
            f"{job.operation} is another package's module: only a running node can ask its meter"
        )
    if job.result is None:
        raise _CannotError("its result was not kept")
    try:
        return module.meter(unpack(module.Request, job.request), unpack(module.Result, job.result))
    except AivillageError as error:
        raise _CannotError(
            f"the stored request or result cannot be read: {error.message}"
        ) from None


def _pieces(bodies: Sequence[bytes], done: Usage) -> Usage:
    """Of pieces that go on from `done`; each says how much of the prompt was read by then."""
    try:
        pieces = [unpack(Piece, body) for body in bodies]
    except AivillageError as error:
        raise _CannotError(f"a stored piece cannot be read: {error.message}") from None
    quads = -(-max(piece.read_bytes for piece in pieces) // BYTES_PER_QUAD)
    tokens = sum(len(piece.token_ids) for piece in pieces)
    return {
        "prompt_quads": max(done.get("prompt_quads", 0), quads),
        "output_tokens": done.get("output_tokens", 0) + tokens,
    }


def _done(row: AttemptRow) -> dict[str, int]:
    """Raises: _CannotError: the stored value is none."""
    if not row.done:
        return {}
    try:
        return msgspec.msgpack.decode(row.done, type=dict[str, int])
    except msgspec.DecodeError:
        raise _CannotError("the stored usage of earlier attempts cannot be read") from None


# ------------------------------------------------------------------ what was signed


def _paid(signed: Signed) -> Paid:
    items = signed.items
    return Paid(
        amount_micro_credits=sum(item.amount for item in items if not item.arrears),
        arrears_micro_credits=sum(item.amount for item in items if item.arrears),
        recovered_micro_credits=signed.recovered,
        final=any(item.final for item in items),
        receipt=bool(items) and all(item.receipt for item in items),
        attested=bool(items) and all(item.attested for item in items),
    )


def _contradictions(row: AttemptRow, total: MicroCredits, paid: Paid) -> list[str]:
    """What cannot be, however the attempt ended; less signed than owed can."""
    faults = []
    if row.price != total:
        faults.append(f"{row.price} micro-credits are stored, recomputed are {total}")
    if paid.amount_micro_credits - paid.recovered_micro_credits > total:
        faults.append(
            f"{paid.amount_micro_credits} micro-credits were signed, recomputed are {total}"
        )
    return faults


def _missing(row: AttemptRow, total: MicroCredits | None, paid: Paid) -> str:
    signed = paid.amount_micro_credits + paid.arrears_micro_credits
    if total is None or signed == total:
        return ""
    if signed > total and paid.recovered_micro_credits:
        return (
            f"{signed - total} micro-credits were signed for output that this node has forgotten, "
            "as after a backup was restored; the seller showed it its own vouchers"
        )
    if signed > total:
        return "arrears were claimed after a crash for work that this node had not stored"
    if row.outcome in {"rejected", "doubtful"}:
        return "its result was wrong, so no more was signed"
    return f"{total - signed} micro-credits are not signed yet; the seller claims them at a SYNC"
