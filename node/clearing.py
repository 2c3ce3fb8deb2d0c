"""Spending elsewhere: what one peer owes us pays what we owe another, around a ring of neighbours.

We know only our own neighbours, so a ring is tried, not searched for: a member that cannot pass
it on gives it back, and the next one is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import trio

from aivillage.ledger.core import PartnerView
from aivillage.ledger.ledger import NodeBook
from aivillage.ledger.transfers import STEPS_PER_EXPOSURE
from aivillage.node.events import Events
from aivillage.protocols.errors import AivillageError, LedgerError
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits
from aivillage.protocols.vouchers import RING_MAX

RING_SECONDS: Final = 10.0
"""A ring of neighbours that are here closes in a tenth of this; later ones still count."""
RINGS_MAX: Final = 12
"""Tried for one debt: whoever refuses once does so for a reason that lasts."""
STEPS_AT_ONCE: Final = 3
"""Of one ring under way; a fourth would be all that we risk there."""
NETTING_PART: Final = 4
"""We net by ourselves what we owe beyond this part of a line: before it stops us."""


class Cleared(msgspec.Struct, frozen=True, kw_only=True):
    """What was moved, and onto whom."""

    amount: MicroCredits
    through: tuple[PeerId, ...]


class Clearing:
    """Moves debts. One at a time for each creditor: two would count the same room twice."""

    def __init__(
        self,
        book: NodeBook,
        hubs: Callable[[], Iterable[PeerId]],
        events: Events,
        netting_seconds: Seconds = 60.0,
    ) -> None:
        """`hubs`: peers with whom many have an account, such as the village's treasury.

        `netting_seconds`: between two looks at what could be netted.
        """
        self._book = book
        self._hubs = hubs
        self._events = events
        self._netting_seconds = netting_seconds
        self._busy: set[PeerId] = set()

    async def clear(self, creditor: PeerId, amount: MicroCredits) -> Cleared:
        """Moves up to `amount` of what we owe `creditor`, or pay it ahead, onto others.

        Those who owe us come first, then those who lend.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, nothing could be moved, and what was tried.
        """
        creditor = self._name(creditor)
        if creditor in self._busy:
            raise LedgerError(f"a debt to {creditor[-8:]} is being moved already")
        self._busy.add(creditor)
        moved, through, reasons = 0, list[PeerId](), list[str]()
        try:
            for ring in self._rings(creditor, only_debtors=False):
                done = await self._around(ring, amount - moved, reasons)
                if done:
                    moved += done
                    through.append(ring[0])
                if moved >= amount:
                    break
        finally:
            self._busy.discard(creditor)
        if not moved:
            raise LedgerError(
                f"nothing of {as_credits(amount)} credits could be moved to others"
                + (f" ({'; '.join(reasons[:3])})" if reasons else ""),
                next_step="earn with somebody whom that peer knows, or ask it for a longer line",
            )
        self._events.emit("debt_moved", peer=creditor, micro_credits=moved)
        return Cleared(amount=moved, through=tuple(dict.fromkeys(through)))

    async def try_clear(self, creditor: PeerId, amount: MicroCredits) -> MicroCredits:
        """As `clear`; 0 where nothing can be moved."""
        try:
            return (await self.clear(creditor, amount)).amount
        except AivillageError:
            return 0

    def _name(self, peer: PeerId) -> PeerId:
        """The id under which the book lists a peer, which a link by its later key has not."""
        return self._book.names_of(peer)[-1]

    def _rings(self, creditor: PeerId, *, only_debtors: bool) -> list[tuple[PeerId, ...]]:
        sources = [
            view.peer
            for view in sorted(self._book.views(), key=lambda view: -view.owed_to_me)
            if view.peer != creditor and _can_pay(view, only_debtors=only_debtors)
        ]
        return rings(creditor, sources, [self._name(hub) for hub in self._hubs()])

    async def _around(
        self, ring: tuple[PeerId, ...], most: MicroCredits, reasons: list[str]
    ) -> MicroCredits:
        """Moves up to `most` around one ring, step by step, until it refuses or has no more."""
        moved = 0
        while moved < most:
            steps = self._steps(ring, most - moved)
            if not steps:
                reasons.append(f"{ring[0][-8:]} has no more for us")
                break
            done = await self._take(ring, steps, reasons)
            moved += done
            if done < sum(steps):
                break
        return moved

    def _steps(self, ring: tuple[PeerId, ...], most: MicroCredits) -> list[MicroCredits]:
        views = [self._book.view(peer) for peer in ring]
        step = min(view.exposure // STEPS_PER_EXPOSURE for view in views)
        last = views[-1]
        room = min(most, spendable(views[0]), last.line - last.owed_to_me + last.owed_by_me)
        steps: list[MicroCredits] = []
        while step > 0 and room > 0 and len(steps) < STEPS_AT_ONCE:
            steps.append(min(step, room))
            room -= steps[-1]
        return steps

    async def _take(
        self, ring: tuple[PeerId, ...], steps: list[MicroCredits], reasons: list[str]
    ) -> MicroCredits:
        closed: list[MicroCredits] = []

        async def one(amount: MicroCredits) -> None:
            try:
                if await self._book.route(ring, amount) == "closed":
                    closed.append(amount)
                else:
                    reasons.append(f"{ring[0][-8:]} could not pass it on")
            except AivillageError as error:
                reasons.append(error.message)

        with trio.move_on_after(RING_SECONDS):
            async with trio.open_nursery() as nursery:
                for amount in steps:
                    nursery.start_soon(one, amount)
        return sum(closed)

    async def run(self) -> None:
        """Nets by itself what would soon stop us, where somebody owes us as much."""
        while True:
            await trio.sleep(self._netting_seconds)
            await self.net_all()

    async def net_all(self) -> None:
        """What is too much by now, creditor by creditor."""
        for view in self._book.views():
            if view.owed_by_me * NETTING_PART > view.received_line > 0 and view.synced:
                await self._net(view.peer)

    async def _net(self, creditor: PeerId) -> None:
        """Only what others owe us: each such ring makes two debts smaller."""
        if creditor in self._busy:
            return
        self._busy.add(creditor)
        moved = 0
        try:
            for ring in self._rings(creditor, only_debtors=True):
                done = 1
                while done and (most := self._unhurried(ring)):
                    done = await self._take(ring, self._steps(ring, most), [])
                    moved += done
        finally:
            self._busy.discard(creditor)
        if moved:
            self._events.emit("debt_netted", peer=creditor, micro_credits=moved)

    def _unhurried(self, ring: tuple[PeerId, ...]) -> MicroCredits:
        """What to move next of what is left: a part, since the other members may net it too.

        All of them at once with all of it would turn the debts round, and then again. A small rest
        may go as a whole: turned round, it is not worth a ring.
        """
        source, creditor = self._book.view(ring[0]), self._book.view(ring[-1])
        left = min(source.owed_to_me, creditor.owed_by_me)
        is_small = left * NETTING_PART * RING_MAX <= creditor.received_line
        return left if is_small else left // RING_MAX


def rings(
    creditor: PeerId, sources: Sequence[PeerId], hubs: Sequence[PeerId]
) -> list[tuple[PeerId, ...]]:
    """The others of each ring worth trying: who pays for us, perhaps a hub, the creditor.

    All rings of one source before the next: else a dozen debtors whom the creditor does not know
    would keep us from ever trying the hub, which it does know.
    """
    through = [hub for hub in hubs if hub != creditor]
    found = [
        (source, *middle, creditor)
        for source in sources
        for middle in [(), *((hub,) for hub in through if hub != source)]
    ]
    return found[:RINGS_MAX]


def spendable(view: PartnerView) -> MicroCredits:
    """What the peer owes us and what more it lends us."""
    return max(0, view.received_line + view.owed_to_me - view.owed_by_me)


def _can_pay(view: PartnerView, *, only_debtors: bool) -> bool:
    has = view.owed_to_me if only_debtors else spendable(view)
    return view.known and not view.blocked and view.connected and view.synced and has > 0
