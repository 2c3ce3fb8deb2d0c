"""Finds the peer for a job: quotes from the best candidates, and the reason for the choice."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

import msgspec
import trio

from aivillage.node.discovery import Candidate, Discovery
from aivillage.node.links import Link, Links
from aivillage.node.pricelist import quote_hash, read_quote
from aivillage.protocols import messages
from aivillage.protocols.errors import (
    AivillageError,
    JobError,
    LedgerError,
    PeerError,
    RefusedError,
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
OTHERS_SECONDS: Final = 0.25
"""Once one seller answered, the others asked have this long to be the better one."""
QUOTE_MARGIN_MS: Final = 2_000
DEBTOR_BONUS: Final = 1.25
"""A seller that owes us the price counts as this much faster: what it owes us is worth something
only there, and our lines with others stay free. A good deal faster still wins."""
REFUSALS: Final = frozenset({"INSUFFICIENT_CREDITS", "OWNER_LIMIT"})
"""Of a seller that is there: to wait for others' offers would only hide what it said."""


Clear = Callable[[PeerId, MicroCredits], Awaitable[MicroCredits]]
"""(creditor, amount) -> how much of it was moved."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be bought: at most `usage`, of which `done` is had already."""

    operation: str
    request: bytes
    usage: Usage
    done: Usage
    budget: MicroCredits
    seconds: Seconds = 0.0
    """Our own estimate."""
    peer: str = ""

    def names(self, peer: PeerId) -> bool:
        """Whether the owner named this peer, by its id or the end of it."""
        return bool(self.peer) and peer.endswith(self.peer)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A seller that said yes, and why it is this one."""

    link: Link
    quote: Quote
    quote_hash: bytes
    envelope: bytes
    """The quote as the seller signed it."""
    price_at_most: MicroCredits
    seconds: Seconds
    why: str
    owes_us: bool
    """At least the price: nobody has to lend for it."""

    @property
    def rank(self) -> tuple[Seconds, MicroCredits, bool]:
        """The least is the best."""
        seconds = self.seconds / DEBTOR_BONUS if self.owes_us else self.seconds
        return seconds, self.price_at_most, not self.owes_us

    @property
    def is_free(self) -> bool:
        return is_free(self.quote.terms)


class Quoted(msgspec.Struct, frozen=True):
    """A quote kept while it is good, and what we owed when we got it."""

    quote: Quote
    hash: bytes
    reply: QuoteReply
    owed: MicroCredits


class Market:
    """Asks peers for quotes and chooses. Quotes are kept while they are good."""

    def __init__(
        self, links: Links, discovery: Discovery, book: Book, advertise: Callable[[str], None]
    ) -> None:
        self._links = links
        self._book = book
        self._discovery = discovery
        self._advertise = advertise
        self._quotes: dict[tuple[PeerId, str], Quoted] = {}
        self.clear: Clear = _clears_nothing
        """Moves what we owe a seller onto others, so that it lends us again."""
        self.debt_of: Callable[[PeerId], MicroCredits] = lambda _peer: 0
        """What a peer owes us."""

    async def choose(self, need: Need, excluded: Mapping[PeerId, AivillageError]) -> Choice:
        """The best seller for `need`.

        Raises:
            RefusedError: NO_PEER, nobody offers it; the message says what was tried.
            AivillageError: everybody refused; the most telling reason.
        """
        reasons: dict[PeerId, AivillageError] = {}
        tried: set[PeerId] = set()
        for offer in self._discovery.offers():
            if need.names(offer.seller):  # its owner knows better than our last failure
                self._discovery.reachable(offer.seller)
        with trio.move_on_after(SEEK_SECONDS):
            while True:
                # Taken before we look, so that an offer that comes meanwhile is not missed.
                news = self._discovery.next_news()
                out = {*excluded, *tried}
                candidates = [c for c in self._candidates(need) if c.peer not in out]
                asked = candidates[:ASKED_AT_ONCE]
                choice = await self._best(need, asked, reasons)
                if choice is not None:
                    return choice
                if asked:
                    tried |= {candidate.peer for candidate in asked}
                    continue
                if any(error.code != "PEER_LOST" for error in reasons.values()) or any(
                    error.code in REFUSALS for error in excluded.values()
                ):
                    break  # somebody is there and said no: waiting changes nothing
                self._advertise(need.operation)
                await news.wait()
                tried.clear()  # they could not be reached; who is back may be asked again
        raise self._nobody(need, excluded, reasons)

    def has_other(self, need: Need, excluded: Collection[PeerId]) -> bool:
        """Whether anybody but `excluded` offers it now."""
        return any(candidate.peer not in excluded for candidate in self._candidates(need))

    def _candidates(self, need: Need) -> list[Candidate]:
        found = self._discovery.candidates(need.operation)
        if not need.peer:
            return [c for c in found if not self._book.policy(c.peer).blocked]
        return [c for c in found if need.names(c.peer)]

    async def _best(
        self, need: Need, candidates: list[Candidate], reasons: dict[PeerId, AivillageError]
    ) -> Choice | None:
        found: list[Choice] = []

        async def ask(candidate: Candidate) -> None:
            try:
                found.append(await self._quoted(need, candidate))
            except AivillageError as error:
                reasons[candidate.peer] = error
            else:
                soon = trio.current_time() + OTHERS_SECONDS
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, soon)

        async with trio.open_nursery() as nursery:
            for candidate in candidates:
                nursery.start_soon(ask, candidate)
        if not found:
            return None
        best = min(found, key=lambda choice: choice.rank)
        others = len(found) - 1
        why = f"{best.why}, best of {others + 1}" if others else f"{best.why}, the only one"
        return msgspec.structs.replace(best, why=why)

    async def _quoted(self, need: Need, candidate: Candidate) -> Choice:
        """A quote from one candidate, held against our budget and its patience with us."""
        link = await self._reach(candidate)
        quoted = await self._quote(need, link)
        price = price_of_rest(quoted.quote.terms, need.usage, need.done)
        if self._short(link, quoted, price):  # as it was then: it may have been paid since
            self.forget_quote(link.peer, need.operation)
            quoted = await self._quote(need, link)
            price = price_of_rest(quoted.quote.terms, need.usage, need.done)
        if price <= need.budget and (short := self._short(link, quoted, price)):
            await self.clear(link.peer, short)
        quote, reply = quoted.quote, quoted.reply
        if price > need.budget:
            raise RequestError(
                f"it may cost {as_credits(price)} credits, your ceiling leaves "
                f"{as_credits(need.budget)}",
                code="PRICE_ABOVE_CEILING",
                next_step="allow more with --max-price, or ask for less",
            )
        if self._short(link, quoted, price):
            raise LedgerError(
                f"it may cost {as_credits(price)} credits, and {link.peer[-8:]} lets you owe "
                f"{as_credits(max(0, self._room(link, quoted)))} more",
                next_step="earn credits by serving, or ask for less",
            )
        seconds = _seconds(quote, need, candidate) * (1 + reply.queue_length)
        owes_us = self.debt_of(link.peer) >= price > 0
        return Choice(
            link=link,
            quote=quote,
            quote_hash=quoted.hash,
            envelope=reply.quote,
            price_at_most=price,
            seconds=seconds,
            why=_why(candidate, link, reply) + (", owes us" if owes_us else ""),
            owes_us=owes_us,
        )

    def _room(self, link: Link, quoted: Quoted) -> MicroCredits:
        """What the seller lets us owe on top of what we owe now."""
        return quoted.reply.room_micro_credits + quoted.owed - self._book.owed_to(link.peer)

    def _short(self, link: Link, quoted: Quoted, price: MicroCredits) -> MicroCredits:
        """What is missing to pay `price`; what is free needs no room."""
        return max(0, price - self._room(link, quoted)) if price else 0

    async def _reach(self, candidate: Candidate) -> Link:
        link = self._links.get(candidate.peer)
        if link is not None:
            return link
        for address in candidate.addresses:
            with trio.move_on_after(CONNECT_SECONDS):
                try:
                    link = await self._links.connect(address)
                except AivillageError:
                    continue  # the next address; all failing is said below
                if link.peer == candidate.peer:  # an offer may name somebody else's address
                    return link
        self._discovery.unreachable(candidate.peer)
        raise PeerError(f"{candidate.peer} cannot be reached", code="PEER_LOST")

    async def _quote(self, need: Need, link: Link) -> Quoted:
        """Terms are posted, so a quote that is still good saves a round trip."""
        kept = self._quotes.get((link.peer, need.operation))
        if kept and kept.quote.not_after_unix_ms - QUOTE_MARGIN_MS > time.time() * 1000:
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
        quote = read_quote(reply.quote, link.peer, need.operation)
        fresh = Quoted(quote, quote_hash(reply.quote), reply, owed)
        self._quotes[link.peer, need.operation] = fresh
        return fresh

    def forget_quote(self, peer: PeerId, operation: str) -> None:
        """A call was refused: the next one asks anew."""
        self._quotes.pop((peer, operation), None)

    def is_back(self, lost: Link) -> bool:
        """Whether the peer of a lost link has a new one."""
        return self._links.get(lost.peer) not in (None, lost)

    def forget_peer(self, peer: PeerId) -> None:
        """A restarted seller does not know its quotes."""
        self._quotes = {key: kept for key, kept in self._quotes.items() if key[0] != peer}

    def _nobody(
        self,
        need: Need,
        excluded: Mapping[PeerId, AivillageError],
        reasons: Mapping[PeerId, AivillageError],
    ) -> AivillageError:
        told = [error for error in reasons.values() if error.code != "PEER_LOST"]
        told += [error for error in excluded.values() if error.code in REFUSALS]
        if told:
            return told[0]
        both = (*excluded.items(), *reasons.items())
        tried = [f"{peer[-8:]}: {error.message}" for peer, error in both]
        detail = f" ({'; '.join(tried[:4])})" if tried else ""
        return RefusedError(
            f"no peer does {need.operation} now{detail}",
            code="NO_PEER",
            next_step="`aivillage-node peers` shows who is there; invite one that offers it, "
            "or do it here: submit --local",
        )


async def _clears_nothing(_creditor: PeerId, _amount: MicroCredits) -> MicroCredits:
    return 0


def _seconds(quote: Quote, need: Need, candidate: Candidate) -> Seconds:
    """Our own measurement of the peer, else its word."""
    speed = candidate.record.units_per_second
    if speed <= 0:
        return quote.seconds
    return sum(max(0, n - need.done.get(u, 0)) for u, n in need.usage.items()) / speed


def _why(candidate: Candidate, link: Link, reply: QuoteReply) -> str:
    record = candidate.record
    speed = f"{record.units_per_second:.0f} units/s measured" if record.units_per_second else "new"
    wait = f", {reply.queue_length} ahead" if reply.queue_length else ""
    return f"{speed}, {link.rtt_seconds * 1000:.0f} ms away{wait}"
