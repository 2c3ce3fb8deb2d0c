r"""Signed envelopes: domain-separated, canonical, with an algorithm byte so that others can join.

An envelope is the msgpack array `[public key, body, signature]`; a signature is
`alg byte || raw bytes`. What is signed is `aivillage/<domain>/1\\0` followed by the exact body
bytes, so a signature made for one purpose is worth nothing for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign, crypto_sign_open
from nacl.exceptions import CryptoError

from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import PeerId, peer_id

ED25519: Final = 1
ENVELOPE_BYTES_MAX: Final = 8192

T = TypeVar("T", bound=msgspec.Struct)
Verify: TypeAlias = Callable[[bytes, bytes, bytes], bool]
"""Whether a public key made a signature over bytes: (key, bytes, signature)."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    public_key: bytes
    body: bytes
    signature: bytes


def prefix(domain: str) -> bytes:
    return f"aivillage/{domain}/1\0".encode()


def sign(key: Ed25519PrivateKey, prefixed: bytes) -> bytes:
    """`alg byte || raw signature` over bytes that already carry their domain prefix.

    By libsodium, byte for byte what OpenSSL signs, in two thirds of its time.
    """
    secret = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return bytes([ED25519]) + crypto_sign(prefixed, secret)[:64]


def is_signed_by(public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
    """Whether `signature` is `public_key`'s over `prefixed`; an unknown algorithm is a no.

    By libsodium: two thirds of what OpenSSL takes, and it refuses keys of small order, for which
    anybody could sign.
    """
    if len(public_key) != 32 or len(signature) != 65 or signature[0] != ED25519:
        return False
    try:
        crypto_sign_open(signature[1:] + prefixed, public_key)
    except CryptoError:
        return False
    return True


def seal(key: Ed25519PrivateKey, domain: str, value: msgspec.Struct) -> bytes:
    """An envelope around `value`, signed by `key` for `domain`."""
    body = msgspec.msgpack.encode(value)
    public = key.public_key().public_bytes_raw()
    signature = sign(key, prefix(domain) + body)
    return msgspec.msgpack.encode(_Envelope(public, body, signature))


def unseal(
    envelope: bytes, domain: str, kind: type[T], verify: Verify = is_signed_by
) -> tuple[PeerId, T]:
    """(who signed it, the value), after checking signature and canonical form.

    Raises:
        PeerError: BAD_REQUEST or TOO_LARGE; the envelope is malformed, not canonical or not signed.
    """
    if len(envelope) > ENVELOPE_BYTES_MAX:
        raise PeerError(f"an envelope of {len(envelope):,} bytes", code="TOO_LARGE")
    try:
        parts = msgspec.msgpack.decode(envelope, type=_Envelope)
        signer = peer_id(parts.public_key)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise _no_envelope(kind, error) from None
    if msgspec.msgpack.encode(parts) != envelope:
        raise PeerError("the envelope is not in canonical form", code="BAD_REQUEST")
    if not verify(parts.public_key, prefix(domain) + parts.body, parts.signature):
        raise PeerError(f"the signature on a {kind.__name__} is wrong", code="BAD_REQUEST")
    try:
        return signer, msgspec.msgpack.decode(parts.body, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise _no_envelope(kind, error) from None


def _no_envelope(kind: type[msgspec.Struct], error: Exception) -> PeerError:
    return PeerError(f"not an envelope of {kind.__name__}: {error}", code="BAD_REQUEST")
