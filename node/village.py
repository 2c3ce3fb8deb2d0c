"""Who belongs: invites, certificates, and the chain that proves them.

A village is named by the hash of its founder's public key. An invite is a signed promise, good
for as many guests and days as its maker said; whoever shows it gets a certificate. A certificate
counts when a chain of certificates leads from it to the founder, each signed by somebody who may
invite.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node import token
from aivillage.node.identity import peer_of
from aivillage.node.village_key import KEY_BYTES
from aivillage.protocols.envelope import seal, unseal
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.messages import CERTIFICATES_MAX
from aivillage.protocols.papers import Certificate, Invite
from aivillage.protocols.types import AMOUNT_MAX, MicroCredits, PeerId, public_key

TOKEN_PREFIX: Final = "aiv1."  # noqa: S105
INVITE_DAYS: Final = 7
CERTIFICATE_DAYS: Final = 365
DAY_MS: Final = 86_400_000


def village_of(founder: PeerId) -> bytes:
    """The village that `founder` founds: 32 bytes."""
    return hashlib.sha256(public_key(founder)).digest()


def make_invite(
    key: Ed25519PrivateKey,
    village: bytes,
    addresses: Sequence[str],
    line: MicroCredits,
    now_unix_ms: int,
    days: int = INVITE_DAYS,
    village_key: bytes | None = None,
) -> str:
    """A token to hand on; whoever holds it can join. `village_key`: of a private village."""
    invite = Invite(
        village=village,
        inviter=peer_of(key),
        addresses=tuple(addresses),
        nonce=secrets.token_bytes(16),
        not_after_unix_ms=now_unix_ms + days * DAY_MS,
        line_micro_credits=line,
        village_key=village_key or b"",
    )
    return token.to_text(TOKEN_PREFIX, seal(key, "invite", invite))


def read_invite(text: str) -> Invite:
    """The invite inside a token, its signature checked.

    Raises:
        RequestError: BAD_REQUEST, the token is cut, changed or not one.
    """
    raw = token.from_text(TOKEN_PREFIX, text, "invite")
    try:
        signer, invite = unseal(raw, "invite", Invite)
    except PeerError as error:
        raise token.bad("invite", error.message) from None
    if signer != invite.inviter:
        raise token.bad("invite", "it is signed by somebody else")
    if len(invite.village_key) not in {0, KEY_BYTES}:
        raise token.bad("invite", "its village key is cut")
    return invite


def redeem(
    key: Ed25519PrivateKey, text: str, guest: PeerId, now_unix_ms: int
) -> tuple[bytes, bytes]:
    """(nonce to mark as used, certificate for `guest`) for an invite that I made.

    Raises:
        RefusedError: OWNER_LIMIT, not mine or expired.
    """
    invite = read_invite(text)
    if invite.inviter != peer_of(key):
        raise RefusedError("this invite was made by another node", code="OWNER_LIMIT")
    if invite.not_after_unix_ms < now_unix_ms:
        raise RefusedError(
            "this invite has expired", code="OWNER_LIMIT", next_step="ask for a new one"
        )
    lasts = now_unix_ms + CERTIFICATE_DAYS * DAY_MS
    line = invite.line_micro_credits
    return invite.nonce, certify(key, invite.village, guest, line=line, not_after_unix_ms=lasts)


def certify(
    key: Ed25519PrivateKey,
    village: bytes,
    member: PeerId,
    *,
    line: MicroCredits,
    not_after_unix_ms: int,
    may_invite: bool = False,
) -> bytes:
    """A certificate for `member`, as good as the word of `key` in the village."""
    certificate = Certificate(
        village=village,
        issuer=peer_of(key),
        member=member,
        line_micro_credits=line,
        not_after_unix_ms=not_after_unix_ms,
        may_invite=may_invite,
    )
    return seal(key, "certificate", certificate)


def membership(
    certificates: Iterable[bytes], names: Sequence[PeerId], village: bytes, now_unix_ms: int
) -> MicroCredits | None:
    """The line that `village` vouches for a peer, or None where it is a stranger.

    `names`: the ids of all its keys. The founder belongs by name; anybody else by a chain that
    ends at the founder.
    """
    if any(village_of(name) == village for name in names):
        return AMOUNT_MAX
    valid = checked(list(certificates)[:CERTIFICATES_MAX], village, now_unix_ms)
    lines = [_vouched(valid, name, village, frozenset()) for name in names]
    return max((line for line in lines if line is not None), default=None)


def newest(envelopes: Iterable[bytes]) -> tuple[bytes, ...]:
    """Of each issuer's certificates for a member the one that lasts longest; as many as travel.

    Whoever joined often has many; a hello with more than the limit would be refused everywhere.
    """
    found: dict[tuple[PeerId, PeerId], tuple[int, bytes]] = {}
    for envelope in envelopes:
        try:
            _, certificate = unseal(envelope, "certificate", Certificate)
        except PeerError:
            continue  # it would prove nothing
        pair = (certificate.issuer, certificate.member)
        lasts = certificate.not_after_unix_ms
        if pair not in found or found[pair][0] < lasts:
            found[pair] = (lasts, envelope)
    return tuple(envelope for _, envelope in found.values())[:CERTIFICATES_MAX]


def _vouched(
    valid: Sequence[Certificate], member: PeerId, village: bytes, below: frozenset[PeerId]
) -> MicroCredits | None:
    """The best line of any chain from `member` up; `below` are those whom it vouches for."""
    lines = []
    for certificate in valid:
        if certificate.member != member or (below and not certificate.may_invite):
            continue
        above: MicroCredits | None = certificate.line_micro_credits
        if village_of(certificate.issuer) != village:
            chain = below | {member}
            above = None
            if certificate.issuer not in chain:
                above = _vouched(valid, certificate.issuer, village, chain)
        if above is not None:
            lines.append(min(above, certificate.line_micro_credits))
    return max(lines, default=None)


def may_invite(valid: Sequence[Certificate], names: Sequence[PeerId], village: bytes) -> bool:
    """Whether the peer with these ids speaks for the village: the founder, or whom it let."""
    if any(village_of(name) == village for name in names):
        return True
    guest = frozenset({PeerId("")})
    return any(_vouched(valid, name, village, guest) is not None for name in names)


def checked(envelopes: Iterable[bytes], village: bytes, now_unix_ms: int) -> list[Certificate]:
    """The certificates of the village among them that their issuers signed and that last."""
    found = []
    for envelope in envelopes:
        try:
            signer, certificate = unseal(envelope, "certificate", Certificate)
        except PeerError:
            continue  # one forged certificate must not hide a good one
        if (
            signer == certificate.issuer
            and certificate.village == village
            and certificate.not_after_unix_ms >= now_unix_ms
        ):
            found.append(certificate)
    return found
