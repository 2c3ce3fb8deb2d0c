"""The relay: joins the streams of two villagers who cannot reach each other.

It sees who talks to whom and how much, and Noise's ciphertext. Whoever holds a reservation pays for
what is carried to and from it, and all is within the limits of the owner; see relay_tab.py and
docs/decisions/0004-relay.md.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

import msgspec
import trio

from aivillage.node.events import Events
from aivillage.node.framing import RateLimit
from aivillage.node.relay_tab import Tab, Toll
from aivillage.node.relay_talk import ask, hear, refusal, say
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError
from aivillage.protocols.ports import PromptStream, Stream, StreamHandler, Transport
from aivillage.protocols.relaying import (
    RELAY_PROTOCOL,
    Granted,
    Incoming,
    Reach,
    Reserve,
)
from aivillage.protocols.types import PeerId

TALK_SECONDS: Final = 10.0
"""For a question or an answer; a slow WAN needs one."""
RESERVATIONS_MAX: Final = 64
"""A village's NATed machines, each a stream that says nothing."""
CIRCUITS_PER_PEER_MAX: Final = 8
"""Of one dialler: nobody takes all of a relay."""
PIECE_BYTES: Final = 64 * 1024
DAY_SECONDS: Final = 86_400
KEEP_SECONDS: Final = 5.0
"""A node that is killed forgets what it relayed in the last ones."""
DAY_SETTING: Final = "relayed_today"


class RelayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner gives. `circuits` are open at the same time, the rest is for all together."""

    circuits: int
    bytes_per_second: int
    bytes_a_day: int


class Shelf(Protocol):
    """Where a count outlives the process: the settings in jobs.db."""

    async def setting(self, key: str) -> bytes | None: ...
    async def set_setting(self, key: str, value: bytes) -> None: ...


class Day(msgspec.Struct):
    """Bytes relayed on one day (UTC), both directions, all circuits. Plain calls."""

    bytes_max: int
    number: int = 0
    spent_bytes: int = 0
    full: bool = False

    def spend(self, size_bytes: int, unix_seconds: float) -> bool:
        """Counts a piece that is to go out, or says that it may not."""
        self._turn(unix_seconds)
        self.full = self.full or self.spent_bytes + size_bytes > self.bytes_max
        if self.full:
            return False
        self.spent_bytes += size_bytes
        return True

    def is_over(self, unix_seconds: float) -> bool:
        self._turn(unix_seconds)
        return self.full or self.spent_bytes >= self.bytes_max

    def _turn(self, unix_seconds: float) -> None:
        today = int(unix_seconds // DAY_SECONDS)
        if today != self.number:
            self.number, self.spent_bytes, self.full = today, 0, False


class Circuit:
    """Two streams that are one."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab
        self.scope = trio.CancelScope()
        self.carried_bytes = 0


class Relay:
    """Serves reservations and circuits."""

    def __init__(
        self,
        *,
        transport: Transport,
        is_member: Callable[[PeerId], bool],
        limits: RelayLimits | None,
        shelf: Shelf,
        events: Events,
        incoming: StreamHandler,
        toll: Toll,
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        """`limits`: None where the owner does not relay. `incoming` gets what is for this node."""
        self._transport = transport
        self._is_member = is_member
        self._limits = limits
        self._shelf = shelf
        self._events = events
        self._now = unix_seconds
        self._day = Day(limits.bytes_a_day if limits else 0)
        self._rate = RateLimit(limits.bytes_per_second if limits else 1)
        self._reservations: dict[PeerId, Tab] = {}
        self._toll = toll
        self._circuits: Counter[PeerId] = Counter()
        self._incoming = incoming
        transport.serve(RELAY_PROTOCOL, self.accept)

    def status(self) -> dict[str, int]:
        """For `status`: what it does for others now, and did today."""
        self._day.is_over(self._now())
        return {
            "reservations": len(self._reservations),
            "circuits": self._circuits.total(),
            "bytes_today": self._day.spent_bytes,
            "bytes_a_day": self._day.bytes_max,
            "price_micro_credits_per_gib": self._toll.price,
            "earned_micro_credits": self._toll.earned,
        }

    async def run(self) -> None:
        """Keeps the day's count, so that a restart does not begin a new day."""
        kept = await self._shelf.setting(DAY_SETTING)
        if kept:
            number, spent = msgspec.msgpack.decode(kept, type=tuple[int, int])
            self._day.is_over(self._now())
            if number == self._day.number:
                self._day.spent_bytes += spent
        known = self._day.spent_bytes
        while True:
            await trio.sleep(KEEP_SECONDS)
            if self._day.spent_bytes != known:
                known = self._day.spent_bytes
                value = msgspec.msgpack.encode((self._day.number, known))
                await self._shelf.set_setting(DAY_SETTING, value)

    async def accept(self, stream: PromptStream) -> None:
        """The handler of inbound streams: lives as long as the reservation or circuit."""
        try:
            with trio.fail_after(TALK_SECONDS):
                admitted = await self._admit(stream, await hear(stream))
        except trio.TooSlowError:
            error = PeerError("the other side did not answer", code="PEER_LOST")
            await self._refuse(stream, error)
        except AivillageError as error:
            await self._refuse(stream, error)
        else:
            if admitted is None:
                await self._incoming(stream)
            elif isinstance(admitted, Tab):
                await self._reservation(admitted)
            else:
                await self._circuit(stream, admitted)

    async def _admit(self, stream: Stream, question: object) -> Tab | Stream | None:
        """A reservation's tab; the far stream of a circuit, granted by its end; None: it is for us.

        Raises:
            AivillageError: why not.
        """
        if isinstance(question, Incoming):
            return None
        if not isinstance(question, Reserve | Reach):
            raise PeerError(f"{type(question).__name__} is no question", code="BAD_REQUEST")
        self._check(stream.peer)
        if isinstance(question, Reserve):
            if (
                len(self._reservations) >= RESERVATIONS_MAX
                and stream.peer not in self._reservations
            ):
                raise _busy("this relay has all the reservations that it takes")
            return await self._toll.open(stream, question)
        return await self._reach(stream.peer, question)

    def _check(self, peer: PeerId) -> None:
        if self._limits is None:
            raise RefusedError("this node is no relay", code="NOT_OFFERED", next_step=ELSEWHERE)
        if not self._is_member(peer):
            raise RefusedError(
                "this node relays for its own village",
                code="OWNER_LIMIT",
                next_step="join the village, or use a relay of your own",
            )
        if self._day.is_over(self._now()):
            raise _spent()

    async def _reach(self, source: PeerId, question: Reach) -> Stream:
        assert self._limits is not None
        if question.peer not in self._reservations or not self._is_member(question.peer):
            raise PeerError(f"{question.peer} has no reservation here", code="PEER_LOST")
        if self._circuits.total() >= self._limits.circuits:
            raise _busy("this relay has all the circuits that its owner allows")
        if self._circuits[source] >= CIRCUITS_PER_PEER_MAX:
            raise _busy(f"you have {CIRCUITS_PER_PEER_MAX} circuits here")
        self._circuits[source] += 1  # before anything is waited for
        far = None
        try:
            far = await self._transport.open_stream(question.peer, RELAY_PROTOCOL)
            await ask(far, Incoming(peer=source))
        except BaseException:
            self._end(source)
            if far is not None:
                with trio.CancelScope(shield=True):
                    await far.close()
            raise
        return far

    def _end(self, source: PeerId) -> None:
        self._circuits[source] -= 1
        self._circuits += Counter()  # forgets who has none

    # ------------------------------------------------------------------ living
    async def _reservation(self, tab: Tab) -> None:
        """Lives as long as its stream; a newer one of the same peer takes its place."""
        peer = tab.holder
        self._reservations[peer] = tab
        self._events.emit("relay_reserved", peer=peer)
        try:
            await say(tab.stream, tab.granted)
            with tab.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(tab.bill_now_and_then)
                    with suppress(PeerError):  # it is gone, which is the end
                        while await tab.stream.read(PIECE_BYTES):
                            continue  # nothing is said here; whoever talks is not answered
                    nursery.cancel_scope.cancel()
        finally:
            if self._reservations.get(peer) is tab:
                del self._reservations[peer]
            tab.close()
            if tab.unpaid:
                self._events.emit("relay_unpaid", peer=peer, micro_credits=tab.amount)

    async def _circuit(self, near: Stream, far: Stream) -> None:
        self._events.emit("circuit_opened", peer=near.peer, target=far.peer)
        carried = 0
        try:
            tab = self._reservations.get(far.peer)  # it may have left while its end was asked
            if tab is not None:
                carried = await self._join(near, far, Circuit(tab))
        finally:
            self._end(near.peer)
            with trio.CancelScope(shield=True):
                await far.close()
            self._events.emit("circuit_closed", peer=near.peer, target=far.peer, bytes=carried)

    async def _join(self, near: Stream, far: Stream, circuit: Circuit) -> int:
        """Both directions until one ends; the bytes that it carried."""
        circuit.tab.circuits.add(circuit)
        try:
            await say(near, Granted())
            with circuit.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, near, far, circuit)
                    nursery.start_soon(self._carry, far, near, circuit)
        finally:
            circuit.tab.circuits.discard(circuit)
        return circuit.carried_bytes

    async def _carry(self, source: Stream, sink: Stream, circuit: Circuit) -> None:
        """One direction until either end is gone, or the day is over, or nobody pays."""
        with suppress(PeerError):  # an end is gone: so is the circuit
            while piece := await source.read(PIECE_BYTES):
                if not self._day.spend(len(piece), self._now()):
                    await self._stop_for_today()
                    break
                circuit.carried_bytes += len(piece)
                if not await circuit.tab.take(len(piece)):
                    break
                await self._rate.spend(len(piece))
                await sink.write(piece)
        circuit.scope.cancel()

    async def _stop_for_today(self) -> None:
        """Whoever has a reservation hears it by its end, and makes one elsewhere."""
        self._events.emit("relay_day_spent", bytes=self._day.spent_bytes)
        for tab in list(self._reservations.values()):
            await tab.stream.close()

    async def _refuse(self, stream: Stream, error: AivillageError) -> None:
        self._events.emit("relay_refused", peer=stream.peer, reason=error.message)
        with trio.move_on_after(TALK_SECONDS), suppress(PeerError):  # it need not hear it
            await say(stream, refusal(error))


ELSEWHERE: Final = "try another relay"


def _busy(message: str) -> RefusedError:
    return RefusedError(message, code="BUSY", next_step=ELSEWHERE)


def _spent() -> RefusedError:
    return RefusedError(
        "this relay carried what its owner allows a day", code="OWNER_LIMIT", next_step=ELSEWHERE
    )
