"""Which engine serves a model: the one its owner named, or the fastest that keeps the promise."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Final, Protocol

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import AivillageError, ConfigError, JobError
from aivillage.protocols.ports import Engine

log = logging.getLogger(__name__)

AUTO: Final = "auto"
ENGINES: Final = ("openvino", "torch")
"""The faster first, where it runs at all."""
DEFAULT_ENGINE: Final = AUTO
"""Where nobody chose; docs/decisions/0011-engines.md says why. Also the setting's default."""


class LoadedEngine(Engine, Protocol):
    """An engine that knows how long it took."""

    load_seconds: float


def installed() -> tuple[str, ...]:
    """The engines whose libraries are on this machine, the faster first; nothing is imported."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name) is not None)


def engine_of(
    model: catalogue.KnownModel, *, slots: int, threads: int = 1, engine: str = DEFAULT_ENGINE
) -> LoadedEngine:
    """Loads `model` in the engine called `engine`: seconds.

    A remote model is asked where it is, a safetensors model runs in transformers. For a GGUF file
    `auto` takes openvino where it is installed and passes its self-test, since it is faster and
    answers alike; else torch.

    Raises:
        ConfigError: no such engine here, or the weights are not on this machine.
        RequestError: they are of a kind that is not read here.
        JobError: it does not fit in the memory that a worker may have.
    """
    if engine not in (AUTO, *ENGINES):
        raise ConfigError(f"no engine is called {engine!r}", next_step=f"one of auto, {ENGINES}")
    if model.format == "remote":
        from aivillage.models.inference.engine_openai import OpenaiEngine

        return OpenaiEngine(model, slots=slots)
    if model.format == "safetensors":
        from aivillage.models.inference.engine_transformers import TransformersEngine

        return TransformersEngine(model, slots=slots, threads=threads)
    if engine == AUTO and "openvino" in installed():
        return _automatic(model, slots, threads)
    return _load(model, slots, threads, "torch" if engine == AUTO else engine)


def _automatic(model: catalogue.KnownModel, slots: int, threads: int) -> LoadedEngine:
    """Takes openvino if it keeps the promise on this machine."""
    try:
        loaded = _load(model, slots, threads, "openvino")
        if loaded.info().identical == "guaranteed":
            return loaded
        why = "its self-test did not pass"
    except AivillageError as error:
        why = error.message
    log.warning("openvino_left_out", extra={"model": model.name, "why": why})
    return _load(model, slots, threads, "torch")


def _load(model: catalogue.KnownModel, slots: int, threads: int, engine: str) -> LoadedEngine:
    if engine not in installed():
        raise ConfigError(
            f"the engine {engine} is not installed here",
            next_step="pip install 'aivillage[models]', or set engine = auto",
        )
    try:
        if engine == "openvino":
            from aivillage.models.inference.engine_openvino import OpenvinoEngine

            return OpenvinoEngine(model, slots=slots, threads=threads)
        from aivillage.models.inference.engine_torch import TorchEngine

        return TorchEngine(model, slots=slots, threads=threads)
    except (MemoryError, RuntimeError, ImportError) as error:  # torch and openvino say it so
        raise JobError(
            f"{engine} could not load {model.name}: {str(error)[-300:] or type(error).__name__}",
            next_step="raise worker_memory_mb, or take a smaller model",
        ) from error


@functools.cache
def shared_engine(model: str) -> LoadedEngine:
    """This process's engine of `model`, loaded once, for whoever runs the module without a node.

    Raises:
        AivillageError: as `engine_of`, or there is no such model.
    """
    return engine_of(catalogue.known(model), slots=1)
