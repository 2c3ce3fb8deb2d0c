"""The process that talks to a Ray cluster; a daemon starts it, or `doctor`.

    python -m aivillage.models.ray_bridge serve ADDRESS PARENT_PID SOCKET THREADS
    python -m aivillage.models.ray_bridge check ADDRESS PARENT_PID

It is one of its own since Ray brings threads, gRPC and 150 MB. Whoever connects to the socket gets
an actor on the cluster, which starts the same fenced worker as a daemon would, as its child; bytes
pass between the two unread. Machines of the cluster have this same version of AIVillage installed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from aivillage import __version__
from aivillage.models import worker_start
from aivillage.models.sandbox import die_with_parent

PIECE_BYTES: Final = 1 << 16
CONNECT_SECONDS_MAX: Final = 5.0
PIECES_WAITING_MAX: Final = 64
"""Of one worker's answers, 4 MiB: beyond it the actor waits for the daemon to read."""


class FencedWorker:
    """On the cluster: a worker process as a daemon would start it, and its pipes."""

    def __init__(self, version: str, threads: int) -> None:
        if version != __version__:
            raise RuntimeError(f"AIVillage {__version__} is installed here, the node has {version}")
        self._folder = Path(tempfile.mkdtemp(prefix="aivillage-"))
        self._process = subprocess.Popen(
            worker_start.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_start.environment(self._folder, threads),
            cwd=self._folder,
            bufsize=0,
        )

    def write(self, piece: bytes) -> None:
        assert self._process.stdin is not None, "it was started with a pipe"
        view = memoryview(piece)
        while view:
            view = view[self._process.stdin.write(view) :]

    def pieces(self) -> Iterator[bytes]:
        """What the worker says, until it ends."""
        assert self._process.stdout is not None, "it was started with a pipe"
        while piece := os.read(self._process.stdout.fileno(), PIECE_BYTES):
            yield piece
        shutil.rmtree(self._folder, ignore_errors=True)


def connected(address: str) -> Any:
    """The library, in a session with the cluster at `address`.

    Raises:
        OSError: nobody listens there.
        Exception: Ray's own.
    """
    ray: Any = importlib.import_module("ray")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # where nobody listens Ray itself would try for a minute
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS_MAX).close()
    ray.init(address=address, log_to_driver=False, logging_level="error")
    return ray


def serve(address: str, path: str, threads: int) -> None:
    ray = connected(address)
    actor_class = ray.remote(FencedWorker).options(num_cpus=1, max_concurrency=2)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        pipe, _ = listener.accept()
        actor = actor_class.remote(__version__, threads)
        threading.Thread(target=_commands, args=(ray, actor, pipe), daemon=True).start()
        threading.Thread(target=_answers, args=(ray, actor, pipe), daemon=True).start()


def _commands(ray: Any, actor: Any, pipe: socket.socket) -> None:
    """Daemon to worker, one piece after the other; the end of either is the end of both."""
    with contextlib.suppress(OSError, ray.exceptions.RayError):  # the other thread says why
        while piece := pipe.recv(PIECE_BYTES):
            ray.get(actor.write.remote(piece))
    ray.kill(actor)


def _answers(ray: Any, actor: Any, pipe: socket.socket) -> None:
    pieces = actor.pieces.options(
        num_returns="streaming", _generator_backpressure_num_objects=PIECES_WAITING_MAX
    ).remote()
    try:
        for piece in pieces:
            pipe.sendall(ray.get(piece))
    except (OSError, ray.exceptions.RayError) as error:
        sys.stderr.write(f"{error}\n")
    finally:
        with contextlib.suppress(OSError):  # the daemon's end went first
            pipe.shutdown(socket.SHUT_RDWR)
        ray.kill(actor)


def check(address: str) -> None:
    """Prints what the cluster has, in one line."""
    ray = connected(address)
    cores = int(ray.cluster_resources().get("CPU", 0))
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    sys.stdout.write(f"Ray {ray.__version__}, {nodes} machines, {cores} processor cores\n")


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    # By its own name, or the actor's class would be one of `__main__` to the cluster.
    from aivillage.models import ray_bridge

    if sys.argv[1] == "serve":
        ray_bridge.serve(sys.argv[2], sys.argv[4], int(sys.argv[5]))
    else:
        ray_bridge.check(sys.argv[2])
