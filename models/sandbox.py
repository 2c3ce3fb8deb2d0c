"""What a worker puts on itself before it reads a stranger's byte: limits, and no network.

The filter denies the system calls that could reach beyond the process; it is inherited by children
and cannot be taken off. It works on Linux, x86-64 and AArch64; elsewhere `deny_network` says so.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst; BPF, McCanne and Jacobson 1993.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_ALLOW: Final = 0x7FFF0000
_DENY: Final = 0x00050000 | errno.EPERM

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL: Final = 0x15
_JUMP_AT_LEAST: Final = 0x35
_RETURN: Final = 0x06
_OFFSET_NUMBER: Final = 0
_OFFSET_ARCHITECTURE: Final = 4
_OFFSET_ARGUMENTS: Final = 16  # 8 bytes each, low half first: both machines are little endian
_X32_BIT: Final = 0x40000000

# socket connect accept bind listen accept4 sendmsg sendmmsg ptrace process_vm_readv
# process_vm_writev io_uring_setup pidfd_open pidfd_getfd pidfd_send_signal tkill
_DENIED: Final = {
    "x86_64": (41, 42, 43, 49, 50, 288, 46, 307, 101, 310, 311, 425, 434, 438, 424, 200),
    "aarch64": (198, 203, 202, 200, 201, 242, 211, 269, 117, 270, 271, 425, 434, 438, 424, 130),
}
_KILL_AND_TGKILL: Final = {"x86_64": (62, 234), "aarch64": (129, 131)}
# socket bind listen
_OF_GPU: Final = {"x86_64": (41, 49, 50), "aarch64": (198, 200, 201)}
_AF_UNIX: Final = 1
_SENDTO: Final = {"x86_64": 44, "aarch64": 206}
_ARCHITECTURE: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

FILE_BYTES_MAX: Final = 2 << 30
OPEN_FILES_MAX: Final = 256
NO_LIMIT: Final = (1 << 63) - 1
"""Of memory in bytes: more than there is. A number, so that a hard limit can still be lower."""
CPU_SECONDS_MAX: Final = 86_400.0
"""For whoever sets no sensible end: a longer one does not fit the kernel's number."""


def limit(*, memory_bytes_max: int, nice: int) -> None:
    """Caps memory, file size and open files, and steps back behind the owner's own work.

    `RLIMIT_DATA`, since torch maps more address space than it uses.
    """
    _lower(resource.RLIMIT_DATA, memory_bytes_max)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES_MAX)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
    _lower(resource.RLIMIT_CORE, 0)
    os.nice(nice)


def limit_cpu(seconds: float) -> None:
    """From now on, at most this much processor time, or the kernel ends the process. 0: no end."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = min(seconds, CPU_SECONDS_MAX)
    soft = int(used.ru_utime + used.ru_stime + most) + 1 if seconds > 0 else hard
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def die_with_parent(parent: int) -> None:
    """Ends this process when the daemon `parent` ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def deny_network(*, on_gpu: bool = False) -> str:
    """Denies the network and other processes for good. Gives why not; empty: it is on.

    `on_gpu`: libcuda does not start where it may not listen at a Unix socket. It may then make one
    and listen; nobody can be let in there, and nobody be called.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _DENIED or sys.byteorder != "little":
        return f"no system call filter for {sys.platform} on {machine}"
    program = _program(machine, on_gpu=on_gpu)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        return f"the kernel refused: {os.strerror(ctypes.get_errno())}"
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    if libc.prctl(_PR_SET_SECCOMP, mode, ctypes.create_string_buffer(header), zero, zero) != 0:
        return f"the kernel refused the filter: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(machine: str, *, on_gpu: bool = False) -> bytes:
    """The filter: another architecture's numbers and the denied calls fail with EPERM."""
    code = [
        _instruction(_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        _instruction(_RETURN, 0, 0, _DENY),
        _instruction(_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":  # the same kernel answers x32 numbers under the same architecture
        code += [_instruction(_JUMP_AT_LEAST, 0, 1, _X32_BIT), _instruction(_RETURN, 0, 0, _DENY)]
    unix_only, *listening = _OF_GPU[machine]
    if on_gpu:
        code += _only_where(unix_only, {_OFFSET_ARGUMENTS: _AF_UNIX})
    for number in _DENIED[machine]:
        if on_gpu and number in listening:
            continue
        code += [_instruction(_JUMP_EQUAL, 0, 1, number), _instruction(_RETURN, 0, 0, _DENY)]
    for number in _KILL_AND_TGKILL[machine]:  # itself only
        code += _only_where(number, {_OFFSET_ARGUMENTS: os.getpid()})
    # Through a pair of its own, but not to a named socket: the fifth argument is no address.
    fifth = _OFFSET_ARGUMENTS + 4 * 8
    code += _only_where(_SENDTO[machine], {fifth: 0, fifth + 4: 0})
    code.append(_instruction(_RETURN, 0, 0, _ALLOW))
    return b"".join(code)


def _only_where(number: int, words: Mapping[int, int]) -> list[bytes]:
    """Allows call `number` only where the words at these offsets have these values."""
    body: list[bytes] = []
    for offset, value in words.items():
        body += [
            _instruction(_LOAD, 0, 0, offset),
            _instruction(_JUMP_EQUAL, 1, 0, value),
            _instruction(_RETURN, 0, 0, _DENY),
        ]
    body.append(_instruction(_RETURN, 0, 0, _ALLOW))
    return [_instruction(_JUMP_EQUAL, 0, len(body), number), *body]


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _lower(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))
