"""Blobs on this machine, named by what is in them: the sha-256 of their bytes.

Plain blocking file work, for the command line and for threads. A blob is there whole or not at
all: it is written beside its place, synced, and renamed into it. Beside it lie the hashes of its
chunks, and a pin where its owner wants to keep it.
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

from aivillage.models.durable import sync_folder
from aivillage.node.blob_room import (
    DRAFT_PREFIX,
    FETCH_PREFIX,
    HASHES_SUFFIX,
    HEX,
    PIN_SUFFIX,
    Room,
    beside,
    fetches,
    forget,
    in_use,
    is_blob,
    is_pinned,
    locked_alone,
    touch,
)
from aivillage.node.config import Settings
from aivillage.protocols.errors import (
    AivillageError,
    ConfigError,
    NodeError,
    RefusedError,
    RequestError,
)
from aivillage.protocols.manifest import CHUNK_BYTES, HASH_BYTES, Manifest, chunks_of
from aivillage.protocols.types import Cid

FREE_BYTES_MIN: Final = 64 << 20
"""Left for the books: a blob that would take it is refused, since a ledger has to be written."""
DRAFT_SECONDS_MAX: Final = 86_400.0
"""A draft that nobody has written to for a day is left from a crash."""


class BlobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One blob; `added_unix` is when it last came in, `used_unix` when it was last used."""

    cid: Cid
    size_bytes: int
    added_unix: float
    used_unix: float
    pinned: bool
    missing_bytes: int = 0
    """Of a blob on its way from others."""


class Blobs:
    """The store in `folder`, which is made at the first `put`."""

    def __init__(self, folder: Path, *, bytes_max: int, store_bytes_max: int) -> None:
        """`bytes_max`: of one blob. `store_bytes_max`: of all; the longest unused make room."""
        self.folder = folder
        self.bytes_max = bytes_max
        self._store_bytes_max = store_bytes_max

    def put(self, source: Path | bytes | BinaryIO) -> Cid:
        """Keeps a copy of `source`; returns once it is durable. Putting it again is harmless.

        Raises:
            RequestError: TOO_LARGE, over a limit of the owner's; BAD_REQUEST, it cannot be read.
            NodeError: DISK_FULL.
            ConfigError: the folder cannot be used.
        """
        with self.typed(), contextlib.ExitStack() as stack:
            self.make_folder()
            reader = stack.enter_context(_reading(source))
            descriptor, name = tempfile.mkstemp(prefix=DRAFT_PREFIX, dir=self.folder)
            draft = Path(name)
            stack.callback(draft.unlink, missing_ok=True)
            with os.fdopen(descriptor, "wb") as file:
                manifest = self._copy(reader, file)
                file.flush()
                self.finish(manifest, file, draft)
        return manifest.cid

    def finish(self, manifest: Manifest, file: BinaryIO, draft: Path) -> Path:
        """Gives the whole and checked `file` at `draft` its name; returns once that is durable."""
        with self.typed():
            os.fchmod(file.fileno(), 0o400)
            os.fsync(file.fileno())
            path = self._path(manifest.cid)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            self._keep_hashes(path, manifest.hashes)
            draft.replace(path)
            sync_folder(path.parent)
            sync_folder(self.folder)
        return path

    def room(self) -> Room:
        """What a writer asks before it writes."""
        return Room(self.folder, self._store_bytes_max)

    def get(self, cid: Cid, *, verify: bool = False) -> Path:
        """Where the bytes of `cid` lie; with `verify`, only after they were read and compared.

        Raises:
            RequestError: BAD_REQUEST, no such blob here.
            NodeError: INTERNAL, the file is not what its name says.
        """
        path = self._path(cid)
        with self.typed():
            if not path.is_file():
                raise _nothing(cid)
            if verify and hash_of(path) != cid:
                raise _damaged(cid)
            touch(path)
        return path

    def has(self, cid: Cid) -> bool:
        return self._path(cid).is_file()

    @contextlib.contextmanager
    def using(self, cid: Cid) -> Iterator[tuple[BinaryIO, Manifest]]:
        """The open file of `cid` and its manifest; it is not evicted meanwhile.

        Raises:
            RequestError: BAD_REQUEST, no such blob here.
        """
        path = self.get(cid)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(in_use(path))
            except FileNotFoundError:
                raise _nothing(cid) from None
            yield file, self._manifest(cid, path, file)

    def manifest(self, cid: Cid) -> Manifest:
        """The hashes of its chunks, read once in the life of a blob.

        Raises:
            RequestError: BAD_REQUEST, no such blob here.
        """
        with self.using(cid) as (_, manifest):
            return manifest

    def pin(self, cid: Cid, *, keep: bool) -> None:
        """With `keep` it is never evicted, else it may be again.

        Raises:
            RequestError: BAD_REQUEST, no such blob here.
        """
        path = self.get(cid)
        with self.typed():
            if keep:
                beside(path, PIN_SUFFIX).touch(mode=0o600)
            else:
                beside(path, PIN_SUFFIX).unlink(missing_ok=True)
            sync_folder(path.parent)

    def all(self) -> list[BlobInfo]:
        """Every blob, the newest first."""
        found = []
        for path in self.folder.glob("??/*"):
            if is_blob(path):
                with contextlib.suppress(FileNotFoundError):  # removed while we looked
                    stat = path.stat()
                    found.append(
                        BlobInfo(
                            cid=Cid(bytes.fromhex(path.name)),
                            size_bytes=stat.st_size,
                            added_unix=stat.st_mtime,
                            used_unix=max(stat.st_atime, stat.st_mtime),
                            pinned=is_pinned(path),
                        )
                    )
        return sorted(found, key=lambda blob: (-blob.added_unix, blob.cid))

    def on_their_way(self) -> list[BlobInfo]:
        """What fetches have brought so far, those under way and those that ended early."""
        found = []
        for path in fetches(self.folder):
            with contextlib.suppress(FileNotFoundError):  # whole by now
                stat = path.stat()
                found.append(
                    BlobInfo(
                        cid=Cid(bytes.fromhex(path.name.removeprefix(FETCH_PREFIX))),
                        size_bytes=stat.st_size,
                        added_unix=stat.st_mtime,
                        used_unix=stat.st_mtime,
                        pinned=False,
                        missing_bytes=max(0, stat.st_size - stat.st_blocks * 512),
                    )
                )
        return found

    def remove(self, cid: Cid) -> None:
        """A blob, or what came of one.

        Raises:
            RequestError: BAD_REQUEST, no such blob here, or it is pinned.
            RefusedError: BUSY, it is being fetched.
        """
        begun = self.folder / f"{FETCH_PREFIX}{cid.hex()}"
        if not self.has(cid) and begun.exists():
            self._remove_begun(begun)
            return
        path = self.get(cid)
        if is_pinned(path):
            raise RequestError(
                f"blob {cid.hex()[:12]} is pinned",
                next_step=f"aivillage-node blobs unpin {cid.hex()[:12]}",
            )
        with self.typed():
            forget(path)
            sync_folder(path.parent)

    def _remove_begun(self, path: Path) -> None:
        with locked_alone(path) as is_ours:
            if not is_ours:
                raise RefusedError(
                    "it is being fetched",
                    code="BUSY",
                    next_step="`aivillage-node jobs list`, then `jobs cancel`",
                )
            forget(path)

    def find(self, text: str, *, begun: bool = False) -> Cid:
        """The blob whose name is, or begins with, `text`; with `begun` also one on its way.

        Raises:
            RequestError: BAD_REQUEST, no blob here or several.
        """
        if text and not set(text) - HEX:
            known = [*self.all(), *(self.on_their_way() if begun else ())]
            cids: set[Cid] = {blob.cid for blob in known if blob.cid.hex().startswith(text)}
            if len(cids) == 1:
                return cids.pop()
        raise RequestError(
            f"no single blob here begins with {text!r}", next_step="aivillage-node blobs list"
        )

    # ------------------------------------------------------------------ inside
    def _path(self, cid: Cid) -> Path:
        assert len(cid) == 32, "a cid is a sha-256"
        name = cid.hex()
        return self.folder / name[:2] / name

    def make_folder(self) -> None:
        """The folder, without what crashes left in it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.mkdir(exist_ok=True, mode=0o700)
        for draft in self.folder.glob(f"{DRAFT_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just ended
                if time.time() - draft.stat().st_mtime > DRAFT_SECONDS_MAX:
                    draft.unlink()

    def _manifest(self, cid: Cid, path: Path, file: BinaryIO) -> Manifest:
        """As stored beside the blob; counted anew where an older version put it there.

        Raises:
            NodeError: INTERNAL, the file is not what its name says.
        """
        size_bytes, kept = path.stat().st_size, beside(path, HASHES_SUFFIX)
        with contextlib.suppress(FileNotFoundError):  # it is made below
            manifest = Manifest(cid, size_bytes, kept.read_bytes())
            if len(manifest.hashes) == chunks_of(size_bytes) * HASH_BYTES:
                return manifest
        hashes, whole = bytearray(), hashlib.sha256()
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            hashes += hashlib.sha256(chunk).digest()
            whole.update(chunk)
        if whole.digest() != cid:  # to vouch for damaged bytes would be a lie
            raise _damaged(cid)
        self._keep_hashes(path, bytes(hashes))
        return Manifest(cid, size_bytes, bytes(hashes))

    def _keep_hashes(self, path: Path, hashes: bytes) -> None:
        """Beside the blob at `path`: all of them, or none."""
        descriptor, name = tempfile.mkstemp(prefix=DRAFT_PREFIX, dir=self.folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashes)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(beside(path, HASHES_SUFFIX))

    def _copy(self, reader: Callable[[], bytes], file: BinaryIO) -> Manifest:
        """The bytes of a source into `file`, and what they are."""
        digest, size_bytes, hashes = hashlib.sha256(), 0, bytearray()
        room = self.room()
        while chunk := reader():
            size_bytes += len(chunk)
            if size_bytes > self.bytes_max:
                raise RequestError(
                    f"a blob has at most {self.bytes_max:,} bytes here",
                    code="TOO_LARGE",
                    next_step="raise blob_bytes_max in config.toml",
                )
            room.take(len(chunk))
            self.require_disk(len(chunk))
            file.write(chunk)
            digest.update(chunk)
            hashes += hashlib.sha256(chunk).digest()
        return Manifest(Cid(digest.digest()), size_bytes, bytes(hashes))

    def require_disk(self, size_bytes: int) -> None:
        """Raises: NodeError: DISK_FULL, with so much more the books would have too little."""
        if shutil.disk_usage(self.folder).free - size_bytes < FREE_BYTES_MIN:
            raise _full(self.folder)

    @contextlib.contextmanager
    def typed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise _full(self.folder) from None
            raise ConfigError(
                f"{self.folder} cannot be used: {error.strerror}",
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


def _nothing(cid: Cid) -> RequestError:
    return RequestError(f"there is no blob {cid.hex()} here", next_step="aivillage-node blobs list")


def _damaged(cid: Cid) -> NodeError:
    return NodeError(
        f"the file of blob {cid.hex()} was damaged",
        next_step=f"aivillage-node blobs remove {cid.hex()[:12]}, then add it again",
    )


def _unreadable(source: object, error: OSError) -> AivillageError:
    name = str(source) if isinstance(source, Path) else "the input"
    return RequestError(f"{name} cannot be read: {error.strerror}", next_step="name another file")


def _full(folder: Path) -> AivillageError:
    return NodeError(
        f"the disk under {folder} has no room for it",
        code="DISK_FULL",
        next_step="free some disk space, or `aivillage-node blobs remove CID`",
    )


def open_blobs(folder: Path, settings: Settings) -> Blobs:
    """The store of a node with these settings."""
    return Blobs(
        folder,
        bytes_max=settings.blob_bytes_max,
        store_bytes_max=settings.blob_store_bytes_max,
    )


def hash_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
