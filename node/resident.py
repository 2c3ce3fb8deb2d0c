"""The models that are loaded: as many sessions of each as memory holds, the rest put away.

A session may fill its context; so an engine gets so many places that all of them full fit what the
owner gives models, and nobody is let in beyond that. No session ever meets a memory that is full.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from aivillage.models import gpu, registry
from aivillage.models import worker_messages as say
from aivillage.models.inference.catalogue import KnownModel
from aivillage.node.devices import Devices
from aivillage.node.engines import EngineClient, load_engine
from aivillage.node.shelf import Shelf
from aivillage.node.warmth import Use, Warm, bytes_with, slots_that_fit, to_unload, worth
from aivillage.node.worker_process import WorkerProcess
from aivillage.protocols.errors import ConfigError, RefusedError, RequestError
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.types import Seconds

log = logging.getLogger(__name__)

MODEL_KIND: Final = "model:"


def kind_of_model(name: str) -> str:
    """What calls that one model answers share; of no model: nothing beside the node's slots."""
    return MODEL_KIND + name if name else ""


def kind_of(operation: OperationInfo) -> str:
    """The same for a call of `operation`, as one model does it; modules share the node's slots."""
    is_engine = registry.is_served_by_engine(operation.name)
    return kind_of_model(operation.models[0].name) if is_engine and operation.models else ""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What models may take: all together, and one of them, which is one worker."""

    all_bytes: int
    one_bytes: int


class Resident:
    """One engine for each model that was asked for of late."""

    def __init__(
        self,
        nursery: trio.Nursery,
        start: Callable[[str, gpu.Device], Awaitable[WorkerProcess]],
        shelf: Shelf,
        memory: Memory,
        *,
        slots_max: int,
        engine: str,
        devices: Devices,
        make_way: Callable[[int], Awaitable[None]],
    ) -> None:
        """`start` gives a worker fit to load that model on that device.

        `make_way` leaves to stages of models no more than so many bytes.
        """
        self._nursery = nursery
        self._start = start
        self._shelf = shelf
        self._memory = memory
        self._slots_max = slots_max
        self._engine = engine
        self._devices = devices
        self._make_way = make_way
        self._engines: dict[str, EngineClient] = {}
        self._loading = trio.Lock()
        self._uses: dict[str, Use] = {}

    async def engine(self, model: str) -> EngineClient:
        """Loaded on first use. Raises: as `Workers.engine`."""
        held = self._shelf.require(model)
        self._uses[model] = self._uses.get(model, Use()).asked(trio.current_time())
        async with self._loading:
            client = self._engines.get(model)
            if client is None or client.dead:
                self._engines.pop(model, None)
                client = await self._load(model, await self._make_room(held))
                self._engines[model] = client
        return client

    def warm(self) -> list[Warm]:
        """The loaded models, and what each is worth."""
        now, held = trio.current_time(), {model.name: model for model in self._shelf.all()}
        return [
            Warm(
                name=name,
                memory_bytes=_bytes_of(held[name], client.slots) if name in held else 0,
                worth=worth(self._uses.get(name, Use()), client.token_price, now),
                is_busy=client.session_count > 0,
                device=client.info.device,
                load_seconds=client.load_seconds,
                prefix_tokens=client.prefix_tokens,
            )
            for name, client in self._engines.items()
            if not client.dead
        ]

    def loaded(self) -> list[EngineClient]:
        return [client for client in self._engines.values() if not client.dead]

    def is_loaded(self, model: str) -> bool:
        client = self._engines.get(model)
        return client is not None and not client.dead

    def places_of(self, kind: str) -> int:
        """Sessions at once of the model that `kind` names: of its engine, or as it would load."""
        name = kind.removeprefix(MODEL_KIND)
        if self.is_loaded(name):
            return self._engines[name].slots
        model = self._shelf.find(name)
        return max(1, self._planned(model)) if model is not None else 1

    def shown(self) -> list[dict[str, object]]:
        """How full each loaded model is; `memory_bytes_max` with every context full."""
        return [
            {
                "model": warm.name,
                "slots": self._engines[warm.name].slots,
                "sessions": self._engines[warm.name].session_count,
                "memory_bytes_max": warm.memory_bytes,
                "pid": self._engines[warm.name].pid,
                "device": warm.device,
            }
            for warm in self.warm()
        ]

    async def end_idle(self, limit_seconds: Seconds) -> None:
        for model, client in list(self._engines.items()):
            if client.dead or client.idle_seconds() > limit_seconds:
                self._engines.pop(model, None)
                await client.stop()

    async def stop(self) -> None:
        for client in list(self._engines.values()):
            await client.stop()

    # ------------------------------------------------------------------ memory
    def memory_left(self) -> int:
        """Of what loaded models share, in bytes, without what stages have."""
        return self._memory.all_bytes - sum(model.memory_bytes for model in self.warm())

    def _planned(self, model: KnownModel) -> int:
        room = min(self._memory.all_bytes, self._memory.one_bytes)
        return slots_that_fit(model.memory_bytes, model.context_bytes, room, self._slots_max)

    async def _make_room(self, model: KnownModel) -> int:
        """How many sessions it gets: as many as its memory holds, fewer beside those at work.

        Raises:
            RefusedError: BUSY, not even one.
        """
        for slots in range(self._planned(model), 0, -1):
            names = to_unload(self.warm(), _bytes_of(model, slots), self._memory.all_bytes)
            if names is not None:
                await self._put_away(names, model.name)
                await self._make_way(self.memory_left() - _bytes_of(model, slots))
                return slots
        raise RefusedError(
            f"{model.name} does not fit in memory beside the models that are at work",
            next_step="try again when they are done, or raise models_memory_mb",
        )

    async def _put_away(self, names: list[str], needed_for: str) -> None:
        for name in names:
            log.info("model_put_away", extra={"model": name, "needed_for": needed_for})
            await self._engines.pop(name).put_away()

    async def _load(self, model: str, slots: int) -> EngineClient:
        load = say.Load(model=model, slots=slots, engine=self._engine)
        found = self._shelf.find(model)
        if found is not None and found.format == "remote":  # another server's device computes
            worker = await self._start(model, load.device)
            return await self._or_spoiled(model, self._load_in(worker, load))
        return await self._or_spoiled(model, self._devices.loaded(load, self._load_once))

    async def _or_spoiled(self, model: str, loading: Awaitable[EngineClient]) -> EngineClient:
        try:
            return await loading
        except (ConfigError, RequestError) as error:  # it will not load the next time either
            self._shelf.spoil(model, error)
            raise

    async def _load_once(self, load: say.Load) -> EngineClient:
        return await self._load_in(await self._start(load.model, load.device), load)

    async def _load_in(self, worker: WorkerProcess, load: say.Load) -> EngineClient:
        load = msgspec.structs.replace(load, way_out=worker.way_out)
        return await load_engine(self._nursery, worker, load)


def _bytes_of(model: KnownModel, slots: int) -> int:
    return bytes_with(model.memory_bytes, model.context_bytes, slots)
