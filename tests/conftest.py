"""What tests share: identities and hellos."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.protocols.messages import VERSION_MAJOR, VERSION_MINOR, Hello
from aivillage.protocols.types import PeerId, peer_id


def make_key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def make_peer(number: int) -> PeerId:
    return peer_id(make_key(number).public_key().public_bytes_raw())


def make_hello(**changes: object) -> Hello:
    fields: dict[str, object] = {
        "major": VERSION_MAJOR,
        "minor": VERSION_MINOR,
        "agent": "test",
        "boot_epoch": 1,
        "clock_unix_ms": 0,
    }
    return Hello(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def key_of() -> Callable[[int], Ed25519PrivateKey]:
    return make_key


@pytest.fixture
def peer_of() -> Callable[[int], PeerId]:
    return make_peer


@pytest.fixture
def hello_of() -> Callable[..., Hello]:
    return make_hello
