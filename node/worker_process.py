"""One worker process, as the daemon holds it: its pipes, its last words and its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import msgspec
import trio

from aivillage.models import worker_messages as say
from aivillage.models import worker_start
from aivillage.node.transport.arrivals import arrived
from aivillage.node.way_out import Hatch, Place
from aivillage.protocols.errors import JobError, NodeError

COMMANDS_QUEUED_MAX: Final = 4_096
"""Allowances for 8 sessions over a slow step; a worker that lets more pile up is stuck."""
LAST_WORDS_BYTES: Final = 4_096
LAST_WORDS_SECONDS_MAX: Final = 0.5
START_SECONDS_MAX: Final = 30.0
REAP_SECONDS_MAX: Final = 2.0


class WorkerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker is held to."""

    memory_bytes_max: int = 4 << 30
    nice: int = 10
    cores: int = 0
    """All workers run on the same so many of the machine's; 0: on any."""
    threads: int = 1
    sandbox: bool = True
    readable_folders: tuple[str, ...] = ()
    """Beside Python's own and the system's."""
    library: str = ""
    """Where models were pulled to; workers may read there."""

    def reading(self, file: str) -> WorkerLimits:
        """The same, for a worker that may read `file` too."""
        readable = (*self.readable_folders, *filter(None, [file]))
        return msgspec.structs.replace(self, readable_folders=readable)


class WorkerProcess:
    """Commands go out in order, `next` gives the replies. Made by `start_worker`."""

    def __init__(self, process: subprocess.Popen[bytes], scratch: Path) -> None:
        self.scratch = scratch
        self.work_folder = str(scratch)
        """Where it works; empty where it makes a folder itself."""
        self.way_out = -1
        """Its number for the descriptor over which it is connected; -1: it never is."""
        self.fences = say.Started(sandboxed=False, fenced=False, why_not="not started yet")
        self.idle_since = trio.current_time()
        self._process = process
        self._stdin = _taken(process.stdin)
        self._stdout = _taken(process.stdout)
        self._stderr = _taken(process.stderr)
        self._queued, self._queue = trio.open_memory_channel[bytes](COMMANDS_QUEUED_MAX)
        self._unwritten = 0
        """Frames that wait for `write_all`: nothing may overtake them."""
        self._received = bytearray()
        self._last_words = b""
        self._fell_silent = trio.Event()
        self.dead = False
        self.is_busy = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: say.Command) -> None:
        """Queues `command`.

        Raises:
            JobError: JOB_FAILED, the worker is dead or has stopped reading.
        """
        try:
            rest = self._written_at_once(say.framed(command))
            if rest:
                self._unwritten += 1
                self._queued.send_nowait(rest)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            self.kill()
            raise self._death("it stopped reading") from None

    def _written_at_once(self, frame: bytes) -> bytes:
        """What the pipe did not take of `frame`: mostly nothing, and no task has to wake."""
        if self._unwritten or self.dead:
            return frame
        try:
            return frame[os.write(self._stdin.fileno(), frame) :]
        except OSError:  # it is full; or broken, which `write_all` finds out
            return frame

    async def next(self) -> say.Reply:
        """The next reply. Cancelling loses none.

        Raises:
            JobError: JOB_FAILED, the worker died, or wrote what is no reply and was killed.
        """
        size_bytes = await self._peek_size()
        while len(self._received) < say.LENGTH_BYTES + size_bytes:
            await self._receive_more()
        return self._reply(size_bytes)

    def _reply(self, size_bytes: int) -> say.Reply:
        """The reply of that size that was received."""
        body = bytes(self._received[say.LENGTH_BYTES : say.LENGTH_BYTES + size_bytes])
        del self._received[: say.LENGTH_BYTES + size_bytes]
        try:
            return say.replies.decode(body)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            self.kill()
            raise self._death(f"it wrote what is no reply ({error})") from None

    def next_nowait(self) -> say.Reply | None:
        """The next reply where all of it is here already. Raises as `next`."""
        if len(self._received) < say.LENGTH_BYTES:
            return None
        size_bytes = int.from_bytes(self._received[: say.LENGTH_BYTES], "big")
        if len(self._received) < say.LENGTH_BYTES + size_bytes:
            return None
        return self._reply(size_bytes)

    def kill(self) -> None:
        """Ends the process now; never raises."""
        self.dead = True
        self._queued.close()
        if self._process.poll() is None:
            self._process.kill()

    async def stop(self) -> None:
        """Kills, reaps and cleans up after the worker, cancelled or not."""
        self.kill()
        with trio.CancelScope(deadline=trio.current_time() + REAP_SECONDS_MAX, shield=True):
            while self._process.poll() is None:  # noqa: ASYNC110 - the kernel sets no trio event
                await trio.sleep(0.005)
        with trio.CancelScope(shield=True):
            for pipe in (self._stdin, self._stdout, self._stderr):
                await pipe.aclose()
            await trio.to_thread.run_sync(_remove, self.scratch)

    async def write_all(self) -> None:
        """Owns the command pipe; ends when the worker does."""
        try:
            async for frame in self._queue:
                await self._stdin.send_all(frame)
                self._unwritten -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.kill()

    async def keep_last_words(self) -> None:
        """Owns stderr: keeps the end of it for the error message."""
        try:
            while some := await self._stderr.receive_some(LAST_WORDS_BYTES):
                self._last_words = (self._last_words + some)[-LAST_WORDS_BYTES:]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            self._fell_silent.set()

    async def _peek_size(self) -> int:
        while len(self._received) < say.LENGTH_BYTES:
            await self._receive_more()
        size_bytes = int.from_bytes(self._received[: say.LENGTH_BYTES], "big")
        if size_bytes > say.FRAME_BYTES_MAX:
            self.kill()
            raise self._death(f"it announced a reply of {size_bytes:,} bytes")
        return size_bytes

    async def _receive_more(self) -> None:
        some = await arrived(self._stdout.fileno(), 1 << 16)
        if not some:
            self.kill()
            with trio.move_on_after(LAST_WORDS_SECONDS_MAX):  # a child of its own may go on talking
                await self._fell_silent.wait()
            raise self._death("it ended")
        self._received += some

    def _death(self, why: str) -> JobError:
        lines = self._last_words.decode(errors="replace").strip().splitlines()
        said = f"; its last words: {lines[-1][:300]}" if lines else ""
        return JobError(f"the worker is gone: {why}{said}", next_step="submit the job again")


async def start_worker(
    nursery: trio.Nursery,
    limits: WorkerLimits,
    scratch_folder: Path,
    *,
    far: Sequence[str] = (),
    place: Place | None = None,
    on_gpu: bool = False,
) -> WorkerProcess:
    """A worker that has put its limits on. Its tasks run in `nursery`; the caller stops it.

    `far`: the command of a process whose pipes lead to a worker on another machine, in a folder of
    its own there. `place`: where it may be connected to, and nowhere else. `on_gpu`: whether the
    GPUs are open to it, which is for engines alone.

    Raises:
        JobError: it did not come up.
    """
    scratch = Path(tempfile.mkdtemp(prefix="worker-", dir=scratch_folder))
    hatch = Hatch(place) if place else None
    environment = worker_start.environment(scratch, limits.threads, on_gpu=on_gpu)
    worker = WorkerProcess(_spawn(environment, limits, far, hatch), scratch)
    worker.work_folder = "" if far else str(scratch)
    if hatch is not None and place is not None:
        worker.way_out = hatch.theirs.fileno()
        hatch.theirs.close()
        nursery.start_soon(hatch.serve)
        limits = limits.reading(place.key_file)
    nursery.start_soon(worker.write_all)
    nursery.start_soon(worker.keep_last_words)
    try:
        with trio.fail_after(START_SECONDS_MAX):
            await _greet(worker, limits, on_gpu=on_gpu)
    except trio.TooSlowError:
        await worker.stop()
        raise NodeError(f"a worker did not start within {START_SECONDS_MAX:.0f} s") from None
    except BaseException:
        await worker.stop()
        raise
    return worker


async def _greet(worker: WorkerProcess, limits: WorkerLimits, *, on_gpu: bool) -> None:
    worker.send(
        say.Start(
            scratch=worker.work_folder,
            memory_bytes_max=limits.memory_bytes_max,
            nice=limits.nice,
            sandbox=limits.sandbox,
            readable=tuple(filter(None, (*limits.readable_folders, limits.library))),
            library=limits.library,
            gpu=on_gpu,
        )
    )
    started = await worker.next()
    if not isinstance(started, say.Started):
        raise JobError("a worker spoke before it had started")
    worker.fences = started


def _spawn(
    environment: dict[str, str], limits: WorkerLimits, far: Sequence[str], hatch: Hatch | None
) -> subprocess.Popen[bytes]:
    """From this very thread: a worker ends with the thread that started it, not only the daemon."""
    process = subprocess.Popen(
        far or worker_start.command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # a Ctrl-C at the terminal is the daemon's to handle
        pass_fds=[hatch.theirs.fileno()] if hatch else [],
    )
    if limits.cores and not far and sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))[-limits.cores :]  # the first is the busiest
        with suppress(ProcessLookupError):  # it ended at once: whoever greets it will say so
            os.sched_setaffinity(process.pid, cores)
    return process


def _taken(pipe: IO[bytes] | None) -> trio.lowlevel.FdStream:
    """The pipe as trio's; Python's file object is closed, so that only one owner is left."""
    if pipe is None:
        raise ValueError("the worker was started without this pipe")
    stream = trio.lowlevel.FdStream(os.dup(pipe.fileno()))
    pipe.close()
    return stream


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
