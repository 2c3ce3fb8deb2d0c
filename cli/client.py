"""The command line's end of the control socket: plain blocking sockets, the mesh's own frames."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from aivillage.protocols import codec, messages
from aivillage.protocols.errors import (
    EXIT_NO_DAEMON,
    AivillageError,
    NodeError,
    PeerError,
    from_code,
)
from aivillage.protocols.messages import Frame, Hello

PICK_UP_SECONDS: Final = 10.0
"""A running daemon is given to take a connection, looked at so many times."""
PICK_UP_TRIES: Final = 200


class StuckDaemonError(NodeError):
    """A daemon took the connection and says nothing."""


class NoDaemonError(NodeError):
    """No daemon answers on the control socket."""

    exit_code = EXIT_NO_DAEMON


def _connect(client: socket.socket, path: str) -> None:
    """Waits where more clients come at once than the daemon has picked up: that one is there.

    Raises:
        OSError: it is not. StuckDaemonError: it picks up nobody.
    """
    for _ in range(PICK_UP_TRIES):
        try:
            return client.connect(path)
        except BlockingIOError:  # its queue is full; with a timeout the kernel does not wait
            time.sleep(PICK_UP_SECONDS / PICK_UP_TRIES)
    raise StuckDaemonError(
        f"the node picked up no connection for {PICK_UP_SECONDS:.0f} s",
        next_step="end some of the commands that talk to it, or stop it and start it again",
    )


class Client:
    """One connection to the daemon of a data folder.

    Raises:
        NoDaemonError: no daemon runs there.
        PeerError: VERSION_UNSUPPORTED, it is of another major version.
    """

    def __init__(self, path: Path, timeout_seconds: float | None = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        self._ids = itertools.count(1)
        self._buffer = bytearray()
        try:
            _connect(self._socket, str(path))
            hello = self.receive()
        except OSError:
            self._socket.close()
            raise NoDaemonError(
                "no node is running here", next_step="start one: aivillage-node start"
            ) from None
        except AivillageError:
            self._socket.close()
            raise
        if not isinstance(hello, Hello) or hello.major != messages.VERSION_MAJOR:
            raise PeerError("the running node is of another version", code="VERSION_UNSUPPORTED")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def patient(self) -> Client:
        """Waits as long as it takes from now on: for jobs, which have deadlines of their own."""
        self._socket.settimeout(None)
        return self

    def next_id(self) -> int:
        return next(self._ids)

    def send(self, frame: Frame) -> None:
        try:
            self._socket.sendall(codec.frame(frame))
        except OSError as error:
            raise _lost(error) from None

    def receive(self) -> Frame:
        """The next frame. Raises: NodeError: the daemon ended."""
        size_bytes = int.from_bytes(self._take(codec.LENGTH_BYTES), "big")
        return codec.decode(self._take(size_bytes))

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                chunk = self._socket.recv(65536)
            except OSError as error:
                raise _lost(error) from None
            if not chunk:
                raise _lost(ConnectionResetError())
            self._buffer += chunk
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def ask(self, what: str, **args: Any) -> Any:
        """One question, one answer. Raises: AivillageError: the daemon's refusal."""
        call = self.next_id()
        self.send(messages.Ask(id=call, what=what, args=args))
        for frame in self.frames(call):
            if isinstance(frame, messages.Answer):
                return frame.value
        raise AssertionError("frames end with an answer or an error")

    def frames(self, call: int) -> Iterator[Frame]:
        """Frames of one call up to its answer. Raises: AivillageError: its failure."""
        while True:
            frame = self.receive()
            if getattr(frame, "id", 0) not in {call, 0}:
                continue
            if isinstance(frame, messages.Failure):
                raise _error(frame)
            yield frame
            if isinstance(frame, messages.Answer):
                return


def _lost(error: OSError) -> NodeError:
    """What a broken conversation means to the person."""
    if isinstance(error, TimeoutError):
        return StuckDaemonError(
            "the node does not answer", next_step="is its machine overloaded, or the node paused?"
        )
    return NodeError("the node ended", next_step="look at its log, then: aivillage-node start")


def _error(failure: messages.Failure) -> AivillageError:
    return from_code(failure.code, failure.message, failure.next_step)
