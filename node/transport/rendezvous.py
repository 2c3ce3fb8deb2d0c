"""TCP's simultaneous open: both sides dial, from the ports that their routers have opened already.

A router with NAT lets in what looks like an answer. If it gives a port of this machine the same
port outside whoever is dialled, as most do, then the port of our connection with a relay, as
the relay sees it, is where an answer may come in. So a second socket is bound to that port.
"""

from __future__ import annotations

import socket
from typing import Any, Final

import trio

from aivillage.protocols.ports import SomebodyElseError, Stream
from aivillage.protocols.types import PeerId

IDENTIFY: Final = "/ipfs/id/1.0.0"
IDENTIFY_BYTES_MAX: Final = 16 * 1024
IDENTIFY_SECONDS: Final = 5.0
MEET_SECONDS: Final = 10.0
"""For Noise and Yamux, once there is a socket."""
OPEN_SECONDS: Final = 4.0
"""The first packet, and two that the kernel sends again where a router dropped it, at 1 and 3 s."""
AGAIN_SECONDS: Final = 0.2
"""After a refusal: some routers refuse what they did not expect yet."""


def local_end(connection: Any) -> tuple[str, int] | None:
    """Where a connection of the library leaves this machine; None: not by TCP over IPv4.

    Its port is shared from now on, which Linux allows afterwards too.
    """
    found: Any = connection.muxed_conn.secured_conn
    for name in ("conn", "read_writer", "read_write_closer", "stream", "_raw", "stream", "stream"):
        found = getattr(found, name, None)
    if not isinstance(found, trio.SocketStream) or found.socket.family != socket.AF_INET:
        return None
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        found.socket.setsockopt(socket.SOL_SOCKET, option, 1)
    host, port = found.socket.getsockname()
    return str(host), int(port)


async def observed(stream: Stream) -> str:
    """The address, `/ip4/<ip>/tcp/<port>`, at which who answers on a stream of identify sees us.

    Empty where it does not say. Raises: PeerError: PEER_LOST.
    """
    import multiaddr
    from libp2p.identity.identify.identify import parse_identify_response

    answer = bytearray()
    with trio.move_on_after(IDENTIFY_SECONDS):
        while chunk := await stream.read(IDENTIFY_BYTES_MAX):
            answer += chunk
            if len(answer) > IDENTIFY_BYTES_MAX:
                return ""
    try:
        return str(multiaddr.Multiaddr(parse_identify_response(bytes(answer)).observed_addr))
    except Exception:  # the library raises whatever it likes of what a peer wrote
        return ""


async def met(
    swarm: Any, source: tuple[str, int], target: tuple[str, int], peer: Any, *, begins: bool
) -> Any:
    """The library's connection with `peer`, who is at `target` and dials `source` just now."""
    from libp2p.io.trio import TrioTCPStream
    from libp2p.network.connection.raw_connection import RawConnection

    stream: Any = TrioTCPStream(await opened_together(source, target))
    raw = RawConnection(stream, begins)
    try:
        with trio.fail_after(MEET_SECONDS):
            if begins:
                return (await swarm.upgrade_outbound_raw_conn(raw, peer)).muxed_conn
            muxed = await swarm.upgrade_inbound_raw_conn(raw, "a meeting")
            await _require(muxed, peer)
            return muxed
    except BaseException:
        with trio.CancelScope(shield=True):
            await raw.close()
        raise


async def _require(muxed: Any, peer: Any) -> None:
    """Raises: SomebodyElseError: another peer than `peer` proved to be there; it is closed."""
    if muxed.peer_id != peer:
        await muxed.close()
        found = PeerId(str(muxed.peer_id))
        raise SomebodyElseError(f"{found} came to the meeting", found)


async def opened_together(source: tuple[str, int], target: tuple[str, int]) -> trio.SocketStream:
    """A connection from `source`, a port of this machine, with `target`, who dials it just now.

    Raises:
        OSError: there came none; also TimeoutError.
    """
    failure = OSError("it did not come about")
    with trio.move_on_after(OPEN_SECONDS):
        while True:
            try:
                return await _dialled(source, target)
            except ConnectionRefusedError as error:
                failure = error
            await trio.sleep(AGAIN_SECONDS)
    raise failure


async def _dialled(source: tuple[str, int], target: tuple[str, int]) -> trio.SocketStream:
    line = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            line.setsockopt(socket.SOL_SOCKET, option, 1)
        await line.bind(source)
        await line.connect(target)
    except BaseException:
        line.close()
        raise
    return trio.SocketStream(line)
