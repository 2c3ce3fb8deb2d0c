"""A change of key that both keys signed: proof for peers that who comes now is who came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.protocols.envelope import Verify, is_signed_by, prefix, seal, sign, unseal
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import SUCCESSIONS_MAX
from aivillage.protocols.papers import Succession
from aivillage.protocols.types import PeerId, peer_id, public_key

_DOMAIN: Final = "succession"
_CONSENT: Final = "succession-consent"


class Step(NamedTuple):
    """One change of key, checked. `proof` is its envelope."""

    old: PeerId
    new: PeerId
    proof: bytes

    @property
    def old_key(self) -> bytes:
        return public_key(self.old)

    @property
    def new_key(self) -> bytes:
        return public_key(self.new)


def make(old: Ed25519PrivateKey, new: Ed25519PrivateKey, at_unix_ms: int) -> bytes:
    """The envelope in which `old` names `new`."""
    names = [peer_id(key.public_key().public_bytes_raw()) for key in (old, new)]
    bare = Succession(old=names[0], new=names[1], at_unix_ms=at_unix_ms, consent=b"")
    consent = sign(new, consented(bare))
    return seal(old, _DOMAIN, msgspec.structs.replace(bare, consent=consent))


def consented(succession: Succession) -> bytes:
    """What the new key signs."""
    bare = msgspec.structs.replace(succession, consent=b"")
    return prefix(_CONSENT) + msgspec.msgpack.encode(bare)


def read(envelope: bytes, verify: Verify = is_signed_by) -> Step:
    """What an envelope proves.

    Raises:
        PeerError: BAD_REQUEST, one of the two keys did not sign it.
    """
    signer, found = unseal(envelope, _DOMAIN, Succession, verify)
    try:
        consents = verify(public_key(found.new), consented(found), found.consent)
    except ValueError:
        consents = False
    if signer != found.old or found.old == found.new or not consents:
        raise PeerError("a change of key that one of the keys did not sign", code="BAD_REQUEST")
    return Step(found.old, found.new, envelope)


def chain(envelopes: Sequence[bytes], peer: PeerId) -> list[Step]:
    """The changes that lead to `peer`, the oldest first; what is forged proves nothing."""
    steps: dict[PeerId, Step] = {}
    for envelope in envelopes[:SUCCESSIONS_MAX]:
        try:
            step = read(envelope)
        except PeerError:
            continue  # the others may still lead somewhere
        steps[step.new] = step
    found: list[Step] = []
    while peer in steps:
        found.insert(0, steps.pop(peer))
        peer = found[0].old
    return found
