"""The command line's end of the control socket, where the daemon is slow to pick up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from aivillage.cli import client
from aivillage.cli.client import Client, NoDaemonError, StuckDaemonError
from aivillage.protocols import codec
from tests.conftest import make_hello


@contextlib.contextmanager
def full(path):
    """A listener whose queue is full of others, and who picks up nobody by itself."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(100):
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(str(path))
        yield listener


def test_who_comes_while_the_daemons_queue_is_full_waits_for_it(tmp_path):
    with full(tmp_path / "s") as listener:

        def pick_up():
            time.sleep(0.2)
            for _ in range(2):
                picked, _ = listener.accept()
                with picked, contextlib.suppress(OSError):
                    picked.sendall(codec.frame(make_hello()))

        slow = threading.Thread(target=pick_up, daemon=True)
        slow.start()
        with Client(tmp_path / "s", timeout_seconds=10):
            slow.join(10)


def test_a_daemon_that_picks_up_nobody_is_not_said_to_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "PICK_UP_SECONDS", 0.2)
    with full(tmp_path / "s"), pytest.raises(StuckDaemonError, match="picked up no connection"):
        Client(tmp_path / "s", timeout_seconds=1)
    with pytest.raises(NoDaemonError):
        Client(tmp_path / "nothing", timeout_seconds=1)
