"""Blobs for others: who has what, and its chunks for a price. For members of the village only."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, deque
from collections.abc import Callable
from typing import BinaryIO, Final

import msgspec
import trio

from aivillage.models.mesh.fetch import UNIT, FetchRequest, FetchResult
from aivillage.node.blobs import Blobs
from aivillage.node.events import Events
from aivillage.node.gossip import send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.links import Link
from aivillage.node.sale import Sale, Till
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, NodeError, RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES, CHUNKS_MAX, Manifest
from aivillage.protocols.messages import Failure, Fetch, Held, Part
from aivillage.protocols.types import Cid, PeerId

HELD_MINOR: Final = 3
"""Since this minor version a peer knows the answer."""
PIECE_BYTES: Final = 128 * 1024
"""A frame that leaves within milliseconds: tokens of others travel between two of them."""
WAITING_BYTES: Final = 2 * PIECE_BYTES
"""One piece is written while the next one waits."""
READERS_MAX: Final = 4
"""Threads that look for hashes: of a blob of an older version all bytes are read, once."""
QUESTIONS_PER_LINK: Final = 4
LAST_SECONDS: Final = 2.0
"""What was counted may leave within this time when its buyer cancels, or this node stops."""


class BlobShop:
    """Answers `fetch`, and serves `mesh.fetch`."""

    def __init__(
        self,
        store: Blobs,
        require_welcome: Callable[[PeerId], None],
        refusal: Callable[[], AivillageError | None],
        events: Events,
        tasks: Tasks,
    ) -> None:
        """`require_welcome` raises for whom nothing is served, `refusal` says why to nobody now."""
        self._store = store
        self._require_welcome = require_welcome
        self._refusal = refusal
        self._events = events
        self._tasks = tasks
        self._limiter = trio.CapacityLimiter(READERS_MAX)
        self._asking: Counter[Link] = Counter()

    # ------------------------------------------------------------------ who has it
    def on_fetch(self, link: Link, fetch: Fetch) -> None:
        """Few questions of a link at a time: an answer can be half a megabyte."""
        if self._asking[link] >= QUESTIONS_PER_LINK:
            busy = RefusedError("too many questions at once", code="BUSY", next_step="ask again")
            _refuse(link, fetch.id, busy)
            return
        self._asking[link] += 1
        self._tasks.start_soon(self._answer, link, fetch)

    async def _answer(self, link: Link, fetch: Fetch) -> None:
        try:
            await link.drained(WAITING_BYTES)
            if refusal := self._refusal():
                raise refusal
            self._require_welcome(link.peer)
            if link.hello.minor < HELD_MINOR:
                raise _not_here()
            manifest = await self._manifest(Cid(fetch.cid))
        except AivillageError as error:
            _refuse(link, fetch.id, error)
        else:
            hashes = manifest.hashes if fetch.hashes else b""
            size, root = manifest.size_bytes, manifest.root
            send_or_drop(link, Held(id=fetch.id, size_bytes=size, root=root, hashes=hashes))
        finally:
            self._asking[link] -= 1
            self._asking += Counter()  # forgets who asks nothing

    async def _manifest(self, cid: Cid) -> Manifest:
        if not self._store.has(cid):
            raise _not_here()
        read = functools.partial(self._store.manifest, cid)
        manifest = await trio.to_thread.run_sync(read, limiter=self._limiter)
        if manifest.count > CHUNKS_MAX:
            raise RequestError(
                f"a blob of over {CHUNKS_MAX} chunks does not travel", code="TOO_LARGE"
            )
        return manifest

    # ------------------------------------------------------------------ serving
    async def serve(self, sale: Sale, till: Till) -> None:
        """The chunks that a call names, one after the other, as far as pay and owner allow.

        Raises:
            AivillageError: why it ended before the last one.
        """
        self._require_welcome(sale.peer)
        request = unpack(FetchRequest, sale.call.request)
        cid = Cid(bytes.fromhex(request.cid))
        if not self._store.has(cid):
            raise _not_here()
        with contextlib.ExitStack() as stack:
            manifest = await self._manifest(cid)
            using = self._store.using(cid)
            file, _ = await trio.to_thread.run_sync(stack.enter_context, using)
            if not 0 < request.count <= manifest.count - request.first:
                raise RequestError(f"the blob has {manifest.count} chunks")
            for number in range(request.count):
                body = await self._chunk(file, manifest, request.first + number)
                await till.pace(sale, len(body))
                out_hash = sale.fold(manifest.hash_of(request.first + number))
                await till.deliver(sale, {UNIT: number + 1}, {}, out_hash)
                await _send(sale, body, out_hash)
        result = FetchResult(size_bytes=manifest.size_bytes, mebibytes=request.count)
        till.finish(sale, pack(result), {UNIT: request.count})

    async def _chunk(self, file: BinaryIO, manifest: Manifest, index: int) -> bytes:
        """Checked before it leaves: a damaged disk must not look like a lie."""

        def read() -> bytes:
            file.seek(index * CHUNK_BYTES)
            body = file.read(manifest.size_of(index))
            return body if manifest.is_chunk(index, body) else b""

        body = await trio.to_thread.run_sync(read)
        if not body:
            self._events.emit("blob_damaged", level=40, cid=manifest.cid.hex(), chunk=index)
            raise NodeError("the blob was damaged on the seller's disk")
        return body


async def _send(sale: Sale, body: bytes, out_hash: bytes) -> None:
    """One chunk in pieces; the last one carries the running hash, which is over chunks' hashes.

    What was counted is sent, so that its buyer can pay it: also when it cancels meanwhile.
    """
    places = range(0, len(body), PIECE_BYTES)
    pieces = deque(
        Part(id=sale.call.id, seq=seq, body=body[at : at + PIECE_BYTES])
        for seq, at in enumerate(places)
    )
    pieces.append(msgspec.structs.replace(pieces.pop(), hash8=out_hash[:8]))
    try:
        await _flush(sale.link, pieces)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_SECONDS):
            await _flush(sale.link, pieces)


async def _flush(link: Link, pieces: deque[Part]) -> None:
    while pieces:
        await link.drained(WAITING_BYTES)
        send_or_drop(link, pieces.popleft())


def _not_here() -> RefusedError:
    return RefusedError(
        "there is no such blob here", code="NOT_OFFERED", next_step="ask another member"
    )


def _refuse(link: Link, call: int, error: AivillageError) -> None:
    failure = Failure(id=call, code=error.code, message=error.message, next_step=error.next_step)
    send_or_drop(link, failure)
