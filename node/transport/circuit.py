"""A stream through a relay, dressed as a socket, so that the host runs Noise and Yamux over it."""

from __future__ import annotations

from typing import Any

from aivillage.protocols.errors import PeerError
from aivillage.protocols.ports import Stream


class Carrier:
    """What the library wants of a socket (`ReadWriteCloser`), on a stream of ours.

    Ours may be cancelled at any moment, and a write that was cancelled still goes out whole.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        try:
            data = await self._stream.read(n or 65_536)
        except PeerError as error:
            raise _closed(str(error)) from error
        if not data:
            # The library would ask again a hundred times.
            raise _closed("the circuit ended")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except PeerError as error:
            raise _closed(str(error)) from error

    async def close(self) -> None:
        await self._stream.close()

    def get_remote_address(self) -> None:
        """The relay's would be a lie."""


def raw_connection(stream: Stream, *, dialled: bool) -> Any:
    """The library's unencrypted connection over `stream`, which says that it is relayed."""
    from libp2p.connection_types import ConnectionType
    from libp2p.network.connection.raw_connection import RawConnection

    carrier: Any = Carrier(stream)
    return RawConnection(carrier, dialled, connection_type=ConnectionType.RELAYED, addresses=[])


def is_direct(connection: Any) -> bool:
    """Whether no relay is in between."""
    from libp2p.connection_types import ConnectionType

    return bool(connection.get_connection_type() != ConnectionType.RELAYED)


def is_inbound(connection: Any) -> bool:
    from libp2p.rcmgr import Direction

    return bool(connection.direction == Direction.INBOUND)


def _closed(reason: str) -> Exception:
    from libp2p.io.exceptions import ConnectionClosedError

    return ConnectionClosedError(reason, transport="circuit")
