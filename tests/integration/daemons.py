"""Real daemon processes on this machine: started, asked, invited, paused, killed, cleaned up.

    with Yard(folder) as yard:
        ann, bob = yard.village("ann", "bob")
        done = ann.run("submit", "mesh.noop", "hello")
        assert done.code == 0, done

Every daemon has a data folder and a loopback port of its own; cache and runtime folder are
shared. What goes wrong is told with the end of the daemon's log.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self, TypeVar

import msgspec

from aivillage.cli.client import Client
from aivillage.node.paths import Paths
from aivillage.protocols import messages
from tests.house import ROOT

T = TypeVar("T")
READY_SECONDS = 60.0
"""Two slow cores may start several daemons at once."""
COMMAND_SECONDS = 60.0
LOG_LINES_TOLD = 40


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value that was printed. Raises: ValueError: it was not one."""
        return json.loads(self.out)

    @property
    def text(self) -> str:
        return self.out + self.err


class DaemonError(AssertionError):
    """A daemon did not do what it was started for; its log is in the message."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], T], seconds: float, about: str | Callable[[], str]) -> T:
    """What `what` gives once it is true; `about` may say what happened until it did not.

    Raises:
        DaemonError: it did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            told = about if isinstance(about, str) else about()
            raise DaemonError(f"not within {seconds:g} s: {told}; last seen: {found!r}")
        time.sleep(0.05)
    return found


class Daemon:
    """One node: its folder, its port, and its process while it runs."""

    def __init__(self, name: str, data_dir: pathlib.Path, environment: dict[str, str]) -> None:
        self.name = name
        self.data_dir = data_dir
        self.host = "127.0.0.1"
        self.port = free_port()
        self.launcher: tuple[str, ...] = ()
        """Words before the command that starts it: where it is to run."""
        self.module = "aivillage"
        """What the daemon runs; a test that wants a cheat names its own."""
        self.peer = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.log = data_dir.with_suffix(".log")
        self.out = data_dir.with_suffix(".out")
        self.flags: tuple[str, ...] = ()
        self.ready_seconds = 0.0
        self._environment = environment

    @property
    def paths(self) -> Paths:
        listing = self.run("paths", "--json").json
        return Paths(self.data_dir, pathlib.Path(listing["socket"]), self.data_dir)

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # ------------------------------------------------------------------ its life
    def launch(self, *flags: str, json_output: bool = True) -> None:
        """Starts the process, and does not wait for it."""
        assert not self.running(), f"{self.name} runs already"
        command = self._command("start", "--listen", f"{self.host}:{self.port}", *flags)
        command[command.index("aivillage")] = self.module
        command = [*self.launcher, *command]
        self.out.write_bytes(b"")
        with self.out.open("wb") as out, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--json"] if json_output else command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=self._environment,
                cwd=self.data_dir.parent,
                start_new_session=True,
            )

    def start(self, *flags: str) -> Self:
        """Makes the node if need be, starts it and returns when it is ready.

        Raises:
            DaemonError: it ended, or was not ready in time.
        """
        if not (self.data_dir / "identity.key").exists() and "--join" not in flags:
            made = self.run("init", "--json")
            assert made.code == 0, made
        self.flags = tuple(flags)
        began = time.monotonic()
        self.launch(*flags)
        self.await_ready()
        self.ready_seconds = time.monotonic() - began
        return self

    def await_ready(self) -> None:
        wait_for(self._is_ready, READY_SECONDS, f"{self.name} is ready\n{self.log_end()}")
        self.peer = json.loads(self.out.read_text())["peer"]

    def _is_ready(self) -> bool:
        if not self.running():
            raise DaemonError(f"{self.name} ended: {self.out.read_text()}\n{self.log_end()}")
        return '"ready": true' in self.out.read_text()

    def restart(self) -> Self:
        """Starts it again with the same flags, except that it joins nothing."""
        return self.start(*self._flags_again())

    def relaunch(self) -> None:
        """As `restart`, without waiting: `await_ready` says when it is there."""
        self.flags = self._flags_again()
        self.launch(*self.flags)

    def _flags_again(self) -> tuple[str, ...]:
        flags = list(self.flags)
        if "--join" in flags:
            at = flags.index("--join")
            del flags[at : at + 2]
        return tuple(flags)

    def stop(self, seconds: float = 10.0) -> int:
        """SIGTERM; its exit code."""
        process = self._taken()
        process.terminate()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DaemonError(f"{self.name} did not stop: {self.log_end()}") from None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        process = self._taken()
        process.kill()
        process.wait()

    def _taken(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, f"{self.name} is not running"
        process, self.process = self.process, None
        return process

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    # ------------------------------------------------------------------ talking to it
    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "aivillage", words[0], "--data-dir", str(self.data_dir),
                *words[1:]]  # fmt: skip

    def spawn(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """A command under way, its output in pipes."""
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        return subprocess.Popen(
            self._words(words),
            text=True,
            env=self._environment,
            cwd=self.data_dir.parent,
            **(settings | options),
        )

    def _words(self, words: tuple[str, ...]) -> list[str]:
        """`jobs list` and `blobs get` take their flags after the action."""
        if words[0] not in {"jobs", "blobs"}:
            return self._command(*words)
        return [sys.executable, "-m", "aivillage", *words[:2], "--data-dir", str(self.data_dir),
                *words[2:]]  # fmt: skip

    def run(self, *words: str, seconds: float = COMMAND_SECONDS, **environment: str) -> Done:
        """One command to its end. Raises: DaemonError: it did not end in time."""
        try:
            done = subprocess.run(
                self._words(words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                env=self._environment | environment,
                cwd=self.data_dir.parent,
            )
        except subprocess.TimeoutExpired as late:
            raise DaemonError(f"{words} took over {seconds:g} s: {late.stderr!r}") from None
        return Done(done.returncode, done.stdout, done.stderr)

    def read(self, *words: str) -> Any:
        """The JSON of a read that must succeed."""
        done = self.run(*words, "--json")
        assert done.code == 0, done
        return done.json

    def client(self, seconds: float | None = 30.0) -> Client:
        """The control socket, without the half second that a command needs to start."""
        return Client(self.socket, seconds)

    @property
    def socket(self) -> pathlib.Path:
        from aivillage.node.paths import _socket

        # As the daemon sees it: the runtime folder is the yard's.
        mine = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = self._environment["XDG_RUNTIME_DIR"]
        try:
            return _socket(self.data_dir)
        finally:
            if mine is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = mine

    def ask(self, what: str, **args: Any) -> Any:
        with self.client() as client:
            return client.ask(what, **args)

    def submit(self, operation: str, *, peer: str = "", **request: Any) -> str:
        """Hands in a job and returns its id at once."""
        frames = self.follow(operation, peer=peer, follow=False, **request)
        return str(next(f for f in frames if isinstance(f, messages.Answer)).value["job"])

    def follow(
        self,
        operation: str,
        *,
        peer: str = "",
        follow: bool = True,
        stand_by: bool = False,
        mesh: bool = False,
        draft: str = "",
        **request: Any,
    ) -> Iterator[messages.Frame]:
        """Hands in a job and yields what comes; closing the iterator leaves the job running."""
        with self.client() as client:
            call = client.next_id()
            client.patient().send(
                messages.Submit(
                    id=call,
                    operation=operation,
                    request=msgspec.msgpack.encode(request),
                    peer=peer or None,
                    follow=follow,
                    stand_by=stand_by,
                    mesh=mesh,
                    draft=draft,
                )
            )
            yield from client.frames(call)

    def sellers_known(self, operation: str) -> set[str]:
        """Who offers `operation`, as far as this node has heard."""
        found = {row["name"]: row for row in self.ask("operations")}
        return set(found[operation]["offered_by"])

    def job_ended(self, job: str, seconds: float) -> dict[str, Any]:
        """The job once it has ended, well or not."""

        def ended() -> dict[str, Any] | None:
            found: dict[str, Any] = self.ask("job", job=job)
            return found if found["ended_unix"] else None

        found = wait_for(ended, seconds, f"job {job[:8]} of {self.name} ends\n{self.log_end()}")
        assert found is not None
        return found

    def log_end(self, lines: int = LOG_LINES_TOLD) -> str:
        """The last lines of its log, for messages."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return f"--- {self.name}: no log"
        return f"--- log of {self.name}\n" + "\n".join(text.splitlines()[-lines:])

    def rss_mb(self) -> float:
        return int(_status(self.pid)["VmRSS"].split()[0]) / 1024


def _status(pid: int) -> dict[str, str]:
    text = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return {
        key: value.strip() for key, _, value in (line.partition(":") for line in text.split("\n"))
    }


class Yard:
    """Where daemons live for one test: leaving the block ends them, however it went."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.daemons: list[Daemon] = []
        self._names = itertools.count(1)
        self._runtime = pathlib.Path(_short_folder())
        cache = os.environ.get("AIVILLAGE_CACHE_DIR") or str(folder / "cache")
        ours = ("AIVILLAGE_", "PYTHON")  # a person's terminal has none of these
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            "AIVILLAGE_CACHE_DIR": cache,
            "AIVILLAGE_MDNS": "false",  # nobody on the tester's network is to hear of this
            "AIVILLAGE_VERIFY_PERCENT_MAX": "0",  # bills are counted to the credit
            "XDG_RUNTIME_DIR": str(self._runtime),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            if daemon.running():
                # A paused process takes no other signal.
                daemon.signal(signal.SIGCONT)
                daemon.kill()
        for left in self._runtime.iterdir():
            left.unlink()
        self._runtime.rmdir()

    def daemon(self, name: str = "", data_dir: pathlib.Path | None = None) -> Daemon:
        """A node that is not started yet."""
        name = name or f"node{next(self._names)}"
        made = Daemon(name, data_dir or self.folder / name, self.environment)
        self.daemons.append(made)
        return made

    def village(self, *names: str, flags: tuple[str, ...] = ()) -> list[Daemon]:
        """Running daemons: the first one founds the village, the others join by invite."""
        founder = self.daemon(names[0]).start(*flags)
        guests = []
        for name in names[1:]:
            token = founder.ask("invite")["token"]
            guests.append(self.daemon(name).start("--join", token, *flags))
        return [founder, *guests]

    def know_each_other(self, *daemons: Daemon, seconds: float = 40.0) -> None:
        """Returns when each has heard what all the others offer."""
        for daemon in daemons:
            others = {other.peer for other in daemons} - {daemon.peer}

            def heard(daemon: Daemon = daemon, others: set[str] = others) -> bool:
                return others <= daemon.sellers_known("mesh.noop")

            wait_for(heard, seconds, f"{daemon.name} heard all offers\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(daemon.log_end() for daemon in self.daemons)


def _short_folder() -> str:
    """A socket's path may have 108 bytes, and pytest's folders are long."""
    import tempfile

    return tempfile.mkdtemp(prefix="yard-")


@contextlib.contextmanager
def paused(daemon: Daemon) -> Iterator[None]:
    """The process is there and does nothing: a laptop with its lid closed."""
    daemon.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.signal(signal.SIGCONT)


def books_agree(daemons: list[Daemon]) -> list[str]:
    """What is wrong between the books of `daemons`; empty when everything is right."""
    wrong = []
    balances = {daemon.peer: daemon.ask("balance") for daemon in daemons}
    nets = {
        (peer, other["peer"]): other["net"]
        for peer, balance in balances.items()
        for other in balance["peers"]
    }
    for daemon in daemons:
        audit = daemon.ask("audit")
        if not audit["ok"]:
            wrong.append(f"{daemon.name}: {audit['first_error']}")
    for (mine, theirs), net in nets.items():
        if nets.get((theirs, mine), 0) != -net:
            wrong.append(f"{mine[-6:]} has {net}, {theirs[-6:]} has {nets.get((theirs, mine))}")
    if total := sum(balance["net"] for balance in balances.values()):
        wrong.append(f"the sum of all is {total}")
    earned = sum(balance["earned"] for balance in balances.values())
    spent = sum(balance["spent"] for balance in balances.values())
    if earned != spent:
        wrong.append(f"{spent} was paid and {earned} earned")
    return wrong


STILL_SECONDS = 0.5
"""Books agree, too, without what has ended and is not signed for yet: for some 0.1 s."""


def settled(daemons: list[Daemon], seconds: float) -> float:
    """Seconds until all books agree, nothing is in transit, and it stays so for `STILL_SECONDS`.

    Raises:
        DaemonError: they do not, and where.
    """
    began = since = time.monotonic()
    wrong: list[str] = []
    moved: dict[str, tuple[int, int]] = {}

    def quiet() -> bool:
        nonlocal since, moved
        wrong[:] = books_agree(daemons)
        balances = {daemon.name: daemon.ask("balance") for daemon in daemons}
        wrong.extend(
            f"{name} has {found['in_transit']} in transit"
            for name, found in balances.items()
            if found["in_transit"]
        )
        before, moved = moved, {n: (b["earned"], b["spent"]) for n, b in balances.items()}
        if wrong or moved != before:
            since = time.monotonic()
        return not wrong and time.monotonic() - since >= STILL_SECONDS

    try:
        wait_for(quiet, seconds + STILL_SECONDS, "the books agree")
    except DaemonError:
        logs = "\n".join(daemon.log_end() for daemon in daemons)
        raise DaemonError(f"the books differ after {seconds:g} s: {wrong}\n{logs}") from None
    return since - began


def after_text(buyer: Daemon, request: dict[str, Any]) -> str:
    """The id of an answer in the making, ten pieces of which have come."""
    job, pieces = "", 0
    for frame in buyer.follow("inference.generate", **request):
        if isinstance(frame, messages.Progress) and frame.note.startswith("job "):
            job = frame.note.removeprefix("job ")
        pieces += isinstance(frame, messages.Text)
        if pieces >= 10:
            break
    return job
