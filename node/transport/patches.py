"""What py-libp2p 0.8.1 needs before it can face strangers: one function per fault.

Each function replaces as little as it can, says what goes wrong without it, and has a test that
shows both. They are written against one release, so any other release is refused.
"""

from __future__ import annotations

import importlib
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Final

import trio

from aivillage.node.transport.as_it_comes import Inbound, inbound
from aivillage.protocols.errors import ConfigError

log = logging.getLogger("aivillage.transport")

PINNED: Final = "0.8.1"
STREAMS_INBOUND_MAX: Final = 256
"""Open inbound streams per connection, as go-yamux; each may buffer 256 KiB before we look."""
UNREAD_BYTES_MAX: Final = 4 << 20
"""Over all streams of a connection: 256 first windows would be 64 MiB. A link is one stream."""
PENDING_PER_HOST_MAX: Final = 32
"""Sockets of one host between accept and the end of the handshake, which takes milliseconds."""
PLACES_PER_HOST_MAX: Final = 100
"""Half of all: identities cost nothing, and one machine could be everybody that we know."""
WINDOW_BYTES_MAX: Final = 1 << 20
"""Receive window once data flows: a LAN's bandwidth times delay, and what one stream may hold."""
PROMPT_TURNS: Final = 16
"""How often at most a free lock is taken before everybody else has a turn."""
CHUNK_BYTES: Final = 65_519 - 12
"""A Yamux frame of this much data is exactly one Noise message; 65,536 would make two."""


def refuse_other_versions() -> None:
    """Raises: ConfigError: the installed libp2p is not the one these patches fit."""
    installed = version("libp2p")
    if installed != PINNED:
        raise ConfigError(
            f"libp2p {installed} is installed, this node is written for {PINNED}",
            next_step=f"pip install libp2p=={PINNED}",
        )


def apply() -> None:
    """All of them, once per process. Applying them again changes nothing."""
    refuse_other_versions()
    for patch in ALL:
        patch()


def name_the_connection_logger() -> None:
    """Without it: connection code logs through the root logger, which installs a handler."""
    swarm_connection = _library("libp2p.network.connection.swarm_connection")

    own = logging.getLogger("libp2p.network.connection")
    swarm_connection.logging = SimpleNamespace(
        debug=own.debug, info=own.info, warning=own.warning, error=own.error
    )


def contain_handler_errors() -> None:
    """Without it: an exception in any stream handler ends the whole host."""
    swarm_conn = _library("libp2p.network.connection.swarm_connection").SwarmConn

    original = _original(swarm_conn, "_handle_muxed_stream")

    async def handle_muxed_stream(self: Any, muxed_stream: Any) -> None:
        try:
            await original(self, muxed_stream)
        except Exception as error:
            peer = str(self.muxed_conn.peer_id)
            log.warning("stream_handler_failed", extra={"peer": peer}, exc_info=error)
            # `reset` waits for the connection's write lock: not for longer than a second.
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await quietly(muxed_stream.reset)

    swarm_conn._handle_muxed_stream = handle_muxed_stream


def end_tasks_with_their_connection() -> None:
    """Without it: each inbound connection leaves a task and one of the inbound places behind.

    There are `max_connections` places; once they are gone the node accepts nobody. And one host
    could take them all, with sockets that say nothing or under many names: so it gets
    `PENDING_PER_HOST_MAX` of the former, and `PLACES_PER_HOST_MAX` in all.
    """
    raw_connection = _library("libp2p.network.connection.raw_connection").RawConnection
    swarm = _library("libp2p.network.swarm").Swarm
    pending: Counter[tuple[int, str]] = Counter()
    held: Counter[tuple[int, str]] = Counter()

    async def hold(self: Any, raw: Any, maddr: Any, place: tuple[int, str]) -> None:
        with _counted(held, place):
            with _counted(pending, place):
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
            await muxed.event_closed.wait()

    async def handle_inbound(self: Any, stream: Any, maddr: Any, _failure: Any) -> None:
        raw = raw_connection(stream, False)
        place = id(self), (stream.get_remote_address() or ("", 0))[0]
        try:
            if pending[place] < PENDING_PER_HOST_MAX and held[place] < PLACES_PER_HOST_MAX:
                await hold(self, raw, maddr, place)
        except Exception as error:
            log.debug("inbound_connection_failed", extra={"reason": repr(error)})
        await quietly(raw.close)

    swarm._do_handle_inbound_connection = handle_inbound


def wait_for_window_without_a_cap() -> None:
    """Without it: a reader that pauses for 5 s kills the writer's stream, and both poll.

    The deadline is the caller's. Window and state become properties that wake the writer.
    """
    stream_error = _library("libp2p.stream_muxer.exceptions").MuxedStreamError
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    header = struct.Struct(yamux.YAMUX_HEADER_FORMAT)

    async def write(self: Any, data: bytes) -> None:
        sent, total = 0, len(data)
        while sent < total:
            while self.send_window <= 0 and not (self.closed or self.send_closed):
                self._writable = trio.Event()
                await self._writable.wait()
            if self.closed or self.send_closed:
                raise stream_error("Stream is closed for sending")
            size = min(self.send_window, CHUNK_BYTES, total - sent)
            self.send_window -= size
            head = header.pack(0, yamux.TYPE_DATA, 0, self.stream_id, size)
            await self.conn._write_frame(head + data[sent : sent + size])
            sent += size

    yamux.YamuxStream.write = write
    for name in ("send_window", "closed", "send_closed"):
        setattr(yamux.YamuxStream, name, _waking_property(name))


def coalesce_window_updates() -> None:
    """Without it: every read, also one of a single byte, sends an encrypted frame.

    One update per half window, sent by the connection's own task, so that a cancelled reader
    cannot cut a frame in half.
    """
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    def release(self: Any, size_bytes: int) -> None:
        self._pending_recv_release += size_bytes
        if self._pending_recv_release < self.target_recv_window // 2:
            return
        if self.recv_closed or self.conn.event_shutting_down.is_set():
            return
        grown = max(self.target_recv_window, WINDOW_BYTES_MAX)
        increment = self._pending_recv_release + grown - self.target_recv_window
        self.target_recv_window = grown
        self._pending_recv_release = 0
        self.recv_window += increment
        self.conn._nursery.start_soon(quietly, self.send_window_update, increment)

    async def update(self: Any, *, bytes_read: int = 0) -> None:
        self.release(bytes_read)

    yamux.YamuxStream.release = release
    yamux.YamuxStream._auto_tune_and_send_window_update = update


def write_frames_cheaply() -> None:
    """Without it: each frame is parsed again for a debug line and pays one more checkpoint."""
    yamux_conn = _library("libp2p.stream_muxer.yamux.yamux").Yamux

    async def write_frame(self: Any, data: bytes) -> None:
        async with self._write_lock:
            await self.secured_conn.write(data)

    yamux_conn._write_frame = write_frame


def take_free_locks_at_once() -> None:
    """Without it: a frame passes six locks, and each gives all other tasks a turn, also when free.

    A busy connection still yields: at the socket, and at every sixteenth lock, for what was read
    ahead may be hundreds of frames.
    """
    tcp = _library("libp2p.io.trio").TrioTCPStream
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    for owner, names in (
        (tcp, ("read_lock", "write_lock")),
        (yamux.Yamux, ("streams_lock", "_write_lock")),
        (yamux.YamuxStream, ("window_lock", "close_lock")),
    ):
        _give_prompt_locks(owner, names)


def write_what_is_owed_first() -> None:
    """Without it: the rest of a frame that was written at once (`at_once.py`) is overtaken."""
    tcp = _library("libp2p.io.trio").TrioTCPStream

    original = _original(tcp, "write")

    async def write(self: Any, data: bytes) -> None:
        owed, self.owed = self.owed, b""
        await original(self, owed + data)

    tcp.owed = b""
    tcp.write = write


def deliver_plain_data_as_it_comes() -> None:
    """Without it: a small frame takes sixteen coroutines and a third of its link's time."""
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    handle_incoming = _original(yamux.Yamux, "handle_incoming")
    read_exactly = _original(yamux, "read_exactly")
    ways: dict[Any, Inbound] = {}

    async def handle(self: Any) -> None:
        session = self.secured_conn
        if way := inbound(self):
            ways[session] = way
        try:
            await handle_incoming(self)
        finally:
            ways.pop(session, None)

    async def read_header(session: Any, size_bytes: int) -> Any:
        if way := ways.get(session):
            await way.deliver()
        return await read_exactly(session, size_bytes)

    async def read_data_body(self: Any, size_bytes: int) -> Any:
        with trio.fail_after(yamux._yamux_data_read_timeout()):
            return await read_exactly(self.secured_conn, size_bytes)

    yamux.YamuxStream.ear = None
    yamux.Yamux.handle_incoming = handle
    yamux.read_exactly = read_header  # in that module, asked for headers and for bodies only
    yamux.Yamux._read_data_body = read_data_body


def enforce_flow_control() -> None:
    """Without it: a peer that ignores the window fills our memory; now it loses the stream.

    So does one that fills many windows, each as far as it may.
    """
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    # A frame larger than any window we grant is refused before it is read.
    yamux.MAX_WINDOW_SIZE = WINDOW_BYTES_MAX

    def get(self: Any) -> Any:
        return self.__dict__["recv_window"]

    def put(self: Any, value: int) -> None:
        before = self.__dict__.get("recv_window", value)
        self.__dict__["recv_window"] = value
        if value >= before or self.closed:
            return  # granted, not used
        unread = sum(map(len, self.conn.stream_buffers.values()))
        if value < 0 or unread > UNREAD_BYTES_MAX:
            _end_violator(self)

    yamux.YamuxStream.recv_window = property(get, put)


def cap_inbound_streams() -> None:
    """Without it: 20,000 opened streams are 20,000 tasks; now the 257th is reset."""
    yamux_conn = _library("libp2p.stream_muxer.yamux.yamux").Yamux

    original = _original(yamux_conn, "accept_stream")

    async def accept_stream(self: Any) -> Any:
        while True:
            stream = await original(self)
            inbound = sum(not known.is_initiator for known in self.streams.values())
            if inbound <= STREAMS_INBOUND_MAX:
                return stream
            log.info("stream_refused", extra={"peer": str(self.peer_id), "open": inbound})
            await stream.reset()

    yamux_conn.accept_stream = accept_stream


ALL: Final = (
    name_the_connection_logger,
    contain_handler_errors,
    end_tasks_with_their_connection,
    wait_for_window_without_a_cap,
    coalesce_window_updates,
    write_frames_cheaply,
    take_free_locks_at_once,
    write_what_is_owed_first,
    deliver_plain_data_as_it_comes,
    enforce_flow_control,
    cap_inbound_streams,
)


class PromptLock:
    """`async with` of it is a `trio.Lock`'s, but takes a free one without a turn of the loop."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._taken = 0

    def locked(self) -> bool:
        return self._lock.locked()

    async def __aenter__(self) -> None:
        self._taken += 1
        if self._lock.locked() or self._taken % PROMPT_TURNS == 0:
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


@contextmanager
def _counted(counts: Counter[tuple[int, str]], place: tuple[int, str]) -> Iterator[None]:
    counts[place] += 1
    try:
        yield
    finally:
        counts[place] -= 1
        if not counts[place]:
            del counts[place]


def _library(module: str) -> Any:
    """A module of the library, untyped: the patches reach into what is private to it."""
    return importlib.import_module(module)


def _original(owner: Any, name: str) -> Any:
    """The method as the library wrote it, also when the patch is applied a second time."""
    kept = f"_unpatched_{name}"
    if not hasattr(owner, kept):
        setattr(owner, kept, getattr(owner, name))
    return getattr(owner, kept)


def _give_prompt_locks(owner: Any, names: tuple[str, ...]) -> None:
    """Makes the locks of every later instance of `owner` prompt ones."""
    original = _original(owner, "__init__")

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in names:
            setattr(self, name, PromptLock())

    owner.__init__ = init


def _waking_property(name: str) -> property:
    def get(self: Any) -> Any:
        return self.__dict__[name]

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value
        waiting = self.__dict__.get("_writable")
        if waiting is not None:
            waiting.set()

    return property(get, put)


def _end_violator(stream: Any) -> None:
    """Resets a stream whose peer sent more than it was allowed; called inside the read loop."""
    yamux = _library("libp2p.stream_muxer.yamux.yamux")

    conn, stream_id = stream.conn, stream.stream_id
    log.warning("window_violated", extra={"peer": str(conn.peer_id)})
    stream.reset_received = stream.closed = stream.recv_closed = stream.send_closed = True
    buffer = conn.stream_buffers.get(stream_id)
    if buffer is not None:
        buffer.clear()
    reset = struct.pack(
        yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_WINDOW_UPDATE, yamux.FLAG_RST, stream_id, 0
    )
    conn._nursery.start_soon(quietly, conn._write_frame, reset)


async def quietly(call: Any, *args: Any) -> None:
    """Runs a library call on something that may be gone already."""
    try:
        await call(*args)
    except Exception as error:
        log.debug("library_call_failed", extra={"reason": repr(error)})
