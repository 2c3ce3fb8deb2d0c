"""Does without a relay where both ends are behind routers: they agree to dial at one moment.

Their routers may not allow it. So it is tried seldom, ever more seldom, and nobody waits for it:
the link stays on the relay until a direct connection is there and nothing is under way.

Source: libp2p specifications, relay/DCUtR.md, whose messages these resemble.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
import trio

from aivillage.node.events import Events
from aivillage.node.framing import FrameReader
from aivillage.node.relay_talk import say
from aivillage.protocols.errors import AivillageError, PeerError
from aivillage.protocols.meeting import PUNCH_PROTOCOL, Meet, Meeting, Now, place
from aivillage.protocols.ports import Seen, Stream, Transport
from aivillage.protocols.relaying import TALK_BYTES_MAX
from aivillage.protocols.types import PeerId, Seconds

PAUSE_SECONDS: Final = (5.0, 3600.0)
"""Between two tries with one peer: the first, and the longest."""
TALK_SECONDS: Final = 10.0
MEETINGS_MAX: Final = 4
"""At a time: each is a few packets to an address that somebody else named."""
PEERS_MAX: Final = 1000
T = TypeVar("T", Meet, Now)

_meeting: Final[msgspec.msgpack.Decoder[Meeting]] = msgspec.msgpack.Decoder(Meeting)


class Pauses:
    """When to try again with whom: twice as long after each try, success or not.

    A direct connection that does not last must not become a relayed one and back every few seconds.
    Who was not tried for twice the longest pause begins anew. Plain calls.
    """

    def __init__(self) -> None:
        self._tried: collections.OrderedDict[PeerId, tuple[float, Seconds]] = (
            collections.OrderedDict()
        )

    def begin(self, peer: PeerId, now: float) -> bool:
        """Whether a try may begin now; then it counts as one."""
        first, longest = PAUSE_SECONDS
        at, pause = self._tried.get(peer, (now - 2 * longest, 0.0))
        if now - at < pause:
            return False
        pause = first if now - at >= 2 * longest else min(2 * pause, longest)
        self._tried.pop(peer, None)
        self._tried[peer] = (now, pause)
        if len(self._tried) > PEERS_MAX:
            self._tried.popitem(last=False)
        return True


class Punching:
    """Both sides of it: whose id is lower asks, the other answers."""

    def __init__(
        self,
        transport: Transport,
        events: Events,
        *,
        relay_of: Callable[[PeerId], PeerId | None],
        is_member: Callable[[PeerId], bool],
    ) -> None:
        self._transport = transport
        self._events = events
        self._relay_of = relay_of
        self._is_member = is_member
        self._asked, self._answered = Pauses(), Pauses()
        self._under_way = 0
        transport.serve(PUNCH_PROTOCOL, self.answer)

    async def ask(self, peer: PeerId) -> str | None:
        """The address at which `peer` is connected directly now; None: not, or not our turn."""
        relay = self._relay_of(peer)
        if relay is None or self._transport.peer > peer:
            return None
        if self._under_way >= MEETINGS_MAX or not self._asked.begin(peer, trio.current_time()):
            return None
        self._under_way += 1
        try:
            address = await self._ask(peer, relay)
        except AivillageError as error:
            self._note("punch_failed", peer, str(error))
            return None
        finally:
            self._under_way -= 1
        self._note("punched", peer, address)
        return address

    async def _ask(self, peer: PeerId, relay: PeerId) -> str:
        seen = await self._seen_by(relay)
        stream = await self._transport.open_stream(peer, PUNCH_PROTOCOL)
        try:
            with trio.fail_after(TALK_SECONDS):
                reader, began = FrameReader(stream, TALK_BYTES_MAX), trio.current_time()
                await say(stream, Meet(address=seen.address))
                target = await _heard(reader, Meet)
                place(target.address)
                round_trip = trio.current_time() - began
                await say(stream, Now())
                await trio.sleep(round_trip / 2)
            address = f"{target.address}/p2p/{peer}"
            await self._transport.meet(seen.source, address, begins=True)
        except trio.TooSlowError:
            raise PeerError("it does not answer", code="PEER_LOST") from None
        finally:
            with trio.CancelScope(shield=True):
                await stream.close()
        return address

    async def answer(self, stream: Stream) -> None:
        """The handler of inbound streams; whoever may not ask hears the stream's end."""
        peer, now = stream.peer, trio.current_time()
        relay = self._relay_of(peer)
        if relay is None or not self._is_member(peer) or peer > self._transport.peer:
            return
        if self._under_way >= MEETINGS_MAX or not self._answered.begin(peer, now):
            return
        self._under_way += 1
        try:
            await self._answer(stream, relay)
        except AivillageError as error:
            self._note("punch_failed", peer, str(error))
        except trio.TooSlowError:
            self._note("punch_failed", peer, "it does not answer")
        finally:
            self._under_way -= 1

    async def _answer(self, stream: Stream, relay: PeerId) -> None:
        reader = FrameReader(stream, TALK_BYTES_MAX)
        with trio.fail_after(TALK_SECONDS):
            target = (await _heard(reader, Meet)).address
            place(target)
            seen = await self._seen_by(relay)
            await say(stream, Meet(address=seen.address))
            await _heard(reader, Now)
        await self._transport.meet(seen.source, f"{target}/p2p/{stream.peer}", begins=False)

    async def _seen_by(self, relay: PeerId) -> Seen:
        seen = await self._transport.seen_by(relay)
        if seen is None:
            raise PeerError("the relay does not say where it sees this node", code="PEER_LOST")
        place(seen.address)
        return seen

    def _note(self, name: str, peer: PeerId, what: str) -> None:
        self._events.emit(name, level=logging.INFO, peer=peer, what=what[:200])


async def _heard(reader: FrameReader, kind: type[T]) -> T:
    """Raises: PeerError: PEER_LOST; BAD_REQUEST, something else was said."""
    try:
        found = _meeting.decode(await reader.next())
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise PeerError(f"no talk of a meeting: {error}", code="BAD_REQUEST") from None
    if not isinstance(found, kind):
        raise PeerError(f"{type(found).__name__} out of turn", code="BAD_REQUEST")
    return found
