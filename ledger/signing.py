"""Who signs for this book. A structural type, so that a simulation can bring its own."""

from __future__ import annotations

from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.protocols.envelope import is_signed_by, sign


class Signer(Protocol):
    @property
    def public_key(self) -> bytes: ...

    def sign(self, prefixed: bytes) -> bytes: ...

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool: ...


class Ed25519Signer:
    """Signs with the key of the node's peer id."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def sign(self, prefixed: bytes) -> bytes:
        return sign(self._key, prefixed)

    def verify(self, public_key: bytes, prefixed: bytes, signature: bytes) -> bool:
        return is_signed_by(public_key, prefixed, signature)
