"""Finds the peer for a job: quotes from the best candidates, and the reason for the choice."""

from __future__ import annotations

import time
from collections import ChainMap, Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from functools import cached_property, partial
from random import Random
from typing import Final

import msgspec
import trio

from aivillage.node.choice import (
    RATES,
    Explanation,
    Facts,
    Weighed,
    in_order,
    known_of,
    pick,
    stays,
    weigh,
    why_of,
)
from aivillage.node.dialling import reach_mover
from aivillage.node.discovery import Candidate, Discovery
from aivillage.node.links import Link, Links
from aivillage.node.offers import price_offered
from aivillage.node.pricelist import quote_hash, read_quote
from aivillage.node.records import Work, work_of
from aivillage.node.seen import Seen, nobody
from aivillage.protocols import messages
from aivillage.protocols.errors import (
    AivillageError,
    JobError,
    LedgerError,
    PeerError,
    RequestError,
)
from aivillage.protocols.messages import Quote, QuoteReply
from aivillage.protocols.ports import Book
from aivillage.protocols.pricing import Usage, is_free, price_of_rest
from aivillage.protocols.types import MicroCredits, PeerId, Seconds, as_credits

ASKED_AT_ONCE: Final = 3
"""Quotes asked for at a time: enough to choose, little enough to answer."""
QUOTE_SECONDS: Final = 5.0
CONNECT_SECONDS: Final = 5.0
SEEK_SECONDS: Final = 10.0
"""How long a job waits for the first offer, its task advertised meanwhile."""
LOOK_AGAIN_SECONDS: Final = 1.0
"""While it waits and hears nothing; how often one task is advertised is the herald's matter."""
OTHERS_SECONDS: Final = 0.25
"""Once one seller answered, the others asked have this long to be the better one."""
QUOTE_MARGIN_MS: Final = 2_000

Excluded = MutableMapping[PeerId, AivillageError]
Clear = Callable[[PeerId, MicroCredits], Awaitable[MicroCredits]]
"""(creditor, amount) -> how much of it was moved."""


class Need(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What is to be bought: at most `usage`, of which `done` is had already."""

    operation: str
    request: bytes
    usage: Usage
    done: Usage
    budget: MicroCredits
    seconds: Seconds = 0.0
    """Our own estimate."""
    peer: str = ""
    prefer: str = "balanced"
    may_stay: bool = False
    """Whether this machine may do it itself."""
    is_patient: bool = True
    """Waits for offers where there is none."""

    def names(self, peer: PeerId) -> bool:
        """Whether the owner named this peer, by its id or the end of it."""
        return bool(self.peer) and peer.endswith(self.peer)

    @cached_property  # each candidate is held against it, and a request may be long
    def work(self) -> Work:
        return work_of(self.operation, self.request)

    @cached_property
    def rest(self) -> Usage:
        """What is still to do."""
        return {unit: max(0, n - self.done.get(unit, 0)) for unit, n in self.usage.items()}

    def weigh(self, facts: Facts) -> Weighed:
        return weigh(facts, RATES[self.prefer])


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A seller that said yes, and why it is this one."""

    link: Link
    quote: Quote
    quote_hash: bytes
    envelope: bytes
    """The quote as the seller signed it."""
    price_at_most: MicroCredits
    why: str
    weighed: Weighed
    explain: Callable[[], Explanation | None] = lambda: None
    """The choice laid open: made by whoever has the time for it, once the call has left."""

    @property
    def is_free(self) -> bool:
        return is_free(self.quote.terms)


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """No seller: this machine does it, since none would be better."""

    explain: Callable[[], Explanation]


class Quoted(msgspec.Struct, frozen=True):
    """A quote kept while it is good, and what we owed when we got it."""

    quote: Quote
    hash: bytes
    reply: QuoteReply
    owed: MicroCredits
    at: Seconds


class Market:
    """Asks peers for quotes and chooses. Quotes are kept while they are good."""

    def __init__(
        self, links: Links, discovery: Discovery, book: Book, advertise: Callable[[Work], None]
    ) -> None:
        self._links = links
        self._book = book
        self._discovery = discovery
        self._advertise = advertise
        self._quotes: dict[tuple[PeerId, Work], Quoted] = {}
        self.clear: Clear = _clears_nothing
        """Moves what we owe a seller onto others, so that it lends us again."""
        self.debt_of: Callable[[PeerId], MicroCredits] = lambda _peer: 0
        """What a peer owes us."""
        self.running_at: Callable[[PeerId], int] = lambda _peer: 0
        """Jobs of ours that run at a peer now: newer than what it last said of its queue."""
        self.home: Callable[[Need], Facts | None] = lambda _need: None
        """This machine as a candidate, where it was measured at such work."""
        self.random = Random()
        self._turns: Counter[Work] = Counter()
        self.cut_off: Callable[[str], Mapping[PeerId, AivillageError]] = lambda _operation: {}
        """Who gets no job of an operation now, and why."""

    async def choose(self, need: Need, excluded: Excluded) -> Choice | Here:
        """The best seller for `need`, or this machine where none is better.

        Raises:
            RefusedError: NO_PEER, nobody offers it; the message says what was tried.
            AivillageError: everybody refused; the most telling reason.
        """
        if not need.peer:  # a view: who is back is let in again while we wait
            excluded = ChainMap(dict(self.cut_off(need.operation)), excluded)
        seen = self._look(need, excluded)
        self._turns[need.work] += 1
        if need.peer:  # its owner knows better than our last failure
            for offer in self._discovery.offers():
                if need.names(offer.seller):
                    self._discovery.reachable(offer.seller)
        deadline = trio.current_time() + SEEK_SECONDS
        found, _ = await self._round(seen)
        return found or await self._seek(seen, deadline)

    async def _round(self, seen: Seen) -> tuple[Choice | Here | None, list[Candidate]]:
        """Whom we chose, if anybody, and who was asked for it."""
        asked = self._next(seen)
        await self._ask(seen, asked)
        return self._decide(seen), asked

    async def _seek(self, seen: Seen, deadline: Seconds) -> Choice | Here:
        """Asks on, and waits for offers. Raises: as `choose`."""
        need = seen.need
        with trio.CancelScope(deadline=deadline):
            while True:
                # Taken before we look, so that an offer that comes meanwhile is not missed.
                news = self._discovery.next_news()
                found, asked = await self._round(seen)
                if found:
                    return found
                if asked:
                    continue
                if seen.told() or not need.is_patient:
                    break  # somebody is there and said no: waiting changes nothing
                self._advertise(need.work)
                with trio.move_on_after(LOOK_AGAIN_SECONDS):  # an ad that met nobody is repeated
                    await news.wait()
                seen.asked.clear()  # they could not be reached; who is back may be asked again
                self._discovery.reconsider()
        raise nobody(seen)

    async def explain(self, need: Need) -> Explanation:
        """What `choose` would say now, and buys nothing. Nobody is waited for.

        Raises:
            AivillageError: nobody does it.
        """
        seen = self._look(need, {} if need.peer else self.cut_off(need.operation))
        while asked := self._next(seen):
            await self._ask(seen, asked)
            if seen.found:
                break
        found = self._decide(seen)
        if found is None or (explanation := found.explain()) is None:
            raise nobody(seen)
        return explanation

    def _look(self, need: Need, excluded: Mapping[PeerId, AivillageError]) -> Seen:
        facts = self.home(need) if need.may_stay else None
        home = need.weigh(facts) if facts else None
        return Seen(need, home, excluded, self._turns[need.work])

    def _next(self, seen: Seen) -> list[Candidate]:
        """Whom to ask now, by what their offers say, as stale as these are.

        Nobody where this machine is better than all of them promise to be.
        """
        found = self._candidates(seen.need)
        if len(found) == 1 and seen.home is None:  # there is nothing to weigh
            seen.offered = {}
            return [one for one in found if seen.may_ask(one.peer)]
        candidates = {c.peer: c for c in found}
        seen.offered = {peer: self._offered(seen.need, c) for peer, c in candidates.items()}
        rivals = seen.rivals()
        explore = seen.explores(rivals)
        if stays(seen.home, rivals, explore=explore):
            return []
        left = [one for one in rivals if seen.may_ask(one.facts.peer)]
        order = in_order(left, ASKED_AT_ONCE, self.random, explore=explore)
        return [candidates[weighed.facts.peer] for weighed in order[:ASKED_AT_ONCE]]

    async def terms_of(self, peer: str, need: Need) -> Choice:
        """What this seller asks, and nobody else; at once, without waiting for its return.

        Raises:
            PeerError: PEER_LOST, it offers nothing now or cannot be reached.
            AivillageError: it refused.
        """
        for candidate in self._discovery.candidates(*need.work):
            if candidate.peer == peer:
                return await self._quoted(need, candidate)
        raise PeerError(f"{peer[-8:]} is gone", code="PEER_LOST")

    def has_other(self, need: Need, excluded: Collection[PeerId]) -> bool:
        """Whether anybody but `excluded` offers it now."""
        return any(candidate.peer not in excluded for candidate in self._candidates(need))

    def _candidates(self, need: Need) -> list[Candidate]:
        found = self._discovery.candidates(*need.work)
        if not need.peer:
            return [c for c in found if not self._book.policy(c.peer).blocked]
        return [c for c in found if need.names(c.peer)]

    def _offered(self, need: Need, candidate: Candidate) -> Weighed:
        price = price_offered(candidate.offered, need.rest, need.work.model)
        facts = self._facts(need, candidate, price)
        return need.weigh(msgspec.structs.replace(facts, guess_seconds=need.seconds))

    def _facts(self, need: Need, candidate: Candidate, price: MicroCredits) -> Facts:
        """What we know of a candidate without asking it."""
        return Facts(
            peer=candidate.peer,
            units=sum(need.rest.values()),
            units_per_second=candidate.record.speed(need.work),
            price=price,
            load=self.running_at(candidate.peer),
            has_room=candidate.free_slots > 0,
            rtt_seconds=self.rtt_of(candidate.peer),
            neighbour=candidate.neighbour,
            failures=candidate.record.failures,
            owes_us=self.debt_of(candidate.peer) >= price > 0,
        )

    def rtt_of(self, peer: PeerId) -> Seconds | None:
        """None: there is no link."""
        link = self._links.get(peer)
        return link.rtt_seconds if link else None

    async def _ask(self, seen: Seen, candidates: list[Candidate]) -> None:
        """Quotes from all of them at once; who is much later than the first is not waited for."""

        async def ask(candidate: Candidate, scope: trio.CancelScope | None = None) -> None:
            try:
                seen.found[candidate.peer] = await self._quoted(seen.need, candidate)
            except AivillageError as error:
                seen.reasons[candidate.peer] = error
            else:
                if scope is not None:
                    scope.deadline = min(scope.deadline, trio.current_time() + OTHERS_SECONDS)

        seen.asked |= {candidate.peer for candidate in candidates}
        if len(candidates) == 1:
            return await ask(candidates[0])
        async with trio.open_nursery() as nursery:
            for candidate in candidates:
                nursery.start_soon(ask, candidate, nursery.cancel_scope)
        return None

    def _decide(self, seen: Seen) -> Choice | Here | None:
        """Among those that said yes and this machine; None: ask on."""
        quoted = [choice.weighed for choice in seen.found.values()]
        rivals = seen.rivals()
        explore = seen.explores(rivals)
        if not quoted and not stays(seen.home, rivals, explore=explore):
            return None
        own = [seen.home] if seen.home else []
        winner = pick([*own, *quoted], self.random, explore=explore)
        why = why_of(winner, quoted or rivals, len(seen.reasons), seen.home)
        if winner.facts.here:
            return Here(explain=partial(seen.explained, winner, why))
        choice = seen.found[winner.facts.peer]
        why = f"{choice.why}, {why}"
        explain = partial(seen.explained, winner, why)
        return msgspec.structs.replace(choice, why=why, explain=explain)

    async def _quoted(self, need: Need, candidate: Candidate) -> Choice:
        """A quote from one candidate, held against our budget and its patience with us."""
        link = await self._reach(candidate)
        quoted = await self._quote(need, link)
        price = price_of_rest(quoted.quote.terms, need.usage, need.done)
        short = self._short(link, quoted, price)
        if short:  # as it was then: it may have been paid since
            self.forget_quote(link.peer, need.work)
            quoted = await self._quote(need, link)
            price = price_of_rest(quoted.quote.terms, need.usage, need.done)
            short = self._short(link, quoted, price)
        if short and price <= need.budget:
            await self.clear(link.peer, short)
            short = self._short(link, quoted, price)
        quote, reply = quoted.quote, quoted.reply
        if price > need.budget:
            raise RequestError(
                f"it may cost {as_credits(price)} credits, your ceiling leaves "
                f"{as_credits(need.budget)}",
                code="PRICE_ABOVE_CEILING",
                next_step="allow more with --max-price, or ask for less",
            )
        if short:
            raise LedgerError(
                f"it may cost {as_credits(price)} credits, and {link.peer[-8:]} lets you owe "
                f"{as_credits(max(0, self._room(link, quoted)))} more",
                next_step="earn credits by serving, or ask for less",
            )
        facts = self._facts(need, candidate, price)
        facts = msgspec.structs.replace(
            facts,
            guess_seconds=max(need.seconds, _quoted_seconds(quote, need)),
            load=max(facts.load, reply.queue_length),
            slots=max(1, reply.slots),
            wait_seconds=max(0.0, reply.wait_seconds - (time.monotonic() - quoted.at)),
            has_room=facts.has_room or not reply.queue_length,
            age_seconds=time.monotonic() - quoted.at,
        )
        return Choice(
            link=link,
            quote=quote,
            quote_hash=quoted.hash,
            envelope=reply.quote,
            price_at_most=price,
            why=known_of(facts),
            weighed=need.weigh(facts),
        )

    def _room(self, link: Link, quoted: Quoted) -> MicroCredits:
        """What the seller lets us owe on top of what we owe now."""
        return quoted.reply.room_micro_credits + quoted.owed - self._book.owed_to(link.peer)

    def _short(self, link: Link, quoted: Quoted, price: MicroCredits) -> MicroCredits:
        """What is missing to pay `price`; what is free needs no room."""
        return max(0, price - self._room(link, quoted)) if price else 0

    async def _reach(self, candidate: Candidate) -> Link:
        peer = candidate.peer
        newest = partial(self._discovery.addresses_of, peer)
        with suppress(AivillageError):  # said below
            return await reach_mover(
                self._links, peer, candidate.addresses, newest, seconds=CONNECT_SECONDS
            )
        self._discovery.unreachable(peer)
        raise PeerError(f"{peer} cannot be reached", code="PEER_LOST")

    async def _quote(self, need: Need, link: Link) -> Quoted:
        """Terms are posted, so a quote that is still good saves a round trip."""
        kept = self._quotes.get((link.peer, need.work))
        its_now_ms = time.time() * 1000 + link.clock_ahead_ms
        if kept and kept.quote.not_after_unix_ms - QUOTE_MARGIN_MS > its_now_ms:
            return kept
        owed = self._book.owed_to(link.peer)
        question = messages.QuoteRequest(
            id=link.next_id(), operation=need.operation, request=need.request
        )
        try:
            reply = await link.ask(question, timeout_seconds=QUOTE_SECONDS)
        except JobError as error:
            raise PeerError(f"{link.peer[-8:]}: {error.message}", code="PEER_LOST") from None
        if not isinstance(reply, QuoteReply):
            raise PeerError("a quote was asked for, something else came", code="BAD_REQUEST")
        quote = read_quote(reply.quote, link.peer, need.operation, need.work.model)
        fresh = Quoted(quote, quote_hash(reply.quote), reply, owed, time.monotonic())
        self._quotes[link.peer, need.work] = fresh
        return fresh

    def forget_quote(self, peer: PeerId, work: Work) -> None:
        """A call was refused: the next one asks anew."""
        self._quotes.pop((peer, work), None)

    def is_back(self, lost: Link) -> bool:
        """Whether the peer of a lost link has a new one."""
        return self._links.get(lost.peer) not in (None, lost)

    def forget_peer(self, peer: PeerId) -> None:
        """A restarted seller does not know its quotes."""
        self._quotes = {key: kept for key, kept in self._quotes.items() if key[0] != peer}


async def _clears_nothing(_creditor: PeerId, _amount: MicroCredits) -> MicroCredits:
    return 0


def _quoted_seconds(quote: Quote, need: Need) -> Seconds:
    """The seller's word, for as much as we need: the quote may be of another request."""
    quoted = sum(quote.estimate.values())
    return quote.seconds * sum(need.rest.values()) / quoted if quoted else quote.seconds
