"""Into a village and out of it: invites made and redeemed, and joining by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.ledger import NodeBook
from aivillage.node import invites, village
from aivillage.node.dialling import reach_peer
from aivillage.node.events import Events
from aivillage.node.gossip import send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.invites import Invites
from aivillage.node.jobs import Jobs
from aivillage.node.links import Link, Links
from aivillage.node.membership import Membership
from aivillage.protocols import messages, papers
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError
from aivillage.protocols.types import MicroCredits, PeerId

JOIN_SECONDS: Final = 15.0
DIAL_SECONDS: Final = 10.0


class Joining:
    """The inviter's side and the guest's."""

    def __init__(
        self,
        *,
        key: Ed25519PrivateKey,
        membership: Membership,
        links: Links,
        jobs: Jobs,
        book: NodeBook,
        events: Events,
        tasks: Tasks,
        usual_line: MicroCredits,
        on_joined: Callable[[], None],
    ) -> None:
        self.invites = Invites(jobs)
        self._key = key
        self._membership = membership
        self._links = links
        self._jobs = jobs
        self._book = book
        self._events = events
        self._tasks = tasks
        self._usual_line = usual_line
        self._on_joined = on_joined
        self.keep_key: Callable[[bytes | None], None] = lambda key: None
        """Writes down the key of the village that was joined; may block."""

    # ------------------------------------------------------------------ as the inviter
    async def invite(
        self,
        addresses: tuple[str, ...],
        line: MicroCredits | None = None,
        *,
        uses: int = 1,
        days: int = village.INVITE_DAYS,
        note: str = "",
    ) -> str:
        """A token that lets `uses` people join.

        Raises:
            RefusedError: OWNER_LIMIT, only the founder of a village invites.
            RequestError: BAD_REQUEST, too many uses or days, or too long a note.
        """
        if village.village_of(self._book.names[-1]) != self._membership.village:
            raise RefusedError(
                "only the founder of this village can invite",
                code="OWNER_LIMIT",
                next_step="ask the person who invited you for another token",
            )
        invites.check(uses, days, note)
        promised = self._usual_line if line is None else line
        token = village.make_invite(
            self._key, self._membership.village, addresses, promised, _now_ms(), days,
            self._links.transport.village_key,
        )  # fmt: skip
        await self.invites.add(village.read_invite(token), uses, note)
        return token

    def on_join(self, link: Link, request: messages.Join) -> None:
        self._tasks.start_soon(self._admit, link, request)

    async def _admit(self, link: Link, request: messages.Join) -> None:
        try:
            nonce, certificate = village.redeem(self._key, request.token, link.peer, _now_ms())
            await self.invites.use(nonce, link.peer)
        except AivillageError as error:
            failure = messages.Failure(
                id=request.id, code=error.code, message=error.message, next_step=error.next_step
            )
            send_or_drop(link, failure)
            return
        self._events.emit("member_admitted", peer=link.peer)
        chain = village.newest((certificate, *self._membership.certificates))
        joined = messages.Joined(id=request.id, certificates=chain)
        send_or_drop(link, joined)

    # ------------------------------------------------------------------ as the guest
    async def join(self, token: str) -> PeerId:
        """Becomes a member of the inviter's village.

        Raises:
            AivillageError: the token is bad, used, revoked or expired, or nobody is there.
        """
        invite = village.read_invite(token)
        transport, key = self._links.transport, invite.village_key or None
        former = transport.village_key
        if self._belongs_to(invite.village) and key == former:
            return invite.inviter  # `start --join` is a command that people repeat
        transport.village_key = key
        try:
            await self._become_member(invite, token)
            await trio.to_thread.run_sync(self.keep_key, key)
        except BaseException:
            transport.village_key = former
            raise
        if key != former:  # whoever is linked from before may not have this one
            for link in self._links.all():
                if link.peer != invite.inviter:
                    await self._links.drop(link.peer, "the village has another key")
        self._events.emit("village_joined", village=invite.village.hex(), inviter=invite.inviter)
        return invite.inviter

    async def _become_member(self, invite: papers.Invite, token: str) -> None:
        link = await self._reach(invite.addresses, invite.inviter)
        reply = await link.ask(
            messages.Join(id=link.next_id(), token=token), timeout_seconds=JOIN_SECONDS
        )
        joined = reply.certificates if isinstance(reply, messages.Joined) else ()
        if village.membership(joined, self._book.names, invite.village, _now_ms()) is None:
            raise PeerError("the inviter sent no valid certificate", code="BAD_REQUEST")
        await self._membership.store(invite.village, joined)
        await self._jobs.saw_peer(link.peer, link.hello.addresses)
        # The hellos were said before we were members: say them again.
        await self._links.drop(link.peer, "joined a village")
        self._on_joined()
        await self._reach(invite.addresses, invite.inviter)

    def _belongs_to(self, wanted: bytes) -> bool:
        known = self._membership
        line = village.membership(known.certificates, self._book.names, wanted, _now_ms())
        return known.village == wanted and line is not None

    async def _reach(self, addresses: tuple[str, ...], inviter: PeerId) -> Link:
        try:
            return await reach_peer(self._links, inviter, addresses, seconds=DIAL_SECONDS)
        except AivillageError as failure:
            failure.next_step = "is the inviter's node running, and reachable from here?"
            raise


def _now_ms() -> int:
    return int(time.time() * 1000)
