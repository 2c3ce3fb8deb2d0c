"""`text.count_words`: a module in one file. Copy it to begin your own.

The name of the operation is the name of the entry point in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from aivillage.protocols.ports import (
    Context,
    Event,
    Machine,
    ProgressEvent,
    ResultEvent,
    Verdict,
)

TEXT_CHARACTERS_MAX = 100_000
PRICE_MICRO_CREDITS = 1


class CountWordsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    text: Annotated[
        str, msgspec.Meta(max_length=TEXT_CHARACTERS_MAX, description="The text to count.")
    ]


class CountWordsResult(msgspec.Struct, frozen=True, kw_only=True):
    words: int = 0


class CountWords:
    """Everything that a module must have; nothing to inherit from."""

    name = "text.count_words"
    title = "Count the words of a text"
    positional = "text"
    Request = CountWordsRequest
    Result = CountWordsResult

    def prices_micro_credits(self) -> dict[str, int]:
        return {"characters": PRICE_MICRO_CREDITS}

    def estimate(
        self, request: CountWordsRequest, machine: Machine
    ) -> tuple[dict[str, int], float]:
        """At most this usage, and the seconds it may take."""
        del machine
        return {"characters": len(request.text)}, 0.1

    def meter(self, request: CountWordsRequest, result: CountWordsResult) -> dict[str, int]:
        """What the buyer pays for, recounted from what the buyer has."""
        del result
        return {"characters": len(request.text)}

    def run(self, request: CountWordsRequest, context: Context) -> Iterator[Event]:
        """The work: yields progress if it takes long, and ends with the result."""
        del context  # cancelled(), scratch, delivered and call() are here when you need them
        yield ProgressEvent(done=1, total=1)
        result = CountWordsResult(words=len(request.text.split()))
        yield ResultEvent(body=msgspec.msgpack.encode(result))

    def check(self, request: CountWordsRequest, result: CountWordsResult) -> Verdict:
        """Told by the buyer on every result; it should be cheaper than `run`."""
        right = len(request.text.split())
        return Verdict(ok=result.words == right, reason="" if result.words == right else "no")


MODULE = CountWords()
