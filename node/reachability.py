"""Can others dial this node? Only somebody else can tell: a villager is asked to try.

Both sides are here. Who is asked dials only where the asker's own link comes from, or into private
networks, only for a node that proves to be the asker, and seldom: so nobody is made to knock at
strangers' doors.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from aivillage.node.dialling import RELAYED, distance, ip_of, is_near
from aivillage.node.events import Events
from aivillage.node.gossip import send_or_drop
from aivillage.node.guard import Tasks
from aivillage.node.links import Link, Links
from aivillage.protocols.errors import AivillageError, PeerError, RefusedError
from aivillage.protocols.messages import Failure, Reach, Reached
from aivillage.protocols.types import PeerId

REACH_MINOR: Final = 2
PROBE_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 8.0
"""The probe's time and two ways over the link."""
FIRST_SECONDS: Final = 3.0
"""After the start: addresses and links have settled by then."""
LOOK_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = {"reachable": 1800.0, "not reachable": 120.0, "unknown": 60.0}
"""Routers change their minds; who is not reachable wants to know soon that it is."""
HELPERS_MAX: Final = 3
ADDRESSES_TRIED_MAX: Final = 4
PROBES_MAX: Final = 4
"""Under way for others at a time."""
BURST: Final = 8
"""Questions of one peer at once: two of its looks."""
REFILL_SECONDS: Final = 15.0
ASKERS_MAX: Final = 1000


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: reachable, not reachable or unknown."""

    state: str
    why: str
    next_step: str = ""


NOBODY: Final = Verdict(
    state="unknown",
    why="no villager is here who could try to dial this node",
    next_step="invite somebody, or wait for a villager to come",
)


class _Tried(msgspec.Struct, frozen=True):
    """What one helper found at one address."""

    helper: PeerId
    address: str
    reached: bool
    seen_from: str


class Reachability:
    """Asks to be dialled back, answers who asks, and says what came out of it."""

    def __init__(
        self, links: Links, tasks: Tasks, events: Events, members: Callable[[], Sequence[Link]]
    ) -> None:
        self.verdict = NOBODY
        self._links = links
        self._tasks = tasks
        self._events = events
        self._members = members
        self._budget: collections.OrderedDict[PeerId, tuple[float, float]] = (
            collections.OrderedDict()
        )
        self._probes = 0

    # ------------------------------------------------------------------ as the asker
    async def run(self) -> None:
        """Looks when the addresses change, and now and then."""
        known: tuple[str, ...] = ()
        due = trio.current_time() + FIRST_SECONDS
        while True:
            await trio.sleep(LOOK_SECONDS)
            addresses, now = self._links.my_addresses(), trio.current_time()
            if self._members() and (now >= due or (known and addresses != known)):
                known = addresses
                self._note(await self.look())
                due = trio.current_time() + AGAIN_SECONDS[self.verdict.state]

    async def look(self) -> Verdict:
        """Asks some villagers, until one reaches us."""
        links = list(self._members())
        helpers = [link for link in links if link.hello.minor >= REACH_MINOR]
        if not helpers:
            return NOBODY if not links else _unknown("the villagers here run earlier versions")
        tried: list[_Tried] = []
        refusal = ""
        for helper in random.sample(helpers, min(HELPERS_MAX, len(helpers))):
            try:
                tried += await self._ask(helper)
            except AivillageError as error:
                refusal = f"{helper.peer[-8:]} did not try: {error.message}"
            if any(one.reached for one in tried):
                break
        if not tried:
            return _unknown(refusal or "this node has no address that others could try")
        return judged(tried, self._links.my_addresses())

    async def _ask(self, helper: Link) -> list[_Tried]:
        """What `helper` finds at our addresses, and at the one that it sees us come from.

        Raises:
            AivillageError: it would try none of them, and why.
        """
        mine = [a for a in self._links.my_addresses() if distance(a) != RELAYED]
        waiting = collections.deque(mine[: ADDRESSES_TRIED_MAX - 1])
        tried: list[_Tried] = []
        failure: AivillageError | None = None
        while waiting:
            address = waiting.popleft()
            try:
                found = await self._try(helper, address)
            except AivillageError as error:
                failure = error
                continue
            if not tried and not found.reached:
                waiting.extend(_as_seen(found.seen_from, mine))
            tried.append(found)
            if found.reached:
                break
        if not tried and failure is not None:
            raise failure
        return tried

    async def _try(self, helper: Link, address: str) -> _Tried:
        question = Reach(id=helper.next_id(), address=await numbered(address))
        reply = await helper.ask(question, timeout_seconds=ANSWER_SECONDS)
        if not isinstance(reply, Reached):
            raise PeerError("it answered something else", code="BAD_REQUEST")
        return _Tried(helper.peer, address, reply.reached, reply.seen_from)

    def _note(self, verdict: Verdict) -> None:
        if verdict.state != self.verdict.state:
            self._events.emit("reachability_found", state=verdict.state, why=verdict.why)
        self.verdict = verdict

    # ------------------------------------------------------------------ as the helper
    def on_reach(self, link: Link, question: Reach) -> None:
        try:
            self._check(link, question)
        except RefusedError as error:
            send_or_drop(link, Failure(id=question.id, code=error.code, message=error.message))
            return
        self._probes += 1
        self._tasks.start_soon(self._answer, link, question)

    def _check(self, link: Link, question: Reach) -> None:
        """Raises: RefusedError: OWNER_LIMIT, we do not dial that; BUSY, not now."""
        host = self._links.transport.host_of(link.peer)
        if link.peer not in {member.peer for member in self._members()}:
            raise RefusedError("only villagers are dialled back", code="OWNER_LIMIT")
        if not may_dial(question.address, link.peer, host):
            raise RefusedError(
                "only where you come from is dialled, and private networks", code="OWNER_LIMIT"
            )
        if self._probes >= PROBES_MAX or not self._within_budget(link.peer):
            raise RefusedError("too many such questions, ask later", code="BUSY")

    async def _answer(self, link: Link, question: Reach) -> None:
        reached = False
        try:
            with trio.move_on_after(PROBE_SECONDS):
                await self._links.transport.probe(question.address)
                reached = True
        except AivillageError as error:
            # Its words could tell the asker what else lives there.
            self._events.emit("probe_failed", level=10, peer=link.peer, reason=error.message)
        finally:
            self._probes -= 1
        seen_from = self._links.transport.host_of(link.peer)
        send_or_drop(link, Reached(id=question.id, reached=reached, seen_from=seen_from))

    def _within_budget(self, peer: PeerId) -> bool:
        """A token bucket per asker; it outlives the link, so that coming again refills nothing."""
        now = trio.current_time()
        level, at = self._budget.pop(peer, (float(BURST), now))
        level = min(BURST, level + (now - at) / REFILL_SECONDS)
        self._budget[peer] = (max(0.0, level - 1) if level >= 1 else level, now)
        if len(self._budget) > ASKERS_MAX:
            self._budget.popitem(last=False)
        return level >= 1


async def numbered(address: str) -> str:
    """An address by name as one by number: helpers look nothing up for others."""
    _, kind, host, *rest = address.split("/")
    if kind not in {"dns", "dns4", "dns6"}:
        return address
    family = trio.socket.AF_INET6 if kind == "dns6" else trio.socket.AF_INET
    try:
        found = await trio.socket.getaddrinfo(host, None, family, trio.socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of a name that can be none
        raise PeerError(f"{host} is not found: {error}", code="PEER_LOST") from None
    number = f"ip{6 if kind == 'dns6' else 4}"
    return "/".join(["", number, str(found[0][4][0]), *rest])


def may_dial(address: str, asker: PeerId, host: str) -> bool:
    """Whether an address that `asker`, whose link comes from `host`, names is ours to try."""
    if not address.endswith(f"/p2p/{asker}") or distance(address) == RELAYED:
        return False
    named = address.split("/")[2]
    ip = ip_of(address)
    if ip is None:
        return bool(host) and named == host
    if ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast:
        return str(ip) == host  # of whoever lives there as we do; else it is our own machine
    return str(ip) == host or is_near(ip)


def judged(tried: Sequence[_Tried], mine: Sequence[str]) -> Verdict:
    """What follows from what helpers found."""
    for one in tried:
        if one.reached:
            ip = ip_of(one.address)
            near = ip is not None and is_near(ip)
            why = f"{one.helper[-8:]} dialled {_place(one.address)}"
            if near:
                why += ", on the same network; nobody outside it was asked"
            step = "" if one.address in mine else f"hand it out: announce = {_place(one.address)}"
            return Verdict(state="reachable", why=why, next_step=step)
    places = ", ".join(dict.fromkeys(_place(one.address) for one in tried))
    helpers = ", ".join(dict.fromkeys(one.helper[-8:] for one in tried))
    port = _place(tried[0].address).rpartition(":")[2]
    return Verdict(
        state="not reachable",
        why=f"{helpers} could not dial {places}",
        next_step=f"forward TCP port {port} of the router to this machine and let it through the "
        "firewall; this node still dials others",
    )


def _unknown(why: str) -> Verdict:
    return Verdict(state="unknown", why=why, next_step="wait for another villager to come")


def _place(address: str) -> str:
    """`/ip4/192.168.1.7/tcp/4051/p2p/...` -> `192.168.1.7:4051`."""
    _, _, host, *rest = address.split("/")
    return f"{host}:{rest[1]}" if rest[:1] == ["tcp"] else host


def _as_seen(seen_from: str, mine: Sequence[str]) -> list[str]:
    """Our port at the number that a helper sees us come from, where that is not ours already."""
    known = {address.split("/")[2] for address in mine}
    template = next((address for address in mine if ip_of(address) is not None), "")
    kind = "ip6" if ":" in seen_from else "ip4"
    if not template or seen_from in known or ip_of(f"/{kind}/{seen_from}/") is None:
        return []
    return ["/".join(["", kind, seen_from, *template.split("/")[3:]])]
