"""What computing on an NVIDIA GPU takes: who may, which device, and what its worker is let.

Nothing here was tried on a GPU yet. Where each opening comes from, and what is only believed:
docs/decisions/0029-gpu.md. No torch here: the daemon and the doctor ask too.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Final

import msgspec

AUTO: Final = "auto"
CPU: Final = "cpu"
CUDA: Final = "cuda"
MEMORY_SHARE: Final = 0.9
"""Of the GPU's memory that one worker may take, unless its owner says how much."""

READABLE: Final = (
    "/proc/driver/nvidia", "/proc/driver/nvidia-uvm", "/proc/devices", "/proc/modules",
    "/proc/sys/vm/mmap_min_addr",
)  # fmt: skip
"""What libcuda reads as it starts, beside what every worker may."""
NAMED: Final = "/proc/self/task"
"""libcuda writes its threads' names beneath, and gives up where it cannot."""
_NODES: Final = re.compile(r"nvidia(\d+|ctl|-uvm|-uvm-tools)")
_CONTROL: Final = "nvidiactl"
_DEV: Final = Path("/dev")


class Device(msgspec.Struct, frozen=True):
    """Where an engine is to compute: `cpu`, `cuda`, or `cuda:N`.

    `memory_bytes_max`: of the GPU's memory, for this engine's worker; 0: `MEMORY_SHARE` of it.
    """

    name: str = CPU
    memory_bytes_max: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU


def nodes(folder: Path = _DEV) -> tuple[str, ...]:
    """The device files that a worker on a GPU opens, as far as they are there.

    All GPUs': the numbers of CUDA are not those of the files.
    """
    if not folder.is_dir():
        return ()
    names = sorted(path.name for path in folder.iterdir() if _NODES.fullmatch(path.name))
    return tuple(str(folder / name) for name in names)


def why_none(folder: Path = _DEV) -> str:
    """Why no engine here can compute on a GPU, as far as files tell; empty: one may try."""
    if not (folder / _CONTROL).exists():
        return f"there is no {folder / _CONTROL}: no NVIDIA GPU, or not its driver"
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "torch is not installed"
    return f"torch {version} is a build for the CPU" if version.endswith("+cpu") else ""


def wanted(setting: str, engine: str, why_none: str) -> str:
    """The device that an engine is to try, of the owner's settings `device` and `engine`.

    `auto` is a GPU where `why_none` says nothing, but not for an owner who chose the CPU's engine.
    """
    if setting != AUTO:
        return setting
    return CPU if why_none or engine == "openvino" else CUDA
