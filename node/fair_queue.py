"""Whose turn it is at a seller: fair by work done, within bounds. Pure: no clock and no tasks.

Every peer has a meter: the work that it was given, divided by its weight. Whoever has the least
goes next, so a peer with long jobs, or with many, holds up nobody by more than the job that runs.
Who comes back after a pause begins at the meter of whoever was served last: a pause saves nothing
up. The owner's own jobs go first. What goes on with delivered work goes before new work, at most
every second time: a buyer can claim it.

Source: Goyal, Vin and Cheng 1996, start-time fair queueing, section 3; a full queue drops from its
longest line: Suter, Lakshman, Stiliadis and Choudhury 1998.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from aivillage.protocols.errors import RefusedError
from aivillage.protocols.types import PeerId, Seconds

WEIGHT_MAX: Final = 4
"""Nobody's turn comes more than so many times as often as another's, whatever they pay."""
_SCALE: Final = 12
"""Divisible by every weight: meters are whole numbers."""
PACE_SHARE: Final = 0.3
"""Of the newest measurement in the pace."""
PEERS_MAX: Final = 1024
"""Beyond it, the meters of those who have nothing here are forgotten."""
RETRY_SECONDS_MIN: Final[Seconds] = 0.2


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One who wants a place. `cost`: at most so much work, in micro-credits at default prices."""

    number: int
    peer: PeerId
    kind: str = ""
    """What it needs beside a place: asks of one kind share its places."""
    cost: int = 1
    weight: int = 1
    guess_seconds: Seconds = 1.0
    """Of the work, for as long as none of its kind was measured."""
    goes_on: bool = False
    own: bool = False
    """Its owner's: first, and in none of the places that are for others."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """`places`: asks of others at the same time. Beyond it so many wait, of one peer so many."""

    places: int
    waiting_max: int
    waiting_peer_max: int


class FairQueue:
    """Call `begin` until it gives None after whatever may have made room."""

    def __init__(self, bounds: Bounds, places_of: Callable[[str], int]) -> None:
        """`places_of`: how many asks of a kind may run at once."""
        self.bounds = bounds
        self._places_of = places_of
        self._waiting: dict[int, Ask] = {}
        self._running: dict[int, tuple[Ask, Seconds]] = {}
        self._meters: dict[PeerId, int] = {}
        self._clock = 0
        self._is_news_turn = False
        """The one before went on with delivered work ahead of its turn."""
        self._pace: dict[str, Seconds] = {}
        """Kind -> seconds that one micro-credit of work holds a place."""

    # ------------------------------------------------------------------ what there is
    @property
    def waiting(self) -> int:
        """Asks of others that wait."""
        return sum(not ask.own for ask in self._waiting.values())

    @property
    def running(self) -> int:
        """Asks of others that have a place."""
        return sum(not ask.own for ask, _ in self._running.values())

    def free(self, kind: str) -> int:
        """Places for an ask of another of this kind."""
        left = self._places_of(kind) - self._of_kind(kind)
        return max(0, min(left, self.bounds.places - self.running))

    def peers_waiting(self) -> Counter[PeerId]:
        return Counter(ask.peer for ask in self._waiting.values() if not ask.own)

    # ------------------------------------------------------------------ coming and going
    def enter(self, ask: Ask, now: Seconds) -> Ask | None:
        """Whom it takes the place in the queue from, if it is full: the last of the longest line.

        Raises:
            RefusedError: BUSY, as many wait as may, of this peer or in all.
        """
        dropped = None if ask.own or self._fits(ask) else self._make_room(ask, now)
        self._join(ask)
        return dropped

    def _join(self, ask: Ask) -> None:
        if len(self._meters) >= PEERS_MAX:  # who is away loses at most the memory of its last job
            here = {one.peer for one in self._all()}
            self._meters = {peer: n for peer, n in self._meters.items() if peer in here}
        if not self._has(ask.peer):
            self._meters[ask.peer] = max(self._meters.get(ask.peer, 0), self._clock)
        self._waiting[ask.number] = ask

    def _make_room(self, ask: Ask, now: Seconds) -> Ask | None:
        lines = self.peers_waiting()
        mine = lines[ask.peer]
        if mine >= self.bounds.waiting_peer_max:
            raise self._full(f"{mine} calls of yours wait here already", now)
        if self.waiting < self.bounds.waiting_max:
            return None
        longest = max(lines, key=lambda peer: (lines[peer], peer), default=ask.peer)
        if lines[longest] <= mine + 1:
            raise self._full(f"all slots are taken, and {self.waiting} calls wait", now)
        numbers = (n for n, one in self._waiting.items() if one.peer == longest and not one.own)
        return self._waiting.pop(max(numbers))

    def begin(self, now: Seconds) -> Ask | None:
        """The next that has a place from now on; None: nobody that waits fits."""
        fitting = [ask for ask in self._waiting.values() if self._fits(ask)]
        if not fitting:
            return None
        ask = fair = fitting[0]
        if len(fitting) > 1:
            prefers = not self._is_news_turn
            ask = min(fitting, key=lambda one: self._turn(one, prefers=prefers))
            fair = min(fitting, key=lambda one: self._turn(one, prefers=False))
        self._is_news_turn = ask is not fair
        del self._waiting[ask.number]
        self._running[ask.number] = ask, now
        if not ask.own:
            self._clock = max(self._clock, self._meters[ask.peer])
            self._charge(ask, ask.cost)
        return ask

    def _turn(self, ask: Ask, *, prefers: bool) -> tuple[bool, bool, int, int]:
        goes_on = prefers and ask.goes_on
        return not ask.own, not goes_on, self._meters.get(ask.peer, 0), ask.number

    def leave(self, number: int, cost: int, now: Seconds) -> None:
        """It is over, begun or not; it did work of `cost`. Whoever is unknown left before."""
        self._waiting.pop(number, None)
        begun = self._running.pop(number, None)
        if begun is not None:
            ask, at = begun
            if not ask.own:
                self._charge(ask, max(1, cost) - ask.cost)
            if cost > 0:
                self._measure(ask.kind, (now - at) / cost)
        if not self._waiting and not self._running:
            self._meters.clear()  # nobody is ahead of anybody
            self._clock = 0

    def works(self, number: int, now: Seconds) -> None:
        """Its work begins only now: what it waited for counts in nobody's pace."""
        if number in self._running:
            self._running[number] = self._running[number][0], now

    def _charge(self, ask: Ask, cost: int) -> None:
        self._meters[ask.peer] = self._meters[ask.peer] + cost * _SCALE // ask.weight

    def _measure(self, kind: str, seconds: Seconds) -> None:
        former = self._pace.get(kind, seconds)
        self._pace[kind] = former + PACE_SHARE * (seconds - former)

    # ------------------------------------------------------------------ room
    def _fits(self, ask: Ask) -> bool:
        if self._of_kind(ask.kind) >= self._places_of(ask.kind):
            return False
        return ask.own or self.running < self.bounds.places

    def _of_kind(self, kind: str) -> int:
        return sum(ask.kind == kind for ask, _ in self._running.values())

    def _has(self, peer: PeerId) -> bool:
        return any(ask.peer == peer for ask in self._all())

    def _all(self) -> Iterator[Ask]:
        yield from self._waiting.values()
        for ask, _ in self._running.values():
            yield ask

    # ------------------------------------------------------------------ how long
    def wait_seconds(self, ask: Ask, now: Seconds) -> Seconds:
        """How long `ask` would wait if it came now, or how long it still does."""
        rivals = [one for one in self._waiting.values() if one.number != ask.number]
        rivals = [one for one in rivals if self._is_shared(one, ask)]
        if self._fits(ask) and not rivals:
            return 0.0
        ahead = self._ahead_of(ask, rivals)
        running = [(one, at) for one, at in self._running.values() if self._is_shared(one, ask)]
        left = sum(self._left_seconds(one, at, now) for one, at in running)
        pace = self._pace_of(ask)
        places = max(1, min(self.bounds.places, self._places_of(ask.kind)))
        return (sum(one.cost for one in ahead) * pace + left) / places

    def _ahead_of(self, ask: Ask, rivals: list[Ask]) -> list[Ask]:
        """Those whose turn comes before: each counts after the work that its peer has before it."""
        meters = {one.peer: self._meters.get(one.peer, 0) for one in rivals}
        tags = []
        for one in rivals:
            if one.peer == ask.peer and one.number > ask.number:
                continue
            tags.append((meters[one.peer], one.number, one))
            meters[one.peer] += one.cost * _SCALE // one.weight
        here = self._has(ask.peer)
        former = self._meters.get(ask.peer, 0)
        mine = meters.get(ask.peer, former if here else max(former, self._clock))
        first = (mine, ask.number)
        return [one for tag, number, one in tags if one.own or (tag, number) < first]

    def _is_shared(self, one: Ask, ask: Ask) -> bool:
        """Whether `one` is in the way of `ask`: of its kind, or all places are taken."""
        return one.kind == ask.kind or (not one.own and self.running >= self.bounds.places)

    def _left_seconds(self, ask: Ask, began: Seconds, now: Seconds) -> Seconds:
        return max(0.0, ask.cost * self._pace_of(ask) - (now - began))

    def _pace_of(self, ask: Ask) -> Seconds:
        return self._pace.get(ask.kind, ask.guess_seconds / max(1, ask.cost))

    def retry_seconds(self, now: Seconds) -> Seconds:
        """Until one of those that run is over, and one of those that wait can begin."""
        left = [self._left_seconds(ask, at, now) for ask, at in self._running.values()]
        return max(RETRY_SECONDS_MIN, min(left, default=0.0))

    def _full(self, message: str, now: Seconds) -> RefusedError:
        seconds = self.retry_seconds(now)
        return RefusedError(
            message,
            code="BUSY",
            next_step=f"try another peer, or again in {seconds:.1f} s",
            retry_after_seconds=seconds,
        )
