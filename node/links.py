"""The links of this node: exactly one live link per peer, whoever dialled first.

Race rule. When two nodes dial each other at once, the stream that the lower PeerId opened wins.
The acceptor decides: it answers a hello only with its own, and the dialer counts a link as live
when that answer is in. A refused dialer finds the winner already live.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from aivillage.node.framing import FrameReader
from aivillage.node.link import Link, LinkLimits, as_error
from aivillage.protocols import codec
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import (
    CERTIFICATES_MAX,
    JOB_PROTOCOL,
    VERSION_MAJOR,
    Failure,
    Frame,
    Hello,
)
from aivillage.protocols.ports import PromptStream, Stream, Transport
from aivillage.protocols.types import PeerId

__all__ = ["Link", "LinkLimits", "Links", "open_links"]

log = logging.getLogger("aivillage.links")


@asynccontextmanager
async def open_links(
    transport: Transport, hello: Callable[[], Hello], *, limits: LinkLimits
) -> AsyncIterator[Links]:
    """Accepts links from now on; leaving the block flushes and closes all of them.

    Cancelled from outside it closes them without the flush: a node that wants its last words
    heard leaves the block by itself.
    """
    async with trio.open_nursery() as nursery:
        links = Links(transport, hello, limits, nursery)
        transport.serve(JOB_PROTOCOL, links.accept)
        try:
            yield links
        finally:
            with trio.CancelScope(shield=True):
                await links.close()
            nursery.cancel_scope.cancel()


async def _admit_all(_peer: PeerId, _hello: Hello) -> None: ...
def _ignore_up(_link: Link) -> None: ...
def _ignore_down(_link: Link, _reason: str) -> None: ...
def _ignore_message(_link: Link, _frame: Frame) -> None: ...
def _no_rider(_link: Link) -> Frame | None: ...


class Links:
    """All live links, and the callbacks of their owner. Callbacks are plain calls, in order."""

    def __init__(
        self,
        transport: Transport,
        hello: Callable[[], Hello],
        limits: LinkLimits,
        nursery: trio.Nursery,
    ) -> None:
        self.transport = transport
        self.dial: Callable[[str], Awaitable[PeerId]] = transport.dial
        """How to get a connection with whoever is at an address."""
        self.admit: Callable[[PeerId, Hello], Awaitable[None]] = _admit_all
        """Before a link is up: what its peer's hello proves is noted first, or it is refused."""
        self.on_up: Callable[[Link], None] = _ignore_up
        self.on_down: Callable[[Link, str], None] = _ignore_down
        self.on_message: Callable[[Link, Frame], None] = _ignore_message
        self.before_write: Callable[[Link], Frame | None] = _no_rider
        self.counts: Counter[str] = Counter()
        self._hello = hello
        self._limits = limits
        self._nursery = nursery
        self._live: dict[PeerId, Link] = {}
        self._attempts: dict[PeerId, _Attempt] = {}
        self._running: set[Link] = set()
        self._closing = False

    def get(self, peer: PeerId) -> Link | None:
        return self._live.get(peer)

    def all(self) -> list[Link]:
        return list(self._live.values())

    def my_addresses(self) -> tuple[str, ...]:
        """This node's own, as others are told them."""
        return self._hello().addresses

    async def drop(self, peer: PeerId, reason: str) -> None:
        """Closes the link and every connection with `peer`; an unknown peer is no error.

        From a callback, which cannot wait, say `link.close(reason)`.
        """
        link = self._live.get(peer)
        if link is not None:
            link.close(reason)
            await link.ended.wait()
        await self.transport.hang_up(peer)

    async def connect(self, address: str) -> Link:
        """The live link with the peer at `address`, opened if need be.

        Raises:
            RequestError: `address` is malformed or this node's own.
            PeerError: PEER_LOST or VERSION_UNSUPPORTED.
            RefusedError: the relay that the address leads through said no.
        """
        peer = await self.dial(address)
        if peer == self.transport.peer:
            raise RequestError("this is the node's own address", next_step="dial another node")
        while True:
            link = self._live.get(peer)
            if link is not None:
                return link
            attempt = self._attempts.get(peer)
            if attempt is None:
                return await self._open(peer)
            await attempt.over.wait()

    async def accept(self, stream: PromptStream) -> None:
        """The handler of inbound streams: lives as long as the link."""
        if self._closing:
            return
        reader = FrameReader(stream, self._limits.frame_bytes_max)
        try:
            with trio.fail_after(self._limits.hello_seconds):
                hello = await self._read_hello(reader)
                await self.admit(stream.peer, hello)
        except trio.TooSlowError:
            log.info("hello_missed", extra={"peer": stream.peer})
            return
        except PeerError as error:
            await self._refuse(stream, error)
            return
        if not await self._wins(stream.peer):
            await self._refuse(stream, PeerError("another stream of this pair won", code="BUSY"))
            return
        link = self._make(stream, reader, hello, dialled=False)
        # The hello is the link's first frame: sent before anybody can queue another.
        link.send(self._hello())
        self._up(link)
        await self._run(link)

    async def close(self) -> None:
        """Closes every link; each has the flush time to empty its queue."""
        self._closing = True
        for link in list(self._running):
            link.close("the node is stopping")
        for link in list(self._running):
            await link.ended.wait()

    # ------------------------------------------------------------------ opening

    async def _open(self, peer: PeerId) -> Link:
        attempt = self._attempts[peer] = _Attempt()
        try:
            with attempt.scope:
                return await self._dialled(peer)
        finally:
            del self._attempts[peer]
            attempt.over.set()
        winner = self._live.get(peer)
        if winner is None:
            raise PeerError(f"the link that {peer} opened broke at once", code="PEER_LOST")
        return winner

    async def _dialled(self, peer: PeerId) -> Link:
        """The link over a stream of ours, or the one that won meanwhile."""
        try:
            with trio.fail_after(self._limits.hello_seconds):
                return await self._shake_hands(peer)
        except trio.TooSlowError:
            await self.transport.hang_up(peer)
            reason = f"{peer} said no hello within {self._limits.hello_seconds:g} s"
            raise PeerError(reason, code="PEER_LOST") from None
        except PeerError:
            winner = self._live.get(peer)
            if winner is None:
                raise
            return winner

    async def _shake_hands(self, peer: PeerId) -> Link:
        stream = await self.transport.open_stream(peer, JOB_PROTOCOL)
        try:
            await stream.write(codec.frame(self._hello()))
            reader = FrameReader(stream, self._limits.frame_bytes_max)
            hello = await self._read_hello(reader)
            await self.admit(peer, hello)
            self._refuse_when_closing()
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.close()
            raise
        link = self._make(stream, reader, hello, dialled=True)
        self._up(link)
        self._nursery.start_soon(self._run, link)
        return link

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise PeerError("this node is stopping", code="PEER_LOST")

    async def _read_hello(self, reader: FrameReader) -> Hello:
        frame = codec.decode(await reader.next())
        if isinstance(frame, Failure):
            error = as_error(frame)
            code = "VERSION_UNSUPPORTED" if error.code == "VERSION_UNSUPPORTED" else "PEER_LOST"
            raise PeerError(error.message, code=code, next_step=error.next_step)
        if not isinstance(frame, Hello):
            raise PeerError(f"{type(frame).__name__} before a hello", code="BAD_REQUEST")
        if frame.major != VERSION_MAJOR:
            raise PeerError(
                f"protocol {frame.major}.{frame.minor} is not ours, {VERSION_MAJOR}.x",
                code="VERSION_UNSUPPORTED",
                next_step="bring the older of the two nodes up to date",
            )
        if len(frame.certificates) > CERTIFICATES_MAX:
            raise PeerError("too many certificates in the hello", code="BAD_REQUEST")
        return frame

    async def _wins(self, peer: PeerId) -> bool:
        """Whether a stream that `peer` opened just now becomes the link."""
        attempt = self._attempts.get(peer)
        if attempt is not None:
            if peer > self.transport.peer:
                await attempt.over.wait()
            else:
                attempt.scope.cancel()
        link = self._live.get(peer)
        if link is None:
            return not self._closing
        # A peer that opened the live link itself and opens another has lost the first one.
        if link.dialled and peer > self.transport.peer:
            if await link.is_alive(self._limits.probe_seconds):
                return False
            link = self._live.get(peer)
        if link is not None:
            link.close("replaced by a newer stream of the same peer")
        return not self._closing

    async def _refuse(self, stream: Stream, error: PeerError) -> None:
        log.info("link_refused", extra={"peer": stream.peer, "reason": str(error)})
        self.counts["link_refused"] += 1
        if error.code == "PEER_LOST":
            return
        failure = Failure(
            id=0, code=error.code, message=error.message[:200], next_step=error.next_step
        )
        with trio.move_on_after(self._limits.flush_seconds):
            await stream.write(codec.frame(failure))

    # ------------------------------------------------------------------ living

    def _make(
        self, stream: PromptStream, reader: FrameReader, hello: Hello, *, dialled: bool
    ) -> Link:
        return Link(stream, reader, hello, dialled=dialled, limits=self._limits, owner=self)

    async def _run(self, link: Link) -> None:
        try:
            await link.run()
            if link.silent and link.peer not in self._live:
                # The connection is as dead as the link: a later dial must not find it.
                await self.transport.hang_up(link.peer)
        finally:
            self._running.discard(link)

    def _up(self, link: Link) -> None:
        older = self._live.get(link.peer)
        if older is not None:
            older.close("replaced by a newer stream of the same peer")
        self._live[link.peer] = link
        self._running.add(link)
        log.debug("link_opened", extra={"peer": link.peer, "dialled": link.dialled})
        try:
            self.on_up(link)
        except Exception as error:
            self._defect(link, error)

    def link_closed(self, link: Link, reason: str) -> None:
        if self._live.get(link.peer) is not link:
            return
        del self._live[link.peer]
        log.debug("link_closed", extra={"peer": link.peer, "reason": reason})
        try:
            self.on_down(link, reason)
        except Exception as error:
            self._defect(link, error)

    def rider(self, link: Link) -> Frame | None:
        return self.before_write(link)

    def frame_arrived(self, link: Link, frame: Frame) -> None:
        try:
            self.on_message(link, frame)
        except PeerError as error:
            self.counts["peer_errors"] += 1
            log.info("message_refused", extra={"peer": link.peer, "reason": str(error)})
            link.fail(error)
        except Exception as error:
            self._defect(link, error)

    def _defect(self, link: Link, error: Exception) -> None:
        """A callback of ours failed, which costs this link only."""
        self.counts["defects"] += 1
        log.error("link_callback_failed", extra={"peer": link.peer}, exc_info=error)
        link.close("a defect of this node")


class _Attempt:
    """A dial under way; cancelled when a stream of the lower peer makes it pointless."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.over = trio.Event()
