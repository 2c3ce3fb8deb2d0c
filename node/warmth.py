"""Which models stay loaded: those that earn most, as far as the owner's memory goes. Pure.

What a model is worth is what it was asked for lately times what a token of it costs: an ask counts
half after ten minutes. The least worth goes first, and never one that is at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from aivillage.protocols.prefixes import PrefixTokens
from aivillage.protocols.types import MicroCredits, Seconds

HALF_LIFE_SECONDS: Final[Seconds] = 600.0


class Use(msgspec.Struct, frozen=True):
    """How often a model was asked for, counted down with time."""

    count: float = 0.0
    at: Seconds = 0.0

    def now(self, at: Seconds) -> float:
        return float(self.count * 0.5 ** (max(0.0, at - self.at) / HALF_LIFE_SECONDS))

    def asked(self, at: Seconds) -> Use:
        return Use(self.now(at) + 1, at)


class Warm(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model."""

    name: str
    memory_bytes: int
    worth: float
    is_busy: bool
    device: str = "cpu"
    load_seconds: Seconds = 0.0
    prefix_tokens: PrefixTokens = PrefixTokens()


def worth(use: Use, price: MicroCredits, at: Seconds) -> float:
    """Micro-credits: asks of late, each at the price of a token."""
    return use.now(at) * price


def to_unload(warm: Sequence[Warm], needed_bytes: int, memory_bytes_max: int) -> list[str] | None:
    """Whom to put away so that `needed_bytes` fit beside the rest; None: it does not fit now."""
    free = memory_bytes_max - sum(model.memory_bytes for model in warm)
    gone: list[Warm] = []
    for model in sorted((m for m in warm if not m.is_busy), key=lambda m: (m.worth, m.name)):
        if free >= needed_bytes:
            break
        gone.append(model)
        free += model.memory_bytes
    if free < needed_bytes:
        return None
    for model in reversed(gone):  # a small one need not go where a larger one has to all the same
        if free - model.memory_bytes >= needed_bytes:
            gone.remove(model)
            free -= model.memory_bytes
    return [model.name for model in gone]


def bytes_with(memory_bytes: int, context_bytes: int, slots: int) -> int:
    """What a model takes whose `memory_bytes` have one full context, with `slots` of them."""
    return memory_bytes + (slots - 1) * context_bytes


def slots_that_fit(memory_bytes: int, context_bytes: int, room_bytes: int, most: int) -> int:
    """How many sessions of a model may each fill their context within `room_bytes`; 0: not one."""
    if memory_bytes > room_bytes:
        return 0
    if not context_bytes:
        return most
    return min(most, 1 + (room_bytes - memory_bytes) // context_bytes)
