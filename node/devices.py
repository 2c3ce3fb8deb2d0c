"""Where engines compute: on the GPU that the owner wants, or that is there; else on the CPU.

The daemon has no torch to ask. It looks for NVIDIA's device, starts a worker that may use it, and
hears from that worker whether torch can.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec

from aivillage.models import gpu
from aivillage.models import worker_messages as say
from aivillage.node.engines import EngineClient
from aivillage.protocols.errors import AivillageError

log = logging.getLogger(__name__)

Attempt = Callable[[say.Load], Awaitable[EngineClient]]
"""Starts a worker that may use the device of what it is to load, and loads it there."""


class Devices(msgspec.Struct, frozen=True):
    """Made by `devices`. `first`: where an engine is tried; `falls_back`: else on the CPU."""

    first: gpu.Device = gpu.Device()
    falls_back: bool = False

    async def loaded(self, load: say.Load, attempt: Attempt) -> EngineClient:
        """The engine of `load`; where the owner named a device, there or nowhere.

        Raises:
            AivillageError: it could not be loaded.
        """
        if not self.first.is_gpu:
            return await attempt(load)
        try:
            return await attempt(msgspec.structs.replace(load, device=self.first))
        except AivillageError as error:
            if not self.falls_back:
                raise
            log.warning("gpu_left_out", extra={"model": load.model, "why": error.message})
        return await attempt(load)


def devices(setting: str, engine: str, memory_bytes_max: int, why_none: str) -> Devices:
    """By the owner's settings, and by what files tell of a GPU (`gpu.why_none`).

    `memory_bytes_max`: of the GPU's, for one engine; 0: most of it.
    """
    name = gpu.wanted(setting, engine, why_none)
    if name == gpu.CPU:
        return Devices()
    return Devices(gpu.Device(name, memory_bytes_max), falls_back=setting == gpu.AUTO)
