"""Parts of models, loaded and kept: stages of some layers, and the drivers of split answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from aivillage.models import gpu
from aivillage.models import worker_messages as say
from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.stages import StageRequest, memory_bytes
from aivillage.node.devices import Devices
from aivillage.node.engines import EngineClient, load_engine
from aivillage.node.worker_process import WorkerProcess
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.types import Seconds

SESSIONS_MAX: Final = 64
"""Of a driver: as many as an owner may have jobs; each is a list of numbers."""
STAGES_MAX: Final = 2
"""Loaded at once, each in a worker's memory: a buyer names the layers, in one of 465 ways."""
ON_CPU: Final = Devices()
AHEAD_SECONDS_MIN: Final[Seconds] = 60.0
"""Layers that were loaded ahead stay so long, whoever else wants some: who asks pays nothing."""


class Parts:
    """One worker each, loaded on first use, then warm."""

    def __init__(
        self,
        nursery: trio.Nursery,
        start: Callable[[gpu.Device], Awaitable[WorkerProcess]],
        memory_bytes_max: int,
        devices: Devices = ON_CPU,
    ) -> None:
        """`start` gives a worker that may use that device."""
        self._nursery = nursery
        self._start = start
        self._memory_bytes_max = memory_bytes_max
        self._devices = devices
        self._loaded: dict[say.Load, EngineClient] = {}
        self._ahead: dict[say.Load, Seconds] = {}
        """Those that nobody has used so far, and since when."""
        self._models: dict[str, KnownModel] = {}
        """By the hash of their weights: those of whose layers some were asked for."""
        self._loading = trio.Lock()

    async def stage(self, request: StageRequest, model: KnownModel, slots: int) -> EngineClient:
        """The resident engine of these layers.

        Raises:
            RefusedError: OWNER_LIMIT, they need more memory than a worker may have; BUSY, other
                stages are at work.
            AivillageError: they could not be loaded.
        """
        load = self._load_of(request, model, slots)
        client = await self._resident(load, self._make_room)
        self._ahead.pop(load, None)
        return client

    async def ahead(
        self,
        request: StageRequest,
        model: KnownModel,
        slots: int,
        memory_left: Callable[[], int],
    ) -> EngineClient:
        """The same for a buyer that may need it later: nothing that was used makes room for it.

        `memory_left`: bytes that all stages may have together.

        Raises:
            RefusedError: OWNER_LIMIT, as `stage`; BUSY, there is no room now.
            AivillageError: they could not be loaded.
        """
        load, known = self._load_of(request, model, slots), set(self._loaded.values())

        async def find_room() -> None:
            await self._find_room(memory_left() - self._bytes_of(load))

        client = await self._resident(load, find_room)
        if client not in known:
            self._ahead[load] = trio.current_time()
        return client

    async def make_way(self, memory_left: int) -> None:
        """Puts away what was only loaded ahead, until stages have no more bytes than this."""
        for load in sorted(self._unused(), key=self._ahead.__getitem__):
            if self._memory() <= memory_left:
                return
            await self._put_away(load)

    async def driver(self, model: str) -> EngineClient:
        """The resident driver of split answers. Raises: AivillageError: it could not be loaded."""
        load = say.Load(model=model, slots=SESSIONS_MAX, part="driver")
        return await self._resident(load, trio.lowlevel.checkpoint)

    async def end_idle(self, limit_seconds: Seconds) -> None:
        """Ends those that nobody has used for so long."""
        for load, client in list(self._loaded.items()):
            if client.dead or client.idle_seconds() > limit_seconds:
                self._loaded.pop(load, None)
                self._ahead.pop(load, None)
                await client.stop()

    async def stop(self) -> None:
        for client in list(self._loaded.values()):
            await client.stop()

    def _load_of(self, request: StageRequest, model: KnownModel, slots: int) -> say.Load:
        """Raises: RefusedError: OWNER_LIMIT."""
        layers = (request.first, request.last)
        load = say.Load(
            model=model.name, weights_sha256=model.sha256, slots=slots, part="stage", layers=layers
        )
        self._models[model.sha256] = model
        needed = self._bytes_of(load)
        if needed > self._memory_bytes_max:
            raise RefusedError(
                f"{needed >> 20} MB are needed, a worker of this node has "
                f"{self._memory_bytes_max >> 20}",
                code="OWNER_LIMIT",
                next_step="ask for fewer layers",
            )
        return load

    async def _resident(
        self, load: say.Load, make_room: Callable[[], Awaitable[None]]
    ) -> EngineClient:
        async with self._loading:
            client = self._loaded.get(load)
            if client is None or client.dead:
                self._loaded.pop(load, None)
                self._ahead.pop(load, None)
                await make_room()
                client = self._loaded[load] = await self._load(load)
        return client

    async def _load(self, load: say.Load) -> EngineClient:
        if load.part == "driver":  # it has no layers
            return await self._load_once(load)
        return await self._devices.loaded(load, self._load_once)

    async def _load_once(self, load: say.Load) -> EngineClient:
        return await load_engine(self._nursery, await self._start(load.device), load)

    # ------------------------------------------------------------------ room
    async def _make_room(self) -> None:
        """For one more stage: what was only loaded ahead goes first, then the longest idle.

        Raises:
            RefusedError: BUSY, all that may be loaded are at work.
        """
        if len(self._alive()) < STAGES_MAX:
            return
        idle = [load for load in self._alive() if not self._loaded[load].session_count]
        if not idle:
            raise RefusedError(f"{STAGES_MAX} stages are at work here", next_step="try again")
        await self._put_away(
            max(idle, key=lambda load: (load in self._ahead, self._loaded[load].idle_seconds()))
        )

    async def _find_room(self, memory_left: int) -> None:
        """For one more ahead: room of others that were, a while ago, and no more than this.

        Raises:
            RefusedError: BUSY, there is none.
        """
        now = trio.current_time()
        old = [load for load in self._unused() if now - self._ahead[load] >= AHEAD_SECONDS_MIN]
        while len(self._alive()) >= STAGES_MAX or self._memory() > memory_left:
            if not old:
                raise RefusedError(
                    "no room for layers ahead of need beside what is loaded here",
                    next_step="ask another peer",
                )
            await self._put_away(old.pop(0))

    def _alive(self) -> list[say.Load]:
        """The loaded stages."""
        return [load for load, c in self._loaded.items() if load.part == "stage" and not c.dead]

    def _unused(self) -> list[say.Load]:
        """Of those, what was only loaded ahead; the session of a sale begins a moment later."""
        return [x for x in self._alive() if x in self._ahead and not self._loaded[x].session_count]

    def _memory(self) -> int:
        return sum(map(self._bytes_of, self._alive()))

    def _bytes_of(self, load: say.Load) -> int:
        """What a stage needs."""
        return memory_bytes(self._models[load.weights_sha256], *load.layers)

    async def _put_away(self, load: say.Load) -> None:
        self._ahead.pop(load, None)
        await self._loaded.pop(load).put_away()
