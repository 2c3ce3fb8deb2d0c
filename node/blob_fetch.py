"""A job that fetches a blob: from several members at once, each chunk checked when it comes.

It lives as any job: one row in jobs.db, an attempt for each call, paid by what was kept. What came
lies in the draft, so that a killed fetch goes on with the chunks that are still missing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

import trio

from aivillage.models.mesh.fetch import NAME, UNIT, FetchRequest, FetchResult
from aivillage.node.attempt import Output
from aivillage.node.blob_draft import is_drafted, open_draft
from aivillage.node.blob_sources import Sources
from aivillage.node.blob_swarm import ALONE_SECONDS, Accuse, Swarm, Tab, require_patience, terms
from aivillage.node.blobs import Blobs
from aivillage.node.jobs import JobRow
from aivillage.node.trade import Receipt, Say, Trade
from aivillage.protocols import messages
from aivillage.protocols.codec import pack, unpack
from aivillage.protocols.errors import AivillageError, PeerError, RequestError
from aivillage.protocols.job import JobEvent, State, step
from aivillage.protocols.manifest import Manifest
from aivillage.protocols.messages import Held
from aivillage.protocols.types import AttemptId, Cid, MicroCredits, PeerId, Seconds

SEEK_SECONDS: Final = 10.0
"""How long the first source is waited for: a node that just started meets its village."""
LOOK_SECONDS: Final = 0.5


class BlobFetch:
    """What a `Pursuit` is for other jobs on the mesh. `under_way`: all fetches of this node."""

    def __init__(
        self,
        row: JobRow,
        say: Say,
        *,
        trade: Trade,
        store: Blobs,
        sources: Sources,
        accuse: Accuse,
        under_way: dict[Cid, trio.Event],
    ) -> None:
        self.row = row
        self.say = say
        self.state: State = "new"
        self.output = Output()
        self.excluded: dict[PeerId, AivillageError] = {}
        self.result: bytes | None = None
        self._trade = trade
        self._store = store
        self._sources = sources
        self._accuse = accuse
        self._under_way = under_way
        self._request = unpack(FetchRequest, row.request)
        self._cid = Cid(bytes.fromhex(self._request.cid))
        names = (row.peer,) if row.peer else self._request.sources
        self._names = tuple(name for name in names if name)
        self._tab = Tab(row.ceiling)
        self._false_roots: set[bytes] = set()

    @property
    def spent(self) -> MicroCredits:
        return self._tab.spent

    async def restore(self) -> None:
        """What was paid before this node stopped; what came is in the draft."""
        tab, jobs = self._tab, self._trade.jobs
        for attempt in await jobs.attempts(self.row.id):
            tab.attempts += 1
            tab.spent += attempt.price
            if attempt.price:
                tab.sellers.append(attempt.seller)
            if not attempt.outcome:
                jobs.end_attempt(AttemptId(attempt.id), attempt.price, "stopped")
        tab.chunks = len(await jobs.delivered(self.row.id))

    async def run(self) -> None:
        """To the whole blob in its place.

        Raises:
            AivillageError: why there is none; what came is paid and kept.
        """
        self.move("seek")
        if self._request.first or self._request.count:
            raise RequestError("a fetch is of a whole blob", next_step="leave out first and count")
        while (other := self._under_way.get(self._cid)) is not None:
            self.say(messages.Progress(id=0, done=0, note="another fetch of it is under way"))
            await other.wait()
        ended = self._under_way[self._cid] = trio.Event()
        try:
            while not self._store.has(self._cid):
                manifest, group = await self._agree()
                await self._require_affordable(manifest, group)
                self.move("call")
                self.move("acknowledged")
                if await self._bring(manifest) is None:
                    self.move("retry")
            self._conclude()
        finally:
            del self._under_way[self._cid]
            ended.set()

    def receipt(self) -> Receipt:
        sellers = tuple(dict.fromkeys(self._tab.sellers))
        return Receipt(
            job=self.row.id,
            operation=NAME,
            sellers=sellers,
            usage={UNIT: self._tab.chunks},
            seconds=round(time.time() - self.row.created, 3),
            price_micro_credits=self.spent,
            attempts=self._tab.attempts,
            identical="guaranteed",
            why=f"from {len(sellers)} of the village" if sellers else "it was here",
        )

    def seconds_left(self) -> Seconds:
        """Of the owner's deadline; without one a fetch lasts as long as chunks come."""
        if self.row.deadline is None:
            return math.inf
        return self.row.deadline - (time.time() - self.row.created)

    def move(self, event: JobEvent) -> None:
        self.state = step(self.state, event)

    # ------------------------------------------------------------------ stages
    async def _agree(self) -> tuple[Manifest, list[PeerId]]:
        """The manifest that most sources vouch for, or the one that the owner named; and they.

        Raises:
            AivillageError: nobody has it.
        """
        began = trio.current_time()
        while True:
            held = await self._sources.ask(self._cid, self._names, self.excluded)
            for group in self._groups(held):
                for peer in group:
                    try:
                        manifest = await self._sources.manifest(peer, self._cid, held[peer])
                    except PeerError as error:
                        await self._note(peer, error)
                    except AivillageError as error:
                        self.excluded[peer] = error
                    else:
                        return manifest, group
            patience = ALONE_SECONDS if self._tab.attempts else SEEK_SECONDS
            require_patience(self._cid, self.excluded, trio.current_time() - began, patience)
            await trio.sleep(LOOK_SECONDS)

    def _groups(self, held: dict[PeerId, Held]) -> list[list[PeerId]]:
        """Peers by the manifest that they vouch for, the largest group first.

        What is too large here comes last: it may be a lie.
        """
        groups: dict[bytes, list[PeerId]] = defaultdict(list)
        for peer, answer in held.items():
            is_wanted = self._request.root in {"", answer.root.hex()}
            if is_wanted and answer.root not in self._false_roots:
                groups[answer.root].append(peer)

        def rank(group: list[PeerId]) -> tuple[bool, int]:
            return held[group[0]].size_bytes <= self._store.bytes_max, len(group)

        return sorted(groups.values(), key=rank, reverse=True)

    async def _require_affordable(self, manifest: Manifest, group: list[PeerId]) -> None:
        """Before other blobs make room for it. What has come before may make it cheaper.

        Raises:
            RequestError: PRICE_ABOVE_CEILING, whoever says a price says a higher one.
        """
        if self._tab.attempts or is_drafted(self._store, self._cid):
            return
        dear: AivillageError | None = None
        for peer in group:
            try:
                await terms(self._trade, self._tab, manifest, peer, manifest.count)
            except AivillageError as error:
                dear = error if error.code == "PRICE_ABOVE_CEILING" else dear
            else:
                return
        if dear is not None:
            raise dear

    async def _note(self, peer: PeerId, error: PeerError) -> None:
        """A source whose manifest is none falls out, and is told of."""
        self.excluded[peer] = error
        if error.code != "PEER_LOST":
            await self._accuse(peer, self.row.id, error.message)

    async def _bring(self, manifest: Manifest) -> Path | None:
        """The blob in its place; None: the manifest was not of this blob, as its whole shows.

        Raises:
            AivillageError: nobody brings the rest.
        """
        with contextlib.ExitStack() as stack:
            opening = open_draft(self._store, manifest)
            draft = await trio.to_thread.run_sync(stack.enter_context, opening)
            swarm = Swarm(
                job=self.row.id, names=self._names, trade=self._trade, sources=self._sources,
                draft=draft, tab=self._tab, excluded=self.excluded, say=self.say,
                accuse=self._accuse,
            )  # fmt: skip
            await swarm.bring()
            path: Path | None = await trio.to_thread.run_sync(draft.finish)
        if path is None:
            await self._disown(manifest.root, swarm.peers)
        return path

    async def _disown(self, root: bytes, peers: set[PeerId]) -> None:
        """All of it came, and is not what was asked for: who vouched for it is left out."""
        self._false_roots.add(root)
        for peer in peers:
            error = PeerError("its manifest was not of this blob", code="BAD_REQUEST")
            await self._note(peer, error)

    def _conclude(self) -> None:
        """In one step: no cancel comes between the blob and the result."""
        if self.state == "seeking":  # it was here
            self.move("call")
            self.move("acknowledged")
        self.move("finished")
        self.move("passed")
        size_bytes = self._store.get(self._cid).stat().st_size
        self.result = pack(FetchResult(size_bytes=size_bytes, mebibytes=self._tab.chunks))
