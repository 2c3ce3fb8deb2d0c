"""What fits this machine, and why: pure, from sizes to one line a model.

Figures of models that are not here are arithmetic from their published shapes, not measured.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from aivillage.models.library.inspection import RUNTIME_BYTES
from aivillage.models.library.pull import FREE_BYTES_MIN
from aivillage.protocols.pricing import token_price

WEIGHTS_A_CORE_SECOND: Final = 2_000_000_000
"""Decoding in float32 reads every active weight once a token, at some 8 GB/s a core."""
TOKENS_A_SECOND_MIN: Final = 2.0
"""Slower than people read; such a model fits, and is not recommended."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a model may take of this machine."""

    memory_bytes: int
    cores: int
    disk_bytes: int


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that could run here. `disk_bytes` 0: it is here already."""

    name: str
    source: str
    licence: str
    parameters: int
    active_parameters: int
    memory_bytes: int
    disk_bytes: int


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """One line. `recommended`: the best of those that fit."""

    model: Candidate
    fits: bool
    recommended: bool
    tokens_per_second: float
    """A guess from cores and weights."""
    price_micro_credits: int
    reason: str


class _Published(msgspec.Struct, frozen=True):
    """Shapes as their publishers state them."""

    source: str
    parameters: int
    context_tokens: int
    key_value_weights: int
    """Of one token: 2 x layers x key heads x head width."""
    licence: str = "apache-2.0"


_PUBLISHED: Final = {
    "SmolLM2-360M-Instruct": _Published(
        "hf:HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 8_192, 20_480
    ),
    "Qwen2.5-0.5B-Instruct": _Published(
        "hf:Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 32_768, 6_144
    ),
    "TinyLlama-1.1B-Chat-v1.0": _Published(
        "hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, 2_048, 11_264
    ),
    "Qwen2.5-1.5B-Instruct": _Published(
        "hf:Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, 32_768, 14_336
    ),
    "SmolLM2-1.7B-Instruct": _Published(
        "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 8_192, 98_304
    ),
    "Qwen2.5-7B-Instruct": _Published("hf:Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 32_768, 28_672),
}


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def published() -> list[Candidate]:
    """Models that can be pulled from a hub, the smallest first."""
    return [
        Candidate(
            name=name,
            source=model.source,
            licence=model.licence,
            parameters=model.parameters,
            active_parameters=model.parameters,
            memory_bytes=4 * (model.parameters + model.key_value_weights * model.context_tokens)
            + 2 * RUNTIME_BYTES,
            disk_bytes=2 * model.parameters,
        )
        for name, model in _PUBLISHED.items()
    ]


def room(folder: Path, memory_bytes: int) -> Room:
    """Of this machine, where models may take `memory_bytes`."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return Room(
        memory_bytes=memory_bytes,
        cores=len(os.sched_getaffinity(0)),
        disk_bytes=max(0, shutil.disk_usage(place).free - FREE_BYTES_MIN),
    )


def advise(candidates: Sequence[Candidate], here: Room) -> list[Advice]:
    """Those that fit first, the largest of them first; then the others, the smallest first.

    Recommended is the largest that fits and is not slower than people read.
    """
    found = [_advice(candidate, here) for candidate in candidates]
    fitting = sorted((a for a in found if a.fits), key=lambda a: -a.model.parameters)
    others = sorted((a for a in found if not a.fits), key=lambda a: a.model.parameters)
    fast = [a for a in fitting if a.tokens_per_second >= TOKENS_A_SECOND_MIN]
    best = (fast or fitting[-1:])[:1]
    return [msgspec.structs.replace(a, recommended=a in best) for a in (*fitting, *others)]


def _advice(model: Candidate, here: Room) -> Advice:
    speed = WEIGHTS_A_CORE_SECOND * here.cores / model.active_parameters
    lacks = []
    if model.memory_bytes > here.memory_bytes:
        lacks.append(f"needs {_gb(model.memory_bytes)} of memory, {_gb(here.memory_bytes)} may go")
    if model.disk_bytes > here.disk_bytes:
        lacks.append(f"needs {_gb(model.disk_bytes)} of disk, {_gb(here.disk_bytes)} are free")
    reason = "; ".join(lacks)
    if not lacks:
        where = f"{_gb(model.disk_bytes)} of disk" if model.disk_bytes else "here already"
        pace = f"about {speed:.2g} tokens a second on {here.cores} cores"
        slow = "" if speed >= TOKENS_A_SECOND_MIN else ", slower than people read"
        reason = f"{_gb(model.memory_bytes)} of memory, {where}; {pace}{slow}"
    return Advice(
        model=model,
        fits=not lacks,
        recommended=False,
        tokens_per_second=round(speed, 2),
        price_micro_credits=token_price(model.active_parameters),
        reason=reason,
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
