"""What was found out for one choice so far, and how it is laid open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from aivillage.node.choice import (
    LINES_MAX,
    RATES,
    Explanation,
    Weighed,
    explores,
    line,
    why_not,
)
from aivillage.protocols.errors import AivillageError, RefusedError
from aivillage.protocols.types import PeerId

if TYPE_CHECKING:
    from aivillage.node.market import Choice, Need

REASON_MAX: Final = 200
"""Characters of a refusal in an explanation: a peer may have written it."""
REFUSALS: Final = frozenset({"INSUFFICIENT_CREDITS", "OWNER_LIMIT"})
"""Of a seller that is there: to wait for others' offers would only hide what it said."""


class Seen:
    """What was found out for one choice so far."""

    def __init__(
        self,
        need: Need,
        home: Weighed | None,
        excluded: Mapping[PeerId, AivillageError],
        turn: int,
    ) -> None:
        self.need = need
        self.home = home
        self.excluded = excluded
        self.turn = turn
        self.offered: dict[PeerId, Weighed] = {}
        self.asked: set[PeerId] = set()
        self.found: dict[PeerId, Choice] = {}
        self.reasons: dict[PeerId, AivillageError] = {}

    def told(self) -> list[AivillageError]:
        """What those said who are there and refused."""
        now = [error for error in self.reasons.values() if error.code != "PEER_LOST"]
        return [*now, *(error for error in self.excluded.values() if error.code in REFUSALS)]

    def rivals(self) -> list[Weighed]:
        """Who offers it and has not refused, by its offer."""
        return [one for peer, one in self.offered.items() if not self._is_out(peer)]

    def may_ask(self, peer: PeerId) -> bool:
        """Whether it was not asked yet, and nothing is known that speaks against it."""
        return peer not in self.asked and not self._is_out(peer)

    def _is_out(self, peer: PeerId) -> bool:
        """Who was not there is a rival again once `asked` begins anew."""
        reason = self.reasons.get(peer)
        refused = reason is not None and (reason.code != "PEER_LOST" or peer in self.asked)
        return refused or peer in self.excluded

    def explores(self, rivals: list[Weighed]) -> bool:
        return explores(self.turn, rivals, self.home)

    def explained(self, winner: Weighed, why: str) -> Explanation:
        """Every candidate, the winner first, then those that were asked."""
        quoted = {peer: choice.weighed for peer, choice in self.found.items()}
        every = self.offered | quoted
        order = [peer for peer in (*quoted, *self.asked, *every) if peer in every]
        weighed = [every[peer] for peer in dict.fromkeys(order)]
        if self.home is not None:
            weighed.insert(0, self.home)
        others = [one for one in weighed if one.facts.peer != winner.facts.peer]
        lines = [line(winner, "chosen"), *(line(one, self._lost(one, winner)) for one in others)]
        return Explanation(
            why=why,
            prefer=self.need.prefer,
            micro_credits_a_second=RATES[self.need.prefer],
            candidates=tuple(lines[:LINES_MAX]),
            left_out=max(0, len(lines) - LINES_MAX),
        )

    def _lost(self, one: Weighed, winner: Weighed) -> str:
        peer = one.facts.peer
        if error := self.excluded.get(peer):
            return f"failed this job before: {error.message}"[:REASON_MAX]
        if error := self.reasons.get(peer):
            return f"refused: {error.code} {error.message}"[:REASON_MAX]
        if peer in self.asked and peer not in self.found:
            return "no answer in time"
        if peer not in self.asked and not one.facts.here:
            return f"not asked: {why_not(one, winner)}, by its offer"
        return why_not(one, winner)


def nobody(seen: Seen) -> AivillageError:
    if told := seen.told():
        return told[0]
    both = (*seen.excluded.items(), *seen.reasons.items())
    tried = [f"{peer[-8:]}: {error.message}" for peer, error in both]
    detail = f" ({'; '.join(tried[:4])})" if tried else ""
    return RefusedError(
        f"no peer does {' with '.join(filter(None, seen.need.work))} now{detail}",
        code="NO_PEER",
        next_step="`aivillage-node peers` shows who is there; invite one that offers it, "
        "or do it here: submit --local",
    )
