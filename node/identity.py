"""One Ed25519 key file is who this node is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.models.durable import sync_folder, write_private
from aivillage.protocols.errors import ConfigError
from aivillage.protocols.types import PeerId, peer_id

KEY_FILE: Final = "identity.key"
NEXT_FILE: Final = "identity.next"
"""A key that is to follow, while it does."""


def peer_of(key: Ed25519PrivateKey) -> PeerId:
    return peer_id(key.public_key().public_bytes_raw())


def exists(data_dir: Path, name: str = KEY_FILE) -> bool:
    return (data_dir / name).exists()


def create(data_dir: Path, name: str = KEY_FILE) -> Ed25519PrivateKey:
    """A new key in the file `name` of `data_dir`, readable by the owner only, whole or not at all.

    Raises:
        ConfigError: there is a key already, or the folder cannot be written.
    """
    path = data_dir / name
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_whole(path, pem)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists already", next_step="use it, or choose another --data-dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{data_dir} cannot hold a key: {error.strerror}",
            next_step="choose a folder of yours with --data-dir",
        ) from None
    return key


def _write_whole(path: Path, pem: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)  # of a start that was killed
    try:
        write_private(draft, pem)
        os.link(draft, path)  # refuses to replace a key, unlike a rename
    finally:
        draft.unlink(missing_ok=True)


def forget_next(data_dir: Path) -> None:
    """Drops the key that was to follow and did not."""
    (data_dir / NEXT_FILE).unlink()


def replace(data_dir: Path, former: PeerId) -> None:
    """The next key becomes the key; the one of `former` is kept beside it, named by its end.

    At any moment there is a whole key, and doing it again is no error.
    """
    path, kept = data_dir / KEY_FILE, data_dir / f"identity-{former[-8:]}.old"
    if not kept.exists():
        os.link(path, kept)
    (data_dir / NEXT_FILE).replace(path)
    sync_folder(data_dir)


def load(data_dir: Path, name: str = KEY_FILE) -> Ed25519PrivateKey:
    """The key in the file `name` of `data_dir`.

    Raises:
        ConfigError: no key, not a key, or one that others can read.
    """
    path = data_dir / name
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others can read {path}", next_step=f"chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no node in {data_dir}", next_step="aivillage-node init"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a key: {error}", next_step="restore it from your backup"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key", next_step="restore it from your backup")
    return key
