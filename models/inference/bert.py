"""BERT and its kin, forwards, one sequence at a time, in float32.

Source: Devlin et al. 2018, arXiv 1810.04805; Liu et al. 2019, arXiv 1907.11692.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from aivillage.models.inference.encoder_files import Shape
from aivillage.protocols.errors import RequestError


class Affine(NamedTuple):
    """A matrix (out, in) or a norm's scale (width,), and what is added."""

    weight: Tensor
    bias: Tensor


class Layer(NamedTuple):
    """`asks`: queries, keys and values in one matrix (3 x width, width)."""

    asks: Affine
    attended: Affine
    attention_norm: Affine
    inner: Affine
    outer: Affine
    norm: Affine


class Bert:
    """The weights, and what follows from them."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        """Reads the safetensors. Raises: RequestError: they cannot be read."""
        self._shape = shape
        self._weights = _read(folder, shape)
        self._words, self._places, self._types = (
            self._weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        )
        self._norm = self._affine("embeddings.LayerNorm")
        self._layers = [self._layer(n) for n in range(shape.config.num_hidden_layers)]

    @torch.inference_mode()
    def states(self, ids: Sequence[int], types: Sequence[int]) -> Tensor:
        """(tokens, width) after the last layer. `types` says to which text each token belongs."""
        config = self._shape.config
        first = config.first_position
        kinds = torch.tensor(types).clamp(max=config.type_vocab_size - 1)
        states = self._words[torch.tensor(ids)] + self._types[kinds]
        states = self._normed(states + self._places[first : first + len(ids)], self._norm)
        for layer in self._layers:
            states = self._through(layer, states)
        return states

    @torch.inference_mode()
    def logit(self, ids: Sequence[int], types: Sequence[int]) -> float:
        """Of a model that ranks: what its one label gets."""
        first = self.states(ids, types)[0]
        is_bert = self._shape.config.model_type == "bert"
        names = ("pooler.dense", "classifier") if is_bert else _ROBERTA_HEAD
        pooled, head = map(self._affine, names)
        return float(functional.linear(torch.tanh(functional.linear(first, *pooled)), *head))

    def _through(self, layer: Layer, states: Tensor) -> Tensor:
        tokens, heads = len(states), self._shape.config.num_attention_heads
        asks = functional.linear(states, *layer.asks).view(tokens, 3, heads, -1)
        query, key, value = asks.permute(1, 2, 0, 3).unsqueeze(1)  # (1, heads, tokens, head width)
        found = functional.scaled_dot_product_attention(query, key, value)
        mixed = functional.linear(found[0].transpose(0, 1).reshape(tokens, -1), *layer.attended)
        states = self._normed(states + mixed, layer.attention_norm)
        inner = functional.gelu(functional.linear(states, *layer.inner))
        return self._normed(states + functional.linear(inner, *layer.outer), layer.norm)

    def _normed(self, states: Tensor, norm: Affine) -> Tensor:
        eps = self._shape.config.layer_norm_eps
        return functional.layer_norm(states, states.shape[-1:], *norm, eps)

    def _layer(self, number: int) -> Layer:
        name = f"encoder.layer.{number}"
        asks = [self._affine(f"{name}.attention.self.{n}") for n in ("query", "key", "value")]
        return Layer(
            asks=Affine(*(torch.cat(parts) for parts in zip(*asks, strict=True))),
            attended=self._affine(f"{name}.attention.output.dense"),
            attention_norm=self._affine(f"{name}.attention.output.LayerNorm"),
            inner=self._affine(f"{name}.intermediate.dense"),
            outer=self._affine(f"{name}.output.dense"),
            norm=self._affine(f"{name}.output.LayerNorm"),
        )

    def _affine(self, name: str) -> Affine:
        return Affine(self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])


_ROBERTA_HEAD = ("classifier.dense", "classifier.out_proj")


def _read(folder: Path, shape: Shape) -> dict[str, Tensor]:
    ours = {theirs: name for name, theirs in shape.tensors.items()}
    found: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names: Iterable[str] = file.keys()
                for name in names:
                    if name in ours:
                        found[ours[name]] = file.get_tensor(name).float()
    except Exception as error:  # whatever a stranger's file makes the library raise
        raise RequestError(f"the weights cannot be read: {str(error)[:300]}") from None
    return found
