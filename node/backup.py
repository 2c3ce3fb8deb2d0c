"""backup and restore: who this node is and what it has signed, in one file and back.

A backup disturbs no running node: it reads through connections that cannot write. A restore is
checked in full, beside what is there, before anything of it is replaced.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import apsw
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.ledger import books, queries, reader
from aivillage.ledger import restore as restored_book
from aivillage.models.durable import sync_folder
from aivillage.node import archive, identity, lock
from aivillage.node.archive import Manifest
from aivillage.node.jobs import SCHEMA_VERSION, TOLD_SUFFIX, Said, said_beside, store_said
from aivillage.node.paths import Paths
from aivillage.protocols.errors import AivillageError, ConfigError, RequestError
from aivillage.protocols.types import PeerId, peer_id

_DATABASES: Final = ("jobs.db", "ledger.db")
"""In this order: what the job store knows of an attempt, the later book knows too."""
_SIDE_FILES: Final = ("-wal", "-shm", "-journal", TOLD_SUFFIX)


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was put in place; `kept_aside` is the folder of what was there, if anything was.

    `jobs_cancelled`: how many had not ended when the backup was made.
    """

    peer: PeerId
    data_dir: str
    created_unix_ms: int
    kept_aside: str | None
    jobs_cancelled: int


# ------------------------------------------------------------------ backup


def backup(where: Paths, target: Path, *, force: bool = False) -> Manifest:
    """Writes the backup of a node to `target`, whole or not at all; the node may run meanwhile.

    Raises:
        ConfigError: there is no node, its files are damaged, its key is not the book's or was to
            change, or `target` cannot be written.
        RequestError: BAD_REQUEST, `target` exists, and not `force`.
        NodeError: DISK_FULL.
    """
    peer = identity.peer_of(identity.load(where.data_dir))
    if target.exists() and not force:
        raise RequestError(
            f"{target} exists already",
            code="BAD_REQUEST",
            next_step="name another file, or replace it with --force",
        )
    if identity.exists(where.data_dir, identity.NEXT_FILE):
        raise ConfigError(
            "a change of this node's key was cut off",
            next_step="start the node once, which ends it, then make the backup",
        )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".backup-") as folder:
            draft = Path(folder) / "draft.tar"
            manifest = _written(where.data_dir, Path(folder), draft, peer)
            draft.replace(target)
            sync_folder(target.parent)
    except OSError as error:
        raise archive.unwritten(error, f"{target} cannot be written") from None
    return manifest


def _written(data_dir: Path, folder: Path, draft: Path, peer: PeerId) -> Manifest:
    files, schemas = {}, dict.fromkeys(_DATABASES, 0)
    said = said_beside(data_dir / "jobs.db")  # first: what leaves it meanwhile is in the snapshot
    for name in _DATABASES:
        if (data_dir / name).exists():
            files[name] = folder / name
            schemas[name] = _snapshot(data_dir / name, folder / name)
    if said and schemas["jobs.db"] == SCHEMA_VERSION:
        _add(files["jobs.db"], said)
    if schemas["ledger.db"] == books.SCHEMA_VERSION:
        _require_own(files["ledger.db"], peer)
    for path in sorted(data_dir.iterdir()):
        if path.name not in _DATABASES and _is_member(path):
            files[path.name] = folder / path.name
            shutil.copyfile(path, files[path.name])
    manifest = Manifest(
        version=archive.VERSION,
        peer=peer,
        created_unix_ms=time.time_ns() // 1_000_000,
        ledger_schema=schemas["ledger.db"],
        jobs_schema=schemas["jobs.db"],
        members=tuple(archive.member_of(path) for path in files.values()),
    )
    archive.write(draft, manifest, files)
    return manifest


def _is_member(path: Path) -> bool:
    return path.is_file() and archive.MEMBERS.fullmatch(path.name) is not None


def _require_own(book: Path, peer: PeerId) -> None:
    """Raises: ConfigError: the book goes by another key, so no restore would take the two."""
    if peer_id(reader.read(book, queries.keys())[0]) != peer:
        raise ConfigError(
            "the ledger belongs to another key",
            next_step="put the identity.key back that this ledger.db was written with",
        )


def _snapshot(source: Path, target: Path) -> int:
    """One moment of a database that others may be writing; returns its schema version."""
    try:
        db = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            db.set_busy_timeout(5000)
            db.execute("VACUUM INTO ?", (str(target),))
            version = int(db.pragma("user_version"))
        finally:
            db.close()
    except apsw.FullError as error:
        raise OSError(errno.ENOSPC, str(error)) from None
    except apsw.Error as error:
        raise ConfigError(
            f"{source} cannot be copied: {error}", next_step="aivillage-node doctor"
        ) from None
    return version


def _add(jobs: Path, said: list[Said]) -> None:
    """To a snapshot, what was told before it was stored."""
    db = apsw.Connection(str(jobs))
    try:
        store_said(db, said)
    finally:
        db.close()


# ------------------------------------------------------------------ restore


def restore(where: Paths, source: Path, *, force: bool = False) -> Restored:
    """Puts the backup at `source` in place of what is there, all of it or nothing.

    Raises:
        ConfigError: a node runs, the backup is damaged or its book is wrong, or another identity or
            a ledger is there and not `force`.
        NodeError: DISK_FULL.
    """
    try:
        with _folder(where.data_dir), _staging(where.data_dir) as staged:
            manifest = archive.unpack(source, staged)
            key = _checked(staged, manifest)
            _require_place(where, key, force=force)
            jobs_cancelled = _end_jobs(staged / "jobs.db")
            kept_aside = _swap(where.data_dir, staged)
    except OSError as error:
        raise archive.unwritten(error, f"{where.data_dir} cannot be written") from None
    return Restored(
        peer=manifest.peer,
        data_dir=str(where.data_dir),
        created_unix_ms=manifest.created_unix_ms,
        kept_aside=str(kept_aside) if kept_aside else None,
        jobs_cancelled=jobs_cancelled,
    )


@contextmanager
def _folder(data_dir: Path) -> Iterator[None]:
    """The data folder, locked; one that was made for a restore that failed is gone again."""
    is_new = not data_dir.exists()
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    had_lock = (data_dir / lock.LOCK_FILE).exists()
    with lock.held(data_dir):
        try:
            yield
        except BaseException:
            if not had_lock:
                (data_dir / lock.LOCK_FILE).unlink()
            if is_new:
                data_dir.rmdir()
            raise


@contextmanager
def _staging(data_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".restore-") as folder:
        yield Path(folder)


def _checked(staged: Path, manifest: Manifest) -> Ed25519PrivateKey:
    """The identity in a backup, whose book passed the audit and is marked as a restored one."""
    try:
        key = identity.load(staged)
    except ConfigError as error:
        raise _refused(f"its identity.key is missing or no key: {error.message}") from None
    if identity.peer_of(key) != manifest.peer:
        raise _refused(f"its identity.key is not that of {manifest.peer}")
    if manifest.jobs_schema > SCHEMA_VERSION:
        raise _refused(f"its jobs.db is of version {manifest.jobs_schema}, a newer program's")
    book = staged / "ledger.db"
    if book.exists():
        try:
            restored_book.bring_up_to_date(
                book, key.public_key().public_bytes_raw(), time.time_ns() // 1_000_000
            )
            report = reader.read_audit(book)
        except ConfigError as error:
            raise _refused(error.message) from None
        if not report.ok:
            raise _refused(f"its book is wrong: {report.first_error}")
        restored_book.mark(book)
    return key


def _end_jobs(path: Path) -> int:
    """A job that ran at the backup may have ended and been paid since: nobody buys it again."""
    if not path.exists():
        return 0
    why = "it was running when the backup was made that this node was restored from"
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            db.pragma("journal_mode", "delete")  # so that all of it is in the one file
            with db:
                db.execute(
                    "UPDATE job SET state='cancelled', ended=?, code='CANCELLED', message=?"
                    " WHERE ended IS NULL",
                    (time.time(), why),
                )
            return db.changes()
        finally:
            db.close()
    except apsw.FullError as error:
        raise OSError(errno.ENOSPC, str(error)) from None
    except apsw.Error as error:
        raise _refused(f"its jobs.db cannot be read: {error}") from None


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"this backup cannot be restored: {why}",
        next_step="take another backup; nothing was changed",
    )


def _require_place(where: Paths, key: Ed25519PrivateKey, *, force: bool) -> None:
    """Raises: ConfigError: what is there must not be replaced."""
    if force:
        return
    what = "a ledger" if where.ledger.exists() else ""
    if identity.exists(where.data_dir):
        try:
            own = identity.load(where.data_dir)
        except AivillageError:
            what = "another identity"
        else:
            if identity.peer_of(own) != identity.peer_of(key):
                what = "another identity"
    if what:
        raise ConfigError(
            f"{where.data_dir} holds {what}; nothing was changed",
            next_step="choose an empty --data-dir; with --force what is there is kept aside",
        )


def _swap(data_dir: Path, staged: Path) -> Path | None:
    """Moves what is there aside and the staged files in; a failure on the way is undone.

    The identity comes last and goes first: a folder between the two holds no node.
    """
    moves = [
        *((path, True) for path in sorted(data_dir.iterdir(), key=_key_first) if _is_ours(path)),
        *((path, False) for path in sorted(staged.iterdir(), key=_key_first, reverse=True)),
    ]
    made = time.strftime("before-restore-%Y%m%dT%H%M%SZ", time.gmtime())
    aside = Path(tempfile.mkdtemp(dir=data_dir, prefix=f"{made}-"))
    done: list[tuple[Path, Path]] = []
    try:
        for path, is_old in moves:
            target = (aside if is_old else data_dir) / path.name
            path.rename(target)
            done.append((path, target))
        for folder in (aside, data_dir):
            sync_folder(folder)
    except BaseException:
        for path, target in reversed(done):
            target.rename(path)
        aside.rmdir()
        raise
    if any(is_old for _, is_old in moves):
        return aside
    aside.rmdir()
    return None


def _key_first(path: Path) -> tuple[bool, str]:
    return path.name != identity.KEY_FILE, path.name


def _is_ours(path: Path) -> bool:
    """A member, its side file, or a key that was to follow: another node would use or drop it."""
    name = path.name
    for suffix in _SIDE_FILES:
        name = name.removesuffix(suffix)
    is_member = archive.MEMBERS.fullmatch(name) is not None
    return path.is_file() and (is_member or name == identity.NEXT_FILE)
