"""Which files a worker may touch: Python and the system to read, its scratch folder to write.

The owner's key and books lie elsewhere, and so out of reach. Linux 5.13 and newer, where Landlock
is on; `fence_files` says where it is not.

Source: Linux, Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from aivillage.models import gpu

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION_FLAG: Final = 1
_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _DEVICE = 1 << 13, 1 << 14, 1 << 15
_SINCE_VERSION: Final = {2: _REFER, 3: _TRUNCATE, 5: _DEVICE}
_FIRST_VERSION: Final = (1 << 13) - 1
_READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
_ALL: Final = _FIRST_VERSION | sum(_SINCE_VERSION.values())
_USE: Final = _READ_FILE | _WRITE_FILE | _DEVICE
"""Of a GPU's device: opened, mapped, and spoken to by ioctl."""
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _DEVICE
_SCOPE_ALL: Final = 3
"""Abstract sockets and signals stay among the fenced; version 6."""

_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/sys/devices", "/proc/self",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
)  # fmt: skip
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def rules(
    *, readable: Iterable[str], writable: Iterable[str], on_gpu: bool = False
) -> list[tuple[str, int]]:
    """What may be done beneath which path; several rules for one add up.

    `on_gpu`: as an engine on a GPU needs it, which runs our code only; nobody else is let that.
    """
    python = (sys.prefix, sys.base_prefix, *filter(None, sys.path))
    found = [(path, _READ) for path in sorted({*_SYSTEM, *python, *readable})]
    found += [(path, _ALL) for path in sorted({*_DEVICES, *writable})]
    if on_gpu:
        found += [(path, _READ) for path in gpu.READABLE]
        found += [(path, _USE) for path in gpu.nodes()]
        found.append((gpu.NAMED, _WRITE_FILE | _TRUNCATE))
    return found


def fence_files(*, readable: Iterable[str], writable: Iterable[str], on_gpu: bool = False) -> str:
    """Fences this process in for good. Gives why not; empty: it is on."""
    if sys.platform != "linux":
        return f"no file fence on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG))
    if version < 1:
        return "this kernel has no Landlock"
    handled = _FIRST_VERSION | sum(bit for v, bit in _SINCE_VERSION.items() if v <= version)
    ruleset = _ruleset(libc, version, handled)
    for path, rights in rules(readable=readable, writable=writable, on_gpu=on_gpu):
        _allow(libc, ruleset, path, rights & handled)
    zero = ctypes.c_ulong(0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    failed = libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint(0))
    os.close(ruleset)
    return f"the kernel refused: {os.strerror(ctypes.get_errno())}" if failed else ""


def _ruleset(libc: ctypes.CDLL, version: int, handled: int) -> int:
    """A descriptor of rules; the structure grew with the versions of Landlock."""
    attributes = struct.pack("QQQ", handled, 0, _SCOPE_ALL if version >= 6 else 0)
    size = 24 if version >= 6 else 8
    descriptor: int = libc.syscall(
        _CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)
    )
    return descriptor


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Grants `rights` beneath `path`; what does not exist needs no rule."""
    if not Path(path).exists():
        return
    if not Path(path).is_dir():
        rights &= _OF_FILES
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, descriptor)
    libc.syscall(_ADD_RULE, ruleset, ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint(0))
    os.close(descriptor)
