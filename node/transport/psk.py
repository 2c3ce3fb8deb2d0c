"""Private villages: connections only with nodes that have the same pre-shared key.

Under Noise, everything that leaves is XORed with XSalsa20 of the key and a nonce that goes first.
It keeps strangers out and authenticates nobody: that is Noise's part. The library has a private
network of its own with Salsa20 and nonces of 8 bytes, which is not what the specification says and
no other program speaks; with a wrong key it waits until a timeout. So this is ours.

Whoever has the right key, or needs none, begins with the name of the negotiation protocol. What
begins otherwise is told at once, and named.

Source: libp2p specifications, pnet/Private-Networks-PSK-V1.md; Bernstein, "Extending the Salsa20
nonce" (2008), for HSalsa20 and XSalsa20.
"""

from __future__ import annotations

import collections
import logging
import secrets
import struct
from typing import Any, Final

import trio

from aivillage.node.transport.arrivals import arrived

log = logging.getLogger("aivillage.transport")

NONCE_BYTES: Final = 24
FIRST_WORDS: Final = b"\x13/multistream/1.0.0\n"
"""What every libp2p program says first on every connection."""
HOSTS_TOLD_MAX: Final = 256
"""Whose refusal was logged already; a neighbour that tries each minute is told of once."""
AHEAD_BYTES: Final = 16_384
"""Read in one go where less is asked for: the head of a message, the message, the next one's head.
Held for as long as it takes to ask for it: the library reads all that comes."""
NOISE_LENGTH_BYTES: Final = 2
NO_KEY: Final = "its village has no key, and this node's has one"
OTHER_KEY: Final = "its village has another key than this node's"
OURS_MISSING: Final = "it does not speak libp2p, or its village has a key that this node lacks"

ENDED: Final = "it ended unheard: perhaps its village has another key than this node's, or none"
KEY_STEP: Final = "join by an invite of the village that it belongs to: such a one has its key"


class WrongKeyError(Exception):
    """The other side of a connection is not of this node's private network."""


class Guard:
    """Every connection of one host, made or accepted, direct or through a relay, passes here."""

    def __init__(self, key: bytes | None) -> None:
        """`key`: 32 bytes; None: no private network. It may be replaced at any time."""
        self.key = key
        self.refused = 0
        self.last_refused = ""
        """Of connections that others began: how many, and `HOST: why` of the last."""
        self._told: collections.OrderedDict[str, None] = collections.OrderedDict()

    def stand_before(self, upgrader: Any) -> None:
        """From now on `upgrader` secures only what is in the private network."""
        secure = upgrader.upgrade_security

        async def upgrade_security(raw: Any, is_initiator: bool, peer: Any = None) -> Any:
            inside = await self._inside(raw)
            try:
                return await secure(inside, is_initiator, peer)
            except WrongKeyError as error:
                if not is_initiator:
                    self._note((raw.get_remote_address() or ("a circuit", 0))[0], str(error))
                raise

        upgrader.upgrade_security = upgrade_security

    async def _inside(self, raw: Any) -> Any:
        from libp2p.network.connection.raw_connection import RawConnection

        lane: Any = Lane(raw, self.key)
        # Ours goes first, before anything is read: some programs wait for it.
        await lane.begin()
        return RawConnection(
            lane,
            raw.is_initiator,
            connection_type=raw.get_connection_type(),
            addresses=raw.get_transport_addresses(),
        )

    def _note(self, host: str, reason: str) -> None:
        self.refused += 1
        self.last_refused = f"{host}: {reason}"
        is_new = host not in self._told
        self._told[host] = None
        if len(self._told) > HOSTS_TOLD_MAX:
            self._told.popitem(last=False)
        log.log(
            logging.INFO if is_new else logging.DEBUG,
            "connection_outside_the_village",
            extra={"host": host, "reason": reason},
        )


class Lane:
    """What the library wants of a socket, on another one: XORed where there is a key."""

    def __init__(self, raw: Any, key: bytes | None) -> None:
        self._raw = raw
        self._socket = _socket_of(raw)
        self._key = key
        self._out: Any = None
        self._in: Any = None
        self._unseen = FIRST_WORDS
        """What must still come before anything else does."""
        self._ahead = b""
        """What came and was not asked for yet."""

    async def begin(self) -> None:
        if self._key is not None:
            nonce = secrets.token_bytes(NONCE_BYTES)
            self._out = xsalsa20(self._key, nonce)
            await self._raw.write(nonce)

    async def write(self, data: bytes) -> None:
        # The cipher goes on with each byte, so writes must come one after the other: Noise's must.
        try:
            await self._raw.write(self.sealed(data))
        except Exception as error:
            self._judge(error)
            raise

    def sealed(self, data: bytes) -> bytes:
        """As it leaves; once for each piece, in their order."""
        out: bytes = data if self._out is None else self._out.encrypt(data)
        return out

    @property
    def raw_socket(self) -> Any:
        """The library's own stream of it."""
        return self._raw.stream

    async def read(self, n: int | None = None) -> bytes:
        if self._unseen:
            return await self._first(n)
        if not self._ahead and n != 0:
            if n is None or n >= AHEAD_BYTES:
                return await self._next(n)
            self._ahead = await self._next(AHEAD_BYTES)
        size = len(self._ahead) if n is None else n
        piece, self._ahead = self._ahead[:size], self._ahead[size:]
        return piece

    async def message(self) -> bytes | None:
        """The next one of Noise, as it came; None: it is too early, or there is no next one."""
        while not self._unseen:
            ahead = self._ahead
            size = int.from_bytes(ahead[:NOISE_LENGTH_BYTES], "big")
            end = NOISE_LENGTH_BYTES + size
            if len(ahead) >= max(end, NOISE_LENGTH_BYTES):
                self._ahead = ahead[end:]
                return ahead[NOISE_LENGTH_BYTES:end]
            more = await self._next(max(AHEAD_BYTES, end - len(ahead)))
            if not more:
                return None
            self._ahead = ahead + more
        return None

    async def _next(self, n: int | None) -> bytes:
        data = (
            b""
            if self._socket is None
            else await arrived(self._socket.socket.fileno(), n or AHEAD_BYTES)
        )
        if not data:  # no socket below, or it ended or broke: the library finds out how
            data = await self._raw.read(n)
        return data if self._in is None else self._in.decrypt(data)

    async def _first(self, n: int | None) -> bytes:
        """As `read`, while it is not clear who is there. Raises: WrongKeyError."""
        try:
            if self._key is not None and self._in is None:
                self._in = xsalsa20(self._key, await self._nonce())
            data: bytes = await self._raw.read(n)
        except Exception as error:
            self._judge(error)
            raise
        if self._in is not None:
            data = self._in.decrypt(data)
            if not data:
                raise WrongKeyError(ENDED)
        self._look(data)
        return data

    def _judge(self, error: Exception) -> None:
        """Whoever lacks the key resets the connection, often before its first words get through.

        Raises: WrongKeyError: this may be such a one.
        """
        if self._key is not None and self._unseen and not isinstance(error, WrongKeyError):
            raise WrongKeyError(ENDED) from None

    async def _nonce(self) -> bytes:
        """Raises: WrongKeyError: the other side speaks in the open, or not at all."""
        found = b""
        while len(found) < NONCE_BYTES:
            piece = await self._raw.read(NONCE_BYTES - len(found))
            if not piece:
                raise WrongKeyError(ENDED)
            found += piece
            if found.startswith(FIRST_WORDS):
                raise WrongKeyError(NO_KEY)
        return found

    def _look(self, data: bytes) -> None:
        """Raises: WrongKeyError: these are not the first words, as this node reads them."""
        size = min(len(data), len(self._unseen))
        if data[:size] != self._unseen[:size]:
            raise WrongKeyError(OURS_MISSING if self._key is None else OTHER_KEY)
        self._unseen = self._unseen[size:]

    async def close(self) -> None:
        await self._raw.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        found: tuple[str, int] | None = self._raw.get_remote_address()
        return found


def _socket_of(raw: Any) -> trio.SocketStream | None:
    """What is right below a connection of the library's; None: something else than a socket."""
    below = getattr(getattr(raw, "stream", None), "stream", None)
    return below if type(below) is trio.SocketStream else None


def xsalsa20(key: bytes, nonce: bytes) -> Any:
    """A stream cipher of `key` (32 bytes) and `nonce` (24 bytes), at its beginning."""
    from Crypto.Cipher import Salsa20

    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


def hsalsa20(key: bytes, head: bytes) -> bytes:
    """32 bytes of `key` (32 bytes) and the nonce's first 16. Once a direction: 0.1 ms."""
    sigma = struct.unpack("<4I", b"expand 32-byte k")
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", head)
    x = [sigma[0], *k[:4], sigma[1], *n, sigma[2], *k[4:], sigma[3]]
    for _ in range(10):
        for step in (_COLUMNS, _ROWS):
            for quarter in step:
                _mix(x, *quarter)
    return struct.pack("<8I", *(x[at] for at in (0, 5, 10, 15, 6, 7, 8, 9)))


_COLUMNS: Final = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
_ROWS: Final = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))


def _mix(x: list[int], a: int, b: int, c: int, d: int) -> None:
    for to, one, other, bits in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
        total = (x[one] + x[other]) & 0xFFFFFFFF
        x[to] ^= (total << bits | total >> 32 - bits) & 0xFFFFFFFF
