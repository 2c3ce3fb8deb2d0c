"""Some layers of a model, with a slot of keys and values for each session.

Split is unsplit, bit for bit, in one kernel class: rows are padded and keys counted by the same two
rules as in `llama.py`, and states travel as the float32 that they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from aivillage.models.inference import gguf_model
from aivillage.models.inference.gguf_model import Shape
from aivillage.models.inference.linear import padded_rows
from aivillage.models.inference.llama import KEY_STEP, Head, Layers, Span, embedded
from aivillage.models.inference.placement import HOST, Placement, on_host, placed_stage

_PROBE_STATES: Final = 64


class Stage:
    """Layers first..last-1 of the model in a GGUF file; nothing else of it is in memory."""

    def __init__(
        self,
        path: Path,
        first: int,
        last: int,
        *,
        slots: int,
        context_tokens: int,
        at: Placement = HOST,
    ) -> None:
        """Raises: RequestError: the file is damaged, of another kind, or has no such layers."""
        weights = placed_stage(gguf_model.load_stage(path, first, last), at)
        self.shape: Shape = weights.shape
        self.sha256 = weights.sha256
        self.context_tokens = min(context_tokens, self.shape.context_tokens)
        self._embedding = weights.embedding
        self._head: Head | None = None
        if weights.head is not None and weights.norm is not None:
            self._head = Head(weights.shape, weights.norm, weights.head())
        self._layers = Layers(
            weights.shape, weights.layers, slots=slots, context_tokens=self.context_tokens
        )
        self.copy_slot = self._layers.copy_slot

    @property
    def is_first(self) -> bool:
        return self._embedding is not None

    @property
    def is_last(self) -> bool:
        return self._head is not None

    def read(self, spans: Sequence[Span], states: Tensor | None) -> Tensor:
        """Reads rows into their slots and gives their states, the last stage's ones normed.

        Args:
            spans: whose rows these are; their ids count at the first stage only.
            states: (rows, width) of the stage before, wherever they lie; None at the first.

        Returns:
            (rows padded, width); rows beyond those of the spans mean nothing.
        """
        if self._embedding is not None:
            state = embedded(self._embedding, spans)
        else:
            assert states is not None, "only the first stage embeds"
            state = functional.pad(states, (0, 0, 0, padded_rows(len(states)) - len(states)))
            state = state.to(self._layers.like)
        state = self._layers.forward(state, spans)
        return state if self._head is None else self._head.normed(state)

    def logits(self, states: Tensor) -> Tensor:
        """`states` (count, width) that the last stage read -> (count, vocabulary)."""
        assert self._head is not None, "only the last stage has the head"
        return self._head.logits(states)


class ProbedStage:
    """A stage as `sameness.probe` takes a model: inner ones get states made up from token ids."""

    def __init__(self, stage: Stage) -> None:
        self.shape = stage.shape
        self.copy_slot = stage.copy_slot
        self._stage = stage
        draw = torch.Generator().manual_seed(1)
        self._made_up = torch.randn(_PROBE_STATES, stage.shape.width, generator=draw)

    def forward(self, spans: Sequence[Span]) -> Tensor:
        ids = [token % _PROBE_STATES for span in spans for token in span.token_ids]
        return self._stage.read(spans, None if self._stage.is_first else self._made_up[ids])

    def logits(self, states: Tensor) -> Tensor:
        return self._stage.logits(states) if self._stage.is_last else states


def spans_of(slot: int, position: int, token_ids: Sequence[int]) -> list[Span]:
    """Neighbouring rows of one session, cut where the number of keys grows."""
    spans, at = [], 0
    while at < len(token_ids):
        border = (position + at) // KEY_STEP * KEY_STEP + KEY_STEP
        end = min(len(token_ids), border - position)
        spans.append(Span(slot, position + at, tuple(token_ids[at:end])))
        at = end
    return spans


def states_of(body: bytes, width: int) -> Tensor:
    """The float32 rows on the wire as (rows, width)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes are read-only, and so is our use of them
        return torch.frombuffer(body, dtype=torch.float32).view(-1, width)


def bytes_of(states: Tensor) -> bytes:
    """As float32, whatever computed them."""
    body: bytes = on_host(states).contiguous().numpy().tobytes()
    return body
