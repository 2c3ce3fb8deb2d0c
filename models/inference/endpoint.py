"""Where a remote model answers, as its owner wrote it down: URL, the server's name for it, a key.

The key is in a file of its own that only the owner can read; here is that file's path. What lies
in `endpoint.json` names the model to others by its sha-256 alone, salted, so that nobody finds out
a URL by guessing.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec

from aivillage.models.library.manifest import ENDPOINT_FILE
from aivillage.protocols.errors import ConfigError, RequestError

URL_CHARACTERS_MAX: Final = 1_024
KEY_BYTES_MAX: Final = 4_096
ENDPOINT_BYTES_MAX: Final = 16_384
_FORBIDDEN_MODE: Final = stat.S_IRWXG | stat.S_IRWXO
_PORTS: Final = {"http": 80, "https": 443}


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model` is what the server calls it."""

    url: Annotated[str, msgspec.Meta(max_length=URL_CHARACTERS_MAX)]
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    key_file: Annotated[str, msgspec.Meta(max_length=4_096)] = ""
    salt: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """What a URL comes to. `path` is that of chat completions."""

    host: str
    port: int
    path: str
    is_encrypted: bool


def new(*, url: str, model: str, key_file: str = "") -> Endpoint:
    """Raises: RequestError: the URL is none that is asked, or would show the key to others."""
    found = Endpoint(
        url=url,
        model=model,
        key_file=str(Path(key_file).expanduser().absolute()) if key_file else "",
        salt=secrets.token_hex(16),
    )
    address_of(found)
    return found


def address_of(endpoint: Endpoint) -> Address:
    """Raises: RequestError: as `new`."""
    url = endpoint.url
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        raise _bad(url, "its port is none") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise _bad(url, "it begins neither with https://HOST nor with http://HOST")
    if parts.username is not None or parts.query or parts.fragment or not _is_plain(url):
        raise _bad(url, "it has more than host, port and path")
    is_encrypted = parts.scheme == "https"
    if endpoint.key_file and not is_encrypted and not _is_loopback(parts.hostname):
        raise _bad(url, "the key would cross the network for all to read")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return Address(host=parts.hostname, port=port, path=path, is_encrypted=is_encrypted)


def _bad(url: str, why: str) -> RequestError:
    shown = url[:80].partition("@")[0] if "@" not in url[:80] else "the URL"  # it may hold a secret
    return RequestError(f"{shown!r} cannot be asked: {why}", next_step="https://HOST[:PORT]/v1")


def _is_plain(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read(folder: Path) -> Endpoint:
    """The endpoint of the model in `folder`. Raises: ConfigError: it cannot be read."""
    path = folder / ENDPOINT_FILE
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(ENDPOINT_BYTES_MAX), type=Endpoint)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(
            f"{ENDPOINT_FILE} of model {folder.name} cannot be read: {error}",
            next_step=f"aivillage-node models remove {folder.name}, then add it again",
        ) from None


def key_of(endpoint: Endpoint) -> str:
    """What the server wants to see; empty: nothing. No message ever holds it.

    Raises:
        ConfigError: the file is not there, is no key, or others can read it.
    """
    if not endpoint.key_file:
        return ""
    path = endpoint.key_file
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - checked and read through one descriptor
            found = os.fstat(file.fileno())
            body = file.read(KEY_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"the key in {path} cannot be read: {error.strerror}",
            next_step="write the key there, in a file of mode 0600",
        ) from None
    if not stat.S_ISREG(found.st_mode) or found.st_mode & _FORBIDDEN_MODE:
        raise ConfigError(
            f"others can read the key in {path}", next_step=f"chmod 600 {path}; take a new key"
        )
    key = body.strip().decode("ascii", "replace")
    if len(body) > KEY_BYTES_MAX or not key or not _is_plain(key):
        raise ConfigError(
            f"{path} holds no key", next_step="one line of letters, digits and signs in it"
        )
    return key
