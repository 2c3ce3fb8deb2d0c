"""backup and restore: real books out and back, and nothing is touched where something is wrong."""

import errno
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import apsw
import pytest
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs

from aivillage.cli import main
from aivillage.ledger import reader
from aivillage.ledger.books import SCHEMA_VERSION
from aivillage.ledger.ledger import open_ledger
from aivillage.node import archive, identity, lock
from aivillage.node.backup import backup, restore
from aivillage.node.identity import load, peer_of
from aivillage.node.jobs import AttemptRow, JobRow, open_jobs, told_beside
from aivillage.node.paths import paths
from aivillage.node.rotation import rotate, settle
from aivillage.protocols.errors import ConfigError, NodeError, RequestError
from aivillage.protocols.types import JobId
from tests.house import ROOT
from tests.unit.ledger.test_ledger import BUYER, SELLER, A, B, join, until, work


def place(folder, key):
    """A data folder with this identity and nothing else."""
    folder.mkdir()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "identity.key").write_bytes(pem)
    (folder / "identity.key").chmod(0o600)
    return paths(str(folder))


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != lock.LOCK_FILE
    }


@pytest.fixture
def node(tmp_path):
    """A node that is not running: an identity, both databases, settings."""
    where = place(tmp_path / "node", B)

    async def fill():
        async with open_ledger(where.ledger, B) as book, open_jobs(where.jobs) as jobs:
            await book.set_line(BUYER, 10_000, 1_000)
            await jobs.set_setting("colour", b"blue")

    trio.run(fill)
    where.config.write_text("slots = 2\n")
    (where.data_dir / "identity-abcdEFGH.old").write_bytes(b"the key before")
    return where


@pytest.fixture
def file(node, tmp_path):
    backup(node, tmp_path / "b.tar")
    return tmp_path / "b.tar"


def unsynced(path):
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [value for (value,) in db.execute("SELECT unsynced FROM peer")]
    finally:
        db.close()


# ------------------------------------------------------------------ there and back


async def told_and_not_stored(where):
    """As a kill leaves it right after an owner heard of a result."""
    job = JobRow(
        id=JobId("cd" * 16), operation="mesh.noop", request=b"\x80", state="settling", ceiling=1,
        deadline=None, peer="", created=1.0, result=b"result",
    )  # fmt: skip
    attempt = AttemptRow(
        id=b"t" * 16, job=job.id, seller=SELLER, price=1, outcome="done", created=1.0
    )
    async with open_jobs(where.jobs) as jobs:
        await jobs.passed(job, attempt)
        left = told_beside(where.jobs).read_bytes()
    assert left
    told_beside(where.jobs).write_bytes(left)


async def result_in(where):
    async with open_jobs(where.jobs) as jobs:
        found = await jobs.get("cd")
        return found and found.result


async def test_a_backup_has_what_was_told_and_not_stored(node, tmp_path):
    await told_and_not_stored(node)
    other = paths(str(tmp_path / "other"))
    await trio.to_thread.run_sync(backup, node, tmp_path / "b.tar")
    await trio.to_thread.run_sync(restore, other, tmp_path / "b.tar")
    assert await result_in(other) == b"result"


async def test_what_was_told_before_a_restore_is_kept_aside_with_the_rest(node, file):
    await told_and_not_stored(node)
    kept = (await trio.to_thread.run_sync(lambda: restore(node, file, force=True))).kept_aside
    assert told_beside(Path(kept) / "jobs.db").stat().st_size
    assert await result_in(node) is None


async def test_what_was_lost_comes_back_from_the_peer_and_until_then_nothing_is_lent(tmp_path):
    buyer, seller = place(tmp_path / "a", A), place(tmp_path / "b", B)
    file = tmp_path / "backup.tar"
    async with open_ledger(buyer.ledger, A) as a, open_ledger(seller.ledger, B) as b:
        await b.set_line(BUYER, 10_000, 1_000)
        join(a, b)
        await work(a, b, 100)
        await until(lambda: b.view(BUYER).owed_to_me == 100)
        await trio.to_thread.run_sync(backup, seller, file)  # beside the running book
        await work(a, b, 200)
        await until(lambda: b.view(BUYER).owed_to_me == 300)
    other = paths(str(tmp_path / "other"))
    await trio.to_thread.run_sync(restore, other, file)
    assert unsynced(other.ledger) == [1]
    async with open_ledger(buyer.ledger, A) as a, open_ledger(other.ledger, B) as b:
        assert b.view(BUYER).owed_to_me == 100
        b.want_room(BUYER, 100)
        await b.room_changed(BUYER)
        assert b.room(BUYER) == b.headroom(BUYER) == 0
        join(a, b)
        await until(lambda: b.view(BUYER).owed_to_me == 300)
        await until(lambda: b.room(BUYER) >= 100)
        await work(a, b, 100)
        await until(lambda: b.view(BUYER).owed_to_me == a.owed_to(SELLER) == 400)
        for book in (a, b):
            report = await book.audit()
            assert report.ok, report.first_error


async def test_a_buyer_that_forgot_what_it_signed_signs_on_and_pays_nothing_twice(tmp_path):
    buyer, seller = place(tmp_path / "a", A), place(tmp_path / "b", B)
    file = tmp_path / "backup.tar"
    async with open_ledger(buyer.ledger, A) as a, open_ledger(seller.ledger, B) as b:
        await b.set_line(BUYER, 10_000, 1_000)
        join(a, b)
        await work(a, b, 100)
        await until(lambda: a.owed_to(SELLER) == 100)
        await trio.to_thread.run_sync(backup, buyer, file)
        await work(a, b, 200)
        await until(lambda: b.view(BUYER).owed_to_me == 300)
    with trio.fail_after(10):
        await trio.to_thread.run_sync(lambda: restore(buyer, file, force=True))
    async with open_ledger(buyer.ledger, A) as a, open_ledger(seller.ledger, B) as b:
        join(a, b)
        await until(lambda: a.owed_to(SELLER) == b.view(BUYER).owed_to_me == 300)
        await work(a, b, 100)
        await until(lambda: a.owed_to(SELLER) == b.view(BUYER).owed_to_me == 400)


async def test_every_file_comes_back_and_the_archive_is_for_its_owner_alone(node, file, tmp_path):
    assert file.stat().st_mode & 0o777 == 0o600
    other = paths(str(tmp_path / "other"))
    restore(other, file)
    assert {path.name for path in other.data_dir.iterdir()} == {
        "ledger.db", "jobs.db", "config.toml", "identity.key", "identity-abcdEFGH.old", "node.lock",
    }  # fmt: skip
    for name in ("config.toml", "identity.key", "identity-abcdEFGH.old"):
        assert (other.data_dir / name).read_bytes() == (node.data_dir / name).read_bytes()
        assert (other.data_dir / name).stat().st_mode & 0o777 == 0o600
    async with open_jobs(other.jobs) as jobs:
        assert await jobs.setting("colour") == b"blue"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


async def test_a_backup_waits_for_no_writer_and_sees_only_what_was_committed(node, tmp_path):
    db = apsw.Connection(str(node.ledger))
    db.execute("BEGIN IMMEDIATE; UPDATE peer SET line = 77")
    backup(node, tmp_path / "b.tar")
    db.execute("COMMIT")
    db.close()
    restore(paths(str(tmp_path / "other")), tmp_path / "b.tar")
    assert reader.read_balance(tmp_path / "other" / "ledger.db").peers[0].line == 10_000


def test_an_existing_file_is_replaced_only_by_force(node, file):
    before = file.read_bytes()
    with pytest.raises(RequestError, match="exists already"):
        backup(node, file)
    assert file.read_bytes() == before
    assert backup(node, file, force=True).peer == SELLER
    assert file.read_bytes() != before


def test_a_book_of_an_older_version_is_brought_up_to_date(tmp_path):
    key = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)  # the one that wrote it
    where = place(tmp_path / "node", key)
    shutil.copy(ROOT / "tests" / "data" / "ledger_v1_buyer.db", where.ledger)
    assert backup(where, tmp_path / "b.tar").ledger_schema == 1
    restore(paths(str(tmp_path / "other")), tmp_path / "b.tar")
    assert reader.read_audit(tmp_path / "other" / "ledger.db").ok
    assert set(unsynced(tmp_path / "other" / "ledger.db")) == {1}


# ------------------------------------------------------------------ what is there


def test_a_folder_that_holds_a_ledger_or_another_identity_is_left_alone(node, file, tmp_path):
    other = place(tmp_path / "other", A)
    for where, what in ((node, "a ledger"), (other, "another identity")):
        before = contents(where.data_dir)
        with pytest.raises(ConfigError, match=what):
            restore(where, file)
        assert contents(where.data_dir) == before


def test_by_force_what_was_there_is_kept_aside_with_its_side_files(file, tmp_path):
    other = place(tmp_path / "other", A)
    other.ledger.write_bytes(b"something")
    (other.data_dir / "ledger.db-wal").write_bytes(b"of another book")
    (other.data_dir / "notes.txt").write_bytes(b"mine")
    found = restore(other, file, force=True)
    kept = other.data_dir / Path(found.kept_aside).name
    assert kept.name.startswith("before-restore-20")
    assert {path.name for path in kept.iterdir()} == {"ledger.db", "ledger.db-wal", "identity.key"}
    assert (kept / "ledger.db-wal").read_bytes() == b"of another book"
    assert (other.data_dir / "notes.txt").exists()
    assert not (other.data_dir / "ledger.db-wal").exists()
    assert reader.read_audit(other.ledger).ok


def test_a_former_key_comes_along_under_the_name_that_a_rotation_gives_it(node, tmp_path):
    former, _ = trio.run(rotate, node)
    backup(node, tmp_path / "b.tar")
    other = paths(str(tmp_path / "other"))
    restore(other, tmp_path / "b.tar")
    kept = other.data_dir / f"identity-{former[-8:]}.old"
    assert peer_of(load(other.data_dir, kept.name)) == former == SELLER


def test_a_change_of_key_that_was_cut_off_is_ended_before_a_backup(node, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(identity, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trio.run(rotate, node)
    with pytest.raises(ConfigError, match="cut off") as caught:
        backup(node, tmp_path / "b.tar")
    assert "start" in caught.value.next_step
    trio.run(settle, node)
    backup(node, tmp_path / "b.tar")
    assert restore(paths(str(tmp_path / "other")), tmp_path / "b.tar").peer != SELLER


def test_a_key_that_its_book_does_not_know_is_not_backed_up(node, tmp_path):
    place(tmp_path / "other", A)
    shutil.copyfile(tmp_path / "other" / "identity.key", node.data_dir / "identity.key")
    with pytest.raises(ConfigError, match="another key"):
        backup(node, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_by_force_a_key_that_was_to_follow_stays_with_the_book_that_names_it(
    node, file, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(identity, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trio.run(rotate, node)
    follows = peer_of(load(node.data_dir, identity.NEXT_FILE))
    found = restore(node, file, force=True)
    trio.run(settle, node)  # as the next start does: it would drop the key
    kept = Path(found.kept_aside)
    assert peer_of(load(kept, identity.NEXT_FILE)) == follows
    aside = paths(str(kept))
    trio.run(settle, aside)
    assert peer_of(load(kept)) == follows


def test_the_same_identity_without_its_ledger_gets_it_back(node, file):
    node.ledger.unlink()
    assert restore(node, file).peer == SELLER
    assert reader.read_audit(node.ledger).ok


async def test_a_job_that_was_running_is_not_bought_again(node, tmp_path):
    row = JobRow(
        id=JobId("ab" * 16), operation="mesh.noop", request=b"\x80", state="new", ceiling=1,
        deadline=None, peer="", created=1.0,
    )  # fmt: skip
    async with open_jobs(node.jobs) as jobs:
        await jobs.add(row)
        await jobs.add(structs.replace(row, id=JobId("cd" * 16)))
        await jobs.end(JobId("cd" * 16), "done")
    backup(node, tmp_path / "b.tar")
    other = paths(str(tmp_path / "other"))
    found = await trio.to_thread.run_sync(restore, other, tmp_path / "b.tar")
    assert found.jobs_cancelled == 1
    async with open_jobs(other.jobs) as jobs:
        assert await jobs.unfinished() == []
        ended = {job.id[:2]: (job.state, job.code) for job in await jobs.latest(5)}
    assert ended == {"ab": ("cancelled", "CANCELLED"), "cd": ("done", "")}


def test_a_folder_on_which_a_node_runs_is_refused_even_by_force(node, file):
    before = contents(node.data_dir)
    with lock.held(node.data_dir), pytest.raises(ConfigError, match="running"):
        restore(node, file, force=True)
    assert contents(node.data_dir) == before


# ------------------------------------------------------------------ what is wrong


def remade(file, change):
    """The archive at `file` after `change` of its list of [TarInfo, bytes]; the manifest first."""
    with tarfile.open(file) as tar:
        members = [[found, tar.extractfile(found).read()] for found in tar]
    change(members)
    with tarfile.open(file, "w") as tar:
        for found, data in members:
            found.size = len(data)
            tar.addfile(found, io.BytesIO(data))


def manifest_of(members, **changes):
    """Rewrites the manifest so that it fits the members again, then `changes` it."""
    told = json.loads(members[0][1])
    told["members"] = [
        {"name": f.name, "size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for f, d in members[1:]
    ]
    members[0][1] = json.dumps(told | changes).encode()


def named(members, name):
    return next(member for member in members if member[0].name == name)


def flipped(members):
    member = named(members, "ledger.db")
    member[1] = member[1][:-1] + bytes([member[1][-1] ^ 1])


def traversing(members):
    named(members, "config.toml")[0].name = "../escaped"
    manifest_of(members)


def unlisted(members):
    members.append([tarfile.TarInfo("../escaped"), b"x"])


def twice(members):
    members.append(named(members, "config.toml"))


def linked(members):
    found = named(members, "config.toml")[0]
    found.type, found.linkname = tarfile.SYMTYPE, "/etc/passwd"


def missing(members):
    members.remove(named(members, "identity.key"))
    manifest_of(members)


def others_key(members):
    other = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    named(members, "identity.key")[1] = other
    manifest_of(members)


def others_book(members):
    others_key(members)
    key = serialization.load_pem_private_key(named(members, "identity.key")[1], None)
    manifest_of(members, peer=peer_of(key))


def newer(members):
    manifest_of(members, version=2)


def newer_jobs(members):
    manifest_of(members, jobs_schema=99)


def wrong_book(members):
    """A book whose one balance was raised: its hashes fit, its audit does not."""
    member = named(members, "ledger.db")
    db = apsw.Connection(":memory:")
    db.deserialize("main", member[1])
    db.execute("INSERT INTO bal VALUES ('12D3KooWnobody', 1000, 1)")
    member[1] = db.serialize("main")
    manifest_of(members)


def no_book(members):
    named(members, "ledger.db")[1] = b"this is no database" * 99
    manifest_of(members)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flipped, "not what its manifest says"),
        (traversing, "no file of a node"),
        (unlisted, "not in its manifest"),
        (twice, "not in its manifest"),
        (linked, "not a plain file|another size"),
        (missing, "identity.key is missing"),
        (others_key, "not that of"),
        (others_book, "another key"),
        (newer, "version 2"),
        (newer_jobs, "newer program"),
        (wrong_book, "book is wrong"),
        (no_book, "no ledger"),
    ],
)
def test_a_wrong_archive_changes_nothing(file, tmp_path, damage, why):
    remade(file, damage)
    other = place(tmp_path / "other", A)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=why) as caught:
        restore(other, file, force=True)
    assert caught.value.next_step
    assert contents(tmp_path) == before
    with pytest.raises(ConfigError):
        restore(paths(str(tmp_path / "fresh")), file)
    assert not (tmp_path / "fresh").exists()


def test_a_file_that_is_cut_short_anywhere_is_refused(file, tmp_path):
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = max(found.offset_data + found.size for found in tar)
    for size in (0, 1, 511, 512, 700, *range(1024, end, end // 40), end - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            restore(paths(str(tmp_path / "fresh")), file)
        assert not (tmp_path / "fresh").exists()


def test_no_backup_at_all_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore(paths(str(tmp_path / "fresh")), tmp_path / "nowhere.tar")
    with pytest.raises(ConfigError, match="no node"):
        backup(paths(str(tmp_path / "fresh")), tmp_path / "b.tar")


def test_a_full_disk_is_said_and_changes_nothing(node, file, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "no space")

    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(archive.os, "fsync", full)
        for attempt in (
            lambda: backup(node, file, force=True),
            lambda: restore(node, file, force=True),
        ):
            with pytest.raises(NodeError) as caught:
                attempt()
            assert caught.value.code == "DISK_FULL"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("after", range(9))
def test_a_failure_while_files_are_swapped_is_undone(node, file, tmp_path, monkeypatch, after):
    before, left, rename = contents(tmp_path), [after], Path.rename

    def fails(path, target):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ConfigError):
        restore(node, file, force=True)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ as a person types it


def test_the_commands_say_what_a_restored_node_does_not_do_yet(node, tmp_path, capsys):
    file, other = tmp_path / "b.tar", tmp_path / "other"
    assert main.main(["backup", str(file), "--data-dir", str(node.data_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["peer"], told["ledger_schema"]) == (
        str(file),
        SELLER,
        SCHEMA_VERSION,
    )
    assert main.main(["backup", str(file), "--data-dir", str(node.data_dir)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main.main(["restore", str(file), "--data-dir", str(other)]) == 0
    assert "nothing is delivered to it on credit" in capsys.readouterr().out
    assert main.main(["restore", str(file), "--data-dir", str(other)]) == 3
    words = ["restore", str(file), "--data-dir", str(other), "--force", "--json"]
    capsys.readouterr()
    assert main.main(words) == 0
    assert "before-restore-" in json.loads(capsys.readouterr().out)["kept_aside"]
