"""GGUF tensors -> float32 torch tensors of a Llama model. Nothing is ever unpickled."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from aivillage.models.inference.gguf_file import GgufFile, TensorInfo
from aivillage.protocols.errors import RequestError

BLOCK: Final = 32
"""Weights that share one scale, in every quantised type read here."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a Llama model."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One block's weights, each (out, in). Query, key and value are one matrix, as are gate, up."""

    attention_norm: Tensor  # (width,)
    query_key_value: Tensor  # ((heads + 2 key_heads) * head_width, width)
    attention_out: Tensor  # (width, heads * head_width)
    feed_forward_norm: Tensor  # (width,)
    gate_up: Tensor  # (2 feed_forward, width)
    down: Tensor  # (width, feed_forward)


class LlamaWeights(msgspec.Struct, frozen=True, kw_only=True):
    """`layers` converts one at a time, once, so that no more than one is held unpacked."""

    shape: Shape
    embedding: Tensor  # (vocabulary, width), also the head where the file has none of its own
    head: Tensor  # (vocabulary, width)
    norm: Tensor  # (width,)
    layers: Iterator[Layer]
    sha256: str


class StageWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Layers first..last-1 alone, with what the ends of the model need beside them."""

    shape: Shape
    embedding: Tensor | None
    """(vocabulary, width); None: another stage is the first."""
    head: Callable[[], Tensor] | None
    """Reads (vocabulary, width), which is held for as long as the caller packs it."""
    norm: Tensor | None
    """None, as is `head`: another stage is the last."""
    layers: Iterator[Layer]
    sha256: str


def load_stage(path: Path, first: int, last: int) -> StageWeights:
    """The weights of layers first..last-1; no other tensor's bytes are converted.

    Raises:
        RequestError: as for `load`, or the model has no such layers.
    """
    file = GgufFile(path)
    shape = read_shape(file)
    if not 0 <= first < last <= shape.layers:
        raise RequestError(f"layers {first} to {last} of a model of {shape.layers}")
    size = (shape.vocabulary, shape.width)
    ends = last == shape.layers
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    with path.open("rb") as whole:  # read, not mapped: what is mapped counts as our memory
        sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
    return StageWeights(
        shape=shape,
        embedding=_matrix(file, "token_embd.weight", size) if first == 0 else None,
        head=functools.partial(_matrix, file, head, size) if ends else None,
        norm=_matrix(file, "output_norm.weight", (shape.width,)) if ends else None,
        layers=(_layer(file, shape, index) for index in range(first, last)),
        sha256=sha256,
    )


def load(path: Path) -> LlamaWeights:
    """The weights of the Llama model in `path`, as float32.

    Raises:
        RequestError: no whole GGUF file, another architecture, or a tensor type we do not read;
            that of a layer is raised when it is converted.
    """
    file = GgufFile(path)
    shape = read_shape(file)
    embedding = _matrix(file, "token_embd.weight", (shape.vocabulary, shape.width))
    tied = "output.weight" not in file.tensors
    return LlamaWeights(
        shape=shape,
        embedding=embedding,
        head=embedding if tied else _matrix(file, "output.weight", tuple(embedding.shape)),
        norm=_matrix(file, "output_norm.weight", (shape.width,)),
        layers=(_layer(file, shape, index) for index in range(shape.layers)),
        sha256=sha256_of(file),
    )


def sha256_of(file: GgufFile) -> str:
    """Of the whole file, in hexadecimal."""
    return hashlib.sha256(file.mapping).hexdigest()


def read_shape(file: GgufFile) -> Shape:
    """Raises: RequestError: not a Llama, or its sizes do not fit together."""
    architecture = file.field("general.architecture", str)
    if architecture != "llama":
        raise RequestError(f"the model is a {architecture!r}; this engine runs 'llama'")
    heads, width = (
        file.field(f"llama.{name}", int) for name in ("attention.head_count", "embedding_length")
    )
    shape = Shape(
        layers=file.field("llama.block_count", int),
        width=width,
        feed_forward=file.field("llama.feed_forward_length", int),
        heads=heads,
        key_heads=file.field("llama.attention.head_count_kv", int),
        head_width=width // max(1, heads),
        vocabulary=len(file.field("tokenizer.ggml.tokens", list)),
        context_tokens=file.field("llama.context_length", int),
        rope_base=file.field("llama.rope.freq_base", float),
        norm_epsilon=file.field("llama.attention.layer_norm_rms_epsilon", float),
    )
    if min(shape.layers, heads, shape.key_heads) < 1 or width % heads or heads % shape.key_heads:
        raise RequestError("the sizes of the model do not fit together")
    return shape


def _layer(file: GgufFile, shape: Shape, index: int) -> Layer:
    def matrix(name: str, *size: int) -> Tensor:
        return _matrix(file, f"blk.{index}.{name}.weight", size)

    width, inner = shape.width, shape.feed_forward
    rows, key_rows = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    query = unpermute(matrix("attn_q", rows, width), shape.heads)
    key = unpermute(matrix("attn_k", key_rows, width), shape.key_heads)
    return Layer(
        attention_norm=matrix("attn_norm", width),
        query_key_value=torch.cat([query, key, matrix("attn_v", key_rows, width)]),
        attention_out=matrix("attn_output", width, rows),
        feed_forward_norm=matrix("ffn_norm", width),
        gate_up=torch.cat([matrix("ffn_gate", inner, width), matrix("ffn_up", inner, width)]),
        down=matrix("ffn_down", width, inner),
    )


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows back in the order that rotates halves; llama.cpp stores them for rotating pairs."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def _matrix(file: GgufFile, name: str, shape: tuple[int, ...]) -> Tensor:
    info = file.tensor(name)
    if info.shape != shape:
        raise RequestError(f"{name} has shape {info.shape} where {shape} belongs")
    return dequantize(file, info)


def dequantize(file: GgufFile, info: TensorInfo) -> Tensor:
    """One tensor as float32, bit-equal to the reference dequantisation of the gguf package.

    Raises:
        RequestError: its type is none of F32, F16, Q8_0, Q4_1, or the file ends inside it.
    """
    if info.kind not in _KINDS:
        raise RequestError(
            f"{info.name} is of GGUF type {info.kind}; F32, F16, Q8_0 and Q4_1 are read",
            next_step="convert the model to one of these",
        )
    per_block, block_bytes, unpack = _KINDS[info.kind]
    if info.shape[-1] % per_block:
        raise RequestError(f"{info.name} does not divide into blocks of {per_block}")
    size_bytes = info.count // per_block * block_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mapping is read-only, and so is our use of it
        raw = torch.frombuffer(file.bytes_of(info, size_bytes), dtype=torch.uint8)
    return unpack(raw.view(-1, block_bytes)).reshape(info.shape)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.clone().view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.clone().view(torch.float16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    scale = _f16(blocks[:, :2])  # (blocks, 1)
    return blocks[:, 2:].view(torch.int8).float().mul_(scale)  # (blocks, 32)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, low = _f16(blocks[:, :2]), _f16(blocks[:, 2:4])  # (blocks, 1) each
    nibbles = blocks[:, 4:]  # (blocks, 16): weights 0..15 in the low halves, 16..31 in the high
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=1).float()  # (blocks, 32)
    return codes.mul_(scale).add_(low)


_KINDS: Final[dict[int, tuple[int, int, Callable[[Tensor], Tensor]]]] = {
    0: (1, 4, _f32),
    1: (1, 2, _f16),
    8: (BLOCK, 34, _q8_0),
    3: (BLOCK, 20, _q4_1),
}
