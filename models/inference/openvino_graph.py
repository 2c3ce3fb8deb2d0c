"""GGUF tensors -> an OpenVINO graph of a Llama, its weights as they lie in the file.

OpenVINO's own reading of Q4_1 rounds each block's offset to a multiple of its scale, which costs a
quarter of the perplexity. Here a block is (code - 8) * scale, and what its offset lacks is a small
product of its own over the sums of 32 inputs: the arithmetic of the file, exactly.

Source: OpenVINO, PagedAttentionExtension; rotary embedding, Su et al., arXiv 2104.09864.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.op import _PagedAttentionExtension as PagedAttention  # it has no public name

from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.gguf_model import BLOCK, Shape
from aivillage.protocols.errors import RequestError

Node = Any
"""A node of OpenVINO's graph, or one of its outputs: its stubs do not tell them apart."""
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
_BLOCKS: Final = {F32: (1, 4), F16: (1, 2), Q4_1: (BLOCK, 20), Q8_0: (BLOCK, 34)}
"""GGUF type -> weights and bytes of a block."""
_MIDDLE: Final = 8
"""The code that stands for zero, so that codes reach as far below it as above."""


class Body(msgspec.Struct, frozen=True):
    """`body` gives normed states of tokens, `head` logits of such states."""

    body: ov.Model
    head: ov.Model


class _Weights:
    """Tensors of one file as constants. The graph borrows the arrays: `kept` holds them."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.kept: list[Any] = []

    def blocks(self, name: str, shape: tuple[int, ...]) -> tuple[int, NDArray[np.uint8]]:
        """The type of a tensor and its bytes: (rows, blocks of a row, bytes of a block).

        Raises:
            RequestError: another shape, a type that is not read, or the file ends inside it.
        """
        info = self._file.tensor(name)
        if info.shape != shape:
            raise RequestError(f"{name} has shape {info.shape} where {shape} belongs")
        if info.kind not in _BLOCKS or shape[-1] % _BLOCKS[info.kind][0]:
            raise RequestError(f"{name} is of GGUF type {info.kind} in rows of {shape[-1]}")
        per_block, size = _BLOCKS[info.kind]
        raw = np.frombuffer(self._file.bytes_of(info, info.count // per_block * size), np.uint8)
        return info.kind, raw.reshape(-1, shape[-1] // per_block, size)

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        kind, blocks = self.blocks(name, (size,))
        if kind != F32:
            raise RequestError(f"{name} is of GGUF type {kind}; F32 belongs there")
        return blocks.reshape(-1).view(np.float32)

    def constant(self, values: NDArray[Any], shape: tuple[int, ...], kind: ov.Type) -> Node:
        """`values` as a constant that may have half bytes; nothing is copied."""
        self.kept.append(values)
        return op.constant(ov.Tensor(values, ov.Shape(shape), kind))


def _f16(bytes_: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(bytes_).view(np.float16)


def _integers(*values: int) -> Node:
    return op.constant(np.array(values, dtype=np.int64))


def _index(value: int) -> Node:
    return op.constant(np.array(value, dtype=np.int64))


def _number(value: float) -> Node:
    return op.constant(np.array(value, dtype=np.float32))


def _empty(kind: Any, *shape: int) -> Node:
    return op.constant(np.zeros(shape or (0,), dtype=kind))


def _input(name: str, kind: Any, *shape: int) -> Node:
    made = op.parameter(list(shape), kind, name=name)
    made.output(0).set_names({name})
    return made


class _Matrix:
    """One weight (out, in): what its product with rows takes."""

    def __init__(self, weights: _Weights, kind: int, blocks: NDArray[np.uint8]) -> None:
        """`blocks` as `_Weights.blocks` gives them."""
        rows, groups, _ = blocks.shape
        self._low: Node | None = None
        if kind in (F32, F16):
            flat = np.ascontiguousarray(blocks).reshape(rows, -1)
            self.weight = op.constant(flat.view(np.float32 if kind == F32 else np.float16))
        elif kind == Q8_0:
            codes = np.ascontiguousarray(blocks[..., 2:]) ^ 0x80  # signed to unsigned: + 128
            middle = op.constant(np.full((rows, groups, 1), 128, np.uint8))
            self.weight = _scaled(op.constant(codes), middle, _f16(blocks[..., :2]))
        else:
            scale, low = _f16(blocks[..., :2]), _f16(blocks[..., 2:4])  # (rows, groups, 1) each
            codes = weights.constant(_halves(blocks[..., 4:]), (rows, groups, BLOCK), ov.Type.u4)
            middle = weights.constant(np.full(1, _MIDDLE, np.uint8), (1, 1, 1), ov.Type.u4)
            self.weight = _scaled(codes, middle, scale)
            lacks = low.astype(np.float32) + _MIDDLE * scale.astype(np.float32)
            self._low = op.constant(np.ascontiguousarray(lacks[..., 0]))  # (rows, groups)
        self.weight = op.convert(self.weight, "f32")

    def __call__(self, rows: Node, sums: Node) -> Node:
        """`rows` (n, 1, in) and their `sums` by block (n, 1, in / 32) -> (n, 1, out)."""
        product = op.matmul(rows, self.weight, False, True)
        if self._low is None:
            return product
        return op.add(product, op.matmul(sums, self._low, False, True))


def _scaled(codes: Node, middle: Node, scale: NDArray[np.float16]) -> Node:
    """(codes - middle) * scale, in f16, (rows, in): the pattern that stays packed in memory."""
    rows, groups, _ = scale.shape
    centred = op.subtract(op.convert(codes, "f16"), op.convert(middle, "f16"))
    return op.reshape(
        op.multiply(centred, op.constant(scale)), _integers(rows, groups * BLOCK), False
    )


def _halves(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """16 bytes, weights 0..15 low and 16..31 high, as pairs of neighbours, the first low."""
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return np.ascontiguousarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


class _Builder:
    """One graph in the making."""

    def __init__(self, file: GgufFile, shape: Shape) -> None:
        self.weights = _Weights(file)
        self.shape = shape
        self.inputs = {
            name: _input(name, kind, *size)
            for name, kind, size in (
                ("input_ids", np.int64, (-1,)),
                ("position_ids", np.int64, (-1,)),
                ("past_lens", np.int32, (-1,)),
                ("subsequence_begins", np.int32, (-1,)),
                ("block_indices", np.int32, (-1,)),
                ("block_indices_begins", np.int32, (-1,)),
                ("max_context_len", np.int32, ()),
            )
        }

    def matrix(self, names: tuple[str, ...], *sizes: int, heads: tuple[int, ...] = ()) -> _Matrix:
        """Several (size, in) under each other as one; `heads` where rows are in llama.cpp's order.

        `sizes` are the rows of each and, last, the inputs.
        """
        parts, kinds = [], set()
        for index, name in enumerate(names):
            kind, blocks = self.weights.blocks(name, (sizes[index], sizes[-1]))
            kinds.add(kind)
            parts.append(_unpermuted(blocks, heads[index]) if index < len(heads) else blocks)
        if len(kinds) > 1:
            raise RequestError(f"{', '.join(names)} are of different types")
        return _Matrix(self.weights, kinds.pop(), np.concatenate(parts))

    def embedding(self) -> _Matrix:
        return self.matrix(("token_embd.weight",), self.shape.vocabulary, self.shape.width)

    def normed(self, state: Node, name: str) -> Node:
        square = op.reduce_mean(op.power(state, _number(2.0)), _integers(-1), True)
        root = op.sqrt(op.add(square, _number(self.shape.norm_epsilon)))
        weight = self.weights.vector(name, self.shape.width).reshape(1, 1, -1)
        return op.multiply(op.multiply(op.divide(_number(1.0), root), state), op.constant(weight))

    def sums(self, rows: Node, width: int) -> Node:
        """(n, 1, width) -> (n, 1, width / 32): what offsets of blocks multiply."""
        grouped = op.reshape(rows, _integers(0, 0, width // BLOCK, BLOCK), True)
        return op.reduce_sum(grouped, _integers(3), False)

    def turn(self, context_tokens: int) -> tuple[Node, Node]:
        """Cosine and sine of every row's angles: (n, 1, 1, head_width) each.

        From tables of float64 angles: in float32 the last bits of a large angle are lost, and
        states drift from the reference's as a text grows.
        """
        width = self.shape.head_width
        steps = np.arange(0, width, 2, dtype=np.float64) / width
        angles = np.arange(context_tokens, dtype=np.float64)[:, None] / self.shape.rope_base**steps
        both = np.concatenate([angles, angles], axis=1)  # (context_tokens, head_width)
        cos, sin = (
            op.gather(op.constant(table.astype(np.float32)), self.inputs["position_ids"], _index(0))
            for table in (np.cos(both), np.sin(both))
        )
        return op.unsqueeze(cos, _integers(1, 2)), op.unsqueeze(sin, _integers(1, 2))

    def rotated(self, rows: Node, heads: int, turn: tuple[Node, Node]) -> Node:
        """(n, 1, heads * head_width) with halves of each head turned as pairs: (n, the same)."""
        width, (cos, sin) = self.shape.head_width, turn
        split = op.reshape(rows, _integers(0, 0, heads, width), True)
        split = op.transpose(split, _integers(0, 2, 1, 3))  # (n, heads, 1, head_width)
        axis, one, half = _integers(3), _integers(1), _integers(width // 2)
        high = op.slice(split, half, _integers(2**63 - 1), one, axis)
        low = op.slice(split, _integers(0), half, one, axis)
        swapped = op.concat([op.multiply(high, _number(-1.0)), low], 3)
        turned = op.add(op.multiply(split, cos), op.multiply(swapped, sin))
        return op.reshape(op.transpose(turned, _integers(0, 2, 1, 3)), _integers(0, -1), True)

    def cache(self, name: str) -> Node:
        made = op.parameter([-1, -1, -1, -1], ov.Type.dynamic, name=name)
        made.output(0).set_names({name})
        self.inputs[name] = made
        return made

    def attention(self, layer: int, state: Node, turn: tuple[Node, Node]) -> Node:
        """One block's attention over the paged caches: (n, 1, heads * head_width)."""
        shape = self.shape
        width, heads, key_heads = shape.head_width, shape.heads, shape.key_heads
        names = tuple(f"blk.{layer}.attn_{part}.weight" for part in "qkv")
        sizes = heads * width, key_heads * width, key_heads * width, shape.width
        mix = self.matrix(names, *sizes, heads=(heads, key_heads))
        mixed = mix(state, self.sums(state, shape.width))
        cut = _integers((heads + key_heads) * width, key_heads * width)
        query_key, value = op.variadic_split(mixed, _index(2), cut).outputs()
        turned = self.rotated(query_key, heads + key_heads, turn)
        cut = _integers(heads * width, key_heads * width)
        query, key = op.variadic_split(turned, _index(1), cut).outputs()
        node = PagedAttention(
            [
                getattr(part, "output", lambda _, part=part: part)(0)
                for part in (
                    query,
                    key,
                    op.reshape(value, _integers(0, -1), True),
                    self.cache(f"key_cache.{layer}"),
                    self.cache(f"value_cache.{layer}"),
                    *(self.inputs[name] for name in _PLACES),
                    _number(width**-0.5),
                    *self._unused(),
                )
            ]
        )
        sizes_of = {"num_k_heads": key_heads, "num_v_heads": key_heads}
        for name, size in (sizes_of | {"k_head_size": width, "v_head_size": width}).items():
            node.get_rt_info()[name] = size
        return op.unsqueeze(node.output(0), _index(1))

    def _unused(self) -> list[Node]:
        """Inputs 10 to 27 of the attention: windows, slopes, rotation, sinks, scores: none."""
        zero, none = op.constant(np.array(0, dtype=np.int32)), _empty(np.int32)
        nothing = _empty(np.float32)
        return [
            zero, nothing, self.inputs["max_context_len"], none, none, none, nothing, nothing,
            zero, zero, _empty(np.float32, 0, 0, 0, 0), zero, none, none, none, none,
            _empty(np.uint8), none,
        ]  # fmt: skip

    def block(self, layer: int, state: Node, turn: tuple[Node, Node]) -> Node:
        shape, prefix = self.shape, f"blk.{layer}."
        width, inner = shape.width, shape.feed_forward
        rows = self.normed(state, f"{prefix}attn_norm.weight")
        seen = self.attention(layer, rows, turn)
        out = self.matrix((f"{prefix}attn_output.weight",), width, shape.heads * shape.head_width)
        state = op.add(state, out(seen, self.sums(seen, shape.heads * shape.head_width)))
        rows = self.normed(state, f"{prefix}ffn_norm.weight")
        sums = self.sums(rows, width)
        gate = self.matrix((f"{prefix}ffn_gate.weight",), inner, width)(rows, sums)
        up = self.matrix((f"{prefix}ffn_up.weight",), inner, width)(rows, sums)
        grown = op.multiply(op.swish(gate), up)
        down = self.matrix((f"{prefix}ffn_down.weight",), width, inner)
        return op.add(state, down(grown, self.sums(grown, inner)))


_PLACES: Final = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


def _unpermuted(blocks: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Rows back in the order that rotates halves; llama.cpp stores them for rotating pairs."""
    rows, *rest = blocks.shape
    pairs = blocks.reshape(heads, rows // heads // 2, 2, *rest)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(blocks.shape)


def build(file: GgufFile, shape: Shape, context_tokens: int) -> tuple[Body, list[Any]]:
    """Both graphs, for positions below `context_tokens`, and what must live until they compile.

    Raises:
        RequestError: a tensor is missing, of another shape, or of a type that is not read here.
    """
    made = _Builder(file, shape)
    table, turn = made.embedding(), made.turn(context_tokens)
    ids = op.convert(op.unsqueeze(made.inputs["input_ids"], _index(1)), "i32")
    state = op.gather(table.weight, ids, _index(0))  # (n, 1, width)
    for layer in range(shape.layers):
        state = made.block(layer, state, turn)
    state = made.normed(state, "output_norm.weight")
    body = ov.Model([state.output(0)], list(made.inputs.values()), "body")
    tied = "output.weight" not in file.tensors
    name = "token_embd.weight" if tied else "output.weight"
    head = made.matrix((name,), shape.vocabulary, shape.width)
    rows = _input("states", np.float32, -1, 1, shape.width)
    logits = head(rows, made.sums(rows, shape.width))
    return Body(body, ov.Model([logits.output(0)], [rows], "head")), made.weights.kept
