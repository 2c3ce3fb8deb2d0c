"""The transport between machines: py-libp2p behind `Transport`, made safe to be cancelled.

Cancelling a library call can cut an encrypted frame in half and with it the connection. So every
call that writes runs in a task of the transport: the caller may leave, the call goes on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final
from weakref import WeakSet, WeakValueDictionary

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aivillage.node.transport import circuit, rendezvous
from aivillage.node.transport.as_it_comes import Ear, plain_data
from aivillage.node.transport.at_once import shortcut
from aivillage.node.transport.faults import lost, reason_of, tell_who_is_there
from aivillage.node.transport.host import run_host
from aivillage.node.transport.patches import PromptLock
from aivillage.node.transport.psk import Guard
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.ports import Seen, Stream, StreamHandler
from aivillage.protocols.types import PeerId, peer_id

log = logging.getLogger("aivillage.transport")

DIAL_SECONDS: Final = 10.0
OPEN_SECONDS: Final = 10.0
ADOPT_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 1.0
PROBE_SECONDS: Final = 5.0
LINGER_SECONDS: Final = 5.0
"""Noise's own words, once the other side has proved who it is."""
"""How long a closed stream is drained before it is reset: what the peer still sends is lost."""


@asynccontextmanager
async def open_libp2p(
    key: Ed25519PrivateKey, listen: str, village_key: bytes | None = None
) -> AsyncIterator[Libp2pTransport]:
    """A node on the network under the identity `key`, listening on `listen` ("ip:port").

    `village_key`: 32 bytes that whoever connects must have too; None: nobody needs any.

    Raises:
        ConfigError: `listen` is malformed or taken.
    """
    guard = Guard(village_key)
    async with run_host(key, listen, guard) as host, trio.open_nursery() as nursery:
        peer = peer_id(key.public_key().public_bytes_raw())
        transport = Libp2pTransport(host, peer, nursery, guard)
        log.info("transport_opened", extra={"addresses": transport.addresses()})
        try:
            yield transport
        finally:
            with trio.CancelScope(shield=True):
                await transport.hang_up_all()
            nursery.cancel_scope.cancel()


class Libp2pTransport:
    """A `Transport` over TCP, Noise and Yamux."""

    def __init__(self, host: Any, peer: PeerId, nursery: trio.Nursery, guard: Guard) -> None:
        self._host = host
        self._guard = guard
        self._swarm = host.get_network()
        self._peer = peer
        self._nursery = nursery
        self._dials: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._met: WeakSet[Any] = WeakSet()
        self._meeting: set[Any] = set()
        self._made: WeakValueDictionary[PeerId, Any] = WeakValueDictionary()

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def village_key(self) -> bytes | None:
        return self._guard.key

    @village_key.setter
    def village_key(self, key: bytes | None) -> None:
        self._guard.key = key

    def refused(self) -> tuple[int, str]:
        return self._guard.refused, self._guard.last_refused

    def addresses(self) -> tuple[str, ...]:
        from libp2p.utils.address_validation import expand_wildcard_address

        found = [
            expanded
            for listener in self._swarm.listeners.values()
            for address in listener.get_addrs()
            for expanded in expand_wildcard_address(address)
        ]
        return tuple(dict.fromkeys(f"{address}/p2p/{self._peer}" for address in found))

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        async def handle(library_stream: Any) -> None:
            stream = Libp2pStream(library_stream, self._nursery)
            try:
                await handler(stream)
            except PeerError as error:
                log.info("stream_lost", extra={"peer": stream.peer, "reason": str(error)})
                await stream.reset()
                return
            except Exception as error:
                details = {"protocol": protocol, "peer": stream.peer}
                log.warning("stream_handler_failed", extra=details, exc_info=error)
                await stream.reset()
                return
            await stream.close()

        self._host.set_stream_handler(protocol, handle)

    async def dial(self, address: str) -> PeerId:
        maddr, peer = _parsed(address)
        name = PeerId(str(peer))
        if name == self._peer:
            raise RequestError("this is the node's own address", next_step="dial another node")
        async with self._dials.setdefault(address, trio.Lock()):
            if not any(map(circuit.is_direct, self._open_connections(peer))):
                # Straight to the address: the library's own way tries one address per kind only,
                # waits 250 ms after a success, and refuses a peer for a minute after a failure.
                call = _Call(self._swarm.dial_addr, maddr, peer)
                call.if_abandoned = functools.partial(self._keep_one, name)
                try:
                    made = await call.run_in(
                        self._nursery, DIAL_SECONDS, f"nobody answers at {address}"
                    )
                except PeerError as error:
                    tell_who_is_there(error, address)
                    raise
                await self._keep_one(name, made)
        return name

    async def _keep_one(self, peer: PeerId, made: Any) -> None:
        """Of several addresses dialled at a time the first connection stays, later ones go."""
        first = self._made.get(peer)
        if first is None or first.is_closed:
            self._made[peer] = made
        elif first is not made:
            await _Call(made.close).wait_in(self._nursery, CLOSE_SECONDS)

    async def probe(self, address: str) -> None:
        _, peer = _parsed(address)
        call = _Call(self._prove, address, peer)
        try:
            await call.run_in(self._nursery, PROBE_SECONDS, f"nobody answers at {address}")
        except PeerError as error:
            tell_who_is_there(error, address)
            raise

    async def _prove(self, address: str, peer: Any) -> None:
        """Past the list of connections: this one carries nothing but the proof."""
        import multiaddr

        maddr = multiaddr.Multiaddr(address)
        with trio.fail_after(PROBE_SECONDS):
            raw = await self._swarm.transport_manager.transport_for_dialing(maddr).dial(maddr)
            try:
                await self._swarm.upgrader.upgrade_security(raw, True, peer)
            finally:
                with trio.CancelScope(shield=True):
                    await raw.close()

    def host_of(self, peer: PeerId) -> str:
        for connection in self._swarm.get_connections(_library_peer(peer)):
            if not connection.is_closed:
                found = connection.muxed_conn.secured_conn.get_remote_address()
                if found is not None:
                    return str(found[0])
        return ""

    async def open_stream(self, peer: PeerId, protocol: str) -> Libp2pStream:
        library_peer = _library_peer(peer)
        await trio.lowlevel.checkpoint()
        if not self._open_connections(library_peer):
            raise lost(f"not connected to {peer}")
        call = _Call(self._host.new_stream, library_peer, [protocol])
        reason = f"{peer} did not open a stream for {protocol}"
        call.if_abandoned = _reset_library_stream
        return Libp2pStream(await call.run_in(self._nursery, OPEN_SECONDS, reason), self._nursery)

    async def hang_up(self, peer: PeerId) -> None:
        # One by one: the library's `close_peer` forgets every connection of a peer, also that by
        # which it came back meanwhile.
        async with trio.open_nursery() as nursery:
            for connection in list(self._swarm.get_connections(_library_peer(peer))):
                nursery.start_soon(self._end, peer, connection)

    async def _end(self, peer: PeerId, connection: Any) -> None:
        call = _Call(connection.close)
        try:
            await call.run_in(self._nursery, CLOSE_SECONDS, "closing took too long")
        except PeerError as error:
            # A peer that does not read blocks the goodbye: close the socket under it.
            log.info("connection_cut", extra={"peer": peer, "reason": str(error)})
            await _cut(connection)

    async def hang_up_all(self) -> None:
        """As `hang_up` for everybody at once: a peer that is stuck delays nobody's end."""
        async with trio.open_nursery() as nursery:
            for library_peer in list(self._swarm.connections):
                nursery.start_soon(self.hang_up, PeerId(str(library_peer)))

    async def adopt(self, stream: Stream, peer: PeerId | None) -> PeerId:
        raw = circuit.raw_connection(stream, dialled=peer is not None)
        call = _Call(self._upgrade, raw, peer)
        try:
            muxed = await call.run_in(self._nursery, ADOPT_SECONDS, "nobody at the other end")
        except BaseException as error:
            # An upgrade that nobody waits for any more ends with its stream.
            with trio.CancelScope(shield=True):
                await stream.close()
            if isinstance(error, PeerError):
                tell_who_is_there(error, "the other end of a circuit")
            raise
        return PeerId(str(muxed.peer_id))

    async def _upgrade(self, raw: Any, peer: PeerId | None) -> Any:
        if peer is None:
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, "a circuit")
        else:
            upgrade = self._swarm.upgrade_outbound_raw_conn
            muxed = (await upgrade(raw, _library_peer(peer))).muxed_conn
        self._nursery.start_soon(self._close_with, muxed, raw)
        return muxed

    async def _close_with(self, muxed: Any, raw: Any) -> None:
        await muxed.event_closed.wait()
        await raw.close()

    def callers(self) -> tuple[PeerId, ...]:
        return tuple(
            PeerId(str(library_peer))
            for library_peer in list(self._swarm.connections)
            for connection in self._open_connections(library_peer)
            if circuit.is_direct(connection)
            and circuit.is_inbound(connection)
            # Both dialled: that does not say that anybody else could.
            and connection.muxed_conn not in self._met
            and library_peer not in self._meeting
        )

    def met(self) -> tuple[PeerId, ...]:
        return tuple(
            PeerId(str(muxed.peer_id))
            for muxed in list(self._met)
            if not muxed.event_closed.is_set()
        )

    async def seen_by(self, peer: PeerId) -> Seen | None:
        known = self._open_connections(_library_peer(peer))
        direct = [connection for connection in known if circuit.is_direct(connection)]
        if not direct:
            raise lost(f"not connected to {peer}")
        source = rendezvous.local_end(direct[0])
        if len(known) > 1 or source is None:
            return None  # the answer could be about another connection than this one
        stream = await self.open_stream(peer, rendezvous.IDENTIFY)
        try:
            address = await rendezvous.observed(stream)
        finally:
            with trio.CancelScope(shield=True):
                await stream.close()
        return Seen(address=address, source=source) if address else None

    async def meet(self, source: tuple[str, int], address: str, *, begins: bool) -> None:
        maddr, peer = _parsed(address)
        target = maddr.value_for_protocol("ip4"), int(maddr.value_for_protocol("tcp"))
        call = _Call(self._meet, source, target, peer, begins)
        seconds = rendezvous.OPEN_SECONDS + rendezvous.MEET_SECONDS
        try:
            await call.run_in(self._nursery, seconds, f"nobody met at {address}")
        except PeerError as error:
            tell_who_is_there(error, address)
            raise

    async def _meet(
        self, source: tuple[str, int], target: tuple[str, int], peer: Any, begins: bool
    ) -> None:
        self._meeting.add(peer)
        try:
            muxed = await rendezvous.met(self._swarm, source, target, peer, begins=begins)
            self._met.add(muxed)
        finally:
            self._meeting.discard(peer)

    def _open_connections(self, library_peer: Any) -> list[Any]:
        known = self._swarm.get_connections(library_peer)
        return [connection for connection in known if not connection.is_closed]


class Libp2pStream:
    """A `Stream` on a Yamux stream."""

    def __init__(self, library_stream: Any, nursery: trio.Nursery) -> None:
        self._library = library_stream
        self._muxed = library_stream.muxed_stream
        self._nursery = nursery
        self._in_order = PromptLock()
        self._closing = False
        self._peer = PeerId(str(library_stream.muxed_conn.peer_id))
        self._shortcut = shortcut(self._muxed, nursery)

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def read(self, size_bytes_max: int) -> bytes:
        if self._closing:
            raise lost("the stream is closed")
        try:
            return await self._read(size_bytes_max)
        except Exception as error:
            raise lost(f"the stream with {self._peer} broke: {error!r}") from error

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closing:
            raise lost("the stream is closed")
        call = _Call(self._write, data)
        await call.run_in(self._nursery, None, f"the stream with {self._peer} broke")

    def listen(self, take: Callable[[bytes], bool]) -> None:
        self._muxed.ear = Ear(take)

    def write_now(self, data: bytes) -> bool:
        if self._shortcut is None or self._closing or self._in_order.locked():
            return False
        return self._shortcut.write(data)

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            await _Call(self._finish).wait_in(self._nursery, CLOSE_SECONDS)

    async def reset(self) -> None:
        """Ends both directions at once; never raises, never blocks for longer than a second."""
        self._closing = True
        await _Call(self._library.reset).wait_in(self._nursery, CLOSE_SECONDS)

    async def _read(self, size_bytes_max: int) -> bytes:
        from libp2p.stream_muxer.exceptions import MuxedStreamEOF

        if plain := await plain_data(self._muxed, size_bytes_max):
            return plain
        try:
            data: bytes = await self._muxed.read(size_bytes_max)
        except MuxedStreamEOF:
            # The library also says EOF when the whole connection is gone.
            if self._muxed.reset_received or self._muxed.conn.event_shutting_down.is_set():
                raise
            return b""
        return data

    async def _write(self, data: bytes) -> None:
        async with self._in_order:
            await self._muxed.write(data)

    async def _finish(self) -> None:
        """Says the end, then reads until the peer has said it too, so that nothing is cut off."""
        ended = _Call(self._say_end)
        with trio.move_on_after(LINGER_SECONDS):
            await ended.run_in(self._nursery, None, "the stream broke")
            while await self._read(65_536):
                pass
            await self._library.remove()
            return
        await self._library.reset()

    async def _say_end(self) -> None:
        async with self._in_order:
            await self._muxed.close()


class _Call:
    """A library call in a task of the transport, which its caller may stop waiting for."""

    def __init__(self, call: Callable[..., Awaitable[Any]], *args: Any) -> None:
        self._call = call
        self._args = args
        self._done = trio.Event()
        self._result: Any = None
        self._error: Exception | None = trio.ClosedResourceError("the transport is closed")
        self._abandoned = False
        self.if_abandoned: Callable[[Any], Awaitable[None]] | None = None

    async def run_in(self, nursery: trio.Nursery, seconds: float | None, failure: str) -> Any:
        """Its result. Raises: PeerError: PEER_LOST with `failure`, it failed or took too long."""
        if not await self.wait_in(nursery, seconds):
            raise lost(f"{failure} within {seconds:g} s")
        if self._error is not None:
            raise lost(f"{failure}: {reason_of(self._error)}") from self._error
        return self._result

    async def wait_in(self, nursery: trio.Nursery, seconds: float | None) -> bool:
        """Whether it ended in time, well or not."""
        if nursery.cancel_scope.cancel_called:
            # Handlers end a little later than the transport; it starts nothing for them.
            return True
        nursery.start_soon(self._run)
        try:
            with trio.move_on_after(float("inf") if seconds is None else seconds):
                await self._done.wait()
        finally:
            self._abandoned = not self._done.is_set()
        return self._done.is_set()

    async def _run(self) -> None:
        try:
            self._result = await self._call(*self._args)
            self._error = None
        except Exception as error:
            self._error = error
            log.debug("library_call_failed", extra={"reason": repr(error)})
        finally:
            self._done.set()
        if self._abandoned and self.if_abandoned is not None and self._error is None:
            await self.if_abandoned(self._result)


async def _reset_library_stream(library_stream: Any) -> None:
    """A stream that nobody waits for any more must not stay open."""
    try:
        await library_stream.reset()
    except Exception as error:
        log.debug("library_call_failed", extra={"reason": repr(error)})


async def _cut(connection: Any) -> None:
    try:
        await connection.muxed_conn.secured_conn.close()
    except Exception as error:
        log.debug("library_call_failed", extra={"reason": repr(error)})


def _parsed(address: str) -> tuple[Any, Any]:
    """The address without its peer, and the peer."""
    import multiaddr
    from libp2p.peer.id import ID

    try:
        maddr = multiaddr.Multiaddr(address)
        peer = ID.from_base58(maddr.value_for_protocol("p2p"))
        return maddr.decapsulate(f"/p2p/{peer}"), peer
    except Exception as error:
        raise RequestError(
            f"{address!r} is no address of a node: {error}",
            next_step="write /ip4/<ip>/tcp/<port>/p2p/<peer id>",
        ) from None


def _library_peer(peer: PeerId) -> Any:
    from libp2p.peer.id import ID

    return ID.from_base58(peer)
