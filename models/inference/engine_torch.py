"""The torch engine: the reference. The same bits whatever the batch, checked as it loads."""

from __future__ import annotations

import time
from typing import Final

import torch

from aivillage.models.inference import catalogue, gguf_model, grammar, placement, sameness
from aivillage.models.inference.gguf_file import GgufFile
from aivillage.models.inference.linear import rule
from aivillage.models.inference.llama import Llama
from aivillage.models.inference.placement import HOST, Placement
from aivillage.models.inference.session_engine import SessionEngine
from aivillage.models.inference.tokenizer import ChatTokenizer
from aivillage.protocols.ports import EngineInfo

ENGINE_VERSION: Final = 1
"""Raise it when a change of ours may change a bit of any answer."""
SLOTS: Final = 8


class TorchEngine(SessionEngine):
    """Serves one Llama model from a GGUF file."""

    def __init__(
        self,
        model: catalogue.KnownModel,
        *,
        slots: int = SLOTS,
        threads: int = 1,
        at: Placement = HOST,
    ) -> None:
        """Loads and tests itself: seconds. `threads` are the whole process's.

        Raises:
            ConfigError: the weights are not on this machine.
            RequestError: the file is damaged or of a kind that is not read here.
        """
        if not 1 <= slots <= SLOTS:
            raise ValueError(f"a step has rows for at most {SLOTS} sessions")
        torch.set_num_threads(threads)
        begun = time.monotonic()
        path = catalogue.weights_path(model)
        tokenizer = ChatTokenizer(GgufFile(path))
        weights = gguf_model.load(path)
        catalogue.require_same(model, weights.sha256)
        context_tokens = min(model.context_tokens, weights.shape.context_tokens)
        there = placement.placed(weights, at)
        llama = Llama(there, slots=slots, context_tokens=context_tokens)
        same = sameness.probe(llama, slots=slots, context_tokens=context_tokens)
        info = EngineInfo(
            engine="torch",
            model=model.name,
            kernel_class=kernel_class(weights.sha256, same.digest, at),
            identical=promise(same, at),
            active_parameters=model.active_parameters,
            context_tokens=context_tokens,
            vocabulary=weights.shape.vocabulary,
            weights_sha256=weights.sha256,
            rechecks=at.is_host,
            device=str(at.device),
        )
        super().__init__(llama, tokenizer, info, slots=slots)
        self.load_seconds = time.monotonic() - begun


def promise(same: sameness.Sameness, at: Placement) -> str:
    """What is said of sameness. Of a GPU nothing, whatever the probe gave: nobody has proven it."""
    return "guaranteed" if same.passed and at.is_host else "best effort"


def kernel_class(weights_sha256: str, digest: str, at: Placement = HOST) -> str:
    """Who shares it computes the same bits: both have computed the same bits of a probe.

    A GPU's names another type and device: `fingerprint.family` holds it against nobody.
    """
    like = torch.empty(0, dtype=at.dtype, device=at.device)
    parts = (
        f"torch{ENGINE_VERSION}",
        torch.__version__,
        weights_sha256[:16],
        placement.type_name(at),
        placement.hardware(at),
        f"threads{torch.get_num_threads()}",
        f"{rule(like)}-{sameness.rule()}",
        grammar.version(),
        digest,
    )
    return "/".join(parts)
