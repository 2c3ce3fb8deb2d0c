"""A blob on its way from others: its file, and which of its chunks are there.

Blocking; the daemon calls it in threads. Nothing is noted beside the file: after a crash each chunk
in it is hashed again, so that what counts as there is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aivillage.node.blob_room import FETCH_PREFIX
from aivillage.node.blobs import Blobs, hash_of
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES, Manifest
from aivillage.protocols.types import Cid


class Draft:
    """Made by `open_draft`. `had`: the chunks that are there and right."""

    def __init__(self, store: Blobs, manifest: Manifest, path: Path, file: BinaryIO) -> None:
        self.manifest = manifest
        self._store = store
        self._path = path
        self._file = file
        self.had = {index for index in range(manifest.count) if self._is_there(index)}

    def _is_there(self, index: int) -> bool:
        body = os.pread(self._file.fileno(), self.manifest.size_of(index), index * CHUNK_BYTES)
        return self.manifest.is_chunk(index, body)

    def write(self, index: int, body: bytes | bytearray) -> bool:
        """Keeps a chunk where its hash is right; whether it is.

        Raises:
            NodeError: DISK_FULL.
        """
        if len(body) != self.manifest.size_of(index) or not self.manifest.is_chunk(index, body):
            return False
        with self._store.typed():
            self._store.require_disk(len(body))
            os.pwrite(self._file.fileno(), body, index * CHUNK_BYTES)
        return True

    def finish(self) -> Path | None:
        """The blob in its place; None where the whole is not what its name says."""
        if hash_of(self._path) != self.manifest.cid:
            return None
        return self._store.finish(self.manifest, self._file, self._path)


@contextlib.contextmanager
def open_draft(store: Blobs, manifest: Manifest) -> Iterator[Draft]:
    """The draft of a blob with this manifest; it stays when the block is left.

    Its whole size is taken from the store's room at once. Nobody evicts it meanwhile.

    Raises:
        RequestError: TOO_LARGE, over a limit of the owner's.
        RefusedError: BUSY, another fetch of it is under way.
        NodeError: DISK_FULL.
    """
    if manifest.size_bytes > store.bytes_max:
        raise RequestError(
            f"a blob has at most {store.bytes_max:,} bytes here, this one has "
            f"{manifest.size_bytes:,}",
            code="TOO_LARGE",
            next_step="raise blob_bytes_max in config.toml",
        )
    with store.typed():
        store.make_folder()
        path = store.folder / f"{FETCH_PREFIX}{manifest.cid.hex()}"
        path.touch(mode=0o600)
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"blob {manifest.cid.hex()[:12]} is being fetched already",
                code="BUSY",
                next_step="aivillage-node jobs list",
            ) from None
        with store.typed():
            had = os.fstat(file.fileno())
            store.room().take(max(0, manifest.size_bytes - had.st_size))
            store.require_disk(max(0, manifest.size_bytes - had.st_blocks * 512))
            os.ftruncate(file.fileno(), manifest.size_bytes)
        yield Draft(store, manifest, path, file)


def is_drafted(store: Blobs, cid: Cid) -> bool:
    """Whether a fetch of it was begun before."""
    return (store.folder / f"{FETCH_PREFIX}{cid.hex()}").exists()
