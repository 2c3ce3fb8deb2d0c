"""For every test: reproducible examples in CI, and no network but this machine's own."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


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
