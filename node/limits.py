"""The owner's limits on what others get of this machine: pure, so that each can be tested alone.

Settings, facts and a clock go in; a typed refusal, or None, comes out. node/gate.py asks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.types import Amount, MicroCredits, PeerId, Seconds, as_credits

WINDOW: Final = r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$"
FLOOR_PERCENT_MAX: Final = 1_000_000
_LATER: Final = "try another peer, or ask again then"
_LISTED_APART: Final = "price_floor_percent"
"""`aivillage-node price` sets it."""

Window = Annotated[str, Meta(pattern=WINDOW)]
Percent = Annotated[int, Meta(ge=0, le=FLOOR_PERCENT_MAX)]
Whole = Annotated[int, Meta(ge=1)]


def _doc(text: str) -> Meta:
    return Meta(description=text)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner can limit while the node runs. The field's description is its documentation.

    An unset limit (None, nothing, False) limits nothing.
    """

    quiet_hours: Annotated[
        tuple[Window, ...], _doc("nothing for others then, local time: 22:00-07:00,12:00-13:00")
    ] = ()
    mains_only: Annotated[bool, _doc("nothing for others on battery")] = False
    busy_cores_max: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        _doc("nothing for others while my other programs keep more processor cores busy"),
    ] = None
    disk_bytes_max: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        _doc("nothing for others while blobs and scratch files take more"),
    ] = None
    sent_bytes_per_second_max: Annotated[
        Whole | None, _doc("answers to others leave at most at this rate")
    ] = None
    peer_day_micro_credits: Annotated[
        Amount | None, _doc("worth of work that one peer may take a day; strangers are one peer")
    ] = None
    day_micro_credits: Annotated[
        Amount | None, _doc("worth of work that all others together may take a day")
    ] = None
    operations_allowed: Annotated[
        tuple[str, ...], _doc("the only operations that others may ask for")
    ] = ()
    operations_denied: Annotated[
        tuple[str, ...], _doc("operations that others may not ask for")
    ] = ()
    price_floor_percent: Annotated[
        dict[str, Percent], _doc("the least that an operation costs, in % of its default price")
    ] = msgspec.field(default_factory=dict)


class Pause(msgspec.Struct, frozen=True):
    """The owner said stop; `until_unix` is None where only `resume` ends it."""

    until_unix: float | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is so on this machine now; None: not known here, or nobody needs it."""

    on_mains: bool | None = None
    busy_cores: float | None = None
    disk_bytes: int | None = None


class Day(msgspec.Struct):
    """What others took on one day of the owner's calendar, in work's worth at default prices."""

    date: str = ""
    peers: dict[PeerId, MicroCredits] = msgspec.field(default_factory=dict)
    total: MicroCredits = 0

    def turn(self, now: datetime) -> None:
        """Another day has other counts."""
        today = now.date().isoformat()
        if today != self.date:
            self.date, self.peers, self.total = today, {}, 0

    def add(self, peer: PeerId, worth: MicroCredits) -> None:
        self.peers[peer] = self.peers.get(peer, 0) + worth
        self.total += worth


class Pace:
    """What leaves within any t seconds is at most t times the rate, and one answer more."""

    def __init__(self) -> None:
        self._free_at: Seconds = 0.0

    def wait_seconds(self, size_bytes: int, per_second: int, now: Seconds) -> Seconds:
        """How long the next `size_bytes` must wait; they count from then on."""
        start = max(now, self._free_at)
        self._free_at = start + size_bytes / per_second
        return start - now


def needs_facts(limits: Limits) -> bool:
    """Whether any limit asks what is so on the machine."""
    return limits.mains_only or any(
        most is not None for most in (limits.busy_cores_max, limits.disk_bytes_max)
    )


def unknown(limits: Limits, facts: Facts) -> list[str]:
    """The limits that hold nobody off, since this machine does not say how things are."""
    wanted = {
        "mains_only": limits.mains_only and facts.on_mains is None,
        "busy_cores_max": limits.busy_cores_max is not None and facts.busy_cores is None,
    }
    return [key for key, is_unknown in wanted.items() if is_unknown]


# ------------------------------------------------------------------ refusals


def closed(limits: Limits, pause: Pause | None, facts: Facts, now: datetime) -> RefusedError | None:
    """Why the node does nothing for others now. What runs for them ends too."""
    return next(closings(limits, pause, facts, now), None)


def closings(
    limits: Limits, pause: Pause | None, facts: Facts, now: datetime
) -> Iterator[RefusedError]:
    """Every reason that there is: the owner's word first, then the clock, then the machine."""
    if pause is not None and (pause.until_unix is None or now.timestamp() < pause.until_unix):
        yield _paused(pause)
    ends = quiet_until(limits.quiet_hours, now)
    if ends is not None:
        yield _refusal(f"the owner of this node has quiet hours until {ends} there", _LATER)
    if limits.mains_only and facts.on_mains is False:
        yield _refusal("this node serves on mains power only, and runs on battery")
    if _above(facts.busy_cores, limits.busy_cores_max):
        yield _refusal("the owner of this node needs the machine")
    if _above(facts.disk_bytes, limits.disk_bytes_max):
        yield _refusal("as much of this node's disk is taken as its owner allows")


def quiet_until(windows: tuple[str, ...], now: datetime) -> str | None:
    """When the quiet hours that hold `now` end; a window may go over midnight."""
    minute = 60 * now.hour + now.minute
    for window in windows:
        start, end = map(_minute, window.split("-"))
        inside = start <= minute < end if start < end else minute >= start or minute < end
        if inside:
            return window.split("-")[1]
    return None


def not_offered(limits: Limits, operation: str) -> RefusedError | None:
    """Why others may not ask for `operation` here."""
    allowed = limits.operations_allowed
    if operation in limits.operations_denied or (allowed and operation not in allowed):
        return _refusal(f"the owner of this node does not lend it for {operation}")
    return None


def over_day(limits: Limits, day: Day, peer: PeerId, more: MicroCredits = 1) -> RefusedError | None:
    """Why `peer` may not take work worth `more` today."""
    caps = (
        (limits.day_micro_credits, day.total, "all others together"),
        (limits.peer_day_micro_credits, day.peers.get(peer, 0), "you"),
    )
    for most, taken, who in caps:
        if most is not None and taken + more > most:
            return _refusal(
                f"the owner of this node lends {who} work worth {as_credits(most)} credits a day,"
                f" and {as_credits(taken)} of it are taken",
                "ask for less, try another peer, or wait until midnight there",
            )
    return None


def has_day(limits: Limits) -> bool:
    """Whether what others take on a day has any cap."""
    return limits.day_micro_credits is not None or limits.peer_day_micro_credits is not None


def day_is_spent(limits: Limits, day: Day) -> RefusedError | None:
    """Why nobody gets anything more today; what runs may end."""
    return over_day(msgspec.structs.replace(limits, peer_day_micro_credits=None), day, PeerId(""))


def _paused(pause: Pause) -> RefusedError:
    until = pause.until_unix
    if until is None:
        return _refusal("the owner of this node paused it")
    ends = datetime.fromtimestamp(until).astimezone().isoformat(" ", "minutes")
    return _refusal(f"the owner of this node paused it until {ends}", _LATER)


def _refusal(why: str, next_step: str = "try another peer") -> RefusedError:
    return RefusedError(why, code="OWNER_LIMIT", next_step=next_step)


def _above(value: float | None, most: float | None) -> bool:
    """What is not known limits nothing; `aivillage-node limits` says so."""
    return value is not None and most is not None and value > most


def _minute(text: str) -> int:
    hours, minutes = text.split(":")
    return 60 * int(hours) + int(minutes)


# ------------------------------------------------------------------ changing them


def describe() -> dict[str, str]:
    """Key -> its one-line documentation, of those that `limits` sets."""
    fields = msgspec.json.schema(Limits)["$defs"]["Limits"]["properties"]
    return {
        key: field.get("description", "") for key, field in fields.items() if key != _LISTED_APART
    }


def changed(limits: Limits, words: dict[str, str], operations: set[str]) -> Limits:
    """`limits` with each key set to the value typed; an empty one unsets it.

    Raises:
        RequestError: BAD_REQUEST, an unknown key or operation, or a value that does not fit.
    """
    values: dict[str, Any] = msgspec.structs.asdict(limits)
    for key, text in words.items():
        _require_key(key)
        is_list = isinstance(getattr(Limits(), key), tuple)
        values[key] = [part.strip() for part in text.split(",")] if is_list else text
        if not text:
            values[key] = getattr(Limits(), key)
    try:
        found = msgspec.convert(values, Limits, strict=False)
    except msgspec.ValidationError as error:
        key = str(error).rpartition("$.")[2].rstrip("`").partition("[")[0]
        raise RequestError(
            f"{key} does not fit: {error}", next_step=f"{key}: {describe().get(key, '')}"
        ) from None
    for window in found.quiet_hours:
        if len(set(window.split("-"))) == 1:
            raise RequestError(f"{window} has no length", next_step="all day long: 00:00-24:00")
    for operation in (*found.operations_allowed, *found.operations_denied):
        require_operation(operation, operations)
    return found


def with_floor(limits: Limits, operation: str, percent: int, operations: set[str]) -> Limits:
    """`limits` with a least price of `operation`; 0 takes it away.

    Raises:
        RequestError: BAD_REQUEST, no such operation, or no such percentage.
    """
    require_operation(operation, operations)
    if not 0 <= percent <= FLOOR_PERCENT_MAX:
        raise RequestError(
            f"{percent} is no percentage of a price",
            next_step=f"0 to {FLOOR_PERCENT_MAX:,}; 100 is the default price",
        )
    floors = {**limits.price_floor_percent, operation: percent}
    return msgspec.structs.replace(
        limits, price_floor_percent={key: floor for key, floor in floors.items() if floor}
    )


def require_operation(operation: str, operations: set[str]) -> None:
    """Raises: RequestError: BAD_REQUEST, `operation` is none that this node has."""
    if operation not in operations:
        close = difflib.get_close_matches(operation, operations, n=1)
        raise RequestError(
            f"this node has no operation {operation!r}",
            next_step=f"write {close[0]!r}" if close else "aivillage-node operations",
        )


def _require_key(key: str) -> None:
    if key not in describe():
        close = difflib.get_close_matches(key, describe(), n=1)
        raise RequestError(
            f"there is no limit {key!r}",
            next_step=f"write {close[0]!r}" if close else "`aivillage-node limits` lists them",
        )
