"""The pre-shared key of a private village: its file, its text, its fingerprint.

The file is the `swarm.key` of other libp2p programs under another name, so that one key serves
them too. Source: libp2p specifications, pnet/Private-Networks-PSK-V1.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path
from typing import Final

from aivillage.models.durable import sync_folder, write_private
from aivillage.protocols.errors import ConfigError, RequestError

KEY_FILE: Final = "village.key"
KEY_BYTES: Final = 32
TEXT_CHARACTERS_MAX: Final = 256
"""The longest form has 88; whoever names another file by mistake hears so at once."""
_HEADER: Final = "/key/swarm/psk/1.0.0/"
_DECODERS: Final = {"/base16/": bytes.fromhex, "/base64/": base64.b64decode}


def new() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def to_text(key: bytes) -> str:
    return f"{_HEADER}\n/base16/\n{key.hex()}\n"


def from_text(text: str) -> bytes:
    """The key in the three lines of a key file.

    Raises:
        RequestError: BAD_REQUEST, they are none.
    """
    lines = text.strip().splitlines() if len(text) <= TEXT_CHARACTERS_MAX else []
    if len(lines) != 3 or lines[0].strip() != _HEADER or lines[1].strip() not in _DECODERS:
        raise _bad(f"it has not the three lines of one, {_HEADER} first")
    try:
        key = _DECODERS[lines[1].strip()](lines[2].strip())
    except (ValueError, binascii.Error):
        raise _bad(f"its third line is not {lines[1].strip().strip('/')}") from None
    if len(key) != KEY_BYTES:
        raise _bad(f"it has {len(key)} bytes, {KEY_BYTES} are needed")
    return key


def fingerprint(key: bytes) -> str:
    """32 hex digits to compare aloud; they tell nothing of the key.

    Source: as go-libp2p and rust-libp2p make it: SHAKE-128 of one block of Salsa20.
    """
    from Crypto.Cipher import Salsa20

    block = Salsa20.new(key=key, nonce=b"finprint").encrypt(bytes(64))
    return hashlib.shake_128(block).hexdigest(16)


def load(data_dir: Path) -> bytes | None:
    """The key of the node in `data_dir`; None where its village is open.

    Raises:
        ConfigError: the file is no key, or others can read it.
    """
    path = data_dir / KEY_FILE
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others can read {path}", next_step=f"chmod 600 {path}")
        return from_text(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, RequestError) as error:
        raise ConfigError(
            f"{path} is no village key: {error}",
            next_step="ask for an invite and join again, or restore it from your backup",
        ) from None


def store(data_dir: Path, key: bytes | None) -> None:
    """Makes `key` the key (None: no key), for the owner alone. A former one is kept beside it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path, draft = data_dir / KEY_FILE, data_dir / f"{KEY_FILE}.new"
    try:
        former = path.read_bytes() if path.exists() else None
        if former == (to_text(key).encode() if key else None):
            return
        if key is not None:
            draft.unlink(missing_ok=True)  # of a command that was killed
            write_private(draft, to_text(key).encode("ascii"))
        if former is not None:
            kept = data_dir / f"village-{hashlib.sha256(former).hexdigest()[:8]}.old"
            kept.unlink(missing_ok=True)
            os.link(path, kept)
        if key is not None:
            draft.replace(path)  # at no moment is there none: a node without one is open
        else:
            path.unlink()
        sync_folder(data_dir)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}",
            next_step="choose a folder of yours with --data-dir",
        ) from None


def _bad(reason: str) -> RequestError:
    return RequestError(
        f"this is no village key: {reason}",
        code="BAD_REQUEST",
        next_step="aivillage-node village-key new makes one",
    )
