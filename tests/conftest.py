"""For every test: reproducible examples in CI, no network but this machine's own, identities."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings

from aivillage.protocols.messages import VERSION_MAJOR, VERSION_MINOR, Hello
from aivillage.protocols.types import PeerId, peer_id

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a job in the background starts; commands that tests press Ctrl-C at would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who decides which of several processes runs which tests; None: pytest-xdist does."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.whole_files import WholeFiles

    return WholeFiles(config, log)


def is_local(address: Any) -> bool:
    """Whether `address` (as `socket.connect` takes it) stays on this machine."""
    if not isinstance(address, tuple):
        return True  # a Unix socket's path
    host = str(address[0]).partition("%")[0]
    if host in {"", "localhost"}:
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name: somebody would have to be asked
    return ip.is_loopback or ip.is_unspecified


@pytest.fixture(autouse=True)
def strangers_dialled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Refuses connections off this machine and fails the test that tried one."""
    dialled: list[Any] = []

    def refuse_strangers(method: Any) -> Any:
        def guarded(sock: socket.socket, *args: Any) -> Any:
            address = args[-1]
            if sock.family != socket.AF_UNIX and not is_local(address):
                dialled.append(address)
                raise PermissionError(f"a test wanted to leave this machine: {address}")
            return method(sock, *args)

        return guarded

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse_strangers(getattr(socket.socket, name)))
    yield dialled
    assert not dialled, f"this test dialled {dialled}"


def make_key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))


def make_peer(number: int) -> PeerId:
    return peer_id(make_key(number).public_key().public_bytes_raw())


def make_hello(**changes: object) -> Hello:
    fields: dict[str, object] = {
        "major": VERSION_MAJOR,
        "minor": VERSION_MINOR,
        "agent": "test",
        "boot_epoch": 1,
        "clock_unix_ms": 0,
    }
    return Hello(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def key_of() -> Callable[[int], Ed25519PrivateKey]:
    return make_key


@pytest.fixture
def peer_of() -> Callable[[int], PeerId]:
    return make_peer


@pytest.fixture
def hello_of() -> Callable[..., Hello]:
    return make_hello
