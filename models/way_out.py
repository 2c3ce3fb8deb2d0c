"""How a fenced worker comes by a connection: its daemon makes it, to one place, and hands it over.

The worker itself can still open no socket. Both ends talk over a pair of Unix sockets: a byte asks,
a byte answers, and with `CONNECTED` comes the descriptor.
"""

from __future__ import annotations

import socket
import threading
from typing import Final

ASK: Final = b"?"
CONNECTED: Final = b"+"
REFUSED: Final = b"-"
ANSWER_SECONDS_MAX: Final = 20.0
"""Longer than the daemon dials; else it is gone."""


class WayOut:
    """The worker's end. Any thread may dial; they take turns."""

    def __init__(self, descriptor: int) -> None:
        self._pair = socket.socket(fileno=descriptor)
        self._pair.settimeout(ANSWER_SECONDS_MAX)
        self._turn = threading.Lock()

    def dial(self) -> socket.socket:
        """A connection to the one place that the daemon allows.

        Raises:
            OSError: there is none now.
        """
        with self._turn:
            self._pair.sendall(ASK)
            said, descriptors, _, _ = socket.recv_fds(self._pair, 1, 1)
        if said != CONNECTED or not descriptors:
            raise ConnectionRefusedError("the daemon gives no connection")
        return socket.socket(fileno=descriptors[0])
