"""What a blob is made of: the hashes of its chunks, so that each can be checked when it comes.

A blob's name, its cid, is the sha-256 of its bytes: it says nothing until all of them are there.
A manifest is somebody's word about the chunks. Its `root` is one hash over cid, size and chunk
hashes: who knows the root can check every chunk, whoever brings it. docs/decisions/0008-blobs.md
says what follows for who does not.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, TypeAlias

import msgspec

from aivillage.protocols.errors import PeerError
from aivillage.protocols.types import Cid

CHUNK_BYTES: Final = 1 << 20
"""Small enough to be fetched again for nothing much, large enough that hashes weigh nothing."""
HASH_BYTES: Final = 32
CHUNKS_MAX: Final = 16_384
"""Of a blob that travels: 16 GiB, and a list of hashes that is half a frame."""
BlobName: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
"""A `Cid` on the wire, or the root of a manifest."""
_DOMAIN: Final = b"aivillage/manifest/1\0"


class Manifest(msgspec.Struct, frozen=True):
    """`hashes` are those of the chunks one after the other; all but the last chunk are full."""

    cid: Cid
    size_bytes: int
    hashes: bytes

    @property
    def count(self) -> int:
        return chunks_of(self.size_bytes)

    @property
    def root(self) -> bytes:
        """sha-256 over everything that the manifest says."""
        size = self.size_bytes.to_bytes(8, "big")
        return hashlib.sha256(_DOMAIN + self.cid + size + self.hashes).digest()

    def hash_of(self, index: int) -> bytes:
        return self.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]

    def size_of(self, index: int) -> int:
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def is_chunk(self, index: int, body: bytes | bytearray) -> bool:
        """Whether `body` is the chunk at `index`."""
        return hashlib.sha256(body).digest() == self.hash_of(index)


def chunks_of(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def require_whole(manifest: Manifest, root: bytes) -> Manifest:
    """`manifest` itself, where it is the one with this root and can be of any blob at all.

    Raises:
        PeerError: BAD_REQUEST, it is not, or contradicts itself.
    """
    count = manifest.count
    if count > CHUNKS_MAX or len(manifest.hashes) != count * HASH_BYTES or manifest.root != root:
        raise PeerError("the manifest is not the one that was promised", code="BAD_REQUEST")
    name = manifest.hashes or hashlib.sha256(b"").digest()
    if count <= 1 and name != manifest.cid:
        raise PeerError("the manifest is of another blob", code="BAD_REQUEST")
    return manifest
