"""Brings a model here: bytes into a draft, a look into them, then all of it at once into its place.

A pull that is killed leaves its draft, and the next one of the same source goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from aivillage.models.durable import sync_folder
from aivillage.models.inference import catalogue
from aivillage.models.inference.remote import is_remote
from aivillage.models.library import inspection, layers
from aivillage.models.library import manifest as manifests
from aivillage.models.library.hashing import CHUNK_BYTES, sha256_of
from aivillage.models.library.manifest import Manifest, ModelFile
from aivillage.models.library.sources import Source, Wanted
from aivillage.models.library.store import DRAFT_PREFIX, Library
from aivillage.protocols.errors import (
    AivillageError,
    ConfigError,
    JobError,
    NodeError,
    RefusedError,
    RequestError,
)

FREE_BYTES_MIN: Final = 256 << 20
"""Left for the books, which have to be written, and for work."""
PART: Final = ".part"

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all; 0: not known)."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a pull would do; nothing of it was done."""

    name: str
    source: str
    licence: str
    files: tuple[Wanted, ...]
    size_bytes: int
    had_bytes: int
    """In a draft of an earlier pull."""
    free_bytes: int


class Pull:
    """One source on its way into `library`, under `name`."""

    def __init__(
        self, library: Library, source: Source, *, name: str, bytes_max: int, progress: Progress
    ) -> None:
        """Raises: RequestError: no model can be called that."""
        self._library = library
        self._source = source
        self.name = manifests.require_name(name or source.name)
        self._bytes_max = bytes_max
        self._progress = progress
        key = hashlib.sha256(f"{source.text}\n{self.name}".encode()).hexdigest()
        self.draft = library.folder / f"{DRAFT_PREFIX}{key[:24]}"
        self._total = self._done = 0

    def plan(self) -> Plan:
        """Raises: AivillageError: it would be refused."""
        self._require_free_name()
        files = self._source.files(None)
        size_bytes = sum(file.size_bytes or 0 for file in files)
        self._require_fits(size_bytes)
        folder = next(
            p for p in (self._library.folder, *self._library.folder.parents) if p.exists()
        )
        had = sum(p.stat().st_size for p in self.draft.glob("*")) if self._goes_on() else 0
        return Plan(
            name=self.name,
            source=self._source.text,
            licence=self._source.licence,
            files=files,
            size_bytes=size_bytes,
            had_bytes=had,
            free_bytes=shutil.disk_usage(folder).free,
        )

    def run(self) -> Manifest:
        """To a model that is in its place, durable and looked into.

        Raises:
            RequestError: it is no model that runs here, too large, or its name is taken.
            RefusedError: BUSY, another pull of it is running.
            JobError: it could not be fetched; what came is kept.
            NodeError: DISK_FULL.
        """
        if (here := self._same_is_here()) is not None:
            return here
        self._require_free_name()
        with _typed(self._library.folder), self._locked_draft():
            wanted = self._source.files(self.draft)
            if not 1 <= len(wanted) <= manifests.FILES_MAX:
                raise RequestError(f"a model has 1 to {manifests.FILES_MAX} files")
            self._total = sum(file.size_bytes or 0 for file in wanted)
            self._require_fits(self._total)
            files = tuple(self._file(file) for file in wanted)
            self._progress("looking into it", 0, 0)
            return self._put(files, self._looked())

    # ------------------------------------------------------------------ what may be
    def _same_is_here(self) -> Manifest | None:
        with contextlib.suppress(AivillageError):  # nothing there, or it is damaged: pulled or told
            here = self._library.get(self.name)
            return here if here.source == self._source.text else None
        return None

    def _require_free_name(self) -> None:
        if is_remote(self.name):
            raise RequestError(
                f"{self.name} is a name for models that answer elsewhere",
                next_step="--name another one, or aivillage-node models remote",
            )
        if self.name in catalogue.MODELS:
            raise RequestError(
                f"{self.name} is the name of a packaged model", next_step="--name another one"
            )
        if (self._library.folder / self.name).exists():
            raise RequestError(
                f"a model called {self.name} is here already",
                next_step=f"--name another one, or aivillage-node models remove {self.name}",
            )

    def _require_fits(self, size_bytes: int) -> None:
        if size_bytes > self._bytes_max:
            raise RequestError(
                f"a model has at most {self._bytes_max:,} bytes here",
                code="TOO_LARGE",
                next_step="raise model_bytes_max in config.toml",
            )

    # ------------------------------------------------------------------ the draft
    def _goes_on(self) -> bool:
        """Whether the draft is of the same files."""
        with contextlib.suppress(OSError):  # there is none
            return (self.draft / ".identity").read_text() == self._source.identity
        return False

    @contextlib.contextmanager
    def _locked_draft(self) -> Iterator[None]:
        """The draft, for this pull alone; begun anew where the source is another one since."""
        self.draft.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.draft / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefusedError(
                    f"{self._source.text} is being pulled already", next_step="wait for its end"
                ) from None
            if not self._goes_on():
                for path in self.draft.iterdir():
                    if path.is_file() and path.name != ".lock":
                        path.unlink()
                (self.draft / ".source").write_text(self._source.text)
                (self.draft / ".identity").write_text(self._source.identity)
            yield

    def _file(self, wanted: Wanted) -> ModelFile:
        """One file, whole and durable in the draft."""
        path = self.draft / wanted.name
        if not path.exists():
            part = self.draft / f"{wanted.name}{PART}"
            self._fetch(wanted, part)
            part.replace(path)
        sha256 = sha256_of(path)
        size_bytes = path.stat().st_size
        if (wanted.sha256 and sha256 != wanted.sha256) or wanted.size_bytes not in {
            None, size_bytes,
        }:  # fmt: skip
            path.unlink()
            raise RequestError(
                f"{wanted.name} did not come as {self._source.text} says that it is",
                next_step="pull again; if it stays so, the source is damaged",
            )
        return ModelFile(name=wanted.name, size_bytes=size_bytes, sha256=sha256)

    def _fetch(self, wanted: Wanted, part: Path) -> None:
        """The rest of a file, after what an earlier pull left of it."""
        with part.open("ab") as file:
            offset = file.tell()
            if wanted.size_bytes is not None and offset > wanted.size_bytes:
                offset = 0
                file.truncate(0)
            self._done += offset
            if offset != wanted.size_bytes:
                with self._source.reading(wanted, offset) as source:
                    self._copy(wanted, source, file)
            file.flush()
            os.fsync(file.fileno())
        if wanted.size_bytes is not None and part.stat().st_size < wanted.size_bytes:
            raise JobError(f"{wanted.name} ends too early", next_step="pull again: it goes on")

    def _copy(self, wanted: Wanted, source: BinaryIO, file: BinaryIO) -> None:
        while chunk := source.read(CHUNK_BYTES):
            self._done += len(chunk)
            self._require_fits(self._done)
            if shutil.disk_usage(self.draft).free - len(chunk) < FREE_BYTES_MIN:
                raise _full(self._library.folder)
            file.write(chunk)
            self._progress(wanted.name, self._done, self._total)

    # ------------------------------------------------------------------ its place
    def _looked(self) -> inspection.Found:
        facts, parts = inspection.look(self.draft)
        licence = self._source.licence or facts.licence
        return inspection.Found(msgspec.structs.replace(facts, licence=licence), parts)

    def _put(self, files: tuple[ModelFile, ...], found: inspection.Found) -> Manifest:
        manifest = Manifest(
            name=self.name, source=self._source.text, facts=found.facts, files=files
        )
        if found.layers is not None:
            self._write(layers.LAYERS_FILE, layers.encode(found.layers))
        self._write(manifests.MANIFEST_FILE, manifests.encode(manifest))
        place = self._library.folder / self.name
        self.draft.rename(place)
        sync_folder(place)
        sync_folder(self._library.folder)
        shutil.rmtree(place / ".wheel", ignore_errors=True)
        for name in (".lock", ".source", ".identity"):
            (place / name).unlink(missing_ok=True)
        return manifest

    def _write(self, name: str, body: bytes) -> None:
        with (self.draft / name).open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _typed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise _full(folder) from None
        raise ConfigError(
            f"{error.filename or folder} cannot be used: {error.strerror}",
            next_step="aivillage-node doctor",
        ) from None


def _full(folder: Path) -> NodeError:
    return NodeError(
        f"the disk under {folder} has no room for it",
        code="DISK_FULL",
        next_step="free some disk space; pull again, and it goes on",
    )
