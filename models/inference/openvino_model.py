"""A Llama compiled by OpenVINO, with paged keys and values: what `llama.Llama` is in torch.

Weights stay in four bits; inputs, states and keys are float32: OpenVINO would round inputs to eight
bits, which is told not to. Three rules make the bits of a row independent of its company and of
how it was reached: no product is of a single row; a token of the prompt goes through the attention
kernel for many rows, alone or not; a drawn one through that for one. `openvino_sameness.py` tests
it on this very machine.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import openvino as ov
import torch
from torch import Tensor
from torch.nn import functional

from aivillage.models.inference import openvino_graph
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.gguf_model import Shape
from aivillage.models.inference.llama import Span

PAGE_TOKENS: Final = 32
"""Of a page of keys or values on a CPU."""
ROWS_MIN: Final = 2
"""A single row would go through other kernels, of products and of attention: other bits."""


class PagedLlama:
    """A model and its slots. Not thread-safe; a slot is whoever's the caller says."""

    draws_as_it_reads = False

    def __init__(
        self, file: GgufFile, shape: Shape, *, slots: int, context_tokens: int, threads: int = 1
    ) -> None:
        """Raises: RequestError: a tensor of a type that is not read here."""
        self.shape = shape
        graphs, self._borrowed = openvino_graph.build(file, shape, context_tokens)  # it reads them
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several workers would share the first core
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # products of what is there, not of 8 bits of it
        }
        core = ov.Core()
        self._body = core.compile_model(graphs.body, "CPU", settings).create_infer_request()
        self._head = core.compile_model(graphs.head, "CPU", settings).create_infer_request()
        self._slot_pages = -(-context_tokens // PAGE_TOKENS)
        self._filler = _Part(slots, 0, (0,), drawn=True, padding=1)  # in a page of its own
        self._caches = [self._cache(port, slots) for port in self._body.model_inputs]

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Reads `spans` into their slots; gives the normed state of every row, in order.

        Returns:
            (rows of the spans, width).
        """
        parts = [part for span in spans for part in _sequences(span)]
        if sum(len(part.token_ids) for part in parts) < ROWS_MIN:
            parts.append(self._filler)
        ids = [token for part in parts for token in part.token_ids]
        places = [part.position + n for part in parts for n in range(len(part.token_ids))]
        ends = [part.position + len(part.token_ids) for part in parts]
        pages = [self._pages(part.slot, end) for part, end in zip(parts, ends, strict=True)]
        self._set("input_ids", ids, np.int64)
        self._set("position_ids", places, np.int64)
        self._set("past_lens", [part.position for part in parts])
        self._set("subsequence_begins", _starts(len(part.token_ids) for part in parts))
        self._set("block_indices", list(itertools.chain.from_iterable(pages)))
        self._set("block_indices_begins", _starts(map(len, pages)))
        self._set("max_context_len", max(ends))
        self._body.infer()
        states = torch.from_numpy(self._body.get_output_tensor(0).data[:, 0].copy())
        kept = list(itertools.chain.from_iterable(map(_is_kept, parts)))
        return states if all(kept) else states[torch.tensor(kept)]

    def logits(self, states: Tensor) -> Tensor:
        """`states` (count, width) of `forward` -> (count, vocabulary)."""
        count = len(states)
        padded = functional.pad(states, (0, 0, 0, max(0, ROWS_MIN - count)))
        rows = np.ascontiguousarray(padded.numpy()).reshape(len(padded), 1, -1)
        self._head.set_tensor("states", ov.Tensor(rows))
        self._head.infer()
        return torch.from_numpy(self._head.get_output_tensor(0).data[:count, 0].copy())

    def copy_slot(self, source: int, target: int, tokens: int) -> None:
        """Gives `target` the first `tokens` keys and values of `source`, in whole pages."""
        read, written = self._pages(source, tokens), self._pages(target, tokens)
        for cache in self._caches:
            if cache is not None:
                cache[written.start : written.stop] = cache[read.start : read.stop]

    def _set(self, name: str, values: int | list[int], kind: Any = np.int32) -> None:
        self._body.set_tensor(name, ov.Tensor(np.array(values, dtype=kind)))

    def _pages(self, slot: int, tokens: int) -> range:
        """Those that hold the first `tokens` of a slot."""
        first = slot * self._slot_pages
        return range(first, first + -(-tokens // PAGE_TOKENS))

    def _cache(self, port: Any, slots: int) -> Any:
        """Zeros whose pages become real when they are written; None for another input."""
        if "cache" not in port.any_name:
            return None
        sizes = [size.get_length() for size in list(port.partial_shape)[1:]]
        shape = [slots * self._slot_pages + 1, *sizes]
        memory = np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=np.float32)
        memory = memory.reshape(shape)
        self._body.set_tensor(port.any_name, ov.Tensor(memory, shared_memory=True))
        return memory


class _Part(Span, frozen=True):
    """What one attention kernel reads at once; the last `padding` rows mean nothing."""

    padding: int = 0


def _sequences(span: Span) -> list[_Part]:
    """A span of the prompt as one, of two rows at least; drawn tokens one by one.

    The row that fills up lies where the next token will be written over it.
    """
    if span.drawn:
        return [
            _Part(span.slot, span.position + n, (token,)) for n, token in enumerate(span.token_ids)
        ]
    lack = max(0, ROWS_MIN - len(span.token_ids))
    return [_Part(span.slot, span.position, span.token_ids + (0,) * lack, padding=lack)]


def _is_kept(part: _Part) -> list[bool]:
    return [True] * (len(part.token_ids) - part.padding) + [False] * part.padding


def _starts(lengths: Any) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


def version() -> str:
    return str(ov.__version__).split("-")[0]


def device() -> str:
    """The processor's instruction set, as far as kernels differ by it."""
    kinds = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "-".join([torch.backends.cpu.get_cpu_capability(), *sorted({"BF16", "INT8"} & {*kinds})])
