"""Stands in for a worker that is on a Ray cluster: its pipes lead to the bridge, and from there on.

`python -m aivillage.models.ray_pipe SOCKET DAEMON_PID`, started by a daemon. The daemon holds it as
it holds a local worker: killing it ends the one on the cluster, and it ends when that one does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Final

from aivillage.models.sandbox import die_with_parent

PIECE_BYTES: Final = 1 << 16


def main(path: str) -> None:
    bridge = socket.socket(socket.AF_UNIX)
    bridge.connect(path)
    threading.Thread(target=_commands, args=(bridge,), daemon=True).start()
    while piece := bridge.recv(PIECE_BYTES):
        _write(1, piece)
    sys.stderr.write("the Ray cluster let it go\n")
    sys.stderr.flush()
    os._exit(1)


def _commands(bridge: socket.socket) -> None:
    while piece := os.read(0, PIECE_BYTES):
        bridge.sendall(piece)
    os._exit(0)  # the daemon hung up


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    main(sys.argv[1])
