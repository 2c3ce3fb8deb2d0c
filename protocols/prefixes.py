"""Prompts that begin as an earlier one did: what an engine says of them, and takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec


class PrefixTokens(msgspec.Struct, frozen=True, array_like=True):
    """Of the prompts of all sessions that have ended: tokens read, and those kept from before."""

    read: int = 0
    reused: int = 0

    def __add__(self, other: PrefixTokens) -> PrefixTokens:
        return PrefixTokens(self.read + other.read, self.reused + other.reused)


@runtime_checkable
class ReusingEngine(Protocol):
    """An engine that keeps what a session read for the next one of the same `scope`."""

    @property
    def prefix_tokens(self) -> PrefixTokens: ...

    def add(self, session: int, request: Any, delivered: Sequence[int], scope: bytes = b"") -> None:
        """As `Engine.add`; nothing that another scope wrote shows in how long it takes."""
        ...
