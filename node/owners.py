"""Several devices of one owner: who signs for whom, and what follows for the books.

An owner's key is a file of its own. It signs for a device, for a while; the device's hello shows
it. Others then let all devices of one owner owe one line together, and an owner's own devices
work for each other for nothing.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger.exposure import Word
from aivillage.ledger.ledger import NodeBook
from aivillage.node import token
from aivillage.node.identity import peer_of
from aivillage.node.jobs import Jobs
from aivillage.node.village import DAY_MS
from aivillage.protocols.envelope import seal, unseal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.papers import OwnerCertificate
from aivillage.protocols.types import PeerId, public_key

OWNER_FILE: Final = "owner.key"
TOKEN_PREFIX: Final = "aivo1."  # noqa: S105
DAYS_MIN: Final = 30
DAYS_MAX: Final = 365
"""There is no taking back: a lost device counts until its certificate ends."""
_SETTING: Final = "owner_certificate"
_DOMAIN: Final = "owner"


def adopt(owner: Ed25519PrivateKey, device: PeerId, days: int, now_unix_ms: int) -> str:
    """A token by which `device` shows that it is the owner's.

    Raises:
        RequestError: BAD_REQUEST, no peer id, or too few or many days.
    """
    if not DAYS_MIN <= days <= DAYS_MAX:
        raise RequestError(f"{days} days", next_step=f"{DAYS_MIN} to {DAYS_MAX}")
    try:
        public_key(device)
    except ValueError:
        raise RequestError(
            f"{device!r} is no peer id", next_step="`aivillage-node status` on the device shows it"
        ) from None
    certificate = OwnerCertificate(
        owner=peer_of(owner), device=device, not_after_unix_ms=now_unix_ms + days * DAY_MS
    )
    return token.to_text(TOKEN_PREFIX, seal(owner, _DOMAIN, certificate))


def read(envelope: bytes, names: tuple[PeerId, ...], now_unix_ms: int) -> OwnerCertificate:
    """What an owner signed for the device with these ids.

    Raises:
        PeerError: BAD_REQUEST, it is for another device, over, too long, or not signed.
    """
    signer, found = unseal(envelope, _DOMAIN, OwnerCertificate)
    days_left = (found.not_after_unix_ms - now_unix_ms) / DAY_MS
    if signer != found.owner:
        raise PeerError("it is signed by somebody else", code="BAD_REQUEST")
    if found.device not in names:
        raise PeerError(f"it is for {found.device}", code="BAD_REQUEST")
    if not 0 <= days_left <= DAYS_MAX + 1:  # a day for clocks that differ
        raise PeerError("it is over, or good for too long", code="BAD_REQUEST")
    return found


class Owners:
    """Whose device this node is, and those that it meets."""

    def __init__(self, book: NodeBook, jobs: Jobs) -> None:
        self.certificate = b""
        """What the hello carries; empty: nobody's in particular."""
        self.mine: OwnerCertificate | None = None
        self._book = book
        self._jobs = jobs

    async def load(self) -> None:
        """What a former run joined."""
        self._keep(await self._jobs.setting(_SETTING) or b"")

    def _keep(self, envelope: bytes) -> None:
        self.certificate = envelope
        # Over or not: whose devices work for nothing here is for this node's owner to say.
        self.mine = unseal(envelope, _DOMAIN, OwnerCertificate)[1] if envelope else None

    async def join(self, text: str, now_unix_ms: int) -> OwnerCertificate:
        """Becomes the device that a token says.

        Raises:
            RequestError: BAD_REQUEST, the token is for another device, over, or not valid.
        """
        envelope = token.from_text(TOKEN_PREFIX, text, "adoption")
        try:
            found = read(envelope, self._book.names, now_unix_ms)
        except PeerError as error:
            raise token.bad("adoption", error.message) from None
        former = self.mine
        await self._jobs.set_setting(_SETTING, envelope)
        self._keep(envelope)
        if former is not None and former.owner != found.owner:
            for view in self._book.views():
                if view.owner == former.owner:
                    await self._book.decree(view.peer, Word(shared=False))
        return found

    def owner_of(self, peer: PeerId, envelope: bytes, now_unix_ms: int) -> PeerId | None:
        """Whose device `peer` is, by what its hello shows."""
        if not envelope:
            return None
        try:
            return read(envelope, self._book.names_of(peer), now_unix_ms).owner
        except PeerError:
            return None  # a claim that proves nothing is no claim

    def is_mine(self, owner: str | None) -> bool:
        """Whether that is my own owner."""
        return self.mine is not None and owner == self.mine.owner

    async def set_line(self, peer: PeerId, line: int, exposure: int, owner: PeerId | None) -> None:
        """What `peer` may owe, with all devices of its owner; between my own, work is free."""
        was_mine = self.is_mine(self._book.view(peer).owner)
        await self._book.set_line(peer, line, exposure, owner)
        if self.is_mine(owner) or was_mine:  # whom else it shares with, the owner says itself
            await self._book.decree(peer, Word(shared=self.is_mine(owner)))

    def devices(self) -> list[PeerId]:
        """Those of my owner that this node has met, without itself."""
        return [view.peer for view in self._book.views() if self.is_mine(view.owner)]

    def shown(self) -> dict[str, object]:
        """For the command line."""
        return {
            "owner": self.mine.owner if self.mine else None,
            "not_after_unix_ms": self.mine.not_after_unix_ms if self.mine else None,
            "devices": self.devices(),
        }
