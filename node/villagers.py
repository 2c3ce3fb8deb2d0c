"""The people around: who is linked, who belongs, joining, and finding lost neighbours again."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.ledger import NodeBook
from aivillage.node import village
from aivillage.node.config import Settings
from aivillage.node.events import Events
from aivillage.node.gossip import send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.identity import peer_of
from aivillage.node.jobs import Jobs
from aivillage.node.links import Link, Links
from aivillage.protocols import messages
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError
from aivillage.protocols.messages import ADDRESSES_MAX, Offer
from aivillage.protocols.types import MicroCredits, PeerId, Seconds

VILLAGE_SETTING: Final = "village"
JOIN_SECONDS: Final = 15.0
DIAL_SECONDS: Final = 10.0
BACKOFF_SECONDS: Final = (1.0, 60.0)
NEIGHBOURS: Final = 16
"""With so many we leave it to others to come to us: a link costs both sides pings and gossip."""


class Membership:
    """Which village this node belongs to, and what proves it: what the hello carries."""

    def __init__(self, peer: PeerId, jobs: Jobs) -> None:
        self.village = village.village_of(peer)
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


class Villagers:
    """Neighbours: who may owe us what, who joins, and who is to be found again."""

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
    ) -> None:
        self.peer = peer_of(key)
        self.membership = membership
        self._key = key
        self._settings = settings
        self._links = links
        self._jobs = jobs
        self._book = book
        self._events = events
        self._tasks = tasks
        self._not_before: dict[PeerId, tuple[float, Seconds]] = {}
        self._dialling: set[PeerId] = set()
        self._trusting: dict[PeerId, trio.Event] = {}
        self._members: dict[PeerId, Link] = {}
        self.heard_of: Callable[[], Iterable[Offer]] = tuple
        """Offers that came by gossip: of people of our village whom we may not have met."""

    def line_of(self, link: Link) -> MicroCredits | None:
        """What a neighbour may owe us; None for a stranger."""
        now = int(time.time() * 1000)
        promised = village.membership(
            link.hello.certificates, link.peer, self.membership.village, now
        )
        if promised is None:
            return None
        return min(promised, self._settings.village_line_micro_credits)

    def members(self) -> list[Link]:
        """Links with people of our village."""
        return list(self._members.values())

    def hubs(self) -> list[PeerId]:
        """With whom everybody here has an account: the village's founder, its treasury."""
        wanted = self.membership.village
        return [peer for peer in self._members if village.village_of(peer) == wanted]

    def is_member(self, peer: PeerId) -> bool:
        """Whether `peer` is linked, and of our village."""
        return peer in self._members

    # ------------------------------------------------------------------ links
    def on_up(self, link: Link) -> None:
        """Opens the books with a neighbour, and remembers where it lives."""
        line = self.line_of(link)
        self._not_before.pop(link.peer, None)
        self._book.connected(
            link.peer,
            link.hello.boot_epoch,
            functools.partial(_send_blob, link),
            link.hello.minor,
        )
        if line is not None:
            self._members[link.peer] = link
            self._trusting[link.peer] = trio.Event()
            self._tasks.start_soon(self._trust, link, line)
        elif self._book.view(link.peer).known:
            self._tasks.start_soon(self._forsake, link.peer)
        self._tell("peer_up", link, agent=link.hello.agent)

    def _tell(self, event: str, link: Link, **fields: Any) -> None:
        """Strangers come and go: only who looks closely wants to read of each."""
        is_member = self.is_member(link.peer)
        level = logging.INFO if is_member else logging.DEBUG
        self._events.emit(event, level=level, peer=link.peer, member=is_member, **fields)

    async def _trust(self, link: Link, line: MicroCredits) -> None:
        try:
            exposure = min(line, self._settings.village_exposure_micro_credits)
            await self._book.set_line(link.peer, line, exposure)
            send_or_drop(
                link,
                messages.Standing(line_micro_credits=line, exposure_micro_credits=exposure),
            )
            await self._jobs.saw_peer(link.peer, link.hello.addresses)
        except AivillageError as error:
            self._events.emit("peer_not_recorded", level=30, peer=link.peer, reason=str(error))
        finally:
            trusting = self._trusting.pop(link.peer, None)
            if trusting is not None:
                trusting.set()

    async def _forsake(self, peer: PeerId) -> None:
        """Who belonged once and does not now may owe nothing more; what it owes, it owes."""
        try:
            await self._book.set_line(peer, 0, 0)
        except AivillageError as error:
            self._events.emit("peer_not_recorded", level=30, peer=peer, reason=str(error))

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

    async def acquainted(self, peer: PeerId) -> None:
        """Returns once the book knows what a member that just came may owe."""
        trusting = self._trusting.get(peer)
        if trusting is not None:
            await trusting.wait()

    def on_down(self, link: Link, reason: str) -> None:
        self._book.disconnected(link.peer)
        self._tell("peer_down", link, reason=reason)
        self._members.pop(link.peer, None)

    async def keep_in_touch(self) -> None:
        """Dials known villagers that are not linked, ever more rarely where nobody answers.

        While we have few neighbours, also those we only heard of: who is acquainted with more
        people has more ways to be paid.
        """
        while True:
            for known in await self._jobs.known_peers():
                self._dial_if_due(known.id, known.addresses)
            if len(self._members) < NEIGHBOURS:
                for offer in self.heard_of():
                    self._dial_if_due(offer.seller, offer.addresses)
            await trio.sleep(random.uniform(0.5, 1.5))

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

    async def _dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        try:
            for address in addresses[:ADDRESSES_MAX]:
                with trio.move_on_after(DIAL_SECONDS):
                    try:
                        await self._links.connect(address)
                    except AivillageError:
                        continue  # the next address; the backoff brings us back
                    return
        finally:
            self._dialling.discard(peer)

    # ------------------------------------------------------------------ joining
    def invite(self, addresses: tuple[str, ...], line: MicroCredits | None) -> str:
        """A token for one newcomer.

        Raises:
            RefusedError: OWNER_LIMIT, only the founder of a village invites.
        """
        if village.village_of(self.peer) != self.membership.village:
            raise RefusedError(
                "only the founder of this village can invite",
                code="OWNER_LIMIT",
                next_step="ask the person who invited you for another token",
            )
        promised = self._settings.village_line_micro_credits if line is None else line
        now = int(time.time() * 1000)
        return village.make_invite(self._key, self.membership.village, addresses, promised, now)

    async def join(self, token: str) -> PeerId:
        """Becomes a member of the inviter's village.

        Raises:
            AivillageError: the token is bad, used or expired, or the inviter is not there.
        """
        invite = village.read_invite(token)
        if self._belongs_to(invite.village):
            return invite.inviter  # `start --join` is a command that people repeat
        link = await self._reach(invite.addresses, invite.inviter)
        reply = await link.ask(
            messages.Join(id=link.next_id(), token=token), timeout_seconds=JOIN_SECONDS
        )
        now = int(time.time() * 1000)
        joined = reply.certificates if isinstance(reply, messages.Joined) else ()
        if village.membership(joined, self.peer, invite.village, now) is None:
            raise PeerError("the inviter sent no valid certificate", code="BAD_REQUEST")
        await self.membership.store(invite.village, joined)
        await self._jobs.saw_peer(link.peer, link.hello.addresses)
        # The hellos were said before we were members: say them again.
        await self._links.drop(link.peer, "joined a village")
        linked = self._links.all()
        self._members = {known.peer: known for known in linked if self.line_of(known) is not None}
        await self._reach(invite.addresses, invite.inviter)
        self._events.emit("village_joined", village=invite.village.hex(), inviter=invite.inviter)
        return invite.inviter

    def _belongs_to(self, wanted: bytes) -> bool:
        known, now = self.membership, int(time.time() * 1000)
        line = village.membership(known.certificates, self.peer, wanted, now)
        return known.village == wanted and line is not None

    async def _reach(self, addresses: tuple[str, ...], peer: PeerId) -> Link:
        failure: AivillageError = PeerError("the invite names no address", code="PEER_LOST")
        for address in addresses:
            try:
                with trio.fail_after(DIAL_SECONDS):
                    link = await self._links.connect(address)
            except trio.TooSlowError:
                failure = PeerError(f"{address} does not answer", code="PEER_LOST")
            except AivillageError as error:
                failure = error
            else:
                if link.peer == peer:
                    return link
                failure = PeerError(f"{address} is somebody else", code="PEER_LOST")
        failure.next_step = "is the inviter's node running, and reachable from here?"
        raise failure

    def on_join(self, link: Link, request: messages.Join) -> None:
        self._tasks.start_soon(self._admit, link, request)

    async def _admit(self, link: Link, request: messages.Join) -> None:
        try:
            now = int(time.time() * 1000)
            nonce, certificate = village.redeem(self._key, request.token, link.peer, now)
            if not await self._jobs.use_invite(nonce, link.peer):
                raise RefusedError(
                    "this invite was used already",
                    code="OWNER_LIMIT",
                    next_step="ask for a new one: `aivillage-node invite`",
                )
        except AivillageError as error:
            failure = messages.Failure(
                id=request.id, code=error.code, message=error.message, next_step=error.next_step
            )
            send_or_drop(link, failure)
            return
        self._events.emit("member_admitted", peer=link.peer)
        chain = village.newest((certificate, *self.membership.certificates))
        joined = messages.Joined(id=request.id, certificates=chain)
        send_or_drop(link, joined)


def _send_blob(link: Link, blob: bytes) -> None:
    send_or_drop(link, messages.Ledger(blobs=(blob,)))
