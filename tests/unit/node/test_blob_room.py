"""The room of the store: who goes when it is short, and who never does."""

from __future__ import annotations

import fcntl
import os

import pytest

from aivillage.node.blob_draft import open_draft
from aivillage.node.blob_room import used_bytes
from aivillage.node.blobs import Blobs
from aivillage.protocols.errors import NodeError, RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES, Manifest

HOUR_NS = 3600 * 10**9


@pytest.fixture
def store(tmp_path):
    return Blobs(tmp_path / "blobs", bytes_max=100, store_bytes_max=100)


def put(store: Blobs, letter: bytes, size: int, *, age: int) -> bytes:
    """A blob that was used so many hours ago."""
    cid = store.put(letter * size)
    path = store._path(cid)
    when = path.stat().st_mtime_ns - age * HOUR_NS
    os.utime(path, ns=(when, when))
    return cid


def test_the_longest_unused_makes_room_and_no_more_goes_than_must(store):
    old, older, young = (put(store, n, 30, age=h) for n, h in ((b"a", 2), (b"b", 3), (b"c", 1)))
    new = store.put(b"d" * 40)
    assert [store.has(cid) for cid in (older, old, young, new)] == [False, True, True, True]
    assert used_bytes(store.folder) == 100
    assert not list(store.folder.rglob(f"{older.hex()}*")), "its hashes went with it"


def test_a_store_takes_as_much_as_its_limit_and_evicts_for_one_byte_more(store):
    first, second = put(store, b"a", 50, age=2), put(store, b"b", 50, age=1)
    assert store.has(first)
    store.put(b"c")
    assert (store.has(first), store.has(second)) == (False, True)


def test_what_was_read_lately_stays(store):
    first, second = put(store, b"a", 50, age=3), put(store, b"b", 50, age=2)
    store.get(first)
    store.put(b"c")
    assert (store.has(first), store.has(second)) == (True, False)


def test_a_pinned_blob_is_never_evicted_and_may_be_again_when_it_is_not(store):
    cid = put(store, b"a", 60, age=9)
    store.pin(cid, keep=True)
    assert [blob.pinned for blob in store.all()] == [True]
    with pytest.raises(RequestError, match="pinned or in use") as caught:
        store.put(b"b" * 50)
    assert caught.value.code == "TOO_LARGE"
    assert store.has(cid)
    with pytest.raises(RequestError, match="is pinned"):
        store.remove(cid)
    store.pin(cid, keep=False)
    store.put(b"b" * 50)
    assert not store.has(cid)


def test_nothing_goes_where_that_would_not_suffice(store):
    pinned, other = put(store, b"a", 60, age=2), put(store, b"b", 30, age=1)
    store.pin(pinned, keep=True)
    with pytest.raises(RequestError):
        store.room().take(50)
    assert store.has(other)


def test_a_blob_in_use_stays_and_may_go_afterwards(store):
    cid = put(store, b"a", 60, age=2)
    with store.using(cid) as (file, manifest):
        with pytest.raises(RequestError, match="in use"):
            store.put(b"b" * 50)
        assert file.read() == b"a" * 60
        assert manifest.count == 1
    store.put(b"b" * 50)
    assert not store.has(cid)


def test_a_blob_of_an_older_version_gets_its_hashes_when_it_is_asked_for(tmp_path):
    store = Blobs(tmp_path / "blobs", bytes_max=1 << 22, store_bytes_max=1 << 30)
    body = os.urandom(CHUNK_BYTES + 5)
    cid = store.put(body)
    wanted = store.manifest(cid)
    (kept,) = store.folder.rglob("*.hashes")
    for damage in (kept.unlink, lambda: kept.write_bytes(b"short")):
        damage()
        assert store.manifest(cid) == wanted
        assert kept.read_bytes() == wanted.hashes
    path = store.get(cid)
    path.chmod(0o600)
    path.write_bytes(body[:-1] + b"?" if body[-1:] != b"?" else b"!")
    assert store.manifest(cid) == wanted
    kept.unlink()
    with pytest.raises(NodeError, match="damaged"):
        store.manifest(cid)
    assert all(
        wanted.is_chunk(at, body[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in (0, 1)
    )


# ------------------------------------------------------------------ fetches


@pytest.fixture
def wide(tmp_path):
    return Blobs(tmp_path / "wide", bytes_max=8 * CHUNK_BYTES, store_bytes_max=8 * CHUNK_BYTES)


def manifest_of(tmp_path, body: bytes) -> Manifest:
    there = Blobs(tmp_path / "there", bytes_max=1 << 30, store_bytes_max=1 << 30)
    return there.manifest(there.put(body))


def chunks(body: bytes) -> list[bytes]:
    return [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)]


def test_a_draft_keeps_right_chunks_in_any_order_and_goes_on_after_a_crash(wide, tmp_path):
    body = os.urandom(3 * CHUNK_BYTES + 9)
    manifest, parts = manifest_of(tmp_path, body), chunks(body)
    with open_draft(wide, manifest) as draft:
        assert draft.had == set()
        assert draft.write(3, parts[3])
        assert draft.write(1, parts[1])
        assert not draft.write(0, parts[1]), "a chunk in another's place"
        assert not draft.write(2, parts[2][:-1] + b"?" if parts[2][-1:] != b"?" else b"!")
        assert not draft.write(0, parts[0] + b"more")
        os.pwrite(draft._file.fileno(), b"half a chunk", 0)
    assert not wide.has(manifest.cid)
    with open_draft(wide, manifest) as draft:
        assert draft.had == {1, 3}
        assert all(draft.write(at, parts[at]) for at in (0, 2))
        path = draft.finish()
    assert path == wide.get(manifest.cid, verify=True)
    assert path.read_bytes() == body
    assert not list(wide.folder.glob(".fetch-*"))


def test_what_came_of_a_blob_is_listed_and_can_be_removed_unless_it_is_being_fetched(
    wide, tmp_path
):
    body = os.urandom(3 * CHUNK_BYTES)
    manifest = manifest_of(tmp_path, body)
    with open_draft(wide, manifest) as draft:
        draft.write(1, chunks(body)[1])
        (begun,) = wide.on_their_way()
        assert (begun.cid, begun.size_bytes) == (manifest.cid, len(body))
        assert begun.missing_bytes == 2 * CHUNK_BYTES
        assert wide.all() == []
        with pytest.raises(RefusedError, match="being fetched"):
            wide.remove(manifest.cid)
    name = manifest.cid.hex()[:8]
    assert wide.find(name, begun=True) == manifest.cid
    with pytest.raises(RequestError, match="no single blob"):
        wide.find(name)
    wide.remove(manifest.cid)
    assert wide.on_their_way() == []


def test_the_whole_is_checked_against_the_name_whatever_the_manifest_says(wide, tmp_path):
    body = os.urandom(2 * CHUNK_BYTES)
    honest = manifest_of(tmp_path, body)
    false = Manifest(type(honest.cid)(bytes(32)), honest.size_bytes, honest.hashes)
    with open_draft(wide, false) as draft:
        assert all(draft.write(at, part) for at, part in enumerate(chunks(body)))
        assert draft.finish() is None
    assert not wide.has(false.cid)


def test_a_draft_takes_its_room_at_once_and_is_not_evicted_while_it_is_open(wide, tmp_path):
    manifest = manifest_of(tmp_path, bytes(6 * CHUNK_BYTES))
    old = wide.put(b"old")
    with open_draft(wide, manifest):
        assert used_bytes(wide.folder) == 6 * CHUNK_BYTES + 3
        with pytest.raises(RequestError, match="in use"):
            wide.put(bytes(3 * CHUNK_BYTES))
        with pytest.raises(RefusedError, match="fetched already"), open_draft(wide, manifest):
            pass
    wide.put(b"x" * 3 * CHUNK_BYTES)
    assert not list(wide.folder.glob(".fetch-*")), "an abandoned one makes room as others do"
    assert not wide.has(old), "and so did what was older"


def test_a_blob_at_the_limit_is_fetched_and_one_byte_more_is_not(wide, tmp_path):
    with open_draft(wide, manifest_of(tmp_path, bytes(8 * CHUNK_BYTES))) as draft:
        assert draft.manifest.count == 8
    with (
        pytest.raises(RequestError) as caught,
        open_draft(wide, manifest_of(tmp_path, bytes(8 * CHUNK_BYTES + 1))),
    ):
        pass
    assert caught.value.code == "TOO_LARGE"


def test_a_fetch_leaves_the_books_their_room_on_the_disk(wide, tmp_path, monkeypatch):
    import shutil

    manifest = manifest_of(tmp_path, bytes(2 * CHUNK_BYTES))
    free = shutil._ntuple_diskusage(1, 1, (64 << 20) + CHUNK_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(NodeError) as caught, open_draft(wide, manifest):
        pass
    assert caught.value.code == "DISK_FULL"


def test_a_lock_ends_with_who_held_it(store):
    cid = put(store, b"a", 60, age=2)
    with store._path(cid).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    store.put(b"b" * 50)
    assert not store.has(cid)
