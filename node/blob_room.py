"""Room in the store of blobs: what is used lies still, and who was used last goes last.

Blocking, and right between processes: a command adds blobs beside a running daemon. Whoever uses a
file holds a shared lock on it, which ends with the process; eviction takes no file that it cannot
lock for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from aivillage.protocols.errors import RequestError

DRAFT_PREFIX: Final = ".draft-"
FETCH_PREFIX: Final = ".fetch-"
"""A blob on its way from others, with what has come of it; kept for the next try."""
PIN_SUFFIX: Final = ".pin"
HASHES_SUFFIX: Final = ".hashes"
HEX: Final = frozenset("0123456789abcdef")


class _Item(NamedTuple):
    """What could go. `used` is in nanoseconds."""

    used: int
    path: Path
    size_bytes: int


class Room:
    """Counts what one writer adds to the store, and makes room for it."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._used = used_bytes(folder)

    def take(self, size_bytes: int) -> None:
        """Room for so much more, taken from what was not used for the longest time.

        Raises:
            RequestError: TOO_LARGE, what is there is pinned or in use.
        """
        self._used += size_bytes
        if self._used > self._bytes_max:
            self._used = used_bytes(self._folder) + size_bytes
            self._used -= self._evict(self._used - self._bytes_max)

    def _evict(self, wanted: int) -> int:
        """How many bytes went: nothing where they would not suffice."""
        with contextlib.ExitStack() as locks:
            chosen: list[_Item] = []
            for item in sorted(_unpinned(self._folder)):
                if sum(one.size_bytes for one in chosen) >= wanted:
                    break
                if locks.enter_context(locked_alone(item.path)):
                    chosen.append(item)
            freed = sum(one.size_bytes for one in chosen)
            if freed < wanted:
                raise RequestError(
                    f"the store holds at most {self._bytes_max:,} bytes, and too much of it is "
                    "pinned or in use",
                    code="TOO_LARGE",
                    next_step="aivillage-node blobs unpin CID, or raise blob_store_bytes_max",
                )
            for item in chosen:
                forget(item.path)
        return freed


def used_bytes(folder: Path) -> int:
    """What blobs, drafts and fetches take; a fetch counts as what it will be."""
    found = 0
    for path in (*_blobs(folder), *folder.glob(f"{DRAFT_PREFIX}*"), *fetches(folder)):
        with contextlib.suppress(FileNotFoundError):  # gone while we looked
            found += path.stat().st_size
    return found


def is_blob(path: Path) -> bool:
    """By its name."""
    return len(path.name) == 64 and not set(path.name) - HEX


def beside(path: Path, suffix: str) -> Path:
    """The pin or the hashes of the blob at `path`."""
    return path.with_name(path.name + suffix)


def is_pinned(path: Path) -> bool:
    return beside(path, PIN_SUFFIX).exists()


def touch(path: Path) -> None:
    """It was used just now; when it came in stays as it was."""
    stat = path.stat()
    with contextlib.suppress(PermissionError):  # of another user: it is evicted by its age
        os.utime(path, ns=(max(stat.st_atime_ns + 1, time.time_ns()), stat.st_mtime_ns))


def forget(path: Path) -> None:
    for gone in (path, beside(path, HASHES_SUFFIX), beside(path, PIN_SUFFIX)):
        gone.unlink(missing_ok=True)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[BinaryIO]:
    """The open file at `path`, which nobody evicts meanwhile.

    Raises:
        FileNotFoundError: it is not there.
    """
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        path.stat()  # it may have gone while we waited
        touch(path)
        yield file


@contextlib.contextmanager
def locked_alone(path: Path) -> Iterator[bool]:
    """Whether nobody uses the file at `path`; nobody begins to while the block runs."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _unpinned(folder: Path) -> Iterator[_Item]:
    for path in (*_blobs(folder), *fetches(folder)):
        with contextlib.suppress(FileNotFoundError):  # gone while we looked
            stat = path.stat()
            if not is_pinned(path):
                yield _Item(max(stat.st_atime_ns, stat.st_mtime_ns), path, stat.st_size)


def _blobs(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("??/*") if is_blob(path))


def fetches(folder: Path) -> Iterator[Path]:
    """The files of blobs on their way."""
    return (path for path in folder.glob(f"{FETCH_PREFIX}*") if not path.suffix)
