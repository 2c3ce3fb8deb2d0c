"""The sha-256 of files, and whether a model's files are what its manifest says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aivillage.models.library.manifest import Manifest, ModelFile
from aivillage.protocols.errors import ConfigError

CHUNK_BYTES: Final = 1 << 20
Seen = Callable[[int], None]
"""Hears of so many more bytes."""


def sha256_of(path: Path, seen: Seen = lambda _count: None) -> str:
    """Raises: OSError: it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            seen(len(chunk))
    return digest.hexdigest()


def fault_of(folder: Path, file: ModelFile, seen: Seen = lambda _count: None) -> str:
    """What is wrong with one file; empty: nothing. Reads all of it."""
    path = folder / file.name
    try:
        if path.is_symlink() or not path.is_file():
            return f"{file.name} is not there"
        if path.stat().st_size != file.size_bytes:
            return f"{file.name} has {path.stat().st_size:,} bytes where {file.size_bytes:,} belong"
        found = sha256_of(path, seen)
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    return "" if found == file.sha256 else f"{file.name} was changed: its sha-256 is another one"


def require_whole(folder: Path, manifest: Manifest) -> None:
    """Before a byte of it is used.

    Raises:
        ConfigError: a file is not what the manifest says.
    """
    for file in manifest.files:
        if fault := fault_of(folder, file):
            raise damaged(manifest.name, fault)


def damaged(name: str, fault: str) -> ConfigError:
    """What is said of a model that is not what it was when it came."""
    return ConfigError(
        f"model {name} is damaged: {fault}",
        next_step=f"aivillage-node models remove {name}, then pull it again",
    )
