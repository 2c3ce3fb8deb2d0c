"""The owner's word on people, over the control socket: lines, favours, gifts, what is given up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from aivillage.ledger.exposure import Word
from aivillage.ledger.queries import OpenTransfer
from aivillage.node import who
from aivillage.node.caretaker import Caretaker
from aivillage.node.desk import Desk
from aivillage.protocols.errors import LedgerError, RequestError
from aivillage.protocols.types import Amount, MicroCredits, PeerId, as_credits

REASON_MAX: Final = 500
"""Characters; it is kept in the book for ever."""
FAVOURS_LISTED_MAX: Final = 2000
"""What surely fits a frame."""


class PeopleDesk:
    """Answers by name; `handlers()` is the table that the control socket serves."""

    def __init__(self, desk: Desk, caretaker: Caretaker, usual_exposure: MicroCredits) -> None:
        """`usual_exposure`: of a peer with a line from the owner and an exposure from nobody."""
        self._desk = desk
        self._ledger = desk.ledger
        self._caretaker = caretaker
        self._usual_exposure = usual_exposure

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What can be asked, by name."""
        return {
            "trust": self.on_trust,
            "block": self.on_block,
            "share": self.on_share,
            "gift": self.on_gift,
            "transfers": self.on_transfers,
            "release": self.on_release,
            "release_gap": self.on_release_gap,
            "write_off": self.on_write_off,
            "favours": self.on_favours,
            "compact": self.on_compact,
        }

    # ------------------------------------------------------------------ policy
    async def on_trust(self, args: dict[str, Any]) -> dict[str, Any]:
        """The owner's line for a peer, or with `by_village` again what its village says."""
        peer = await self._named(args)
        if args.get("by_village"):
            return await self._say(peer, Word(by_village=True))
        word = Word(
            line=_amount(args, "line"),
            exposure=_amount(args, "exposure") if "exposure" in args else None,
            usual=self._usual_exposure,
        )
        return await self._say(peer, word)

    async def on_block(self, args: dict[str, Any]) -> dict[str, Any]:
        """No work, credit or transfers for a peer; `stop` ends that."""
        peer, blocked = await self._named(args), not args.get("stop")
        shown = await self._say(peer, Word(blocked=blocked))
        if blocked:
            for name in self._ledger.names_of(peer):
                self._desk.seller.stop_for(name)
        return shown

    async def on_share(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Work for these people is free; `stop` ends that."""
        peers = [await self._named({"peer": name}) for name in args["peers"]]
        return [await self._say(peer, Word(shared=not args.get("stop"))) for peer in peers]

    async def _say(self, peer: PeerId, word: Word) -> dict[str, Any]:
        """Keeps the owner's word and tells the peer what it may owe now."""
        await self._ledger.decree(peer, word)
        told = self._desk.villagers.tell_standing(peer)
        view = self._ledger.view(peer)
        return {
            "peer": peer,
            "line": view.line,
            "exposure": view.exposure,
            "blocked": view.blocked,
            "shared": view.shared,
            "told": told,
        }

    # ------------------------------------------------------------------ money
    async def on_gift(self, args: dict[str, Any]) -> dict[str, Any]:
        """A present: we owe so much more, and nobody worked for it.

        Raises:
            LedgerError: INSUFFICIENT_CREDITS, the peer does not let us owe so much.
        """
        peer, amount = await self._named(args), _amount(args, "amount")
        view = self._ledger.view(peer)
        owed = view.owed_by_me - view.owed_to_me + amount
        if owed > view.received_line:
            raise LedgerError(
                f"you would owe {peer[-8:]} {as_credits(owed)} credits,"
                f" and it lets you owe {as_credits(view.received_line)}",
                next_step="give less, or earn with it first",
            )
        gift = await self._ledger.give(peer, amount)
        owed = self._ledger.view(peer).owed_by_me
        return {"peer": peer, "gift": gift.hex(), "amount": amount, "owed_by_me": owed}

    async def on_transfers(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of ours that are open."""
        return [
            msgspec.to_builtins(transfer) | {"xid": transfer.xid.hex()}
            for transfer in await self._ledger.open_transfers()
        ]

    async def on_release(self, args: dict[str, Any]) -> dict[str, Any]:
        """Gives up a transfer that is stuck; its amount is lost, unless it comes back after all."""
        transfer = await self._transfer(str(args["transfer"]))
        cost = await self._ledger.release(transfer.xid)
        return {"transfer": transfer.xid.hex(), "cost": cost}

    async def _transfer(self, text: str) -> OpenTransfer:
        found = await self._ledger.open_transfers()
        named = [transfer for transfer in found if text and transfer.xid.hex().startswith(text)]
        if len(named) != 1:
            raise RequestError(
                f"{len(named) or 'no'} open transfers of yours begin with {text!r}",
                next_step="`aivillage-node release` without a name lists them",
            )
        return named[0]

    async def on_release_gap(self, args: dict[str, Any]) -> dict[str, Any]:
        """Gives up what was delivered to a peer, or reserved for it, and never signed for."""
        peer = await self._named(args)
        before = self._ledger.view(peer).written_off
        await self._ledger.forgive_gap(peer)
        return {"peer": peer, "cost": self._ledger.view(peer).written_off - before}

    async def on_write_off(self, args: dict[str, Any]) -> dict[str, Any]:
        """Books what a peer owes, or part of it, as lost; it owes it all the same."""
        peer, reason = await self._named(args), str(args["reason"]).strip()
        if not 0 < len(reason) <= REASON_MAX:
            raise RequestError(
                f"a reason has 1 to {REASON_MAX} characters", next_step="say it with --reason"
            )
        amount = _amount(args, "amount") if "amount" in args else None
        return {"peer": peer, "cost": await self._ledger.write_off(peer, amount, reason)}

    async def on_favours(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Work for nothing, both ways, newest first."""
        limit = int(args.get("limit", 50))
        if not 0 < limit <= FAVOURS_LISTED_MAX:
            raise RequestError(
                f"an answer holds 1 to {FAVOURS_LISTED_MAX:,} rows, not {limit:,}",
                next_step=f"--limit {FAVOURS_LISTED_MAX}",
            )
        rows = await self._ledger.favours(limit)
        return [msgspec.to_builtins(row) | {"attempt": row.attempt.hex()} for row in rows]

    async def on_compact(self, _args: dict[str, Any]) -> dict[str, Any]:
        """One round now, whatever else is going on."""
        return dict(msgspec.to_builtins(await self._caretaker.compact()))

    async def _named(self, args: dict[str, Any]) -> PeerId:
        """The peer that is meant: of the book, linked, met or heard of; or a whole id.

        Raises:
            RequestError: BAD_REQUEST, nobody or several, or this node itself.
        """
        known = {view.peer for view in self._ledger.views()}
        known |= {link.peer for link in self._desk.links.all()}
        known |= {met.id for met in await self._desk.jobs.known_peers()}
        known |= {offer.seller for offer in self._desk.discovery.offers()}
        peer = who.named(str(args["peer"]), known - set(self._ledger.names))
        if peer in self._ledger.names:
            raise RequestError(f"{peer[-8:]} is this node itself", next_step="aivillage-node peers")
        return peer


def _amount(args: dict[str, Any], name: str) -> MicroCredits:
    try:
        return msgspec.convert(args[name], Amount)
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: {error}", next_step="micro-credits, 0 or more") from None
