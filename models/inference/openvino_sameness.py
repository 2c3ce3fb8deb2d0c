"""The self-test of the OpenVINO engine at load: the same bits alone, in company and replayed.

A probe is read as a prompt, whole and in slices down to one row; then tokens are decoded alone,
in batches, beside a prompt, and all at once as after a failover. `identical: guaranteed` is said
only where no bit differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from aivillage.models.inference.llama import Span
from aivillage.models.inference.openvino_model import PAGE_TOKENS, ROWS_MIN, PagedLlama
from aivillage.models.inference.sameness import Sameness

PROMPT_TOKENS: Final = 36
DRAWN_TOKENS: Final = 8
SLICES: Final = ((32, 4), (16, 20), (7, 1, 28), (2, 33, 1))
BATCHES: Final = (2, 3, 5, 8)


def probe(model: PagedLlama, *, slots: int) -> Sameness:
    """Runs the probe in the slots of `model`, which must be unused. Under a second."""
    count = PROMPT_TOKENS + DRAWN_TOKENS
    ids = tuple((7919 * n + 11) % model.shape.vocabulary for n in range(count))
    prompt = _read(model, 0, ids, (PROMPT_TOKENS,))
    drawn = torch.cat(
        [_drawn(model, 0, at, ids[at : at + 1]) for at in range(PROMPT_TOKENS, count)]
    )
    last = slots - 1
    passed = all(_same(prompt, _read(model, last, ids, sizes)) for sizes in SLICES)
    passed = passed and _same(drawn, _drawn(model, last, PROMPT_TOKENS, ids[PROMPT_TOKENS:]))
    passed = passed and _batches_alike(model, ids, drawn[-1:], slots)
    logits = model.logits(drawn)
    passed = passed and _same(logits[-1:], model.logits(drawn[-1:]))
    digest = hashlib.sha256(torch.cat([logits[-1], model.logits(prompt[-1:])[0]]).numpy().tobytes())
    return Sameness(passed=passed, digest=digest.hexdigest()[:8])


def _read(model: PagedLlama, slot: int, ids: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """States of a prompt that is read in slices: (tokens, width)."""
    states, at = [], 0
    for size in sizes:
        states.append(model.forward([Span(slot, at, tuple(ids[at : at + size]))]))
        at += size
    return torch.cat(states)


def _drawn(model: PagedLlama, slot: int, at: int, ids: Sequence[int]) -> Tensor:
    return model.forward([Span(slot, at, tuple(ids), drawn=True)])


def _batches_alike(model: PagedLlama, ids: Sequence[int], wanted: Tensor, slots: int) -> bool:
    """The last token in every place of a batch, and beside a prompt that is read.

    The first slot and the last were read; those between get copies, as a kept prefix is.
    """
    at = len(ids) - 1
    for slot in range(1, slots - 1):
        model.copy_slot(0, slot, len(ids))
    for count in (size for size in BATCHES if size <= slots):
        spans = [Span(slot, at, tuple(ids[at:]), drawn=True) for slot in range(count)]
        states = model.forward(spans)
        if not _same(wanted.expand_as(states), states):
            return False
        if not _same(model.logits(wanted).expand(count, -1), model.logits(states)):
            return False
    if slots < 2:
        return True
    last = Span(1, at, tuple(ids[at:]), drawn=True)
    beside = model.forward([last, Span(0, 0, tuple(ids[:32]))])
    return _same(wanted, beside[:1])


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


def rule() -> str:
    """The shape rule, for the kernel class."""
    return f"rows{ROWS_MIN}-kv32-pages{PAGE_TOKENS}"
