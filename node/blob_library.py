"""The blobs of a node, as the rest of it sees them: kept, served, and fetched from others."""

from __future__ import annotations

from pathlib import Path

import trio

from aivillage.models.mesh.fetch import NAME, FetchRequest
from aivillage.node.blob_fetch import BlobFetch
from aivillage.node.blob_shop import BlobShop
from aivillage.node.blob_sources import Sources
from aivillage.node.blobs import open_blobs
from aivillage.node.buyer import Buyer
from aivillage.node.config import Settings
from aivillage.node.gate import Gate
from aivillage.node.guard import Tasks
from aivillage.node.jobs import JobRow
from aivillage.node.paths import Paths
from aivillage.node.replication import Replicator
from aivillage.node.reputation import Key
from aivillage.node.seller import Seller
from aivillage.node.trade import Say, Trade
from aivillage.node.villagers import Villagers
from aivillage.protocols.codec import pack
from aivillage.protocols.errors import AivillageError, RefusedError
from aivillage.protocols.messages import Frame, Submit
from aivillage.protocols.types import Cid, JobId, MicroCredits, PeerId


class Library:
    """Joins the store to buyer and seller; `on_fetch` answers those who ask who has what."""

    def __init__(
        self,
        settings: Settings,
        paths: Paths,
        trade: Trade,
        buyer: Buyer,
        seller: Seller,
        gate: Gate,
        villagers: Villagers,
        replicator: Replicator,
        tasks: Tasks,
    ) -> None:
        self.store = open_blobs(paths.blobs, settings)
        self._trade = trade
        self._buyer = buyer
        self._sources = Sources(villagers.members, self._is_out)
        self._replicator = replicator
        self._under_way: dict[Cid, trio.Event] = {}

        def refusal() -> AivillageError | None:
            if not settings.serve or not gate.offers(NAME):
                return RefusedError("this node gives no blobs to others", code="NOT_OFFERED")
            return seller.refusal()

        def require_welcome(peer: PeerId) -> None:
            seller.allowances.require_welcome(peer)
            if not villagers.is_member(peer):
                raise RefusedError(
                    "this node gives blobs to its own village",
                    code="OWNER_LIMIT",
                    next_step="join the village",
                )

        shop = BlobShop(self.store, require_welcome, refusal, trade.events, tasks)
        self.on_fetch = shop.on_fetch
        seller.by_node[NAME] = shop.serve
        buyer.by_node[NAME] = self._job

    def _job(self, row: JobRow, say: Say) -> BlobFetch:
        return BlobFetch(
            row, say, trade=self._trade, store=self.store, sources=self._sources,
            accuse=self._accuse, under_way=self._under_way,
        )  # fmt: skip

    def _is_out(self, peer: PeerId) -> bool:
        is_cut_off = peer in self._trade.market.cut_off(NAME)
        return is_cut_off or self._trade.book.policy(peer).blocked

    async def _accuse(self, peer: PeerId, job: JobId, reason: str) -> None:
        """It gets no fetches for a while, as who gave a wrong answer; `reputation` says why."""
        await self._replicator.reputation.found_wrong(Key(peer, NAME, "", ""), job, reason)

    async def fetch_blob(
        self,
        cid: Cid,
        *,
        root: bytes = b"",
        sources: tuple[str, ...] = (),
        ceiling: MicroCredits | None = None,
        say: Say | None = None,
    ) -> Path:
        """Where the bytes of `cid` lie, once they are here: for what runs in this process.

        Raises:
            AivillageError: nobody has it, or it costs more than `ceiling`.
        """
        if not self.store.has(cid):
            request = FetchRequest(cid=cid.hex(), root=root.hex(), sources=sources)
            submit = Submit(
                id=0, operation=NAME, request=pack(request), ceiling_micro_credits=ceiling
            )
            running = await self._buyer.submit(submit, say or _unheard)
            await running.ended.wait()
            if running.error is not None:
                raise running.error
        return self.store.get(cid)


def _unheard(_frame: Frame) -> None:
    """Nobody follows this fetch."""
