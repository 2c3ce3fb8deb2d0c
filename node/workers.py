"""What this node can do, done in worker processes: module calls, and resident engines.

The daemon never runs `run` or a line of third-party code, and never imports torch. Built-in
modules' `estimate` and `meter` are pure and run here, and `check` where the registry says so.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from aivillage.models import gpu, registry
from aivillage.models import worker_messages as say
from aivillage.models.description import checked, described, vetted
from aivillage.models.inference import catalogue, endpoint
from aivillage.models.inference.engine_choice import DEFAULT_ENGINE
from aivillage.models.inference.generate import GenerateRequest
from aivillage.models.inference.stages import StageRequest
from aivillage.models.library.fit import machine_bytes
from aivillage.node.devices import devices
from aivillage.node.engines import EngineClient
from aivillage.node.module_runs import ModuleRun, OnCall, WorkerPool, ask
from aivillage.node.parts import Parts
from aivillage.node.ray_executor import RayExecutor
from aivillage.node.resident import Memory, Resident, kind_of_model
from aivillage.node.shelf import Shelf, listed_with
from aivillage.node.warmth import Warm
from aivillage.node.way_out import Place
from aivillage.node.worker_process import WorkerLimits, WorkerProcess, start_worker
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import (
    AivillageError,
    JobError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.ports import Machine, Module, Verdict

log = logging.getLogger(__name__)

SHORT_CALLS_AT_ONCE: Final = 2
"""In workers of their own, so that no paid run of an hour delays the verdict on a job of ours."""
ENGINE_SLOTS_MAX: Final = 8
"""A step of the engine has rows for no more sessions; the node's other slots are for modules."""
GENERATE: Final = "inference.generate"
OUR_OWN: Final = "built-in"
"""Pool key of built-in modules: they share workers."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's choices. `enabled` names experimental and third-party operations to offer."""

    enabled: tuple[str, ...] = ()
    dev_mode: bool = False
    idle_exit_seconds: float = 600.0
    module_workers_max: int = 2
    engine_slots: int = 8
    ray_address: str = ""
    """Of the cluster on which modules run; empty: here."""
    models_memory_bytes_max: int = 0
    """That loaded models share; 0: half of the machine's."""
    engine: str = DEFAULT_ENGINE
    device: str = gpu.CPU
    gpu_memory_bytes_max: int = 0
    """Of the GPU's, for one engine; 0: most of it."""
    stands_by: bool = True
    """Whether buyers may have layers loaded here before they need them."""
    limits: WorkerLimits = WorkerLimits()

    @property
    def library(self) -> Path | None:
        """Where models were pulled to."""
        return Path(self.limits.library) if self.limits.library else None


class Workers:
    """Made by `open_workers`."""

    def __init__(
        self, nursery: trio.Nursery, settings: WorkerSettings, scratch_folder: Path
    ) -> None:
        self._nursery = nursery
        self._settings = settings
        self._scratch_folder = scratch_folder
        self._ids = itertools.count(1)
        self._cluster: RayExecutor | None = None
        limits = settings.limits
        if settings.ray_address:
            self._cluster = RayExecutor(nursery, settings.ray_address, limits, scratch_folder)
        self._pool = WorkerPool(self._start_for_run, settings.module_workers_max)
        self._short = WorkerPool(self._start, SHORT_CALLS_AT_ONCE)
        where = devices(
            settings.device, settings.engine, settings.gpu_memory_bytes_max, gpu.why_none()
        )
        self._parts = Parts(nursery, self._start_engine, limits.memory_bytes_max, where)
        self._infos: dict[str, OperationInfo] = {}
        self.fences: say.Started | None = None  # of the worker that was started last
        self.machine = Machine(cpu_count=os.cpu_count() or 1, memory_bytes=machine_bytes())
        budget_bytes = settings.models_memory_bytes_max or machine_bytes() // 2
        memory = Memory(all_bytes=budget_bytes, one_bytes=limits.memory_bytes_max)
        self.shelf = Shelf(settings.library, min(memory.all_bytes, memory.one_bytes))
        self._resident = Resident(
            nursery, self._start_for, self.shelf, memory, slots_max=self._slots,
            engine=settings.engine, devices=where, make_way=self._parts.make_way,
        )  # fmt: skip

    # ------------------------------------------------------------------ what there is

    def operations(self) -> list[OperationInfo]:
        """Everything installed, with schemas and default terms; `enabled` says what is offered.

        What models do comes with those that are here; without one it is not offered.
        """
        return [
            listed_with(info, self.shelf.sold(info.name)) if registry.formats(info.name) else info
            for info in map(self._divided, self._infos.values())
        ]

    def _divided(self, info: OperationInfo) -> OperationInfo:
        """With the models of whose layers there is a choice, where it is about layers."""
        models = self.shelf.divisible() if registry.takes_inputs(info.name) else []
        return listed_with(info, models) if len(models) > 1 else info

    def describe_for(self, operation: str, request: bytes) -> OperationInfo:
        """One enabled operation, as it is done and priced for `request`.

        Raises:
            RequestError: as `describe`; BAD_REQUEST, TOO_LARGE: the request does not fit the model.
            RefusedError: NOT_OFFERED, its model is not here; OWNER_LIMIT, it is too large.
        """
        info = self.describe(operation)
        if registry.takes_inputs(operation):
            model = self.shelf.divided(unpack(StageRequest, request))
            return info if model.name == catalogue.DEFAULT else listed_with(info, [model])
        if not registry.formats(operation):
            return info
        module = registry.of_models(operation)
        wanted: Any = unpack(module.Request, request)
        model = self.shelf.require(wanted.model, operation)
        module.require_fits(wanted, model.context_tokens)
        return listed_with(info, [model])

    def describe(self, operation: str) -> OperationInfo:
        """One enabled operation, at the module's own prices.

        Raises:
            RequestError: UNKNOWN_OPERATION, NOT_ENABLED.
        """
        info = self._infos.get(operation)
        if info is None:
            registry.entry(operation)  # says what is wrong, unless it was installed just now
            raise RequestError(
                f"{operation} was installed after this node started",
                code="NOT_ENABLED",
                next_step="restart the node",
            )
        if not info.enabled:
            raise RequestError(
                f"{operation} is not enabled on this node",
                code="NOT_ENABLED",
                next_step=f"start it with --enable {operation}",
            )
        return info

    def module(self, operation: str) -> Module | None:
        """Our own module of that name, whose pure methods may be called here; else None."""
        return registry.built_in(operation)

    # ------------------------------------------------------------------ short calls

    async def estimate(self, operation: str, request: bytes) -> tuple[dict[str, int], float]:
        """Most usage that `request` may come to, and the seconds it may take.

        Raises:
            RequestError: unknown, not enabled, or a bad request.
            JobError: a third-party module failed.
        """
        self.describe(operation)
        if module := self.module(operation):
            usage, seconds = module.estimate(unpack(module.Request, request), self.machine)
            return dict(usage), seconds
        estimated = await self._estimate_there(operation, request)
        if not 0 <= estimated.seconds < math.inf:
            raise JobError(f"{operation} estimates {estimated.seconds} seconds")
        return estimated.usage, estimated.seconds

    async def validate(self, operation: str, request: bytes) -> None:
        """What of a request of the owner's only a worker can tell, before anybody is asked.

        Raises:
            RequestError: its format is wrong, matches nothing, or is too large.
            JobError: the worker failed.
        """
        if not registry.is_served_by_engine(operation):
            return  # other modules of ours have nothing to tell; others' estimate in a worker
        if unpack(GenerateRequest, request).format is not None:
            await self._estimate_there(operation, request)

    async def _estimate_there(self, operation: str, request: bytes) -> say.Estimated:
        command = say.Estimate(
            id=next(self._ids), operation=operation, request=request, machine=self.machine
        )
        async with self._worker(self._short, operation) as worker:
            return await ask(worker, command, say.Estimated)

    async def meter(self, operation: str, request: bytes, result: bytes) -> dict[str, int]:
        """Usage of a partial or full `result`. Raises as `estimate` does."""
        self.describe(operation)
        if module := self.module(operation):
            return dict(
                module.meter(unpack(module.Request, request), unpack(module.Result, result))
            )
        command = say.Meter(id=next(self._ids), operation=operation, request=request, result=result)
        async with self._worker(self._short, operation) as worker:
            return (await ask(worker, command, say.Metered)).usage

    async def check(self, operation: str, request: bytes, result: bytes) -> Verdict:
        """Whether `result` can be the answer; told in a worker. Raises as `estimate` does.

        A result that is none of the operation's type is a verdict, not an error. Here only where
        our own module says that its check is as pure as its meter.
        """
        self.describe(operation)
        if registry.checks_anywhere(operation) and (module := self.module(operation)):
            return checked(module, unpack(module.Request, request), result)
        command = say.Check(id=next(self._ids), operation=operation, request=request, result=result)
        async with self._worker(self._short, operation) as worker:
            return (await ask(worker, command, say.Checked)).verdict

    # ------------------------------------------------------------------ long ones

    @asynccontextmanager
    async def run(
        self,
        operation: str,
        request: bytes,
        *,
        delivered: Sequence[bytes] = (),
        deadline_seconds: float = 0.0,
        seed: int = 0,
        on_call: OnCall,
    ) -> AsyncIterator[ModuleRun]:
        """Runs a module; iterate what this gives. Leaving the block early cancels the run.

        Raises:
            RequestError: unknown, not enabled, or a bad request.
            RefusedError: its model is not here, or too large.
            JobError: JOB_FAILED, DEADLINE, CANCELLED; while iterating.
        """
        self.describe_for(operation, request)
        async with self._worker(self._pool, operation) as worker:
            command = say.Run(
                id=next(self._ids),
                operation=operation,
                request=request,
                delivered=tuple(delivered),
                deadline_seconds=deadline_seconds,
                seed=seed,
                scratch=worker.work_folder,
            )

            async def away(operation: str, request: bytes, budget: int) -> bytes:
                async with self._pool.away(worker):
                    return await on_call(operation, request, budget)

            run = ModuleRun(worker, command, away)
            try:
                yield run
            finally:
                if not run.ended and not worker.dead:
                    await run.cancel()

    async def engine(self, operation_or_model: str) -> EngineClient:
        """The resident engine behind an operation or of a model: loaded on first use, then warm.

        Others are put away where its memory is needed, the least worth first.

        Raises:
            RefusedError: NOT_OFFERED, no such model here; OWNER_LIMIT, it never fits; BUSY, it
                does not fit beside those at work.
            ConfigError: its weights are damaged.
            JobError: its worker died while it loaded.
        """
        model = operation_or_model
        if operation_or_model in registry.BUILT_IN:
            model = catalogue.DEFAULT
        self.shelf.require(model, GENERATE)
        return await self._resident.engine(model)

    def warm(self) -> list[Warm]:
        """The loaded models, and what each is worth."""
        return self._resident.warm()

    def loaded(self) -> list[EngineClient]:
        """The engines of whole models that are warm."""
        return self._resident.loaded()

    def engines(self) -> list[dict[str, object]]:
        """The loaded models, and how full each is."""
        return self._resident.shown()

    def places_of(self, kind: str) -> int:
        """How many calls of a kind, as `kind_of_model` names it, an engine serves at once."""
        return self._resident.places_of(kind)

    def at_once(self, operation: OperationInfo, slots: int) -> int:
        """Calls of it that are worked at at the same time, of `slots` that the node has."""
        if registry.is_served_by_engine(operation.name) and operation.models:
            return min(slots, self.places_of(kind_of_model(operation.models[0].name)))
        if registry.is_done_by_node(operation.name) or registry.takes_inputs(operation.name):
            return slots
        return min(slots, self._settings.module_workers_max)

    def is_loaded(self, model: str) -> bool:
        """Whether an engine of that model is warm."""
        return self._resident.is_loaded(model)

    @property
    def _slots(self) -> int:
        return min(self._settings.engine_slots, ENGINE_SLOTS_MAX)

    async def stage(self, request: StageRequest) -> EngineClient:
        """The resident engine of some layers.

        Raises:
            RefusedError: OWNER_LIMIT, they need more memory than a worker may have; BUSY.
            AivillageError: they could not be loaded.
        """
        return await self._parts.stage(request, self.shelf.divided(request), self._slots)

    async def stage_ahead(self, request: StageRequest) -> EngineClient:
        """The same for whoever may need it later: only where memory is free, which it is lent.

        Raises:
            RefusedError: OWNER_LIMIT, the owner lets nobody have that, or as `stage`; BUSY, there
                is no room beside what is loaded.
            AivillageError: they could not be loaded.
        """
        if not self._settings.stands_by:
            raise RefusedError(
                "this node loads no layers ahead",
                code="OWNER_LIMIT",
                next_step="ask another peer; its owner sets stage_stand_by",
            )
        model = self.shelf.divided(request)
        return await self._parts.ahead(request, model, self._slots, self._resident.memory_left)

    async def driver(self, model: str) -> EngineClient:
        """The resident driver of split answers. Raises: AivillageError: it could not be loaded."""
        self.shelf.require_divisible(model)
        return await self._parts.driver(model)

    async def _start_for(self, model: str, device: gpu.Device) -> WorkerProcess:
        """Where its worker is connected to: only a remote model's is. Raises: ConfigError."""
        held = self.shelf.require(model)
        if held.format != "remote":
            return await self._start_engine(device)
        found = await trio.to_thread.run_sync(endpoint.read, Path(held.folder))
        address = endpoint.address_of(found)
        return await self._start(Place(address.host, address.port, found.key_file))

    async def _start_engine(self, device: gpu.Device) -> WorkerProcess:
        """One that loads what is ours to run: no module, of whomever, gets a GPU's devices."""
        return await self._start(on_gpu=device.is_gpu)

    async def _start(self, place: Place | None = None, *, on_gpu: bool = False) -> WorkerProcess:
        limits, scratch = self._settings.limits, self._scratch_folder
        worker = await start_worker(self._nursery, limits, scratch, place=place, on_gpu=on_gpu)
        self.fences = worker.fences
        return worker

    async def _start_for_run(self) -> WorkerProcess:
        return await (self._cluster.start_worker() if self._cluster else self._start())

    def _worker(
        self, pool: WorkerPool, operation: str
    ) -> AbstractAsyncContextManager[WorkerProcess]:
        """A worker fit to run `operation`. Raises: RequestError: NOT_ENABLED, none is."""
        if operation in registry.BUILT_IN:
            return pool.worker(OUR_OWN)

        def require_fences(worker: WorkerProcess) -> None:
            if not worker.fences.sandboxed and not self._settings.dev_mode:
                raise RequestError(
                    f"{operation} comes from another package and this machine cannot fence it in: "
                    f"{worker.fences.why_not}",
                    code="NOT_ENABLED",
                    next_step="set AIVILLAGE_DEV_MODE=true to run it all the same",
                )

        return pool.worker(operation, require_fences)

    # ------------------------------------------------------------------ service

    async def describe_all(self) -> None:
        """Fills the list of operations; third-party ones that are enabled describe themselves."""
        for entry in registry.entries().values():
            is_enabled = self._is_enabled(entry)
            try:
                info = await self._info(entry, is_enabled=is_enabled)
            except AivillageError as error:
                log.warning("module_refused", extra={"operation": entry.operation}, exc_info=error)
                is_enabled, info = False, OperationInfo(name=entry.operation)
            self._infos[entry.operation] = msgspec.structs.replace(
                info,
                memory_bytes=self._memory_bytes(entry),
                stability=entry.stability,
                enabled=is_enabled,
            )

    def _memory_bytes(self, entry: registry.Entry) -> int:
        """Buyers of stages choose their layers by it."""
        return self._settings.limits.memory_bytes_max if entry.takes_inputs else 0

    async def _info(self, entry: registry.Entry, *, is_enabled: bool) -> OperationInfo:
        if module := registry.built_in(entry.operation):
            return described(module, entry.operation)
        if not is_enabled:  # nobody asked for it, so not a line of it runs
            return OperationInfo(name=entry.operation)
        command = say.Describe(id=next(self._ids), operation=entry.operation)
        async with self._worker(self._short, entry.operation) as worker:
            described_info = (await ask(worker, command, say.Described)).info
        return vetted(described_info, entry)

    def _is_enabled(self, entry: registry.Entry) -> bool:
        if entry.stability == "stable":
            return True
        return self._settings.dev_mode or entry.operation in self._settings.enabled

    async def end_idle(self) -> None:
        """Ends workers and engines that nobody has used for the owner's time; runs for ever."""
        limit_seconds = self._settings.idle_exit_seconds
        while True:
            await trio.sleep(limit_seconds / 10)
            try:
                await self._end_idle(limit_seconds)
            except Exception:  # the node goes on; the next round tries again
                log.exception("workers_not_ended")

    async def _end_idle(self, limit_seconds: float) -> None:
        for pool in (self._pool, self._short):
            await pool.stop_idle(limit_seconds)
        await self._parts.end_idle(limit_seconds)
        await self._resident.end_idle(limit_seconds)

    async def stop(self) -> None:
        """Ends every worker that is not in a call."""
        for pool in (self._pool, self._short):
            await pool.stop_idle()
        await self._resident.stop()
        await self._parts.stop()
        if self._cluster is not None:
            await self._cluster.stop()


@asynccontextmanager
async def open_workers(
    settings: WorkerSettings, *, cache_folder: Path, scratch_folder: Path
) -> AsyncIterator[Workers]:
    """The workers of a node; leaving the block ends them all.

    `scratch_folder` holds a folder for each worker while it lives. `cache_folder` is where engines
    may keep converted weights; those of today load in seconds and keep none.
    """
    folders = (cache_folder, scratch_folder, *filter(None, [settings.library]))
    for folder in folders:  # a fence has no rule for what is not there yet
        await trio.to_thread.run_sync(
            lambda folder=folder: folder.mkdir(parents=True, exist_ok=True)
        )
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery, settings, scratch_folder)
        await workers.describe_all()
        nursery.start_soon(workers.end_idle)
        try:
            yield workers
        finally:
            with trio.CancelScope(shield=True):
                await workers.stop()
            nursery.cancel_scope.cancel()
