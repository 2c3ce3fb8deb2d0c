"""Nodes as child processes, with folders and ports of their own: what `demo` plays with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, Final

from aivillage.cli.client import Client
from aivillage.node import identity
from aivillage.node.paths import Paths, paths
from aivillage.protocols.errors import NodeError

READY_SECONDS: Final = 60.0
STOP_SECONDS: Final = 15.0


class NodeProcess:
    """One daemon. `start`, `kill` and `stop` may follow each other; the folder stays."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.where: Paths = paths(str(folder / name))
        self.log = folder / f"{name}.log"
        self.listen = f"127.0.0.1:{_free_port()}"
        self.peer = identity.peer_of(identity.create(self.where.data_dir))
        self._process: subprocess.Popen[str] | None = None

    def start(self, *flags: str) -> None:
        """Returns when the node is ready. Raises: NodeError: it ended or took too long."""
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "aivillage", "start", "--json"),
                    *("--data-dir", str(self.where.data_dir), "--listen", self.listen),
                    *("--set", "offer_seconds=2", "--set", "verify_percent_max=0"),
                    *("--set", "device=cpu", *flags),  # on a GPU no bits are promised
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops its nodes
            )
        assert self._process.stdout is not None
        line = _line_within(self._process.stdout, READY_SECONDS)
        if not line:
            raise NodeError(f"node {self.name} did not start", next_step=f"see {self.log}")
        found = json.loads(line)
        if "error" in found:
            raise NodeError(f"node {self.name}: {found['message']}", next_step=f"see {self.log}")

    @property
    def pid(self) -> int:
        assert self._process is not None, "only a started node has a process"
        return self._process.pid

    def ask(self, what: str, **args: Any) -> Any:
        with Client(self.where.socket) as client:
            return client.ask(what, **args)

    def kill(self) -> None:
        """SIGKILL, workers included: the machine is gone."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> bool:
        """Ends the node; True where it ended by itself and in order."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS) == 0
        except subprocess.TimeoutExpired:
            self.kill()
            return False


def _line_within(pipe: IO[str], seconds: float) -> str:
    """One line from `pipe`, or "" after `seconds`."""
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.append(pipe.readline()), daemon=True)
    reader.start()
    reader.join(seconds)
    return lines[0] if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
