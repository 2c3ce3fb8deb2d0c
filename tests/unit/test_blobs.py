"""The store of blobs, and its command."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from aivillage.cli import main as cli_main
from aivillage.node import blobs
from aivillage.node.blob_room import DRAFT_PREFIX
from aivillage.node.blobs import Blobs
from aivillage.protocols.errors import ConfigError, NodeError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES

TEXT = b"seven bytes and more"


@pytest.fixture
def store(tmp_path):
    return Blobs(tmp_path / "node" / "blobs", bytes_max=1 << 22, store_bytes_max=1 << 30)


def files_of(store):
    """All but the hashes beside the blobs."""
    return sorted(p for p in store.folder.rglob("*") if p.is_file() and p.suffix != ".hashes")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1 << 22])
def test_a_blob_is_named_by_its_sha_256_and_comes_back(store, tmp_path, size):
    body = os.urandom(size)
    (tmp_path / "file").write_bytes(body)
    cids = {store.put(body), store.put(tmp_path / "file"), store.put(io.BytesIO(body))}
    assert cids == {hashlib.sha256(body).digest()}
    assert store.get(cids.pop(), verify=True).read_bytes() == body
    assert len(files_of(store)) == 1


def test_a_blob_at_the_limit_is_kept_and_one_byte_more_is_not(tmp_path):
    store = Blobs(tmp_path / "blobs", bytes_max=8, store_bytes_max=99)
    store.put(bytes(8))
    with pytest.raises(RequestError) as caught:
        store.put(bytes(9))
    assert caught.value.code == "TOO_LARGE"
    assert len(files_of(store)) == 1, "nothing of a refused blob is left"


def test_an_unknown_blob_is_a_bad_request_to_get_and_to_remove(store):
    for action in (store.get, store.remove):
        with pytest.raises(RequestError) as caught:
            action(bytes(32))
        assert caught.value.code == "BAD_REQUEST"


def test_only_the_owner_can_read_a_blob_and_nobody_writes_it(store):
    path = store.get(store.put(TEXT))
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700


def test_a_damaged_blob_is_noticed_when_asked_for_and_healed_by_putting_it_again(store):
    cid = store.put(TEXT)
    path = store.get(cid)
    path.chmod(0o600)
    path.write_bytes(TEXT[:-1])
    assert store.get(cid) == path
    with pytest.raises(NodeError, match="damaged"):
        store.get(cid, verify=True)
    store.put(TEXT)
    assert store.get(cid, verify=True).read_bytes() == TEXT


def test_a_removed_blob_is_gone(store):
    cid, other = store.put(TEXT), store.put(b"another")
    store.remove(cid)
    assert [blob.cid for blob in store.all()] == [other]
    with pytest.raises(RequestError):
        store.get(cid)


def test_a_list_has_sizes_the_newest_first_and_no_drafts(store):
    first, second = store.put(b"1"), store.put(b"22")
    os.utime(store.get(first), (1, 1))
    (store.folder / f"{DRAFT_PREFIX}x").write_bytes(b"half")
    assert [(blob.cid, blob.size_bytes) for blob in store.all()] == [(second, 2), (first, 1)]


def test_a_store_that_was_never_used_is_empty(store):
    assert store.all() == []
    assert not store.folder.exists()


def test_a_blob_is_found_by_the_beginning_of_its_name(store):
    cid = store.put(TEXT)
    assert store.find(cid.hex()) == store.find(cid.hex()[:6]) == cid
    for text in ("", "../identity.key", "00" * 33, cid.hex()[:6] + "*"):
        with pytest.raises(RequestError) as caught:
            store.find(text)
        assert caught.value.code == "BAD_REQUEST"


def test_the_beginning_of_two_names_is_refused(store):
    found: dict[str, bytes] = {}
    for number in range(17):  # sixteen first digits: two of them are the same
        cid = store.put(str(number).encode())
        if cid.hex()[0] in found:
            break
        found[cid.hex()[0]] = cid
    with pytest.raises(RequestError, match="no single"):
        store.find(cid.hex()[0])


def test_a_full_disk_is_typed_and_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 64 << 20))
    with pytest.raises(NodeError) as caught:
        store.put(TEXT)
    assert caught.value.code == "DISK_FULL"
    assert files_of(store) == []


def test_a_disk_that_fills_while_writing_is_typed_and_leaves_nothing(store, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NodeError) as caught:
        store.put(TEXT)
    assert caught.value.code == "DISK_FULL"
    assert files_of(store) == []


def test_a_blob_is_synced_before_it_has_its_name(store, monkeypatch):
    real, seen = os.fsync, []

    def watch(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append((is_folder, len(store.all())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    store.put(TEXT)
    assert seen[0] == (False, 0), "the bytes first"
    assert (True, 1) in seen, "then the folder with the name"


def test_a_source_that_cannot_be_read_is_a_bad_request(store, tmp_path):
    for source in (tmp_path / "missing", tmp_path):
        with pytest.raises(RequestError) as caught:
            store.put(source)
        assert caught.value.code == "BAD_REQUEST"
    assert files_of(store) == []


def test_a_folder_that_is_a_file_is_a_config_error(tmp_path):
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(ConfigError):
        Blobs(tmp_path / "blobs", bytes_max=9, store_bytes_max=99).put(TEXT)


def test_a_crashed_writers_draft_goes_after_a_day_and_a_running_ones_stays(store):
    store.put(TEXT)
    old, young = (store.folder / f"{DRAFT_PREFIX}{name}" for name in ("old", "young"))
    for draft in (old, young):
        draft.write_bytes(b"half")
    yesterday = time.time() - blobs.DRAFT_SECONDS_MAX - 1
    os.utime(old, (yesterday, yesterday))
    store.put(b"more")
    assert (old.exists(), young.exists()) == (False, True)


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(tmp_path, capfdbinary):
    def run(*words):
        code = cli_main.main(["blobs", words[0], "--data-dir", str(tmp_path / "n"), *words[1:]])
        return code, capfdbinary.readouterr().out

    return run


def test_add_list_get_and_remove_work_without_a_daemon(command, tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    cid = hashlib.sha256(TEXT).hexdigest()
    assert command("add", str(tmp_path / "file")) == (0, cid.encode() + b"\n")
    assert cid.encode() in command("list")[1]
    assert command("pin", cid[:8]) == (0, b"pinned " + cid.encode() + b"\n")
    assert b"pinned" in command("list")[1]
    assert command("unpin", cid[:8]) == (0, b"unpinned " + cid.encode() + b"\n")
    assert command("get", cid[:8]) == (0, TEXT)
    out = tmp_path / "copy"
    assert command("get", cid[:8], "--output", str(out)) == (0, b"")
    assert out.read_bytes() == TEXT
    assert command("remove", cid[:8])[0] == 0
    assert json.loads(command("list", "--json")[1]) == []


def test_every_action_gives_json(command, tmp_path):
    (tmp_path / "file").write_bytes(TEXT)
    cid = hashlib.sha256(TEXT).hexdigest()
    found = json.loads(command("add", str(tmp_path / "file"), "--json")[1])
    assert found == {"cid": cid, "size_bytes": len(TEXT), "root": found["root"]}
    got = json.loads(command("get", cid, "--json")[1])
    assert Path(got.pop("path")).read_bytes() == TEXT
    assert got == found
    assert json.loads(command("pin", cid, "--json")[1]) == {"cid": cid, "pinned": True}
    assert [blob["pinned"] for blob in json.loads(command("list", "--json")[1])] == [True]
    assert command("remove", cid)[0] == 2, "pinned"
    assert json.loads(command("unpin", cid, "--json")[1]) == {"cid": cid, "pinned": False}
    assert json.loads(command("remove", cid, "--json")[1]) == {"removed": cid}


def test_what_cannot_be_done_has_its_exit_code(command, tmp_path):
    assert command("get", "00")[0] == 2
    assert command("get", "00" * 32)[0] == 4, "to fetch one takes a node"
    assert command("add", str(tmp_path / "missing"))[0] == 2
    (tmp_path / "file").write_bytes(TEXT)
    cid = command("add", str(tmp_path / "file"))[1].decode().strip()
    assert command("get", cid, "--output", str(tmp_path / "no" / "where"))[0] == 2
    (tmp_path / "n" / "config.toml").write_text("blob_bytes_max = 3")
    assert command("add", str(tmp_path / "file"))[0] == 5
