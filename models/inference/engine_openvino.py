"""The OpenVINO engine: the sessions of `session_engine` over a model that OpenVINO compiled.

Only the arithmetic is another than the torch engine's. It loads in a few seconds and keeps nothing
on disk.
"""

from __future__ import annotations

import time
from typing import Final

import torch

from aivillage.models.inference import (
    catalogue,
    gguf_model,
    grammar,
    openvino_model,
    openvino_sameness,
)
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.session_engine import SessionEngine
from aivillage.models.inference.tokenizer import ChatTokenizer
from aivillage.protocols.ports import EngineInfo

ENGINE_VERSION: Final = 2
"""Raise it when a change of ours may change a bit of any answer."""
SLOTS_MAX: Final = 32


class OpenvinoEngine(SessionEngine):
    """Serves one Llama model from a GGUF file. Needs AVX2; other processors take torch."""

    def __init__(self, model: catalogue.KnownModel, *, slots: int = 8, threads: int = 1) -> None:
        """Loads and tests itself: seconds.

        Raises:
            ConfigError: the weights are not on this machine.
            RequestError: the file is damaged or of a kind that is not read here.
        """
        if not 1 <= slots <= SLOTS_MAX:
            raise ValueError(f"a step has rows for at most {SLOTS_MAX} sessions")
        torch.set_num_threads(threads)
        begun = time.monotonic()
        file = GgufFile(catalogue.weights_path(model))
        tokenizer = ChatTokenizer(file)
        shape = gguf_model.read_shape(file)
        context_tokens = min(model.context_tokens, shape.context_tokens)
        paged = openvino_model.PagedLlama(
            file, shape, slots=slots, context_tokens=context_tokens, threads=threads
        )
        same = openvino_sameness.probe(paged, slots=slots)
        sha256 = gguf_model.sha256_of(file)
        catalogue.require_same(model, sha256)
        info = EngineInfo(
            engine="openvino",
            model=model.name,
            kernel_class=_kernel_class(sha256, threads, same.digest),
            identical="guaranteed" if same.passed else "best effort",
            active_parameters=model.active_parameters,
            context_tokens=context_tokens,
            vocabulary=shape.vocabulary,
            weights_sha256=sha256,
            rechecks=True,
        )
        super().__init__(paged, tokenizer, info, slots=slots)
        self.load_seconds = time.monotonic() - begun


def _kernel_class(weights_sha256: str, threads: int, digest: str) -> str:
    """Who shares it computes the same bits: both have computed the same bits of a probe."""
    parts = (
        f"openvino{ENGINE_VERSION}",
        openvino_model.version(),
        weights_sha256[:16],
        "float32",
        "cpu",
        openvino_model.device(),
        f"threads{threads}",
        openvino_sameness.rule(),
        grammar.version(),
        digest,
    )
    return "/".join(parts)
