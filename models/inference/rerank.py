"""`inference.rerank`: documents in the order in which they answer a query, best first.

A model that ranks reads query and document together. An encoder compares their vectors: cheaper to
come by, and no better than a search by those vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec

from aivillage.models.inference import catalogue, vectors
from aivillage.models.inference.embed import (
    TEXT_BYTES_MAX,
    TEXTS_MAX,
    Digest,
    Kernel,
    ModelName,
    Read,
    Text,
    cut_fault,
    decoded,
    guess_seconds,
    had_before,
    origin_fault,
    parts_of,
    quads,
    read_part,
    require_bytes,
)
from aivillage.protocols.ports import (
    Context,
    Event,
    Machine,
    ProgressEvent,
    ResultEvent,
    Verdict,
)
from aivillage.protocols.pricing import Usage, token_price
from aivillage.protocols.types import Seconds

SCORE_MISS_MAX: Final = 1e-4
"""Between the scores of two honest machines; some 1e-6 was measured."""

Method = Literal["cosine", "cross"]


class RerankRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    query: Annotated[Text, msgspec.Meta(description="What the documents should answer.")]
    document: Annotated[
        tuple[Text, ...],
        msgspec.Meta(min_length=1, max_length=TEXTS_MAX, description="A text; say it again."),
    ]
    model: ModelName = catalogue.EMBEDDER

    def __post_init__(self) -> None:
        query_bytes = len(self.query.encode())
        if query_bytes > TEXT_BYTES_MAX:
            raise ValueError(f"a query has at most {TEXT_BYTES_MAX:,} bytes")
        require_bytes(self.document, query_bytes)


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """A document by its place in the request, and its score: a cosine, or 0 to 1."""

    index: int
    score: float


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    """All documents, best first; equal ones in the order of the request.

    `method`: `cross` where the model read query and document together. `cut`: places of the
    documents that could not be read to their end.
    """

    model: str
    weights_sha256: Digest
    kernel_class: Kernel
    method: Method
    ranking: tuple[Ranked, ...]
    cut: tuple[int, ...] = ()


class Rerank:
    """The module behind the name."""

    name = "inference.rerank"
    title = "Order documents by how well they answer a query"
    positional = "query"
    Request = RerankRequest
    Result = RerankResult

    def prices_micro_credits(self) -> dict[str, int]:
        """Of the default model."""
        return self.prices_of(catalogue.MODELS[catalogue.EMBEDDER].active_parameters)

    def prices_of(self, active_parameters: int) -> dict[str, int]:
        """2 operations for each weight that a token multiplies."""
        return {"pair_quads": token_price(active_parameters)}

    def require_fits(self, request: RerankRequest, context_tokens: int) -> None:
        """Whatever is too long is cut, and told of."""

    def estimate(self, request: RerankRequest, machine: Machine) -> tuple[Usage, Seconds]:
        """Exactly this much; the time is a guess."""
        del machine
        count = sum(_pair_sizes(request))
        return {"pair_quads": count}, guess_seconds(count)

    def meter(self, request: RerankRequest, result: RerankResult) -> Usage:
        """Query and document together, for each: whoever pays need not know what read them."""
        return self.usage_of(request, len(result.ranking))

    def usage_of(self, request: RerankRequest, count: int) -> Usage:
        return {"pair_quads": sum(_pair_sizes(request)[:count])}

    def dearest_item(self, request: RerankRequest) -> Usage:
        return {"pair_quads": max(_pair_sizes(request))}

    def count_part(self, request: RerankRequest, part: bytes, first: int) -> int:
        return len(read_part(part, first, len(request.document), _score_fault).values)

    def run(self, request: RerankRequest, context: Context) -> Iterator[Event]:
        total = len(request.document)
        yield ProgressEvent(done=0, total=total, note="loading the model")
        from aivillage.models.inference.encoder import encoder_of

        encoder = encoder_of(request.model)
        asked = b"" if encoder.shape.ranks else encoder.vector(request.query).value

        def read(document: str) -> Read:
            if encoder.shape.ranks:
                return encoder.score(request.query, document)
            found = encoder.vector(document)
            return Read(vectors.packed([vectors.dot(asked, found.value)]), found.is_cut)

        had = had_before(context, total, _score_fault)
        price = token_price(catalogue.known(request.model).active_parameters)
        costs = [price * size for size in _pair_sizes(request)]
        all_of_it = yield from parts_of(had, request.document, costs, read, context)
        if len(all_of_it.values) < total:
            return
        result = RerankResult(
            model=request.model,
            weights_sha256=catalogue.known(request.model).sha256,
            kernel_class=encoder.kernel_class,
            method="cross" if encoder.shape.ranks else "cosine",
            ranking=ranked(all_of_it.values),
            cut=all_of_it.cut,
        )
        yield ResultEvent(body=msgspec.msgpack.encode(result))

    def check(self, request: RerankRequest, result: RerankResult) -> Verdict:
        """Everything that can be told without reading a document."""
        reason = _fault(request, result)
        return Verdict(ok=not reason, reason=reason)

    def parting(
        self, request: RerankRequest, first: RerankResult, second: RerankResult
    ) -> int | None:
        """The first document whose scores are further apart than rounding explains."""
        del request
        one, other = _by_index(first), _by_index(second)
        for index in sorted({*one, *other}):
            miss = abs(one.get(index, math.inf) - other.get(index, math.inf))
            if not miss <= SCORE_MISS_MAX:
                return index
        return None

    def items_of(self, result: RerankResult, part: bytes, first: int) -> int:
        """As many as `part` has, where they stand in the result unchanged."""
        values = decoded(part).values
        scores = _by_index(result)
        if any(map(_score_fault, values)):
            return 0
        said = [scores.get(place) for place in range(first, first + len(values))]
        return len(values) if said == [vectors.numbers(value)[0] for value in values] else 0


def ranked(scores: tuple[bytes, ...]) -> tuple[Ranked, ...]:
    """`scores` of the documents in the order of the request -> best first."""
    found = [
        Ranked(index=index, score=vectors.numbers(score)[0]) for index, score in enumerate(scores)
    ]
    return tuple(sorted(found, key=lambda one: (-one.score, one.index)))


def _score_fault(value: bytes) -> str:
    """Why it can be no score; empty: it can."""
    if len(value) != vectors.FLOAT_BYTES:
        return "a score of another size"
    return "" if abs(vectors.numbers(value)[0]) <= 1 + SCORE_MISS_MAX else "a score is none"


def _pair_sizes(request: RerankRequest) -> list[int]:
    """In quads, of each document with the query."""
    query_bytes = len(request.query.encode())
    return [quads(query_bytes + len(text.encode())) for text in request.document]


def _by_index(result: RerankResult) -> dict[int, float]:
    return {one.index: one.score for one in result.ranking}


def _fault(request: RerankRequest, result: RerankResult) -> str:
    """What is wrong with it; empty: nothing."""
    if result.model != request.model:
        return "it is by another model"
    if reason := origin_fault(request.model, result.weights_sha256):
        return reason
    count = len(request.document)
    if sorted(one.index for one in result.ranking) != list(range(count)):
        return f"it does not rank each of {count} documents once"
    lowest, scores = (-1 if result.method == "cosine" else 0), [r.score for r in result.ranking]
    if not all(lowest - SCORE_MISS_MAX <= score <= 1 + SCORE_MISS_MAX for score in scores):
        return "a score is none"
    if any(one < other for one, other in itertools.pairwise(scores)):
        return "the best is not first"
    return cut_fault(result.cut, count)


MODULE: Final = Rerank()
