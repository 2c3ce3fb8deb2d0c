"""The models that were pulled to this machine: one folder each. Blocking file work.

A folder is there whole or not at all: it is filled as a draft, and renamed when all of it is
durable and was looked into.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import fault_of
from aivillage.models.library.manifest import Manifest
from aivillage.protocols.errors import AivillageError, ConfigError, RequestError

DRAFT_PREFIX: Final = ".draft-"
GONE_PREFIX: Final = ".gone-"
MODELS_MAX: Final = 64
"""More in one folder is an accident, and each costs the daemon a look."""


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """A pull that has not come to its end."""

    source: str
    size_bytes: int
    touched_unix: float
    folder: str


class Library:
    """The models in `folder`, which the first pull makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Manifest]:
        """Every model, by name. One whose manifest is damaged is left out; `faulty` names it."""
        return [manifest for manifest, _ in self._read() if manifest is not None]

    def faulty(self) -> list[AivillageError]:
        """What is wrong with folders whose manifest cannot be read."""
        return [error for _, error in self._read() if error is not None]

    def get(self, name: str) -> Manifest:
        """Raises: RequestError: no such model. ConfigError: its manifest is damaged."""
        return manifests.read(self.place(name))

    def place(self, name: str) -> Path:
        """The folder of a model that is there.

        Raises:
            RequestError: it is not.
        """
        path = self.folder / manifests.require_name(name)
        if not path.is_dir():
            raise RequestError(
                f"no model called {name} was pulled", next_step="aivillage-node models list"
            )
        return path

    def faults(self, name: str, seen: Callable[[int], None]) -> list[str]:
        """What is wrong with a model's files, all of them read; empty: nothing.

        Raises:
            RequestError: no such model.
        """
        folder = self.place(name)
        try:
            manifest = manifests.read(folder)
        except ConfigError as error:
            return [error.message]
        found = [fault_of(folder, file, seen) for file in manifest.files]
        return [fault for fault in found if fault]

    def remove(self, name: str) -> int:
        """Forgets a model at once, then deletes its files. Gives the bytes that it had.

        Raises:
            RequestError: no such model. ConfigError: it cannot be removed.
        """
        folder = self.place(name)
        size_bytes = bytes_below(folder)
        gone = self.folder / f"{GONE_PREFIX}{name}-{time.time_ns()}"
        with _typed(self.folder):
            folder.rename(gone)
            shutil.rmtree(gone)
        return size_bytes

    def drafts(self) -> list[Draft]:
        """Pulls that have not come to their end, and what a removal left, the oldest first."""
        found = []
        for path in (*self.folder.glob(f"{DRAFT_PREFIX}*"), *self.folder.glob(f"{GONE_PREFIX}*")):
            with contextlib.suppress(FileNotFoundError):  # it has just come to its end
                found.append(
                    Draft(
                        source=_source_of(path),
                        size_bytes=bytes_below(path),
                        touched_unix=max(_times(path)),
                        folder=str(path),
                    )
                )
        return sorted(found, key=lambda draft: draft.touched_unix)

    def remove_draft(self, draft: Draft) -> None:
        """Raises: ConfigError: it cannot be removed."""
        with _typed(self.folder):
            shutil.rmtree(draft.folder)

    def _read(self) -> Iterator[tuple[Manifest | None, AivillageError | None]]:
        for path in sorted(self.folder.glob("[A-Za-z0-9]*"))[:MODELS_MAX]:
            if path.is_dir():
                try:
                    yield manifests.read(path), None
                except AivillageError as error:
                    yield None, error


def bytes_below(folder: Path) -> int:
    """What the files in `folder` take."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _times(folder: Path) -> list[float]:
    return [path.stat().st_mtime for path in (folder, *folder.iterdir())]


def _source_of(draft: Path) -> str:
    """What it is a draft of; empty where that is not known."""
    with contextlib.suppress(OSError):  # it was killed before it could write it
        return (draft / ".source").read_text(errors="replace")[:4096]
    return ""


@contextlib.contextmanager
def _typed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror}", next_step="aivillage-node doctor"
        ) from None
