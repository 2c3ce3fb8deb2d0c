"""The models that this node holds: what it may sell, and what it can load.

The library is looked at again whenever something came into its folder or left it, so that a pull
beside a running node is noticed at the next question. Plain calls; a look reads small files only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from aivillage.models import registry
from aivillage.models.inference import catalogue, stages
from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.stages import StageRequest
from aivillage.models.library.store import Library
from aivillage.protocols.errors import AivillageError, RefusedError, RequestError
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.pricing import MODELS_MAX, ModelInfo, Terms

log = logging.getLogger(__name__)

_NEVER: Final = -1


class Shelf:
    """Everything by name; packaged models first."""

    def __init__(self, library: Path | None, memory_bytes_max: int) -> None:
        """`memory_bytes_max`: the most that one loaded model may take here."""
        self._library = Library(library) if library is not None else None
        self._memory_bytes_max = memory_bytes_max
        self._seen_ns = _NEVER
        self._models: dict[str, KnownModel] = {}
        self._spoiled: dict[str, AivillageError] = {}
        self.is_here: Callable[[KnownModel], bool] = catalogue.is_here

    def all(self) -> list[KnownModel]:
        """Every model whose files are here."""
        self._look()
        return list(self._models.values())

    def find(self, name: str) -> KnownModel | None:
        """A model whose files are here."""
        self._look()
        return self._models.get(name)

    def sold(self, operation: str = "") -> list[KnownModel]:
        """Those that can be loaded, as far as is known; at most as many as fit a list.

        With `operation` those that do it.
        """
        found = [model for model in self.all() if self.why_not(model) is None]
        kinds = registry.formats(operation)
        return [model for model in found if not operation or model.format in kinds][:MODELS_MAX]

    def require(self, name: str, operation: str = "") -> KnownModel:
        """A model that can be loaded here, and does `operation` where that is said.

        Raises:
            RefusedError: NOT_OFFERED, it is not here, or for something else; OWNER_LIMIT, it is
                too large.
            AivillageError: it was found damaged when it was last loaded.
        """
        self._look()
        model = self._models.get(name)
        if model is None:
            raise RefusedError(
                f"no model called {name!r} is here",
                code="NOT_OFFERED",
                next_step="`aivillage-node models list`, or ask another peer",
            )
        if (why := self.why_not(model)) is not None:
            raise why
        if operation and model.format not in registry.formats(operation):
            raise RefusedError(
                f"{name} is no model for {operation}",
                code="NOT_OFFERED",
                next_step=f"it does {registry.operation_of(model.format)}",
            )
        return model

    def divisible(self) -> list[KnownModel]:
        """Those that can be split, the packaged one first; at most as many as fit a list."""
        found = [m for m in self.all() if m.layers and m.name not in self._spoiled]
        return found[:MODELS_MAX]

    def find_divisible(self, name: str) -> KnownModel | None:
        """A model whose layers others may compute for this node, if it is one."""
        found = catalogue.MODELS.get(name) or self.find(name)
        return found if found is not None and found.layers else None

    def require_divisible(self, name: str) -> KnownModel:
        """Raises: RequestError: it cannot be split, or nothing of it is here."""
        found = self.find_divisible(name)
        if found is None:
            raise RequestError(
                f"{name} cannot be split from here",
                next_step="pull it: whoever splits an answer needs the model's own tables",
            )
        return found

    def divided(self, request: StageRequest) -> KnownModel:
        """The model whose layers a request is for, if its weights here are those of the buyer.

        Raises:
            RequestError: it has no such layers, or the request does not say what it is like.
            RefusedError: NOT_OFFERED, no such model is here.
        """
        shape = stages.shape_of(request)
        if request.shape is None:
            return catalogue.MODELS[catalogue.DEFAULT]
        model = self.find(request.model)
        if model is None or not model.layers or stages.shape_of_model(model) != shape:
            raise RefusedError(
                f"no model called {request.model!r} with these weights is here",
                code="NOT_OFFERED",
                next_step="pull the same file at both, or ask another peer",
            )
        return model

    def why_not(self, model: KnownModel) -> AivillageError | None:
        """Why a model that is here cannot be loaded."""
        if model.memory_bytes > self._memory_bytes_max:
            return RefusedError(
                f"{model.name} takes {model.memory_bytes / 1e9:.1f} GB loaded, and the owner gives "
                f"a model at most {self._memory_bytes_max / 1e9:.1f} GB",
                code="OWNER_LIMIT",
                next_step="raise worker_memory_mb and models_memory_mb",
            )
        return self._spoiled.get(model.name)

    def spoil(self, name: str, why: AivillageError) -> None:
        """It did not load: it is not sold any more until something in the library changes."""
        self._spoiled[name] = why

    def _look(self) -> None:
        try:
            now_ns = self._library.folder.stat().st_mtime_ns if self._library else 0
        except FileNotFoundError:
            now_ns = 0
        if now_ns == self._seen_ns:
            return
        packaged = [model for model in catalogue.MODELS.values() if self.is_here(model)]
        pulled = self._pulled() if self._library and now_ns else []
        self._models = {model.name: model for model in (*packaged, *pulled)}
        self._spoiled.clear()
        self._seen_ns = now_ns

    def _pulled(self) -> list[KnownModel]:
        assert self._library is not None, "asked for only where there is one"
        for error in self._library.faulty():
            log.warning("model_left_out", extra={"reason": error.message})
        manifests = self._library.all()
        return [catalogue.pulled(m, self._library.folder / m.name) for m in manifests]


def _prices(operation: str, model: KnownModel) -> dict[str, int]:
    """Of each unit, by default."""
    if registry.takes_inputs(operation):
        return stages.prices_of(model)
    return registry.of_models(operation).prices_of(model.active_parameters)


def listed_with(info: OperationInfo, models: list[KnownModel]) -> OperationInfo:
    """`info` as these models do it, at default prices; its terms are those of the first."""
    told = tuple(
        ModelInfo(
            name=model.name,
            parameters=model.parameters,
            active_parameters=model.active_parameters,
            context_tokens=model.context_tokens,
            licence=model.licence,
            sha256=model.sha256,
            prices_micro_credits=_prices(info.name, model),
        )
        for model in models
    )
    terms = Terms(prices_micro_credits=told[0].prices_micro_credits) if told else info.terms
    return msgspec.structs.replace(info, models=told, terms=terms)
