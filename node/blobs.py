"""Blobs on this machine, named by what is in them: the sha-256 of their bytes.

Plain blocking file work, for the command line and for threads. A blob is there whole or not at
all: it is written beside its place, synced, and renamed into it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from aivillage.protocols.errors import AivillageError, ConfigError, NodeError, RequestError
from aivillage.protocols.types import Cid

CHUNK_BYTES: Final = 1 << 20
FREE_BYTES_MIN: Final = 64 << 20
"""Left for the books: a blob that would take it is refused, since a ledger has to be written."""
DRAFT_PREFIX: Final = ".draft-"
DRAFT_SECONDS_MAX: Final = 86_400.0
"""A draft that nobody has written to for a day is left from a crash."""
_HEX: Final = frozenset("0123456789abcdef")


class BlobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One blob; `added_unix` is when it last came in."""

    cid: Cid
    size_bytes: int
    added_unix: float


class Blobs:
    """The store in `folder`, which is made at the first `put`."""

    def __init__(self, folder: Path, *, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max

    def put(self, source: Path | bytes | BinaryIO) -> Cid:
        """Keeps a copy of `source`; returns once it is durable. Putting it again is harmless.

        Raises:
            RequestError: TOO_LARGE, over the owner's limit; BAD_REQUEST, it cannot be read.
            NodeError: DISK_FULL.
            ConfigError: the folder cannot be used.
        """
        with self._typed(), contextlib.ExitStack() as stack:
            self._make_room()
            reader = stack.enter_context(_reading(source))
            descriptor, name = tempfile.mkstemp(prefix=DRAFT_PREFIX, dir=self._folder)
            draft = Path(name)
            stack.callback(draft.unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                cid = self._copy(reader, file)
                file.flush()
                os.fchmod(file.fileno(), 0o400)
                os.fsync(file.fileno())
            path = self._path(cid)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            draft.replace(path)
            _sync_folder(path.parent)
            _sync_folder(self._folder)
        return cid

    def get(self, cid: Cid, *, verify: bool = False) -> Path:
        """Where the bytes of `cid` lie; with `verify`, only after they were read and compared.

        Raises:
            RequestError: BAD_REQUEST, no such blob here.
            NodeError: INTERNAL, the file is not what its name says.
        """
        path = self._path(cid)
        with self._typed():
            if not path.is_file():
                raise RequestError(
                    f"there is no blob {cid.hex()} here", next_step="aivillage-node blobs list"
                )
            if verify and _hash_of(path) != cid:
                raise NodeError(
                    f"the file of blob {cid.hex()} was damaged",
                    next_step=f"aivillage-node blobs remove {cid.hex()[:12]}, then add it again",
                )
        return path

    def all(self) -> list[BlobInfo]:
        """Every blob, the newest first."""
        found = []
        for path in self._folder.glob("??/*"):
            if len(path.name) == 64 and not set(path.name) - _HEX:
                with contextlib.suppress(FileNotFoundError):  # removed while we looked
                    stat = path.stat()
                    found.append(
                        BlobInfo(
                            cid=Cid(bytes.fromhex(path.name)),
                            size_bytes=stat.st_size,
                            added_unix=stat.st_mtime,
                        )
                    )
        return sorted(found, key=lambda blob: (-blob.added_unix, blob.cid))

    def remove(self, cid: Cid) -> None:
        """Raises: RequestError: BAD_REQUEST, no such blob here."""
        path = self.get(cid)
        with self._typed():
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def find(self, text: str) -> Cid:
        """The blob whose name is, or begins with, `text`.

        Raises:
            RequestError: BAD_REQUEST, no blob here or several.
        """
        if text and not set(text) - _HEX:
            cids = [blob.cid for blob in self.all() if blob.cid.hex().startswith(text)]
            if len(cids) == 1:
                return cids[0]
        raise RequestError(
            f"no single blob here begins with {text!r}", next_step="aivillage-node blobs list"
        )

    # ------------------------------------------------------------------ inside
    def _path(self, cid: Cid) -> Path:
        assert len(cid) == 32, "a cid is a sha-256"
        name = cid.hex()
        return self._folder / name[:2] / name

    def _make_room(self) -> None:
        """The folder, without what crashes left in it."""
        self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.mkdir(exist_ok=True, mode=0o700)
        for draft in self._folder.glob(f"{DRAFT_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just ended
                if time.time() - draft.stat().st_mtime > DRAFT_SECONDS_MAX:
                    draft.unlink()

    def _copy(self, reader: Callable[[], bytes], file: BinaryIO) -> Cid:
        digest, size_bytes = hashlib.sha256(), 0
        while chunk := reader():
            size_bytes += len(chunk)
            if size_bytes > self._bytes_max:
                raise RequestError(
                    f"a blob has at most {self._bytes_max:,} bytes here",
                    code="TOO_LARGE",
                    next_step="raise blob_bytes_max in config.toml",
                )
            if shutil.disk_usage(self._folder).free - len(chunk) < FREE_BYTES_MIN:
                raise _full(self._folder)
            file.write(chunk)
            digest.update(chunk)
        return Cid(digest.digest())

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise _full(self._folder) from None
            raise ConfigError(
                f"{self._folder} cannot be used: {error.strerror}",
                next_step="aivillage-node doctor",
            ) from None


@contextlib.contextmanager
def _reading(source: Path | bytes | BinaryIO) -> Iterator[Callable[[], bytes]]:
    """Gives a function that reads the next chunk, `b""` at the end."""
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(source, Path):
                file: BinaryIO = stack.enter_context(source.open("rb"))
            else:
                file = io.BytesIO(source) if isinstance(source, bytes) else source
        except OSError as error:
            raise _unreadable(source, error) from None

        def read() -> bytes:
            try:
                return file.read(CHUNK_BYTES)
            except OSError as error:
                raise _unreadable(source, error) from None

        yield read


def _unreadable(source: object, error: OSError) -> AivillageError:
    name = str(source) if isinstance(source, Path) else "the input"
    return RequestError(f"{name} cannot be read: {error.strerror}", next_step="name another file")


def _full(folder: Path) -> AivillageError:
    return NodeError(
        f"the disk under {folder} has no room for it",
        code="DISK_FULL",
        next_step="free some disk space, or `aivillage-node blobs remove CID`",
    )


def _hash_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
