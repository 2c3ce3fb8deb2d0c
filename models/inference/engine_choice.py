"""Which engine serves a model: the one its owner named, or the fastest that keeps the promise."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Final, Protocol

from aivillage.models import gpu
from aivillage.models.inference import catalogue
from aivillage.protocols.errors import AivillageError, ConfigError, JobError
from aivillage.protocols.ports import Engine

log = logging.getLogger(__name__)

AUTO: Final = "auto"
ENGINES: Final = ("openvino", "torch")
"""The faster first, where it runs at all."""
DEFAULT_ENGINE: Final = AUTO
"""Where nobody chose; docs/decisions/0011-engines.md says why. Also the setting's default."""
ON_CPU: Final = gpu.Device()


class LoadedEngine(Engine, Protocol):
    """An engine that knows how long it took."""

    load_seconds: float


def installed() -> tuple[str, ...]:
    """The engines whose libraries are on this machine, the faster first; nothing is imported."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name) is not None)


def engine_of(
    model: catalogue.KnownModel,
    *,
    slots: int,
    threads: int = 1,
    engine: str = DEFAULT_ENGINE,
    device: gpu.Device = ON_CPU,
) -> LoadedEngine:
    """Loads `model` in the engine called `engine`: seconds.

    A remote model is asked where it is, a safetensors model runs in transformers. For a GGUF file
    `auto` takes openvino where it is installed and passes its self-test, since it is faster and
    answers alike; else torch, and torch on a GPU.

    Raises:
        ConfigError: no such engine or device here, or the weights are not on this machine.
        RequestError: they are of a kind that is not read here.
        JobError: it does not fit in the memory that a worker may have.
    """
    if engine not in (AUTO, *ENGINES):
        raise ConfigError(f"no engine is called {engine!r}", next_step=f"one of auto, {ENGINES}")
    if model.format == "remote":
        from aivillage.models.inference.engine_openai import OpenaiEngine

        return OpenaiEngine(model, slots=slots)
    if model.format == "safetensors":
        return _with_transformers(model, slots, threads, device)
    if device.is_gpu:
        return _on_gpu(model, slots, threads, engine, device)
    if engine == AUTO and "openvino" in installed():
        return _automatic(model, slots, threads)
    return _load(model, slots, threads, "torch" if engine == AUTO else engine)


def _with_transformers(
    model: catalogue.KnownModel, slots: int, threads: int, device: gpu.Device
) -> LoadedEngine:
    from aivillage.models.inference import placement
    from aivillage.models.inference.engine_transformers import TransformersEngine

    if not device.is_gpu:
        return TransformersEngine(model, slots=slots, threads=threads)
    at = placement.prepare(device)
    with short_of_memory("transformers", model, device):
        return TransformersEngine(model, slots=slots, threads=threads, at=at)


def _on_gpu(
    model: catalogue.KnownModel, slots: int, threads: int, engine: str, device: gpu.Device
) -> LoadedEngine:
    if engine == "openvino":
        raise ConfigError(
            f"the engine openvino computes on the CPU, and device = {device.name}",
            next_step="set engine = torch, or device = cpu",
        )
    _require_installed("torch")
    from aivillage.models.inference import placement
    from aivillage.models.inference.engine_torch import TorchEngine

    at = placement.prepare(device)
    with short_of_memory("torch", model, device):
        return TorchEngine(model, slots=slots, threads=threads, at=at)


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
    _require_installed(engine)
    with short_of_memory(engine, model):
        if engine == "openvino":
            from aivillage.models.inference.engine_openvino import OpenvinoEngine

            return OpenvinoEngine(model, slots=slots, threads=threads)
        from aivillage.models.inference.engine_torch import TorchEngine

        return TorchEngine(model, slots=slots, threads=threads)


def _require_installed(engine: str) -> None:
    if engine not in installed():
        raise ConfigError(
            f"the engine {engine} is not installed here",
            next_step="pip install 'aivillage[models]', or set engine = auto",
        )


@contextlib.contextmanager
def short_of_memory(
    engine: str, model: catalogue.KnownModel, device: gpu.Device = ON_CPU
) -> Iterator[None]:
    """Around loading: whatever says that it does not fit is a `JobError`, and no crash."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError) as error:  # torch and openvino say it so
        setting = "gpu_memory_mb" if device.is_gpu else "worker_memory_mb"
        raise JobError(
            f"{engine} could not load {model.name}: {str(error)[-300:] or type(error).__name__}",
            next_step=f"raise {setting}, or take a smaller model",
        ) from error


@functools.cache
def shared_engine(model: str) -> LoadedEngine:
    """This process's engine of `model`, loaded once, for whoever runs the module without a node.

    Raises:
        AivillageError: as `engine_of`, or there is no such model.
    """
    return engine_of(catalogue.known(model), slots=1)
