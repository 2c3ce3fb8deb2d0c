"""What was told before jobs.db has it: one small file, appended to in the loop.

A result is handed to its owner only once it outlasts a kill of this process. To wake the thread of
jobs.db for that, and the loop after it, takes a quarter of a small job; to append to a file, a
hundredth. So it is appended here, told, and stored with others a little later; then this file is
empty again. What a kill leaves in it goes into jobs.db at the next start.

As jobs.db, it survives kill -9, not power loss. A record is its length and CRC-32 (4 bytes each,
big-endian) and its bytes; the first one that is not whole ends the file.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

RECORD_BYTES_MAX: Final = 64 << 10
"""A page or two that are copied while nobody else has a turn; more takes the way of jobs.db."""
FILE_BYTES_MAX: Final = 1 << 20
"""Some thousand results. In a row without a pause it is never empty: one then waits for jobs.db,
which has all of them after it."""
_HEAD: Final = struct.Struct("!II")
_log = logging.getLogger("aivillage.jobs")


class Told:
    """The file of a running node. Every method is a plain call."""

    def __init__(self, path: Path | None) -> None:
        """Begins anew: what was in it is expected to be in jobs.db. Raises: OSError.

        None: jobs.db is in memory, and nothing outlasts this process.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600) if path else -1
        self._is_file = path is not None
        self._size_bytes = 0
        self._waiting = 0

    def append(self, record: bytes) -> bool:
        """Whether it outlasts a kill from here on; if so, `stored` is to be called once it may go.

        False: it is too large, the file is full, or the disk is.
        """
        if not self._is_file:
            return True
        framed = _HEAD.pack(len(record), zlib.crc32(record)) + record
        is_small = len(record) <= RECORD_BYTES_MAX
        if not is_small or self._size_bytes + len(framed) > FILE_BYTES_MAX:
            return False
        try:
            taken = os.write(self._file, framed)
        except OSError as error:
            _log.warning("not_told_at_once reason=%s", error)
            return False
        if taken < len(framed):  # what follows a record that is cut would never be found
            self._cut(self._size_bytes)
            return False
        self._size_bytes += taken
        self._waiting += 1
        return True

    def stored(self) -> None:
        """jobs.db has one of the records; once it has all of them the file is empty."""
        if not self._is_file:
            return
        self._waiting -= 1
        if not self._waiting:
            self._cut(0)

    def close(self) -> None:
        """What comes after it finds no file, also where its number is another one's by then."""
        file, self._file = self._file, -1
        if self._is_file:
            os.close(file)

    def _cut(self, size_bytes: int) -> None:
        with suppress(OSError):  # then it is longer than we think, and read anew at the next start
            os.ftruncate(self._file, size_bytes)
            self._size_bytes = size_bytes


def read(path: Path) -> list[bytes]:
    """The whole records of a file that a kill left, or that a node writes at this moment."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found: list[bytes] = []
    at = 0
    while at + _HEAD.size <= len(data):
        size_bytes, checksum = _HEAD.unpack_from(data, at)
        record = data[at + _HEAD.size : at + _HEAD.size + size_bytes]
        if len(record) < size_bytes or zlib.crc32(record) != checksum:
            break
        found.append(record)
        at += _HEAD.size + size_bytes
    return found
