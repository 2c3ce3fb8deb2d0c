"""The Llama forward pass over ragged rows, with one key/value slot per session.

Rows of many sessions, decoding or reading their prompt, go through one pass. Two rules make the
bits of a row independent of its company (`linear.py` has the first): rows are padded to few sizes,
and the row at position p attends over keys up to the next multiple of 256 after p, masked.

Source: Llama, Touvron et al., arXiv 2302.13971; rotary embedding, Su et al., arXiv 2104.09864.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from aivillage.models.inference.gguf_model import Layer, LlamaWeights, Shape
from aivillage.models.inference.linear import Linear, linear, padded_rows

KEY_STEP: Final = 256
"""Attention spans grow by this many keys. A span of rows never crosses such a border."""
QUERY_ROWS_MIN: Final = 4


class Span(msgspec.Struct, frozen=True):
    """Neighbouring tokens of one session: ids for `position`, `position + 1`, ...

    `drawn`: they were drawn, not read from a prompt; some engines compute these otherwise.
    """

    slot: int
    position: int
    token_ids: tuple[int, ...]
    drawn: bool = False

    @property
    def key_count(self) -> int:
        return (self.position // KEY_STEP + 1) * KEY_STEP


class RowModel(Protocol):
    """What a step of the engine needs of a model, whoever computes it. Not thread-safe."""

    draws_as_it_reads: bool
    """Whether the row of a drawn token has the bits of the same one read in a prompt."""

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Reads `spans` into their slots; gives the normed state of every row, in order."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """`states` (count, width) of `forward` -> (count, vocabulary)."""
        ...

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Gives `target` the first `tokens` keys and values of `source`."""
        ...


class _Block(msgspec.Struct, frozen=True):
    """One layer, its matrices packed."""

    attention_norm: Tensor
    query_key_value: Linear
    attention_out: Linear
    feed_forward_norm: Tensor
    gate_up: Linear
    down: Linear


class Layers:
    """Some blocks of a model and their slots: states in, states out. Not thread-safe."""

    def __init__(
        self, shape: Shape, layers: Iterable[Layer], *, slots: int, context_tokens: int
    ) -> None:
        """Uses `layers` up, one at a time."""
        self.shape = shape
        self._blocks = [_packed(layer) for layer in layers]
        self.like = self._blocks[0].attention_norm
        """Every tensor of a step is where this one is; states are of its type."""
        size = (len(self._blocks), slots, shape.key_heads, context_tokens, shape.head_width)
        self._keys, self._values = (_lazy_zeros(self.like, *size) for _ in range(2))
        turns = _rotations(shape.head_width, shape.rope_base, context_tokens)
        self._cos, self._sin = (turn.to(self.like.device) for turn in turns)

    @torch.inference_mode()
    def forward(self, state: Tensor, spans: Sequence[Span]) -> Tensor:
        """Reads `spans` into their slots; `state` is (rows padded, width), as is what it gives."""
        places = [span.position + n for span in spans for n in range(len(span.token_ids))]
        places += [0] * (len(state) - len(places))
        at = torch.tensor(places, device=self.like.device)
        turn = self._cos[at].unsqueeze(1), self._sin[at].unsqueeze(1)  # (rows, 1, head_width) each
        masks = [self._mask(span) for span in spans]
        for index, block in enumerate(self._blocks):
            mixed = self._attention(index, block, state, spans, masks, turn)
            state = state + block.attention_out(mixed)
            gate, up = block.gate_up(self._normed(state, block.feed_forward_norm)).chunk(2, dim=1)
            state = state + block.down(functional.silu(gate) * up)
        return state

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Gives `target` the first `tokens` keys and values of `source`."""
        for cache in (self._keys, self._values):
            cache[:, target, :, :tokens] = cache[:, source, :, :tokens]

    def _attention(
        self,
        index: int,
        block: _Block,
        state: Tensor,
        spans: Sequence[Span],
        masks: Sequence[Tensor],
        turn: tuple[Tensor, Tensor],
    ) -> Tensor:
        shape = self.shape
        heads = shape.heads + 2 * shape.key_heads
        mixed = block.query_key_value(self._normed(state, block.attention_norm))
        mixed = mixed.reshape(len(state), heads, shape.head_width)
        turned = _rotate(mixed[:, : -shape.key_heads], turn)
        query = turned[:, : shape.heads] * shape.head_width**-0.5  # (rows, heads, head_width)
        key, value = turned[:, shape.heads :], mixed[:, -shape.key_heads :]
        result = state.new_zeros(len(state), shape.heads * shape.head_width)
        row = 0
        for span, mask in zip(spans, masks, strict=True):
            rows = slice(row, row + len(span.token_ids))
            places = slice(span.position, span.position + len(span.token_ids))
            keys, values = self._keys[index, span.slot], self._values[index, span.slot]
            keys[:, places] = key[rows].transpose(0, 1)
            values[:, places] = value[rows].transpose(0, 1)
            end = span.key_count
            result[rows] = attend(query[rows], keys[:, :end], values[:, :end], mask)
            row = rows.stop
        return result

    def _mask(self, span: Span) -> Tensor:
        """0 where a query row may look, -inf where not: (query rows, keys)."""
        group = self.shape.heads // self.shape.key_heads
        device, end = self.like.device, span.position + len(span.token_ids)
        places = torch.arange(span.position, end, device=device)
        places = places.repeat_interleave(group)
        places = functional.pad(places, (0, max(0, QUERY_ROWS_MIN - len(places))))
        hidden = torch.arange(span.key_count, device=device) > places.unsqueeze(1)
        return self.like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def _normed(self, state: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(state, weight.shape, weight, self.shape.norm_epsilon)


class Head:
    """The last norm and the product with the vocabulary."""

    def __init__(self, shape: Shape, norm: Tensor, weight: Tensor) -> None:
        self._shape = shape
        self._norm = norm
        self._product = linear(weight)

    @torch.inference_mode()
    def normed(self, state: Tensor) -> Tensor:
        return functional.rms_norm(state, self._norm.shape, self._norm, self._shape.norm_epsilon)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """`states` (count, width), normed -> (count, vocabulary)."""
        count = len(states)
        padded = functional.pad(states, (0, 0, 0, padded_rows(count) - count))
        return self._product(padded)[:count]


class Llama:
    """A model and its slots. Not thread-safe; a slot is whoever's the caller says."""

    draws_as_it_reads = True
    """`sameness.py` looks: else nothing is guaranteed, and nothing kept."""

    def __init__(self, weights: LlamaWeights, *, slots: int, context_tokens: int) -> None:
        """Uses `weights.layers` up, one at a time."""
        self.shape = weights.shape
        self._embedding = weights.embedding
        self._head = Head(weights.shape, weights.norm, weights.head)
        self._layers = Layers(
            weights.shape, weights.layers, slots=slots, context_tokens=context_tokens
        )
        self.logits, self.copy_slot = self._head.logits, self._layers.copy_slot

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Reads `spans` into their slots; gives the normed state of every row, in order.

        Returns:
            (rows padded, width); rows beyond those of the spans mean nothing.
        """
        state = embedded(self._embedding, spans)
        return self._head.normed(self._layers.forward(state, spans))


@torch.inference_mode()
def embedded(table: Tensor, spans: Sequence[Span]) -> Tensor:
    """The states that the first layer gets: (rows padded, width)."""
    ids = [token for span in spans for token in span.token_ids]
    padding = [0] * (padded_rows(len(ids)) - len(ids))
    return functional.embedding(torch.tensor(ids + padding, device=table.device), table)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one session's rows; several heads share each key head.

    Args:
        query: (rows, heads, head_width), already scaled.
        keys: (key_heads, keys, head_width), as are `values`.
        values: (key_heads, keys, head_width).
        mask: (rows * heads / key_heads, padded to at least 4, keys), added to the scores.

    Returns:
        (rows, heads * head_width).
    """
    rows, heads, width = query.shape
    key_heads = len(keys)
    group = heads // key_heads
    grouped = query.reshape(rows, key_heads, group, width).transpose(0, 1)
    grouped = grouped.reshape(key_heads, rows * group, width)
    grouped = functional.pad(grouped, (0, 0, 0, len(mask) - rows * group))
    scores = torch.bmm(grouped, keys.transpose(1, 2)).add_(mask)  # (key_heads, rows * group, keys)
    # Summed in float32 whatever the type: in bfloat16 a long text's weights would be lost.
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    mixed = torch.bmm(weights, values)[:, : rows * group]
    return (
        mixed.reshape(key_heads, rows, group * width).transpose(0, 1).reshape(rows, heads * width)
    )


def _packed(layer: Layer) -> _Block:
    return _Block(
        layer.attention_norm,
        linear(layer.query_key_value),
        linear(layer.attention_out),
        layer.feed_forward_norm,
        linear(layer.gate_up),
        linear(layer.down),
    )


def _lazy_zeros(like: Tensor, *size: int) -> Tensor:
    """Zeros beside `like`; in the machine's memory their pages become real when they are written.

    Memory follows use there. A GPU gives all of it at once.
    """
    if like.device.type != "cpu":
        return like.new_zeros(size)
    pages = mmap.mmap(-1, like.element_size() * math.prod(size))
    return torch.frombuffer(pages, dtype=like.dtype).view(size)


def _rotations(width: int, base: float, count: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position: (count, width) each."""
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) / base**steps
    cos, sin = angles.cos().float(), angles.sin().float()  # (count, width / 2)
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def _rotate(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """`heads` (rows, heads, head_width) turned by their position's angle, halves as pairs."""
    cos, sin = turn
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos + swapped * sin).to(heads.dtype)
