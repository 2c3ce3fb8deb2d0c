"""The file of a backup: a plain tar of a manifest and the members that it names, all hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
from msgspec import Meta

from aivillage.protocols.errors import AivillageError, ConfigError, NodeError
from aivillage.protocols.types import PeerId

VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = 64 * 1024
"""Some 300 members: more keys than anybody has."""
MEMBERS: Final = re.compile(
    r"ledger\.db|jobs\.db|config\.toml|owner\.key|village\.key|identity\.key"
    r"|identity-[A-Za-z0-9]{8}\.old"
)
"""All that a backup may hold: no name of a folder, so none that leads out of one."""
PRIVATE: Final = 0o600
_CHUNK_BYTES: Final = 2**20


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One file, whole."""

    name: str
    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a backup, whose it is and when it was made. Schemas: 0 where there is no file."""

    version: int
    peer: PeerId
    created_unix_ms: int
    ledger_schema: int
    jobs_schema: int
    members: tuple[Member, ...]


def member_of(path: Path) -> Member:
    """`path` as a manifest names it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return Member(name=path.name, size_bytes=file.tell(), sha256=digest.hexdigest())


def write(target: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Makes the file `target`, for the owner alone, and returns when it is on the disk.

    Raises:
        OSError: it exists, or cannot be written.
    """
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            described = target.with_name(MANIFEST)
            described.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
            _add(tar, MANIFEST, described, manifest)
            for member in manifest.members:
                _add(tar, member.name, files[member.name], manifest)
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, path: Path, manifest: Manifest) -> None:
    found = tarfile.TarInfo(name)
    found.size, found.mode = path.stat().st_size, PRIVATE
    found.mtime = manifest.created_unix_ms // 1000
    with path.open("rb") as file:
        tar.addfile(found, file)


def unpack(path: Path, folder: Path) -> Manifest:
    """Writes every member of the backup at `path` into `folder`, each checked, and nothing else.

    Raises:
        ConfigError: there is no such file, or it is damaged, cut short or no backup.
        NodeError: DISK_FULL.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            members = iter(tar)
            manifest = _manifest(tar, next(members, None))
            wanted = {member.name: member for member in manifest.members}
            for found in members:
                member = wanted.pop(found.name, None)
                if member is None:
                    raise damaged(path, f"{found.name[:80]!r} is not in its manifest")
                _take(tar, found, member, folder)
    except (tarfile.TarError, EOFError) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise unwritten(error, f"{path} cannot be restored") from None
    if wanted:
        raise damaged(path, f"{min(wanted)} is missing: the file is cut short")
    return manifest


def _manifest(tar: tarfile.TarFile, found: tarfile.TarInfo | None) -> Manifest:
    if found is None or found.name != MANIFEST or found.size > MANIFEST_BYTES_MAX:
        raise tarfile.ReadError("it does not begin with a manifest")
    with _reading(tar, found) as file:
        try:
            manifest = msgspec.json.decode(file.read(), type=Manifest)
        except msgspec.DecodeError as error:
            raise tarfile.ReadError(f"its manifest cannot be read: {error}") from None
    if manifest.version != VERSION:
        raise ConfigError(
            f"a backup of version {manifest.version}; this program reads {VERSION}",
            next_step="restore it with the program that made it, or a newer one",
        )
    names = [member.name for member in manifest.members]
    if len(set(names)) < len(names):
        raise tarfile.ReadError("its manifest names a member twice")
    for name in names:
        if not MEMBERS.fullmatch(name):
            raise tarfile.ReadError(f"{name[:80]!r} is no file of a node")
    return manifest


@contextmanager
def _reading(tar: tarfile.TarFile, found: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    file = tar.extractfile(found) if found.type in {tarfile.REGTYPE, tarfile.AREGTYPE} else None
    if file is None:
        raise tarfile.ReadError(f"{found.name[:80]!r} is not a plain file")
    with file:
        yield file


def _take(tar: tarfile.TarFile, found: tarfile.TarInfo, member: Member, folder: Path) -> None:
    if found.size != member.size_bytes:
        raise tarfile.ReadError(f"{member.name} is of another size than its manifest says")
    digest = hashlib.sha256()
    target = folder / member.name
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    with _reading(tar, found) as source, os.fdopen(descriptor, "wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != member.sha256:
        raise tarfile.ReadError(f"{member.name} is not what its manifest says")


def damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is no backup, or a damaged one: {why}",
        next_step="take another backup; nothing was changed",
    )


def unwritten(error: OSError, what: str) -> AivillageError:
    """A full disk, or a place that is none."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NodeError(
            f"{what}: the disk is full",
            code="DISK_FULL",
            next_step="free some space and say it again; nothing was changed",
        )
    return ConfigError(
        f"{what}: {error.strerror or error}",
        next_step="name a file in a folder of yours; nothing was changed",
    )
