"""The nouns. Money is an integer of micro-credits; ids are opaque; a peer is its public key."""

from __future__ import annotations

from typing import Annotated, Final, NewType, TypeAlias

import msgspec

PeerId = NewType("PeerId", str)
"""libp2p's name of an Ed25519 public key: base58 of the identity multihash (`12D3KooW...`)."""

JobId = NewType("JobId", str)
"""A person's job: 32 hex digits. It may take several attempts, each at one seller."""

AttemptId = NewType("AttemptId", bytes)
"""One seller's try at a job: 16 random bytes. The ledger pays attempts, each on one lane."""

Cid = NewType("Cid", bytes)
"""sha-256 of a blob: 32 bytes."""

MicroCredits: TypeAlias = int
Seconds: TypeAlias = float

MICRO_CREDITS_PER_CREDIT = 1_000_000
"""1 credit = 1 TFLOP of model arithmetic, so a micro-credit is 1 MFLOP."""

AMOUNT_MAX: MicroCredits = 2**53 - 1
"""Largest amount in a book: JSON tools stay exact up to here."""

# What a field of a message may hold. The codec refuses the rest, so that no later line has to ask.
Amount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=AMOUNT_MAX)]
"""Micro-credits on the wire: never negative."""
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""A number of things, a sequence number, unix milliseconds, a call's id."""
U32: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
"""A token id, or a session."""
Measure: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
"""Seconds, or how much is done: not negative and not NaN."""
Net: TypeAlias = Annotated[int, msgspec.Meta(ge=-AMOUNT_MAX, le=AMOUNT_MAX)]
"""Micro-credits either way."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# identity multihash (0x00, 36 bytes) of the protobuf {Type: Ed25519, Data: 32 bytes}
_ED25519_PREFIX = bytes.fromhex("002408011220")


def peer_id(public_key: bytes) -> PeerId:
    """The libp2p name of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        msg = f"an Ed25519 public key has 32 bytes, not {len(public_key)}"
        raise ValueError(msg)
    raw = _ED25519_PREFIX + public_key
    number, digits = int.from_bytes(raw, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return PeerId("1" * zeros + digits)


def public_key(peer: str) -> bytes:
    """The raw 32-byte public key inside a peer id.

    Raises:
        ValueError: `peer` is not the id of an Ed25519 key.
    """
    if len(peer) > 60:
        raise ValueError("a peer id has about 52 characters")
    number = 0
    for character in peer:
        digit = _BASE58.find(character)
        if digit < 0:
            msg = f"{character!r} is not a base58 digit"
            raise ValueError(msg)
        number = number * 58 + digit
    raw = number.to_bytes(len(_ED25519_PREFIX) + 32, "big") if number.bit_length() <= 304 else b""
    if not raw.startswith(_ED25519_PREFIX) or peer_id(raw[-32:]) != peer:
        raise ValueError("not the peer id of an Ed25519 key")
    return raw[-32:]


def as_credits(amount: MicroCredits) -> str:
    """`1234500` -> `1.2345`: credits with as many digits as the amount needs.

    >>> as_credits(-269)
    '-0.000269'
    """
    sign, digits = "-" if amount < 0 else "", f"{abs(amount):07d}"
    fraction = digits[-6:].rstrip("0")
    return f"{sign}{digits[:-6]}" + (f".{fraction}" if fraction else "")


Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=128)]
"""Of a program, or of a kind of kernel."""
KernelName: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]
"""A whole kernel class, which the buyer keeps with the attempt."""
ADDRESSES_MAX: Final = 8
ADDRESS_CHARACTERS_MAX: Final = 256
Address: TypeAlias = Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARACTERS_MAX)]
Addresses: TypeAlias = Annotated[tuple[Address, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]
INPUT_BYTES_MAX: Final = 1 << 19
"""32 rows of a model 4,096 wide, in float32."""
InputBody: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=INPUT_BYTES_MAX)]
