"""What this node found out about others, over the control socket, and how it is forgiven."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aivillage.node import who
from aivillage.node.desk import Desk
from aivillage.node.reputation import Evidence
from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import PeerId

PEERS_LISTED_MAX: Final = 200
EVIDENCE_LISTED: Final = 5


class ReputationDesk:
    """Answers by name; `handlers()` is the table that the control socket serves."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._reputation = desk.replicator.reputation

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What can be asked, by name."""
        return {"reputation": self.on_reputation, "forgive": self.on_forgive}

    async def on_reputation(self, args: dict[str, Any]) -> dict[str, Any]:
        """Everybody, or one peer with what is held against it; and what checks cost."""
        settings = {origin.key: origin.value for origin in self._desk.origins}
        peers = [self._named(args)] if args.get("peer") else self._reputation.peers()
        return {
            "peers": [
                {
                    "peer": peer,
                    "results": self._reputation.listing(peer),
                    "evidence": [
                        _shown(one)
                        for one in await self._reputation.evidence(peer, EVIDENCE_LISTED)
                    ],
                }
                for peer in peers[:PEERS_LISTED_MAX]
            ],
            "spending": self._reputation.spending(settings["verify_percent_max"]),
        }

    async def on_forgive(self, args: dict[str, Any]) -> dict[str, Any]:
        """Gives a peer jobs again. Its results are all done again until trust is earned anew."""
        peer = self._named(args)
        if not await self._reputation.forgive(peer):
            raise RequestError(
                f"nothing is held against {peer[-8:]}", next_step="aivillage-node reputation"
            )
        return await self.on_reputation(args)

    def _named(self, args: dict[str, Any]) -> PeerId:
        known = {*self._reputation.peers(), *self._desk.discovery.records}
        return who.named(str(args["peer"]), known)


def _shown(one: Evidence) -> dict[str, Any]:
    """Without the answers themselves; attempts are named for `statement --job`."""
    return {
        "at_unix": one.at,
        "operation": one.operation,
        "job": one.job,
        "reason": one.reason,
        "attempts": [
            {"seller": share.seller, "attempt": share.attempt.hex()}
            for answer in one.answers
            for share in answer.shares
        ],
    }
