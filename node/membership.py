"""Which village this node belongs to, and what proves it: what the hello carries."""

from __future__ import annotations

from typing import Final

from aivillage.node import village
from aivillage.node.jobs import Jobs
from aivillage.protocols.types import PeerId

VILLAGE_SETTING: Final = "village"


class Membership:
    """One village, and the certificates in it."""

    def __init__(self, first: PeerId, jobs: Jobs) -> None:
        """`first`: the id of this node's first key, which its own village is named by."""
        self.village = village.village_of(first)
        self.certificates: tuple[bytes, ...] = ()
        self._jobs = jobs

    async def load(self) -> None:
        """What a former run joined."""
        self.village = await self._jobs.setting(VILLAGE_SETTING) or self.village
        self.certificates = village.newest(await self._jobs.certificates(self.village))

    async def store(self, joined: bytes, certificates: tuple[bytes, ...]) -> None:
        await self._jobs.add_certificates(joined, certificates)
        await self._jobs.set_setting(VILLAGE_SETTING, joined)
        await self.load()
