"""What a village's papers say; each travels signed, inside an envelope."""

from __future__ import annotations

from typing import Annotated

import msgspec

from aivillage.protocols.types import Addresses, Amount, Count, PeerId


class Invite(msgspec.Struct, frozen=True, kw_only=True):
    """An invitation into a village; travels as text inside an envelope."""

    village: bytes
    inviter: PeerId
    addresses: Addresses
    nonce: bytes
    not_after_unix_ms: Count
    line_micro_credits: Amount
    village_key: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    """What connections into a private village need; empty where it is open."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """`issuer` says that `member` belongs to the village, trusted up to `line`."""

    village: bytes
    issuer: PeerId
    member: PeerId
    line_micro_credits: Amount
    not_after_unix_ms: Count
    may_invite: bool = False


class Succession(msgspec.Struct, frozen=True, kw_only=True):
    """`old` says that it goes by the key of `new` from now on; `consent` is the new key's word."""

    old: PeerId
    new: PeerId
    at_unix_ms: Count
    consent: bytes


class OwnerCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """`owner`, who is a key, says that `device` is one of its nodes."""

    owner: PeerId
    device: PeerId
    not_after_unix_ms: Count


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """`issuer` says for the village that `holder` is good for so much more than its line."""

    village: bytes
    issuer: PeerId
    holder: PeerId
    amount_micro_credits: Amount
    id: bytes
    not_after_unix_ms: Count
