"""Who of the members here has a blob: a question to each link, and one manifest."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Final

import trio

from aivillage.node.links import Link
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.manifest import Manifest, require_whole
from aivillage.protocols.messages import Fetch, Held
from aivillage.protocols.types import Cid, PeerId, Seconds

ASKED_MAX: Final = 16
"""Members asked at a time, by chance: as many as a node links to by itself."""
ANSWER_SECONDS: Final = 5.0
MANIFEST_SECONDS: Final = 30.0
"""Half a megabyte at most, over a slow line."""


class Sources:
    """Asks links. `members` are those with people of our village."""

    def __init__(
        self, members: Callable[[], list[Link]], is_out: Callable[[PeerId], bool] = lambda _: False
    ) -> None:
        """`is_out`: who is asked for nothing unless a fetch names it: blocked, or cut off."""
        self._members = members
        self._is_out = is_out

    def link(self, peer: PeerId) -> Link | None:
        return next((link for link in self._members() if link.peer == peer), None)

    async def ask(
        self, cid: Cid, names: Collection[str], without: Collection[PeerId]
    ) -> dict[PeerId, Held]:
        """Who says that it has the blob. `names`: only these, by their ids or the ends of them."""
        found: dict[PeerId, Held] = {}
        able = [link for link in self._members() if link.peer not in without]
        if names:
            able = [link for link in able if any(link.peer.endswith(name) for name in names)]
        else:
            able = [link for link in able if not self._is_out(link.peer)]

        async def question(link: Link) -> None:
            try:
                found[link.peer] = await _held(link, Fetch(id=link.next_id(), cid=cid))
            except AivillageError:
                return  # whoever has it says so

        async with trio.open_nursery() as nursery:
            for link in random.sample(able, min(len(able), ASKED_MAX)):
                nursery.start_soon(question, link)
        return found

    async def manifest(self, peer: PeerId, cid: Cid, held: Held) -> Manifest:
        """The hashes of its chunks, which must be those that `held` promised.

        Raises:
            PeerError: PEER_LOST; BAD_REQUEST, they are not.
            AivillageError: it refused.
        """
        link = self.link(peer)
        if link is None:
            raise PeerError(f"{peer[-8:]} is gone", code="PEER_LOST")
        question = Fetch(id=link.next_id(), cid=cid, hashes=True)
        answer = await _held(link, question, seconds=MANIFEST_SECONDS)
        return require_whole(Manifest(cid, answer.size_bytes, answer.hashes), held.root)


async def _held(link: Link, question: Fetch, seconds: Seconds = ANSWER_SECONDS) -> Held:
    answer = await link.ask(question, timeout_seconds=seconds)
    if not isinstance(answer, Held):
        raise PeerError("asked for a blob, it said something else", code="BAD_REQUEST")
    return answer
