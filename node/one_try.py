"""A job at one named seller, once: whoever handed it out knows better where it goes next."""

from __future__ import annotations

import msgspec

from aivillage.node.attempt import Output
from aivillage.node.link import Link
from aivillage.node.market import Choice, Need
from aivillage.node.pursuit import Pursuit
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import JobId, PeerId


class Had(msgspec.Struct, frozen=True):
    """What a try leaves to the next one."""

    job: JobId
    output: Output
    sellers: tuple[PeerId, ...]
    kernels: frozenset[tuple[str, str]]


class OneTry(Pursuit):
    """As any job, except that neither the market nor another attempt follows a failure."""

    _from: JobId | None = None

    def had(self) -> Had:
        """What it was given so far, and by whom."""
        output = self.output
        copied = Output(
            list(output.bodies), list(output.ids), list(output.text), list(output.logprobs),
            output.read_bytes,
        )  # fmt: skip
        return Had(self.row.id, copied, tuple(self._sellers), frozenset(self._kernels))

    def go_on_from(self, had: Had) -> None:
        """What an earlier try of the same task was given, and paid for, is not bought again."""
        self._from = had.job
        self.output = had.output
        self._sellers, self._kernels = list(had.sellers), set(had.kernels)

    async def run(self) -> None:
        """As any job's, once what it goes on from is kept with it, for a restart of this node."""
        if self._from is not None:
            await self._trade.jobs.hand_on(self._from, self.row.id)
        await super().run()

    async def _choose(self, need: Need) -> Choice | None:
        return await self._trade.market.terms_of(self.row.peer, need)

    async def _give_up_on(self, link: Link, error: AivillageError) -> None:
        self._note_failure(link.peer, error)
        if error.code == "PEER_LOST" and not self._trade.market.is_back(link):
            self._trade.discovery.unreachable(link.peer)
        raise error
