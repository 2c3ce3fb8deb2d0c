"""Workers on an existing Ray cluster (`executor = "ray"`): held by pipes, as local ones are.

The daemon knows nothing of Ray. A bridge process does, and for each worker there is a small process
of this machine whose pipes lead through it to the worker on the cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final

import trio

from aivillage.node.worker_process import WorkerLimits, WorkerProcess, start_worker
from aivillage.protocols.errors import ConfigError

READY_SECONDS_MAX: Final = 60.0
"""To join a cluster takes Ray 2 to 15 s."""
LOG_BYTES_SHOWN: Final = 2_000


class RayExecutor:
    """Starts workers on the cluster at `address`; the bridge is started for the first of them."""

    def __init__(
        self, nursery: trio.Nursery, address: str, limits: WorkerLimits, scratch_folder: Path
    ) -> None:
        self._nursery = nursery
        self._address = address
        self._limits = limits
        self._scratch_folder = scratch_folder
        # A socket's path may have 108 bytes, and data folders can be deep.
        self._folder = Path(tempfile.mkdtemp(prefix="aiv-ray-"))
        self._bridge: subprocess.Popen[bytes] | None = None
        self._starting = trio.Lock()

    async def start_worker(self) -> WorkerProcess:
        """One that has put its limits on, on the cluster.

        Raises:
            ConfigError: no Ray at that address.
            NodeError: the cluster had no free core for it in time, or its machine cannot run it.
        """
        async with self._starting:
            if self._bridge is None or self._bridge.poll() is not None:
                await self._start_bridge()
        pipe = [sys.executable, "-m", "aivillage.models.ray_pipe", str(self._socket)]
        return await start_worker(
            self._nursery, self._limits, self._scratch_folder, far=[*pipe, str(os.getpid())]
        )

    async def stop(self) -> None:
        """Ends the bridge, and with it whatever is on the cluster."""
        if self._bridge is not None:
            self._bridge.kill()
            await trio.to_thread.run_sync(self._bridge.wait)
        for left in self._folder.iterdir():
            left.unlink()
        self._folder.rmdir()

    @property
    def _socket(self) -> Path:
        return self._folder / "bridge"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    async def _start_bridge(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "aivillage.models.ray_bridge", "serve", self._address),
            *(str(os.getpid()), str(self._socket), str(self._limits.threads)),
        ]
        with self._log.open("wb") as log:
            self._bridge = _spawn(command, log)
        assert self._bridge.stdout is not None, "it was started with a pipe"
        said = trio.lowlevel.FdStream(os.dup(self._bridge.stdout.fileno()))
        self._bridge.stdout.close()
        with trio.move_on_after(READY_SECONDS_MAX):
            async with said:
                if await said.receive_some(16) == b"ready\n":
                    return
        self._bridge.kill()
        raise ConfigError(
            f"there is no Ray cluster at {self._address!r}: {self._last_words()}",
            next_step="start one here (`ray start --head`) or join one, or set executor to local",
        )

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace")[-LOG_BYTES_SHOWN:].strip()
        return said.splitlines()[-1][:300] if said else "it did not answer in time"


def _spawn(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """From this very thread: it ends with the thread that started it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
    )
