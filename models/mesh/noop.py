"""`mesh.noop`: does nothing, for a price, so that the mesh itself can be measured and tested."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from aivillage.protocols.ports import (
    Context,
    Event,
    Machine,
    PartEvent,
    ProgressEvent,
    ResultEvent,
    Verdict,
)
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import Seconds

PRICE_MICRO_CREDITS: Final = 10
SLEEP_SECONDS_MAX: Final = 60.0
PARTS_MAX: Final = 10_000
POLL_SECONDS: Final = 0.02
"""How late a cancelled sleep may end."""

SleepSeconds = Annotated[
    float, msgspec.Meta(ge=0, le=SLEEP_SECONDS_MAX, description="How long to sleep, in all.")
]
Parts = Annotated[
    int, msgspec.Meta(ge=0, le=PARTS_MAX, description="How many parts to send before the end.")
]


class NoopRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    note: Annotated[str, msgspec.Meta(max_length=4096, description="Comes back as it is.")] = ""
    sleep_seconds: SleepSeconds = 0.0
    parts: Parts = 0


class NoopResult(msgspec.Struct, frozen=True, kw_only=True):
    note: str = ""
    parts: int = 0


class Noop:
    """The smallest module there is."""

    name = "mesh.noop"
    title = "Do nothing, and say so"
    positional = "note"
    Request = NoopRequest
    Result = NoopResult

    def prices_micro_credits(self) -> dict[str, int]:
        return {"calls": PRICE_MICRO_CREDITS, "parts": PRICE_MICRO_CREDITS}

    def estimate(self, request: NoopRequest, machine: Machine) -> tuple[Usage, Seconds]:
        del machine  # nothing here depends on it
        return {"calls": 1, "parts": request.parts}, request.sleep_seconds + 0.001

    def meter(self, request: NoopRequest, result: NoopResult) -> Usage:
        return {"calls": 1, "parts": min(result.parts, request.parts)}

    def run(self, request: NoopRequest, context: Context) -> Iterator[Event]:
        pause_seconds = request.sleep_seconds / max(1, request.parts)
        for part in range(len(context.delivered), request.parts):
            _sleep(pause_seconds, context)
            if context.cancelled():
                return
            yield PartEvent(body=msgspec.msgpack.encode(part))
            yield ProgressEvent(done=part + 1, total=request.parts)
        if not request.parts:
            _sleep(pause_seconds, context)
        yield ResultEvent(
            body=msgspec.msgpack.encode(NoopResult(note=request.note, parts=request.parts))
        )

    def check(self, request: NoopRequest, result: NoopResult) -> Verdict:
        wanted = NoopResult(note=request.note, parts=request.parts)
        return Verdict(ok=result == wanted, reason="" if result == wanted else "not what I sent")


def _sleep(seconds: float, context: Context) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not context.cancelled():
        time.sleep(min(left, POLL_SECONDS))


MODULE: Final = Noop()
