"""What is said of an answer that is read again instead of being made again."""

from __future__ import annotations

import msgspec


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """An answer as it was sold: its tokens, and the fingerprints that came with them, in order.

    `logprobs`: of all tokens as they travel, where they were asked for.
    """

    token_ids: tuple[int, ...]
    fingerprints: tuple[bytes, ...] = ()
    logprobs: bytes = b""


class OddDraw(msgspec.Struct, frozen=True, array_like=True):
    """At `position` another token is drawn here; `near`: rounding alone can explain it."""

    position: int
    near: bool


class OddValue(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at `position` are not ours; `near`: by no more than rounding explains."""

    position: int
    near: bool


class Deviation(msgspec.Struct, frozen=True, array_like=True):
    """How far the fingerprint of `count` tokens is from ours: root mean square, relative."""

    first: int
    count: int
    relative: float


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """What reading a claimed answer showed. `odd`: at most 64, in order.

    `values`: at most 64, in order; of those within rounding the first one alone.
    """

    tokens: int
    odd: tuple[OddDraw, ...] = ()
    spans: tuple[Deviation, ...] = ()
    values: tuple[OddValue, ...] = ()
