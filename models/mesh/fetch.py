"""`mesh.fetch`: gives chunks of a blob. Both nodes do it themselves; here are its terms.

What is paid is what the buyer counted: chunks that it got and whose hashes it checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.manifest import CHUNKS_MAX
from aivillage.protocols.ports import Context, Event, Machine, Verdict
from aivillage.protocols.pricing import Usage
from aivillage.protocols.types import Seconds

NAME: Final = "mesh.fetch"
UNIT: Final = "mebibytes"
PRICE_MICRO_CREDITS: Final = 100
"""A mebibyte: 1,000 of them are what a job may cost unasked, or 372 tokens of the default model."""
BYTES_PER_SECOND: Final = 8 << 20
"""What an estimate supposes; a fetch measures."""
HEX: Final = r"^([0-9a-f]{64})?$"

Chunk = Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between nodes `first` and `count` say which chunks; a person fetches all of a blob."""

    cid: Annotated[
        str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$", description="sha-256 of the whole blob.")
    ]
    root: Annotated[
        str, msgspec.Meta(pattern=HEX, description="Root of its manifest, where it is known.")
    ] = ""
    sources: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=64)], ...],
        msgspec.Meta(max_length=16, description="Only from these peers (ids or their ends)."),
    ] = ()
    first: Annotated[Chunk, msgspec.Meta(description="Between nodes only: the first chunk.")] = 0
    count: Annotated[Chunk, msgspec.Meta(description="Between nodes only: how many chunks.")] = 0


class FetchResult(msgspec.Struct, frozen=True, kw_only=True):
    """`mebibytes`: chunks delivered, each counted as a whole one, those had twice included."""

    size_bytes: int = 0
    mebibytes: int = 0


class Kept(msgspec.Struct, frozen=True):
    """What a buyer notes of each chunk that it owes."""

    chunk: int


class Fetch:
    """Terms, estimate and meter; `run` is the node's own."""

    name = NAME
    title = "Fetch a blob from the members that have it, chunk by chunk"
    positional = "cid"
    Request = FetchRequest
    Result = FetchResult

    def prices_micro_credits(self) -> dict[str, int]:
        return {UNIT: PRICE_MICRO_CREDITS}

    def estimate(self, request: FetchRequest, machine: Machine) -> tuple[Usage, Seconds]:
        del machine  # the line between the nodes says how fast it is
        return {UNIT: request.count}, request.count * (1 << 20) / BYTES_PER_SECOND

    def meter(self, request: FetchRequest, result: FetchResult) -> Usage:
        return {UNIT: min(result.mebibytes, request.count or result.mebibytes)}

    def run(self, request: FetchRequest, context: Context) -> Iterator[Event]:
        """Raises: RequestError: no worker can."""
        del request, context
        raise RequestError("a node fetches by itself", next_step="aivillage-node blobs get CID")

    def check(self, request: FetchRequest, result: FetchResult) -> Verdict:
        """Every chunk was checked when it came."""
        ok = not request.count or result.mebibytes <= request.count
        return Verdict(ok=ok, reason="" if ok else "more chunks than were asked for")


MODULE: Final = Fetch()
