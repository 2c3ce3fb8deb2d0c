"""The people around: who is linked, who belongs, and finding lost neighbours again."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.ledger import NodeBook
from aivillage.node import village
from aivillage.node.config import Settings
from aivillage.node.dialling import first_to_answer
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.gossip import send_or_drop
from aivillage.node.grants import Grants
from aivillage.node.guard import Tasks
from aivillage.node.identity import peer_of
from aivillage.node.jobs import Jobs
from aivillage.node.joining import Joining
from aivillage.node.lan import Lan
from aivillage.node.links import Link, Links
from aivillage.node.membership import Membership
from aivillage.node.owners import Owners
from aivillage.node.reachability import Reachability
from aivillage.node.reasons import Reasons
from aivillage.protocols import messages, succession
from aivillage.protocols.errors import AivillageError, PeerError, RequestError
from aivillage.protocols.ports import SomebodyElseError
from aivillage.protocols.types import AMOUNT_MAX, MicroCredits, PeerId, Seconds

GRANTED_MINOR: Final = 1
GRANTS_LOOK_SECONDS: Final = 1.0
DIAL_SECONDS: Final = 10.0
BACKOFF_SECONDS: Final = (1.0, 60.0)
CLOCK_TOLD_MS: Final = 60_000
NEIGHBOURS: Final = 16
"""With so many we leave it to others to come to us: a link costs both sides pings and gossip."""


class Villagers:
    """Neighbours: who may owe us what, and who is to be found again."""

    def __init__(
        self,
        *,
        key: Ed25519PrivateKey,
        settings: Settings,
        membership: Membership,
        links: Links,
        jobs: Jobs,
        book: NodeBook,
        events: Events,
        tasks: Tasks,
        owners: Owners,
        grants: Grants,
        discovery: Discovery,
    ) -> None:
        self.peer = peer_of(key)
        self.membership = membership
        self._settings = settings
        self._links = links
        self._jobs = jobs
        self._book = book
        self._events = events
        self._tasks = tasks
        self._owners = owners
        self._grants = grants
        self.joining = Joining(
            key=key, membership=membership, links=links, jobs=jobs, book=book, events=events,
            tasks=tasks, usual_line=settings.village_line_micro_credits, on_joined=self._look_again,
        )  # fmt: skip
        self.reasons = Reasons()
        self._not_before: dict[PeerId, tuple[float, Seconds]] = {}
        self._dialling: set[PeerId] = set()
        self._trusting: dict[PeerId, trio.Event] = {}
        self._members: dict[PeerId, Link] = {}
        self._following = trio.Lock()
        self.on_succeeded: Callable[[PeerId, PeerId], None] = lambda old, new: None
        """A peer goes by another key from now on: (old, new)."""
        self._discovery = discovery
        discovery.is_neighbour = self.is_member
        self.reachability = Reachability(links, tasks, events, self.members)
        self.lan = Lan(
            self.peer, lambda: membership.village, links.transport.addresses, events,
            on_found=lambda peer: self._not_before.pop(peer, None),
        )  # fmt: skip
        self.services = (self.keep_in_touch, self.end_grants, self.reachability.run) + (
            (self.lan.run,) if settings.mdns else ()
        )

    def line_of(self, link: Link) -> MicroCredits | None:
        """What a neighbour's certificates let it owe us, grants apart; None for a stranger."""
        now = int(time.time() * 1000)
        names = self._book.names_of(link.peer)
        promised = village.membership(link.hello.certificates, names, self.membership.village, now)
        if promised is None:
            return None
        return min(promised, self._settings.village_line_micro_credits)

    def owner_of(self, link: Link) -> PeerId | None:
        """Whose device a neighbour is, where it proves it."""
        now = int(time.time() * 1000)
        return self._owners.owner_of(link.peer, link.hello.owner_certificate, now)

    def members(self) -> list[Link]:
        """Links with people of our village."""
        return list(self._members.values())

    def hubs(self) -> list[PeerId]:
        """With whom everybody here has an account: the village's founder, its treasury."""
        wanted = self.membership.village
        return [
            peer
            for peer in self._members
            if any(village.village_of(name) == wanted for name in self._book.names_of(peer))
        ]

    def is_member(self, peer: PeerId) -> bool:
        """Whether `peer` is linked, and of our village."""
        return peer in self._members

    # ------------------------------------------------------------------ changed keys
    async def admit(self, peer: PeerId, hello: messages.Hello) -> None:
        """Follows the changes of key that a hello proves, durably, before its link is up.

        Raises:
            PeerError: OWNER_LIMIT, this key was replaced: whoever has it may have stolen it.
        """
        chain = succession.chain(hello.successions, peer)
        async with self._following:  # two streams of one peer would follow it twice
            for step in self._new_steps(chain, hello):
                try:
                    await self._book.succeed(step.old, step.new, step.proof)
                except RequestError as error:
                    self._events.emit("succession_refused", level=30, peer=peer, reason=str(error))
                    break
                await self._follow(step.old, step.new)
        now_called = self._book.names_of(peer)[0]
        if now_called != peer:
            self.reasons.note(peer, f"refused: its key was replaced by {now_called}")
            raise PeerError(
                f"this key was replaced by {now_called}",
                code="OWNER_LIMIT",
                next_step="start the node that has the new key",
            )

    def _new_steps(
        self, steps: list[succession.Step], hello: messages.Hello
    ) -> list[succession.Step]:
        """Those from the latest key on that the book knows; all where they make a member."""
        for index in range(len(steps) - 1, -1, -1):
            if self._book.knows(steps[index].new):
                return steps[index + 1 :]
        for index in range(len(steps) - 1, -1, -1):
            if self._book.knows(steps[index].old):
                return steps[index:]
        names = [step.old for step in steps]
        now = int(time.time() * 1000)
        line = village.membership(hello.certificates, names, self.membership.village, now)
        return steps if line is not None else []  # keys are free: strangers would fill the book

    async def _follow(self, old: PeerId, new: PeerId) -> None:
        """The book knows the new key: whoever is here with the old one goes."""
        self._book.disconnected(old)
        link = self._links.get(old)
        if link is not None:
            link.close("its key was replaced")
        self._not_before.pop(old, None)
        self._discovery.rename(old, new)
        self.on_succeeded(old, new)
        self._events.emit("key_changed", peer=new, former=old)
        await self._jobs.rename_peer(old, new)

    # ------------------------------------------------------------------ links
    def on_up(self, link: Link) -> None:
        """Opens the books with a neighbour, and remembers where it lives."""
        if self._is_retired(link.peer):  # its key was replaced between its hello and now
            link.close("its key was replaced")
            return
        line = self.line_of(link)
        self._not_before.pop(link.peer, None)
        self.reasons.forget(link.peer)
        self._discovery.met(link.peer)
        self._book.connected(
            link.peer,
            link.hello.boot_epoch,
            functools.partial(_send_blob, link),
            link.hello.minor,
        )
        if line is not None:
            self._grants.met(link.peer, link.hello.grants)
            self._members[link.peer] = link
            self._trusting[link.peer] = trio.Event()
            self._tasks.start_soon(self._trust, link)
        elif self._book.view(link.peer).known or self._owners.is_mine(self.owner_of(link)):
            self._tasks.start_soon(self._forsake, link)
        self._tell("peer_up", link, agent=link.hello.agent)

    def _is_retired(self, peer: PeerId) -> bool:
        return self._book.names_of(peer)[0] != peer

    def _tell(self, event: str, link: Link, **fields: Any) -> None:
        """Strangers come and go: only who looks closely wants to read of each."""
        is_member = self.is_member(link.peer)
        level = logging.INFO if is_member else logging.DEBUG
        self._events.emit(event, level=level, peer=link.peer, member=is_member, **fields)

    async def _trust(self, link: Link) -> None:
        try:
            await self._lend(link)
            await self._jobs.saw_peer(link.peer, link.hello.addresses)
        except AivillageError as error:
            self._events.emit("peer_not_recorded", level=30, peer=link.peer, reason=str(error))
        finally:
            trusting = self._trusting.pop(link.peer, None)
            if trusting is not None:
                trusting.set()

    async def _lend(self, link: Link) -> None:
        """The line of a member, grants included, as of now: to the book, and to itself."""
        line = self.line_of(link)
        if line is None:
            return
        line = min(AMOUNT_MAX, line + self._grants.guaranteed(link.peer, link.hello.certificates))
        exposure = min(line, self._settings.village_exposure_micro_credits)
        await self._owners.set_line(link.peer, line, exposure, self.owner_of(link))
        self.tell_standing(link.peer)

    def tell_standing(self, peer: PeerId) -> bool:
        """Says to a peer what is in force for it, the owner's word first; False: it is not here."""
        link = self._links.get(self._book.names_of(peer)[0])
        if link is None:
            return False
        view = self._book.view(peer)
        return send_or_drop(
            link,
            messages.Standing(line_micro_credits=view.line, exposure_micro_credits=view.exposure),
        )

    async def _lend_again(self, link: Link) -> None:
        try:
            await self._lend(link)
        except AivillageError as error:
            self._events.emit("peer_not_recorded", level=30, peer=link.peer, reason=str(error))

    async def _forsake(self, link: Link) -> None:
        """Who belongs to no village of ours may owe what our owner says, else nothing.

        What a former member owes, it owes.
        """
        try:
            await self._owners.set_line(link.peer, 0, 0, self.owner_of(link))
            self.tell_standing(link.peer)
            if self._book.view(link.peer).line:
                await self._jobs.saw_peer(link.peer, link.hello.addresses)
        except AivillageError as error:
            self._events.emit("peer_not_recorded", level=30, peer=link.peer, reason=str(error))

    def on_standing(self, link: Link, standing: messages.Standing) -> None:
        self._tasks.start_soon(self._note_standing, link.peer, standing)

    async def _note_standing(self, peer: PeerId, standing: messages.Standing) -> None:
        """A generous peer does not make us generous: our own exposure bounds what it may claim."""
        exposure = self._settings.village_exposure_micro_credits
        try:
            await self._book.set_received(
                peer, standing.line_micro_credits, min(standing.exposure_micro_credits, exposure)
            )
        except AivillageError as error:
            self._events.emit("standing_not_recorded", level=30, peer=peer, reason=str(error))

    def on_granted(self, link: Link, granted: messages.Granted) -> None:
        """A grant to this node, or one that a member shows after its hello."""
        self._tasks.start_soon(self._note_grant, link, granted)

    async def _note_grant(self, link: Link, granted: messages.Granted) -> None:
        try:
            if await self._grants.take(granted):
                self._events.emit("grant_taken", peer=link.peer)
                self.show_grant(granted.envelope)
        except RequestError:  # not ours: then it is the sender's own
            if self.is_member(link.peer) and self._grants.showed(link.peer, granted.envelope):
                await self._lend_again(link)
        except AivillageError as error:
            self._events.emit("grant_not_kept", level=30, peer=link.peer, reason=str(error))

    def show_grant(self, envelope: bytes) -> None:
        """Our hellos were said before we had it."""
        for link in self.members():
            if link.hello.minor >= GRANTED_MINOR:
                send_or_drop(link, messages.Granted(envelope=envelope))

    def give_grant(self, holder: PeerId, granted: messages.Granted) -> bool:
        """Sends a holder its grant; False where it is not here, or would not know the message."""
        link = self._links.get(self._book.names_of(holder)[0])
        if link is None or link.hello.minor < GRANTED_MINOR:
            return False
        return send_or_drop(link, granted)

    async def acquainted(self, peer: PeerId) -> None:
        """Returns once the book knows what a member that just came may owe."""
        trusting = self._trusting.get(peer)
        if trusting is not None:
            await trusting.wait()

    def on_down(self, link: Link, reason: str) -> None:
        if not self._is_retired(link.peer):  # else the books are open with its next key
            self._book.disconnected(link.peer)
        self.reasons.note(link.peer, f"its link ended: {reason}")
        self._tell("peer_down", link, reason=reason)
        self._members.pop(link.peer, None)
        self._grants.left(link.peer)

    async def end_grants(self) -> None:
        """When a grant is over, its holder's line is what it was."""
        while True:
            for peer in self._grants.over():
                if peer in self._members:
                    await self._lend_again(self._members[peer])
            await trio.sleep(GRANTS_LOOK_SECONDS)

    async def keep_in_touch(self) -> None:
        """While we have few neighbours: dials villagers, ever more rarely where nobody answers.

        Those we know first, then those we only heard of: who is acquainted with more people has
        more ways to be paid.
        """
        while True:
            if self._needs_neighbours():
                await self._look_for_neighbours()
            await trio.sleep(random.uniform(0.5, 1.5))

    def _needs_neighbours(self) -> bool:
        return len(self._members) + len(self._dialling) < NEIGHBOURS

    async def _look_for_neighbours(self) -> None:
        near = self.lan.found
        known = {peer.id: peer.addresses for peer in await self._jobs.known_peers()}
        said = {offer.seller: offer.addresses for offer in self._discovery.offers()}
        heard = [(seller, found) for seller, found in said.items() if seller not in known]
        random.shuffle(heard)
        met = [  # where it says that it is now, before where it was
            (peer, tuple(dict.fromkeys((*near.get(peer, ()), *said.get(peer, ()), *addresses))))
            for peer, addresses in known.items()
        ]
        fresh = [(peer, found) for peer, found in near.items() if peer not in known]
        for peer, addresses in (*met, *fresh, *heard):
            if self._needs_neighbours():
                self._dial_if_due(peer, addresses)

    def _dial_if_due(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """One dial of a peer at a time, however many addresses it gave us to wait for."""
        due, wait = self._not_before.get(peer, (0.0, BACKOFF_SECONDS[0]))
        if self._links.get(peer) or peer in self._dialling or trio.current_time() < due:
            return
        self._not_before[peer] = (
            trio.current_time() + wait * random.uniform(0.5, 1.5),
            min(wait * 2, BACKOFF_SECONDS[1]),
        )
        self._dialling.add(peer)
        self._tasks.start_soon(self._dial, peer, addresses)

    def why(self, peer: PeerId) -> str:
        """One line: why a peer is not linked, and what is done about it."""
        link = self._links.get(peer)
        if link is not None:
            kind = "a member" if self.is_member(peer) else "not of my village"
            return f"linked, {kind}{_clock(link.clock_ahead_ms)}"
        blocked = "blocked by you" if self._book.view(peer).blocked else ""
        left = "it said goodbye" if self._discovery.has_left(peer) else ""
        parts = (blocked, left, self.reasons.last(peer), self._plan(peer))
        return "; ".join(part for part in parts if part)

    def _plan(self, peer: PeerId) -> str:
        if self._is_retired(peer):
            return f"it goes by another key now, {self._book.names_of(peer)[0][-8:]}"
        if peer in self._dialling:
            return "being dialled now"
        if peer in self._not_before:
            wait = max(0.0, self._not_before[peer][0] - trio.current_time())
            return f"the next try is in {wait:.0f} s"
        if all(offer.seller != peer for offer in self._discovery.offers()):
            return "never dialled: not known to be of my village"
        if len(self._members) >= NEIGHBOURS:
            return "never dialled: heard of only, and we have neighbours enough"
        return "about to be dialled"

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        try:
            await first_to_answer(
                addresses, functools.partial(self._reach_heir, peer), seconds=DIAL_SECONDS
            )
        except AivillageError as error:  # the backoff brings us back
            self.reasons.note(peer, f"could not be reached: {error.message}")
        finally:
            self._dialling.discard(peer)

    async def _reach_heir(self, peer: PeerId, address: str) -> Link:
        """The link with `peer`, or, if somebody else lives there, with its next key."""
        try:
            return await self._links.connect(address)
        except SomebodyElseError as error:
            there = address.replace(f"/p2p/{peer}", f"/p2p/{error.found}")
            link = await self._links.connect(there)
            if self._book.names_of(peer)[0] != link.peer and not self.is_member(link.peer):
                link.close("not the peer that was looked for")
                raise
            return link

    def _look_again(self) -> None:
        """We belong somewhere else now: who of those linked does too?"""
        linked = self._links.all()
        self._members = {known.peer: known for known in linked if self.line_of(known) is not None}

    async def say_hello_again(self) -> None:
        """Our papers changed, and the hellos were said before: links are opened anew."""
        for link in self._links.all():
            await self._links.drop(link.peer, "its papers changed")


def _clock(ahead_ms: int) -> str:
    """Said where it is worth the owner's attention."""
    if abs(ahead_ms) < CLOCK_TOLD_MS:
        return ""
    side = "ahead of" if ahead_ms > 0 else "behind"
    return f"; its clock is {round(abs(ahead_ms) / 60_000)} min {side} ours"


def _send_blob(link: Link, blob: bytes) -> None:
    send_or_drop(link, messages.Ledger(blobs=(blob,)))
