"""Parts of models, loaded and kept: stages of some layers, and the drivers of split answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from aivillage.models import worker_messages as say
from aivillage.models.inference import catalogue
from aivillage.models.inference.stages import StageRequest, memory_bytes
from aivillage.node.engines import EngineClient, load_engine
from aivillage.node.worker_process import WorkerProcess
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.types import Seconds

SESSIONS_MAX: Final = 64
"""Of a driver: as many as an owner may have jobs; each is a list of numbers."""
STAGES_MAX: Final = 2
"""Loaded at once, each in a worker's memory: a buyer names the layers, in one of 465 ways."""


class Parts:
    """One worker each, loaded on first use, then warm."""

    def __init__(
        self,
        nursery: trio.Nursery,
        start: Callable[[], Awaitable[WorkerProcess]],
        memory_bytes_max: int,
    ) -> None:
        self._nursery = nursery
        self._start = start
        self._memory_bytes_max = memory_bytes_max
        self._loaded: dict[say.Load, EngineClient] = {}
        self._loading = trio.Lock()

    async def stage(self, request: StageRequest, slots: int) -> EngineClient:
        """The resident engine of these layers.

        Raises:
            RefusedError: OWNER_LIMIT, they need more memory than a worker may have; BUSY, other
                stages are at work.
            AivillageError: they could not be loaded.
        """
        layers = (request.first, request.last)
        self._require_memory(request.model, *layers)
        load = say.Load(model=request.model, slots=slots, part="stage", layers=layers)
        return await self._resident(load)

    async def driver(self, model: str) -> EngineClient:
        """The resident driver of split answers. Raises: AivillageError: it could not be loaded."""
        catalogue.known(model)
        return await self._resident(say.Load(model=model, slots=SESSIONS_MAX, part="driver"))

    async def end_idle(self, limit_seconds: Seconds) -> None:
        """Ends those that nobody has used for so long."""
        for load, client in list(self._loaded.items()):
            if client.dead or client.idle_seconds() > limit_seconds:
                self._loaded.pop(load, None)
                await client.stop()

    async def stop(self) -> None:
        for client in list(self._loaded.values()):
            await client.stop()

    def _require_memory(self, model: str, first: int, last: int) -> None:
        needed = memory_bytes(catalogue.known(model), first, last)
        if needed > self._memory_bytes_max:
            raise RefusedError(
                f"{needed >> 20} MB are needed, a worker of this node has "
                f"{self._memory_bytes_max >> 20}",
                code="OWNER_LIMIT",
                next_step="ask for fewer layers",
            )

    async def _resident(self, load: say.Load) -> EngineClient:
        async with self._loading:
            client = self._loaded.get(load)
            if client is None or client.dead:
                self._loaded.pop(load, None)
                if load.part == "stage":
                    await self._make_room()
                client = await load_engine(self._nursery, await self._start(), load)
                self._loaded[load] = client
        return client

    async def _make_room(self) -> None:
        """For one more stage: the one that nobody has used for longest is put away.

        Raises:
            RefusedError: BUSY, all that may be loaded are at work.
        """
        alive = [load for load, c in self._loaded.items() if load.part == "stage" and not c.dead]
        if len(alive) < STAGES_MAX:
            return
        idle = [load for load in alive if not self._loaded[load].session_count]
        if not idle:
            raise RefusedError(f"{STAGES_MAX} stages are at work here", next_step="try again")
        oldest = max(idle, key=lambda load: self._loaded[load].idle_seconds())
        await self._loaded.pop(oldest).put_away()
