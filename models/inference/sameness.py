"""Is an answer the same bits however it is computed? Tested at load, on this machine.

The promise `identical: guaranteed` is made only where decode, prefill in slices and every batch
size gave equal bits on a probe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from aivillage.models.inference.gguf_model import Shape
from aivillage.models.inference.linear import ROW_SIZES
from aivillage.models.inference.llama import KEY_STEP, QUERY_ROWS_MIN, Span, attend

PROBE_TOKENS: Final = 40
PREFIX_TOKENS: Final = 36
BATCHES: Final = (2, 5, 8)


class Probed(Protocol):
    """A whole model, or a stage of one that makes its first states up."""

    @property
    def shape(self) -> Shape: ...
    def forward(self, spans: Sequence[Span]) -> Tensor: ...
    def logits(self, states: Tensor) -> Tensor: ...
    def copy_slot(self, source: int, target: int, tokens: int) -> None: ...


class Sameness(msgspec.Struct, frozen=True, kw_only=True):
    """`digest` names the very bits of the probe: equal on two machines that compute alike."""

    passed: bool
    digest: str


def probe(model: Probed, *, slots: int, context_tokens: int) -> Sameness:
    """Runs the probe in the slots of `model`, which must be unused.

    It costs about a second; slots hold stale, masked keys afterwards.
    """
    ids = tuple((7919 * n + 11) % model.shape.vocabulary for n in range(PROBE_TOKENS))
    reference = _sliced(model, ids, (32, 8))
    passed = (
        _same(reference, _sliced(model, ids, (16, 24)))
        and _same(reference[-12:], _sliced(model, ids, (28, 3, 5, 4))[-12:])
        and _decodes_alike(model, ids, reference)
        and _batches_alike(model, ids, reference, slots)
        and _attention_alike(model, context_tokens, reference)
    )
    logits = model.logits(reference[-1:])
    said = logits.float().cpu().numpy().tobytes()
    return Sameness(passed=passed, digest=hashlib.sha256(said).hexdigest()[:8])


def _sliced(model: Probed, ids: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """States of all of `ids`, read in slices of `sizes` tokens: (tokens, width)."""
    states, at = [], 0
    for size in sizes:
        states.append(model.forward([Span(0, at, ids[at : at + size])])[:size])
        at += size
    return torch.cat(states)


def _decodes_alike(model: Probed, ids: tuple[int, ...], reference: Tensor) -> bool:
    for at in range(PREFIX_TOKENS, PROBE_TOKENS):
        state = model.forward([Span(0, at, ids[at : at + 1])])[:1]
        if not _same(reference[at : at + 1], state):
            return False
    return True


def _batches_alike(model: Probed, ids: tuple[int, ...], reference: Tensor, slots: int) -> bool:
    """The last token beside others, and beside a slice; in every place; through the head too."""
    last = PROBE_TOKENS - 1
    for slot in range(1, slots):
        model.copy_slot(0, slot, last)
    wanted = model.logits(reference[last:])
    for count in (size for size in BATCHES if size <= slots):
        spans = [Span(slot, last, ids[last:]) for slot in range(count)]
        states = model.forward(spans)[:count]
        if not _same(reference[last:].expand_as(states), states):
            return False
        if not _same(wanted.expand(count, -1), model.logits(states)):
            return False
    return slots < 2 or _slice_alike(model, ids, reference)


def _slice_alike(model: Probed, ids: tuple[int, ...], reference: Tensor) -> bool:
    last = PROBE_TOKENS - 1
    states = model.forward([Span(1, last, ids[last:]), Span(0, 0, ids[:32])])
    return _same(reference[last:], states[:1]) and _same(reference[:32], states[1:33])


def _attention_alike(model: Probed, context_tokens: int, like: Tensor) -> bool:
    """A query row among 32 others and alone, over every number of keys that occurs.

    Drawn in float32 on the CPU, the same everywhere, and computed where and as `like` is.
    """
    shape, draw = model.shape, torch.Generator().manual_seed(1)
    group = shape.heads // shape.key_heads
    keys = torch.randn(shape.key_heads, context_tokens, shape.head_width, generator=draw).to(like)
    query = torch.randn(32, shape.heads, shape.head_width, generator=draw).to(like)
    for end in range(KEY_STEP, context_tokens + 1, KEY_STEP):
        seen = keys[:, :end]
        many = attend(query, seen, seen, like.new_zeros(32 * group, end))
        alone_mask = like.new_zeros(max(group, QUERY_ROWS_MIN), end)
        for row in (0, 13, 31):
            if not _same(many[row : row + 1], attend(query[row : row + 1], seen, seen, alone_mask)):
                return False
    return True


def _same(left: Tensor, right: Tensor) -> bool:
    bits = torch.int32 if left.element_size() == 4 else torch.int16
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


def rule() -> str:
    """The shape rule, for the kernel class."""
    return f"rows{'-'.join(map(str, ROW_SIZES))}-keys{KEY_STEP}"
