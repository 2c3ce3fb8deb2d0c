"""Who does which task of a map, and when: a pure state machine, without a clock or a network.

Tasks are pulled, never dealt out: whoever has a free place gets the next one, so a slow machine
simply takes fewer. `step` says what to begin, what to drop and what to give up on.

Money: what was spent, and the ceilings of all that runs, are together never above the budget.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.pricing import Terms, Usage, price
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

HERE: Final = PeerId("")
"""Our own workers: they cost nothing."""
STRAGGLER_FACTOR: Final = 2.5
STRAGGLER_SECONDS: Final = 0.25
"""A second try costs about this much: what is over sooner is not worth one."""
MEASURED_MIN: Final = 3
"""Tasks done before anybody is called slow."""
MEASURED_MAX: Final = 99
FAULTS_MAX: Final = 3
"""Workers that fail a task before it is the task's own fault."""
TRIES_MAX: Final = 8
"""Of one task, those at peers that vanished included."""
PATIENCE_SECONDS: Final = 30.0
"""Without a task ended, running or taken: nobody is there, or nobody wants it."""
FULL_MAX: Final = 10
"""A worker that was full so often is asked for more once in a thousand rounds."""
PAUSE_SECONDS: Final = 0.1
PAUSE_SECONDS_MAX: Final = 10.0
WAITS: Final = frozenset(
    {"BUSY", "QUOTE_EXPIRED", "INSUFFICIENT_CREDITS", "CANCELLED", "DISK_FULL", "NO_PEER"}
)
"""No to anything now, and nothing about this task: it waits for the next free place."""
REFUSES: Final = frozenset(
    {"OWNER_LIMIT", "PRICE_ABOVE_CEILING", "NOT_OFFERED", "NOT_ENABLED", "UNKNOWN_OPERATION",
     "VERSION_UNSUPPORTED", "CONFIG"}
)  # fmt: skip
"""No to this task here, and probably to the next one: others may take it."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What stays as it is. `tasks`: the most that each may come to, by line, in order."""

    tasks: Mapping[int, Usage]
    order: tuple[int, ...]
    budget: MicroCredits
    """For all of them together; no task may cost more than `each`."""
    each: MicroCredits
    parallel: int


class Offered(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody who does it, at which prices, and how many at once."""

    peer: PeerId
    terms: Terms
    places: int


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """`places` is what it takes at once: first what it says, then what we found out."""

    peer: PeerId
    terms: Terms
    places: int
    full: int = 0
    """How often it was: the more often, the more must go well before it gets one more."""
    refusals: int = 0
    good: int = 0
    paused_until: Seconds = 0.0


class Fault(msgspec.Struct, frozen=True):
    """Why a try came to nothing."""

    code: str
    message: str


class Try(msgspec.Struct, frozen=True, kw_only=True):
    """`is_dropped`: another one of the same task was first; only its cost still counts."""

    line: int
    peer: PeerId
    ceiling: MicroCredits
    since: Seconds
    is_dropped: bool = False


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Small whatever the number of tasks: those that never began are `plan.order[at:]`."""

    plan: Plan
    moved_at: Seconds
    """When a task last ended."""
    at: int = 0
    again: tuple[int, ...] = ()
    workers: dict[PeerId, Worker] = {}
    tries: dict[int, Try] = {}
    faults: dict[int, tuple[tuple[PeerId, Fault], ...]] = {}
    took: tuple[Seconds, ...] = ()
    spent: MicroCredits = 0
    done: int = 0
    failed: int = 0
    begun: int = 0
    refusal: Fault | None = None
    is_stopped: bool = False

    @property
    def waiting(self) -> int:
        return len(self.again) + len(self.plan.order) - self.at

    @property
    def ended(self) -> bool:
        """Nothing runs, and nothing will."""
        return not self.tries and (self.is_stopped or not self.waiting)

    @property
    def left(self) -> MicroCredits:
        """What no running try may still spend."""
        return self.plan.budget - self.spent - sum(t.ceiling for t in self.tries.values())

    def at_work(self, peer: PeerId) -> int:
        return sum(t.peer == peer for t in self.tries.values())

    def failed_at(self, line: int) -> set[PeerId]:
        """Who need not be asked again; a peer that vanished may come back."""
        return {p for p, fault in self.faults.get(line, ()) if fault.code != "PEER_LOST"}


class Seen(msgspec.Struct, frozen=True):
    """Everybody who does it now; who is not named has gone."""

    workers: tuple[Offered, ...]


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A try is over: with a checked result, or a fault. `spent` in any case."""

    number: int
    spent: MicroCredits
    fault: Fault | None = None


class Tick(msgspec.Struct, frozen=True):
    """Time passed."""


class Stop(msgspec.Struct, frozen=True):
    """The owner wants no more of it."""


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """Have `line` done by `peer`, for at most `ceiling`."""

    number: int
    line: int
    peer: PeerId
    ceiling: MicroCredits


class Drop(msgspec.Struct, frozen=True):
    """Cancel a try; its `Ended` still comes."""

    number: int


class GiveUp(msgspec.Struct, frozen=True):
    """A task that has no result."""

    line: int
    fault: Fault


Event = Seen | Ended | Tick | Stop
Effect = Begin | Drop | GiveUp
Stepped = tuple[State, tuple[Effect, ...]]
_replace = msgspec.structs.replace


def step(state: State, event: Event, now: Seconds) -> Stepped:
    """The state after `event`, and what is to be done about it."""
    effects: tuple[Effect, ...] = ()
    if isinstance(event, Seen):
        state = _see(state, event)
    elif isinstance(event, Ended):
        state, effects = _end(state, event, now)
    elif isinstance(event, Stop):
        return _stop(state)
    if state.is_stopped:
        return state, effects
    state, given_out = _hand_out(state, now)
    if state.waiting:
        return state, effects + given_out
    state, seconds = _second_tries(state, now)
    return state, effects + given_out + seconds


def _see(state: State, event: Seen) -> State:
    return _replace(state, workers={o.peer: _met(state.workers.get(o.peer), o)
                                    for o in event.workers})  # fmt: skip


def _met(known: Worker | None, offered: Offered) -> Worker:
    """What we found out of its places ourselves is truer than what it said a while ago."""
    if known is None:
        places = max(1, offered.places)
        return Worker(peer=offered.peer, terms=offered.terms, places=places)
    return _replace(known, terms=offered.terms)


def _stop(state: State) -> Stepped:
    dropped = {n: _replace(t, is_dropped=True) for n, t in state.tries.items()}
    effects = tuple(Drop(n) for n, t in state.tries.items() if not t.is_dropped)
    return _replace(state, tries=dropped, is_stopped=True), effects


# ---------------------------------------------------------------- ends
def _end(state: State, event: Ended, now: Seconds) -> Stepped:
    tries = dict(state.tries)
    ended = tries.pop(event.number)
    state = _replace(state, tries=tries, spent=state.spent + event.spent)
    if ended.is_dropped:
        return state, ()
    if event.fault is None:
        return _won(state, ended, now)
    return _lost(state, ended, event.fault, now)


def _won(state: State, ended: Try, now: Seconds) -> Stepped:
    """The first result of a task counts; whoever else is at it stops."""
    rivals = [n for n, t in state.tries.items() if t.line == ended.line]
    tries = {n: _replace(t, is_dropped=t.is_dropped or n in rivals) for n, t in state.tries.items()}
    faults = {line: found for line, found in state.faults.items() if line != ended.line}
    state = _replace(
        state,
        tries=tries,
        faults=faults,
        again=tuple(line for line in state.again if line != ended.line),
        took=(*state.took, now - ended.since)[-MEASURED_MAX:],
        done=state.done + 1,
        moved_at=now,
    )
    return _with(state, ended.peer, _praised), tuple(Drop(n) for n in rivals)


def _lost(state: State, ended: Try, fault: Fault, now: Seconds) -> Stepped:
    if fault.code in WAITS:
        state = _replace(state, refusal=fault)
        busy = state.at_work(ended.peer)
        state = _with(state, ended.peer, lambda worker: _paused(worker, now, busy))
    else:
        found = (*state.faults.get(ended.line, ()), (ended.peer, fault))
        state = _replace(state, faults=state.faults | {ended.line: found})
        if fault.code == "PEER_LOST":
            others = {p: w for p, w in state.workers.items() if p != ended.peer}
            state = _replace(state, workers=others, moved_at=now)
        elif fault.code in REFUSES:
            state = _replace(state, refusal=fault)
            state = _with(state, ended.peer, lambda worker: _paused(worker, now, 0))
        else:
            state = _replace(state, moved_at=now)
    if any(t.line == ended.line for t in state.tries.values()):
        return state, ()  # another one is at it
    if _is_hopeless(state, ended.line):
        return _given_up(state, ended.line, fault)
    return _replace(state, again=(*state.again, ended.line)), ()


def _is_hopeless(state: State, line: int) -> bool:
    return len(state.failed_at(line)) >= FAULTS_MAX or len(state.faults.get(line, ())) >= TRIES_MAX


def _given_up(state: State, line: int, fault: Fault) -> Stepped:
    again = tuple(other for other in state.again if other != line)
    return _replace(state, again=again, failed=state.failed + 1), (GiveUp(line, fault),)


def _with(state: State, peer: PeerId, change: object) -> State:
    worker = state.workers.get(peer)
    if worker is None:  # it went while it worked
        return state
    assert callable(change)
    return _replace(state, workers=state.workers | {peer: change(worker)})


def _praised(worker: Worker) -> Worker:
    """Who did all that it took gets one more at once; here we know how many there are."""
    good = worker.good + 1
    if worker.peer == HERE or good < worker.places << min(worker.full, FULL_MAX):
        return _replace(worker, good=good, refusals=0)
    return _replace(worker, good=0, refusals=0, places=worker.places + 1)


def _paused(worker: Worker, now: Seconds, at_work: int) -> Worker:
    """Full, while it works for us: then we know its places. Else it is asked ever more seldom."""
    if at_work:
        return _replace(worker, places=at_work, good=0, full=worker.full + 1)
    refusals = worker.refusals + 1
    pause = min(PAUSE_SECONDS * 2**refusals, PAUSE_SECONDS_MAX)
    return _replace(worker, refusals=refusals, good=0, paused_until=now + pause)


# ---------------------------------------------------------------- beginnings
def _hand_out(state: State, now: Seconds) -> Stepped:
    """Every free place gets a task, those that were begun before first."""
    effects: list[Effect] = []
    for line, is_fresh in _queue(state):
        if len(state.tries) >= state.plan.parallel:
            break
        worker = _free_worker(state, line, now)
        if worker is not None:
            state = _taken(state, line, is_fresh=is_fresh)
            state, begun = _begin(state, line, worker, now)
            effects += begun
        elif (fault := _doom(state, line, now)) is not None:
            state = _taken(state, line, is_fresh=is_fresh)
            state, given_up = _given_up(state, line, fault)
            effects += given_up
        elif is_fresh:
            break  # the next one has no better chance
    return state, tuple(effects)


def _queue(state: State) -> Iterator[tuple[int, bool]]:
    yield from ((line, False) for line in state.again)
    yield from ((line, True) for line in itertools.islice(state.plan.order, state.at, None))


def _taken(state: State, line: int, *, is_fresh: bool) -> State:
    if is_fresh:
        return _replace(state, at=state.at + 1)
    return _replace(state, again=tuple(other for other in state.again if other != line))


def _begin(state: State, line: int, worker: Worker, now: Seconds) -> Stepped:
    cost = _cost(state, line, worker)
    assert cost is not None, "only who can be paid is free"
    number = state.begun + 1
    attempt = Try(line=line, peer=worker.peer, ceiling=cost, since=now)
    state = _replace(state, begun=number, tries=state.tries | {number: attempt})
    return state, (Begin(number=number, line=line, peer=worker.peer, ceiling=cost),)


def _free_worker(state: State, line: int, now: Seconds) -> Worker | None:
    """Of those with a free place the least busy one, and of these the cheapest."""
    left, failed_at = state.left, state.failed_at(line)
    busy_with_it = {t.peer for t in state.tries.values() if t.line == line}
    found: list[tuple[float, MicroCredits, Worker]] = []
    for worker in state.workers.values():
        at_work, cost = state.at_work(worker.peer), _cost(state, line, worker)
        if (
            at_work < worker.places
            and worker.paused_until <= now
            and worker.peer not in failed_at | busy_with_it
            and cost is not None
            and cost <= left
        ):
            found.append((at_work / worker.places, cost, worker))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _cost(state: State, line: int, worker: Worker) -> MicroCredits | None:
    """The most that it may cost there; None where that is above a task's own ceiling."""
    if worker.peer == HERE:
        return 0
    try:
        cost = price(worker.terms, state.plan.tasks[line])
    except RequestError:  # it prices other units than ours: another version of the module
        return None
    return cost if cost <= state.plan.each else None


def _doom(state: State, line: int, now: Seconds) -> Fault | None:
    """Why nobody will ever take this task; None: somebody may."""
    workers, faults = state.workers.values(), state.faults.get(line, ())
    if workers and faults and {w.peer for w in workers} <= state.failed_at(line):
        return faults[-1][1]
    if state.tries:
        return None  # what it may cost comes back, or its worker does
    costs = [_cost(state, line, worker) for worker in workers]
    if workers and all(cost is None or cost > state.left for cost in costs):
        return Fault(
            "PRICE_ABOVE_CEILING",
            f"the map's budget leaves {as_credits(state.left)} credits, "
            "which is less than this task may cost",
        )
    if now - state.moved_at >= PATIENCE_SECONDS:
        return state.refusal or Fault("NO_PEER", "nobody takes this task")
    return None


def _second_tries(state: State, now: Seconds) -> Stepped:
    """Where nothing waits, a task that takes far longer than the others is begun once more."""
    effects: list[Effect] = []
    if len(state.took) < MEASURED_MIN:
        return state, ()
    slow = max(STRAGGLER_FACTOR * statistics.median(state.took), STRAGGLER_SECONDS)
    lines = [t.line for t in state.tries.values()]
    for found in list(state.tries.values()):
        if len(state.tries) >= state.plan.parallel:
            break
        if found.is_dropped or now - found.since < slow or lines.count(found.line) > 1:
            continue
        worker = _free_worker(state, found.line, now)
        if worker is not None:
            state, begun = _begin(state, found.line, worker, now)
            effects += begun
    return state, tuple(effects)
