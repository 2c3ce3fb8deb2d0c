"""Manifests: one root for all that they say, and no contradiction passes."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from aivillage.protocols import codec
from aivillage.protocols.errors import PeerError
from aivillage.protocols.manifest import (
    CHUNK_BYTES,
    CHUNKS_MAX,
    HASH_BYTES,
    Manifest,
    chunks_of,
    require_whole,
)
from aivillage.protocols.messages import Held
from aivillage.protocols.types import Cid


def manifest_of(body: bytes) -> Manifest:
    parts = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    return Manifest(Cid(hashlib.sha256(body).digest()), len(body), hashes)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_chunks_have_their_sizes_and_hashes(size):
    manifest = manifest_of(bytes(size))
    assert manifest.count == chunks_of(size) == -(-size // CHUNK_BYTES)
    assert sum(manifest.size_of(index) for index in range(manifest.count)) == size
    assert all(manifest.is_chunk(i, bytes(manifest.size_of(i))) for i in range(manifest.count))
    assert require_whole(manifest, manifest.root) is manifest


def test_the_root_changes_with_everything_that_is_said():
    manifest = manifest_of(bytes(CHUNK_BYTES + 1))
    others = [
        msgspec.structs.replace(manifest, cid=Cid(bytes(32))),
        msgspec.structs.replace(manifest, size_bytes=CHUNK_BYTES + 2),
        msgspec.structs.replace(manifest, hashes=manifest.hashes[::-1]),
    ]
    assert len({manifest.root, *(other.root for other in others)}) == 4
    for other in others:
        with pytest.raises(PeerError, match="promised"):
            require_whole(other, manifest.root)


@pytest.mark.parametrize("hashes", [b"", bytes(32), bytes(96)])
def test_a_manifest_with_too_few_or_too_many_hashes_is_none(hashes):
    false = Manifest(Cid(bytes(32)), CHUNK_BYTES + 1, hashes)
    with pytest.raises(PeerError, match="promised"):
        require_whole(false, false.root)


@pytest.mark.parametrize(("size", "hashes"), [(0, b""), (5, bytes(32))])
def test_a_blob_of_one_chunk_has_its_name_as_hash(size, hashes):
    false = Manifest(Cid(b"\1" * 32), size, hashes)
    with pytest.raises(PeerError, match="another blob"):
        require_whole(false, false.root)


def test_the_longest_list_of_hashes_fits_a_frame_and_one_more_is_refused():
    longest = Held(id=1, size_bytes=1, root=bytes(32), hashes=bytes(CHUNKS_MAX * HASH_BYTES))
    assert codec.decode(codec.frame(longest)[4:]) == longest
    longer = msgspec.structs.replace(longest, hashes=longest.hashes + bytes(1))
    with pytest.raises(PeerError):
        codec.decode(msgspec.msgpack.encode(longer))
    size = CHUNKS_MAX * CHUNK_BYTES
    at_limit = Manifest(Cid(bytes(32)), size, bytes(CHUNKS_MAX * HASH_BYTES))
    assert require_whole(at_limit, at_limit.root).count == CHUNKS_MAX
    above = Manifest(Cid(bytes(32)), size + 1, bytes((CHUNKS_MAX + 1) * HASH_BYTES))
    with pytest.raises(PeerError):
        require_whole(above, above.root)
