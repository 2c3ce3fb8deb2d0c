"""`inference.embed`: texts -> vectors of unit length, by an encoder.

One call, one piece of work: its parts are some texts' vectors each, and another machine goes on
from them. The daemon loads this file: standard library and msgspec only at the top.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Annotated, Final, NamedTuple

import msgspec

from aivillage.models.inference import catalogue, vectors
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import (
    Context,
    Event,
    Machine,
    PartEvent,
    ProgressEvent,
    ResultEvent,
    Verdict,
)
from aivillage.protocols.pricing import Usage, token_price
from aivillage.protocols.types import Seconds

TEXTS_MAX: Final = 256
TEXT_BYTES_MAX: Final = 1 << 15
"""More than any encoder here reads of one text."""
TEXTS_BYTES_MAX: Final = 1 << 18
VECTORS_BYTES_MAX: Final = 1 << 19
"""A request with half of the vectors, and all of them, fit a frame each."""
PART_TEXTS: Final = 16
PART_MICRO_CREDITS: Final = 10_000
"""A part is of no more texts, and of one at least where that alone costs more. It is lost with its
machine, and delivered ahead of its pay: half of what a village lends by default."""
BYTES_PER_QUAD: Final = 4
"""As a prompt: texts are priced by quads of their bytes, so whoever pays needs no tokenizer."""

_QUADS_PER_SECOND_GUESS: Final = 1_000.0
_LOAD_SECONDS_GUESS: Final = 5.0

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_BYTES_MAX)]
ModelName = Annotated[str, msgspec.Meta(max_length=128, description="Name of the model.")]
Digest = Annotated[str, msgspec.Meta(max_length=64)]
Kernel = Annotated[str, msgspec.Meta(max_length=256)]


class EmbedRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    text: Annotated[
        tuple[Text, ...],
        msgspec.Meta(min_length=1, max_length=TEXTS_MAX, description="A text; say it again."),
    ]
    model: ModelName = catalogue.EMBEDDER

    def __post_init__(self) -> None:
        require_bytes(self.text)


class EmbedResult(msgspec.Struct, frozen=True, kw_only=True):
    """A vector for each text, in order: `dimension` numbers, float32, little endian.

    `cut`: places of the texts that the model could not read to their end.
    """

    model: str
    weights_sha256: Digest
    kernel_class: Kernel
    dimension: int
    vectors: tuple[bytes, ...]
    cut: tuple[int, ...] = ()


class Encoded(msgspec.Struct, frozen=True, array_like=True):
    """The body of one `PartEvent`: the next texts' vectors, or the next documents' scores."""

    values: tuple[bytes, ...]
    cut: tuple[int, ...]


class Read(NamedTuple):
    """What was computed of a text or a pair. `is_cut`: the model could not read all of it."""

    value: bytes
    is_cut: bool


def decoded(part: bytes) -> Encoded:
    """Raises: RequestError: it is no part of such a result."""
    try:
        return msgspec.msgpack.decode(part, type=Encoded)
    except msgspec.DecodeError as error:
        raise RequestError(f"that is no part of a result: {error}") from None


def require_bytes(texts: Sequence[str], more: int = 0) -> None:
    """Raises: ValueError: a text has too many bytes, or all of them and `more` have."""
    sizes = [len(text.encode()) for text in texts]
    if max(sizes, default=0) > TEXT_BYTES_MAX:
        raise ValueError(f"a text has at most {TEXT_BYTES_MAX:,} bytes")
    if sum(sizes) + more > TEXTS_BYTES_MAX:
        raise ValueError(f"all texts together have at most {TEXTS_BYTES_MAX:,} bytes")


def quads(text_bytes: int) -> int:
    """Of one text: what reading it is priced by."""
    return -(-text_bytes // BYTES_PER_QUAD)


def guess_seconds(count: int) -> Seconds:
    """For so many quads, by the default model on one slow core, the time to load it included."""
    return _LOAD_SECONDS_GUESS + count / _QUADS_PER_SECOND_GUESS


def origin_fault(model: str, weights_sha256: str) -> str:
    """Why weights are not those of the model that was asked for, as far as that is known here."""
    known = catalogue.find(model)
    if known is not None and known.sha256 != weights_sha256:
        return "its weights are not those of the model that was asked for"
    return ""


def read_part(part: bytes, first: int, total: int, value_fault: Callable[[bytes], str]) -> Encoded:
    """A part whose first value is the one at `first`, of `total` in all.

    Raises:
        RequestError: it is none, or no result with it would pass its check.
    """
    found = decoded(part)
    end = first + len(found.values)
    if not first < end <= total:
        raise RequestError(f"a part of {len(found.values)} where {total - first} are left")
    places = [place - first for place in found.cut]
    fault = cut_fault(places, len(found.values)) or next(
        filter(None, map(value_fault, found.values)), ""
    )
    if fault:
        raise RequestError(f"a part is wrong: {fault}")
    return found


def had_before(context: Context, total: int, value_fault: Callable[[bytes], str]) -> Encoded:
    """What other machines gave already, in order.

    Raises:
        RequestError: it can be no such thing, or is of another model.
    """
    values: list[bytes] = []
    cut: list[int] = []
    for body in context.delivered:
        part = read_part(body, len(values), total, value_fault)
        values += part.values
        cut += part.cut
    return Encoded(tuple(values), tuple(cut))


def parts_of(
    had: Encoded,
    texts: Sequence[str],
    costs: Sequence[int],
    read: Callable[[str], Read],
    context: Context,
) -> Generator[Event, None, Encoded]:
    """Parts of what `texts` give beyond what was had; ends early where it is cancelled.

    `costs` are their default prices. The generator returns all values and cuts.
    """
    values, cut = [*had.values], [*had.cut]
    while len(values) < len(texts) and not context.cancelled():
        first = len(values)
        end = _end_of_part(costs, first)
        reads = [read(text) for text in texts[first:end]]
        part = Encoded(
            values=tuple(one.value for one in reads),
            cut=tuple(place for place, one in enumerate(reads, first) if one.is_cut),
        )
        values += part.values
        cut += part.cut
        yield PartEvent(body=msgspec.msgpack.encode(part))
        yield ProgressEvent(done=len(values), total=len(texts))
    return Encoded(tuple(values), tuple(cut))


def _end_of_part(costs: Sequence[int], first: int) -> int:
    """One after the last text of the part that begins at `first`."""
    end, cost = first + 1, costs[first]
    while end < min(len(costs), first + PART_TEXTS) and cost + costs[end] <= PART_MICRO_CREDITS:
        cost += costs[end]
        end += 1
    return end


class Embed:
    """The module behind the name."""

    name = "inference.embed"
    title = "Make vectors of texts"
    positional = "text"
    Request = EmbedRequest
    Result = EmbedResult

    def prices_micro_credits(self) -> dict[str, int]:
        """Of the default model."""
        return self.prices_of(catalogue.MODELS[catalogue.EMBEDDER].active_parameters)

    def prices_of(self, active_parameters: int) -> dict[str, int]:
        """As a quad of a prompt: 2 operations for each weight that a token multiplies."""
        return {"text_quads": token_price(active_parameters)}

    def require_fits(self, request: EmbedRequest, context_tokens: int) -> None:
        """Whatever is too long is cut, and told of."""

    def estimate(self, request: EmbedRequest, machine: Machine) -> tuple[Usage, Seconds]:
        """Exactly this much; the time is a guess."""
        del machine
        count = sum(quads(len(text.encode())) for text in request.text)
        return {"text_quads": count}, guess_seconds(count)

    def meter(self, request: EmbedRequest, result: EmbedResult) -> Usage:
        """Of the texts that have a vector; never looks into one."""
        return self.usage_of(request, len(result.vectors))

    def usage_of(self, request: EmbedRequest, count: int) -> Usage:
        return {"text_quads": sum(quads(len(text.encode())) for text in request.text[:count])}

    def dearest_item(self, request: EmbedRequest) -> Usage:
        return {"text_quads": max(quads(len(text.encode())) for text in request.text)}

    def count_part(self, request: EmbedRequest, part: bytes, first: int) -> int:
        known = catalogue.MODELS.get(request.model)

        def value_fault(value: bytes) -> str:
            width = known.width if known else len(value) // vectors.FLOAT_BYTES
            return vectors.fault(value, width)

        return len(read_part(part, first, len(request.text), value_fault).values)

    def run(self, request: EmbedRequest, context: Context) -> Iterator[Event]:
        total = len(request.text)
        yield ProgressEvent(done=0, total=total, note="loading the model")
        from aivillage.models.inference.encoder import encoder_of

        encoder = encoder_of(request.model)
        width = encoder.shape.width
        if total * width * vectors.FLOAT_BYTES > VECTORS_BYTES_MAX:
            raise RequestError(
                f"{total} vectors of {request.model} have more than {VECTORS_BYTES_MAX:,} bytes",
                code="TOO_LARGE",
                next_step="send fewer texts in one job, or a map of several",
            )
        had = had_before(context, total, lambda value: vectors.fault(value, width))
        price = token_price(catalogue.known(request.model).active_parameters)
        costs = [price * quads(len(text.encode())) for text in request.text]
        all_of_it = yield from parts_of(had, request.text, costs, encoder.vector, context)
        if len(all_of_it.values) < total:
            return
        result = EmbedResult(
            model=request.model,
            weights_sha256=catalogue.known(request.model).sha256,
            kernel_class=encoder.kernel_class,
            dimension=width,
            vectors=all_of_it.values,
            cut=all_of_it.cut,
        )
        yield ResultEvent(body=msgspec.msgpack.encode(result))

    def check(self, request: EmbedRequest, result: EmbedResult) -> Verdict:
        """Everything that can be told without computing a vector."""
        reason = _fault(request, result)
        return Verdict(ok=not reason, reason=reason)

    def parting(self, request: EmbedRequest, first: EmbedResult, second: EmbedResult) -> int | None:
        """The first text whose vectors are further apart than rounding explains."""
        del request
        pairs = zip(first.vectors, second.vectors, strict=False)
        for place, (one, other) in enumerate(pairs):
            if not vectors.distance(one, other) <= vectors.DISTANCE_MAX:
                return place
        counts = len(first.vectors), len(second.vectors)
        return None if counts[0] == counts[1] else min(counts)

    def items_of(self, result: EmbedResult, part: bytes, first: int) -> int:
        """As many as `part` has, where they stand in the result unchanged."""
        values = decoded(part).values
        return len(values) if result.vectors[first : first + len(values)] == values else 0


def _fault(request: EmbedRequest, result: EmbedResult) -> str:
    """What is wrong with it; empty: nothing."""
    if result.model != request.model:
        return "it is by another model"
    if reason := origin_fault(request.model, result.weights_sha256):
        return reason
    if len(result.vectors) != len(request.text):
        return f"{len(result.vectors)} vectors of {len(request.text)} texts"
    known = catalogue.find(request.model)
    if result.dimension < 1 or (known and known.width and known.width != result.dimension):
        return f"vectors of {result.dimension} numbers"
    for place, vector in enumerate(result.vectors):
        if reason := vectors.fault(vector, result.dimension):
            return f"vector {place}: {reason}"
    return cut_fault(result.cut, len(request.text))


def cut_fault(cut: Sequence[int], count: int) -> str:
    """Why these cannot be the places of texts that were cut; empty: they can."""
    in_order = all(one < other for one, other in itertools.pairwise(cut))
    return "" if in_order and all(0 <= p < count for p in cut) else "it names texts that are none"


MODULE: Final = Embed()
