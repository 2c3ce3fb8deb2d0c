"""Which engine runs a model: by the format that its weights are in."""

from __future__ import annotations

import functools
from typing import Protocol

from aivillage.models.inference import catalogue
from aivillage.protocols.ports import Engine


class LoadedEngine(Engine, Protocol):
    """An engine that knows how long it took."""

    load_seconds: float


def engine_of(model: catalogue.KnownModel, *, slots: int, threads: int = 1) -> LoadedEngine:
    """Loads `model`: seconds.

    Raises:
        ConfigError: its weights are not here, or not those that were pulled.
        RequestError: they are of a kind that is not read here.
    """
    if model.format == "safetensors":
        from aivillage.models.inference.engine_transformers import TransformersEngine

        return TransformersEngine(model, slots=slots, threads=threads)
    from aivillage.models.inference.engine_torch import TorchEngine

    return TorchEngine(model, slots=slots, threads=threads)


@functools.cache
def shared_engine(model: str) -> LoadedEngine:
    """This process's engine of `model`, loaded once, for whoever runs the module without a node.

    Raises:
        AivillageError: as `engine_of`, or there is no such model.
    """
    from aivillage.models.inference import engine_torch

    known = catalogue.known(model)
    if known.format == "gguf":
        return engine_torch.shared_engine(model)
    return engine_of(known, slots=1)
