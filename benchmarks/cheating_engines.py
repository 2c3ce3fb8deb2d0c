"""Engines that cost less than the one they claim to be, for benchmarks and tests of the looking.

Each is our own engine with another model inside: fewer layers, other weights, or weights and
products in fewer bits. Everything else of it is honest, its fingerprints included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import msgspec
import torch
from torch import Tensor

from aivillage.models.inference import catalogue, gguf_model, llama
from aivillage.models.inference.engine_torch import SLOTS, TorchEngine
from aivillage.models.inference.gguf_model import Layer, LlamaWeights
from aivillage.models.inference.kept import Slots
from aivillage.models.inference.linear import Linear, linear

MATRICES = ("query_key_value", "attention_out", "gate_up", "down")


def with_matrices(weights: LlamaWeights, change: Callable[[Tensor], Tensor]) -> LlamaWeights:
    """Every matrix of every layer changed; norms and embedding as they are."""

    def changed(layer: Layer) -> Layer:
        return msgspec.structs.replace(
            layer, **{name: change(getattr(layer, name)) for name in MATRICES}
        )

    return msgspec.structs.replace(weights, layers=map(changed, weights.layers))


def quantised(bits: int) -> Callable[[LlamaWeights], LlamaWeights]:
    """Rounded to so many bits, one scale a row."""

    def rounded(matrix: Tensor) -> Tensor:
        scale = matrix.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes: Tensor = (matrix / scale).round_()
        return codes.mul_(scale)

    return lambda weights: with_matrices(weights, rounded)


def without_a_layer(weights: LlamaWeights) -> LlamaWeights:
    """The one in the middle is left out."""
    gone = weights.shape.layers // 2
    layers = (layer for number, layer in enumerate(weights.layers) if number != gone)
    shape = msgspec.structs.replace(weights.shape, layers=weights.shape.layers - 1)
    return msgspec.structs.replace(weights, layers=layers, shape=shape)


def perturbed(weights: LlamaWeights) -> LlamaWeights:
    """Noise of a hundredth of each matrix's own spread: a fine-tuned sibling."""
    draw = torch.Generator().manual_seed(11)
    return with_matrices(
        weights,
        lambda m: m + 0.01 * m.std() * torch.randn(m.shape, generator=draw),
    )


def rounded_to(kind: torch.dtype) -> Callable[[LlamaWeights], LlamaWeights]:
    return lambda weights: with_matrices(weights, lambda matrix: matrix.to(kind).float())


def bfloat16_product(weight: Tensor) -> Linear:
    """Rows, weights and sums in bfloat16, as accelerators compute."""
    packed = weight.bfloat16()

    def product(rows: Tensor) -> Tensor:
        result: Tensor = (rows.bfloat16() @ packed.T).float()
        return result

    return product


OTHER_MODELS: dict[str, Callable[[LlamaWeights], LlamaWeights]] = {
    "layer_dropped": without_a_layer,
    "weights_perturbed": perturbed,
    "weights_int4": quantised(4),
}
OTHER_PRECISIONS: dict[str, Callable[[LlamaWeights], LlamaWeights]] = {
    "int8": quantised(8),
    "bfloat16": lambda weights: weights,
    "float16_weights": rounded_to(torch.float16),
}


@contextmanager
def cheating(engine: TorchEngine, kind: str) -> Iterator[TorchEngine]:
    """`engine` with another model inside, its slots empty; the honest one is back afterwards."""
    change = (OTHER_MODELS | OTHER_PRECISIONS)[kind]
    info = engine.info()
    weights = change(gguf_model.load(catalogue.weights_path(catalogue.known(info.model))))
    product = bfloat16_product if kind == "bfloat16" else linear
    with mock.patch.object(llama, "linear", product):
        model = llama.Llama(weights, slots=SLOTS, context_tokens=info.context_tokens)
    slots = Slots(SLOTS, keeps=True, drawn_as_prompt=model.draws_as_it_reads)
    with mock.patch.object(engine, "_model", model), mock.patch.object(engine, "_slots", slots):
        yield engine
