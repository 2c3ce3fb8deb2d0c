"""Every frame off a link, to the one that it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aivillage.node.buyer import Buyer
from aivillage.node.exchange import Exchange
from aivillage.node.gossip import send_or_drop
from aivillage.node.herald import Herald
from aivillage.node.links import Link, Links
from aivillage.node.pairs import Pairs
from aivillage.node.seller import Seller
from aivillage.node.villagers import Villagers
from aivillage.protocols import messages
from aivillage.protocols.messages import Frame
from aivillage.protocols.ports import Book


class Fetched(Protocol):
    """Who hears those that ask for blobs."""

    def on_fetch(self, link: Link, fetch: messages.Fetch) -> None: ...


class Switch:
    """Plain calls, in order, from the link's reader: whoever needs time starts a task."""

    def __init__(
        self,
        links: Links,
        book: Book,
        villagers: Villagers,
        exchange: Exchange,
        buyer: Buyer,
        seller: Seller,
        herald: Herald,
        pairs: Pairs,
        blobs: Fetched,
    ) -> None:
        self._links = links
        self._book = book
        self._villagers = villagers
        self._exchange = exchange
        self._buyer = buyer
        self._seller = seller
        self._herald = herald
        self._routes: dict[type[Any], Callable[[Link, Any], None]] = {
            messages.Step: buyer.on_step,
            messages.Ledger: self._on_ledger,
            messages.Gossip: lambda link, frame: exchange.gossiper.receive(link.peer, frame),
            messages.OffersQuestion: exchange.on_question,
            messages.QuoteRequest: seller.on_quote_request,
            messages.Call: seller.on_call,
            messages.Input: seller.on_input,
            messages.Passed: seller.on_passed,
            messages.Cancel: lambda link, frame: seller.on_cancel(link, frame.id),
            messages.ListOperations: lambda link, frame: seller.on_list(link, frame.id),
            messages.Standing: villagers.on_standing,
            messages.Fetch: blobs.on_fetch,
            messages.Join: villagers.joining.on_join,
            messages.Granted: villagers.on_granted,
            messages.PairQuestion: pairs.on_question,
            messages.Reach: villagers.reachability.on_reach,
        }
        seller.sessions.link_to = links.get
        links.on_message = self.on_message
        links.admit = villagers.admit
        links.on_up = self.on_up
        links.on_down = self.on_down
        links.before_write = self.rider

    def on_message(self, link: Link, frame: Frame) -> None:
        """A frame without a reader is late news of an ended call: it is dropped, and not paid."""
        route = self._routes.get(type(frame))
        if route is not None:
            route(link, frame)

    def on_up(self, link: Link) -> None:
        self._villagers.on_up(link)
        self._buyer.on_up(link.peer)
        send_or_drop(link, self._herald.for_newcomer())
        self._exchange.on_up(link)

    def on_down(self, link: Link, reason: str) -> None:
        if not self._villagers.is_member(link.peer):
            self._herald.forget(link.peer)
        self._villagers.on_down(link, reason)
        self._seller.on_down(link)
        self._exchange.on_down(link)

    def farewell(self) -> None:
        """This node is stopping: each buyer hears it with its call, and goes on elsewhere.

        It is no fault of the seller's, so nobody's rating suffers from an owner who goes to bed.
        """
        for sale in self._seller.taken():
            sale.steps.flush()
            failure = messages.Failure(
                id=sale.call.id, code="CANCELLED", message="its owner stopped this node"
            )
            send_or_drop(sale.link, failure)
        farewell = self._herald.farewell()
        for link in self._links.all():  # to each itself: gossip may choose whom it tells
            send_or_drop(link, farewell)

    def rider(self, link: Link) -> Frame | None:
        """A receipt never travels in a write of its own while others leave."""
        blob = self._book.take_receipt(link.peer)
        return messages.Ledger(blobs=(blob,)) if blob else None

    def _on_ledger(self, link: Link, frame: messages.Ledger) -> None:
        for blob in frame.blobs:
            self._book.receive(link.peer, blob)
