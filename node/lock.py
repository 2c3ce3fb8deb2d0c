"""One node per data folder: a file lock that the kernel drops with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from aivillage.protocols.errors import ConfigError

LOCK_FILE: Final = "node.lock"


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """This process alone may touch the folder while the block runs.

    Raises:
        ConfigError: another node runs on it, or it cannot be written.
    """
    descriptor = _opened(data_dir)
    try:
        if not _take(descriptor):
            raise ConfigError(
                "a daemon is running on this data folder",
                next_step="`aivillage-node status` shows it, `aivillage-node stop` ends it",
            )
        yield
    finally:
        os.close(descriptor)


def is_held(data_dir: Path) -> bool:
    """Whether a node runs on the folder now, or has not ended yet."""
    try:
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False  # no node was ever here
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)


def _opened(data_dir: Path) -> int:
    try:
        return os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{data_dir} cannot be written: {error.strerror}",
            next_step="choose a folder of yours with --data-dir",
        ) from None


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
