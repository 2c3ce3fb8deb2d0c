"""What the owner can ask of a running node: each answer from where the truth is, at that moment."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from aivillage import __version__
from aivillage.ledger.ledger import NodeBook
from aivillage.node import results, village_key, who
from aivillage.node.addresses import Addresses
from aivillage.node.blob_library import Library
from aivillage.node.buyer import Buyer
from aivillage.node.clearing import Clearing
from aivillage.node.config import Origin
from aivillage.node.detours import Detours
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.grants import Grants, from_token, to_token
from aivillage.node.jobs import JobRow, Jobs
from aivillage.node.links import Links
from aivillage.node.monitor import Monitor
from aivillage.node.owners import Owners
from aivillage.node.pairs import Pairs
from aivillage.node.paths import Paths
from aivillage.node.records import KnownPeer, Record
from aivillage.node.replication import Replicator
from aivillage.node.seller import Seller
from aivillage.node.village import INVITE_DAYS
from aivillage.node.villagers import Villagers
from aivillage.protocols.errors import AivillageError, RefusedError, RequestError
from aivillage.protocols.messages import Offer, Submit
from aivillage.protocols.types import Amount, PeerId

JOBS_LISTED: Final = 50
JOBS_LISTED_MAX: Final = 500
HISTORY_LISTED: Final = 100
HISTORY_LISTED_MAX: Final = 2000
"""Of each, what surely fits a frame; the command line reads more from the file itself."""
PEERS_LISTED_MAX: Final = 300
SELLERS_LISTED_MAX: Final = 1000
TEXT_MAX: Final = 500
"""Characters of a failure's reason in a list: a peer may have written it."""


class Desk(msgspec.Struct, frozen=True, kw_only=True):
    """Answers by name; `handlers()` is the table that the control socket serves."""

    origins: list[Origin]
    paths: Paths
    links: Links
    villagers: Villagers
    discovery: Discovery
    seller: Seller
    buyer: Buyer
    jobs: Jobs
    ledger: NodeBook
    monitor: Monitor
    events: Events
    stop: trio.Event
    started: float = msgspec.field(default_factory=time.time)
    addresses: Addresses
    clearing: Clearing
    owners: Owners
    grants: Grants
    pairs: Pairs
    detours: Detours
    replicator: Replicator
    blobs: Library

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What can be asked, by name."""
        return {
            "status": self.on_status,
            "peers": self.on_peers,
            "operations": self.on_operations,
            "jobs": self.on_jobs,
            "job": self.on_job,
            "usage": self.on_usage,
            "choose": self.on_choose,
            "cancel": self.on_cancel,
            "balance": self.on_balance,
            "history": self.on_history,
            "audit": self.on_audit,
            "audit_peer": self.on_audit_peer,
            "settle": self.on_settle,
            "invite": self.on_invite,
            "invites": self.on_invites,
            "invite_revoke": self.on_invite_revoke,
            "join": self.on_join,
            "owner": self.on_owner,
            "owner_join": self.on_owner_join,
            "grant": self.on_grant,
            "grants": self.on_grants,
            "grants_import": self.on_grants_import,
            "config": self.on_config,
            "events": self.on_events,
            "stop": self.on_stop,
        }

    async def on_status(self, args: dict[str, Any]) -> dict[str, Any]:
        """One screen of truth: every figure is read now, none is remembered.

        `lag_seconds`: of how long ago at most the loop's lag is told.
        """
        refusal = self.seller.refusal()
        settings = {origin.key: origin.value for origin in self.origins}
        return {
            "peer": self.villagers.peer,
            "version": __version__,
            "state": _state(refusal),
            "uptime_seconds": round(time.time() - self.started, 1),
            "addresses": list(self.addresses()),
            "reachable": msgspec.to_builtins(self.villagers.reachability.verdict),
            "village": self.villagers.membership.village.hex(),
            "private": self._private(),
            "peers": len(self.links.all()),
            "members": len(self.villagers.members()),
            "jobs_running": len(self.buyer.running()),
            "sales_running": len(self.seller.running()),
            "sales_waiting": self.seller.places.queue.waiting,
            "slots_free": self.seller.free_slots(),
            "engines": self.seller.engines(),
            "wanted": {key: settings[key] for key in ("engine", "device")},
            "serves": [operation.name for operation in self.seller.operations()],
            "balance_micro_credits": (await self.ledger.balance()).net,
            "dev_mode": settings["dev_mode"],
            "tasks": self.monitor.tasks(),
            "rss_mb": round(self.monitor.rss_mb(), 1),
            "loop_lag_ms": self.monitor.loop_lag_ms(float(args.get("lag_seconds", 60))),
            "relay": self.detours.status(),
        }

    def _private(self) -> dict[str, Any]:
        """Of the village's pre-shared key, and whom it kept out; empty where there is none."""
        transport = self.links.transport
        count, last = transport.refused()
        key = transport.village_key
        return {
            "fingerprint": village_key.fingerprint(key) if key else "",
            "refused": count,
            "last_refused": last,
        }

    async def on_peers(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """Everybody known, met or only heard of; those linked first."""
        offers = {offer.seller: offer for offer in self.discovery.offers()}
        met = {known.id: known for known in await self.jobs.known_peers()}
        heard = (peer for peer in offers if peer not in self.ledger.names)  # my former key's too
        everybody = dict.fromkeys((*(link.peer for link in self.links.all()), *met, *heard))
        return [
            self._peer(peer, met.get(peer), offers.get(peer))
            for peer in list(everybody)[:PEERS_LISTED_MAX]
        ]

    def _peer(self, peer: PeerId, known: KnownPeer | None, offer: Offer | None) -> dict[str, Any]:
        link = self.links.get(peer)
        record = self.discovery.records.get(peer) or Record()
        view = self.ledger.view(peer)
        addresses = known.addresses if known else link.hello.addresses if link else ()
        return {
            "peer": peer,
            "connected": link is not None,
            "synced": view.synced,
            "why": self.villagers.why(peer),
            "member": self.villagers.is_member(peer),
            "through": self.detours.circuits.relay_of(peer),
            "line": view.line,
            "blocked": view.blocked,
            "shared": view.shared,
            "rtt_ms": round(link.rtt_seconds * 1000, 2) if link else None,
            "agent": link.hello.agent if link else "",
            "offers": [operation.name for operation in offer.operations] if offer else [],
            "units_per_second": round(record.units_per_second, 1),
            "good": record.good,
            "bad": record.bad,
            "addresses": list(addresses or (offer.addresses if offer else ())),
            "last_seen_unix": known.seen if known else None,
        }

    async def on_operations(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """Ours, with schemas, and who else offers each."""
        offers = self.discovery.offers()
        return [
            msgspec.to_builtins(operation)
            | {
                "offered_by": [
                    offer.seller
                    for offer in offers[:SELLERS_LISTED_MAX]
                    if any(offered.name == operation.name for offered in offer.operations)
                ]
            }
            for operation in self.seller.known_operations()
        ]

    async def on_jobs(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        rows = await self.jobs.latest(_limit(args, JOBS_LISTED, JOBS_LISTED_MAX))
        return [self._shown(row) for row in rows]

    async def on_job(self, args: dict[str, Any]) -> dict[str, Any]:
        row = await self._job(args)
        attempts = await self.jobs.attempts(row.id)
        outcome = results.shown_or_why(row.operation, row.result)
        return (
            self._shown(row)
            | outcome
            | {
                "request": msgspec.msgpack.decode(row.request),
                "attempts": [
                    {
                        "attempt": attempt.id.hex(),
                        "seller": attempt.seller,
                        "price_micro_credits": attempt.price,
                        "outcome": attempt.outcome or "running",
                        "choice": msgspec.json.decode(attempt.choice) if attempt.choice else None,
                    }
                    for attempt in attempts
                ],
            }
        )

    async def on_usage(self, args: dict[str, Any]) -> dict[str, int]:
        return dict(await self.buyer.metered(await self._job(args)))

    async def on_choose(self, args: dict[str, Any]) -> dict[str, Any]:
        """Who would do a job, and why; nothing is bought. The arguments are those of a `Submit`."""
        submit = msgspec.convert({"id": 0} | args, Submit)
        return dict(msgspec.to_builtins(await self.buyer.explain(submit)))

    async def on_cancel(self, args: dict[str, Any]) -> dict[str, Any]:
        row = await self._job(args)
        if not self.buyer.cancel(row.id):
            raise RequestError(
                f"job {row.id[:8]} is {row.state} already", next_step="aivillage-node jobs list"
            )
        return {"job": row.id, "state": "cancelling"}

    async def _job(self, args: dict[str, Any]) -> JobRow:
        row = await self.jobs.get(str(args["job"]))
        if row is None:
            raise RequestError(
                f"no single job begins with {args['job']!r}", next_step="aivillage-node jobs list"
            )
        return row

    def _shown(self, row: JobRow) -> dict[str, Any]:
        return {
            "job": row.id,
            "operation": row.operation,
            "state": self.buyer.state_of(row),
            "created_unix": row.created,
            "ended_unix": row.ended,
            "ceiling_micro_credits": row.ceiling,
            "receipt": msgspec.json.decode(row.receipt) if row.receipt else None,
            "local": bool(row.local),
            "parent": row.parent,
            "code": row.code,
            "message": row.message[:TEXT_MAX],
        }

    async def on_balance(self, _args: dict[str, Any]) -> dict[str, Any]:
        balance = await self.ledger.balance()
        return dict(msgspec.to_builtins(balance))

    async def on_history(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        rows = await self.ledger.history(_limit(args, HISTORY_LISTED, HISTORY_LISTED_MAX))
        return [msgspec.to_builtins(row) | {"attempt": row.attempt.hex()} for row in rows]

    async def on_audit(self, _args: dict[str, Any]) -> dict[str, Any]:
        report = await self.ledger.audit()
        return dict(msgspec.to_builtins(report))

    async def on_audit_peer(self, args: dict[str, Any]) -> dict[str, Any]:
        """Compares our book with a neighbour's, about the two of us."""
        peer = self.ledger.names_of(self._neighbour(str(args["peer"])))[0]
        link = self.links.get(peer)
        if link is None:
            raise RefusedError(
                f"{peer[-8:]} is not here", code="NO_PEER", next_step="aivillage-node peers"
            )
        found = msgspec.to_builtins(await self.pairs.compare(link), builtin_types=(bytes,))
        for difference in found["differences"]:
            difference["lane"] = difference["lane"].hex()
        return {"peer": peer} | dict(found)

    async def on_settle(self, args: dict[str, Any]) -> dict[str, Any]:
        """Moves what we owe a peer, or pays it ahead, from what others owe or lend us."""
        peer = self._neighbour(str(args["peer"]))
        amount = args.get("micro_credits")
        wanted = self.ledger.owed_to(peer) if amount is None else msgspec.convert(amount, Amount)
        if not wanted:
            raise RequestError(
                f"you owe {peer[-8:]} nothing", next_step="name an amount to pay it ahead"
            )
        cleared = await self.clearing.clear(peer, wanted)
        return {"peer": peer, "asked": wanted} | dict(msgspec.to_builtins(cleared))

    def _neighbour(self, name: str) -> PeerId:
        """The peer of the book or the neighbourhood with that id, or end of an id."""
        booked = {view.peer for view in self.ledger.views()}
        return who.named(name, booked | {link.peer for link in self.links.all()})

    async def on_invite(self, args: dict[str, Any]) -> dict[str, Any]:
        line = args.get("line_micro_credits")
        token = await self.villagers.joining.invite(
            self.addresses(),
            line and msgspec.convert(line, Amount),
            uses=int(args.get("uses", 1)),
            days=int(args.get("days", INVITE_DAYS)),
            note=str(args.get("note", "")),
        )
        return {"token": token}

    async def on_invites(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        """Those that were made here, the newest first; never the tokens."""
        return list(msgspec.to_builtins(await self.villagers.joining.invites.listing()))

    async def on_invite_revoke(self, args: dict[str, Any]) -> dict[str, Any]:
        revoked = await self.villagers.joining.invites.revoke(str(args["id"]))
        return dict(msgspec.to_builtins(revoked))

    async def on_join(self, args: dict[str, Any]) -> dict[str, Any]:
        inviter = await self.villagers.joining.join(str(args["token"]))
        return {"inviter": inviter, "village": self.villagers.membership.village.hex()}

    async def on_owner(self, _args: dict[str, Any]) -> dict[str, Any]:
        return self.owners.shown()

    async def on_owner_join(self, args: dict[str, Any]) -> dict[str, Any]:
        await self.owners.join(str(args["token"]), int(time.time() * 1000))
        await self.villagers.say_hello_again()
        return self.owners.shown()

    async def on_grant(self, args: dict[str, Any]) -> dict[str, Any]:
        amount = msgspec.convert(args["amount_micro_credits"], Amount)
        holder = self._neighbour(str(args["peer"]))
        granted = await self.grants.issue(holder, amount, int(args["days"]))
        sent = self.villagers.give_grant(holder, granted)
        return {"holder": holder, "token": to_token(granted), "sent": sent}

    async def on_grants(self, _args: dict[str, Any]) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self.grants.listing()))

    async def on_grants_import(self, args: dict[str, Any]) -> dict[str, Any]:
        granted = from_token(str(args["token"]))
        if await self.grants.take(granted):
            self.villagers.show_grant(granted.envelope)
        return await self.on_grants({})

    async def on_config(self, _args: dict[str, Any]) -> list[dict[str, Any]]:
        return [msgspec.to_builtins(origin) for origin in self.origins]

    async def on_events(self, _args: dict[str, Any]) -> dict[str, Any]:
        recent = [{"at_unix": at, "event": name} | f for at, name, f in self.events.recent]
        return {"counts": dict(self.events.counts), "recent": recent}

    async def on_stop(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.stop.set()
        return {"stopping": True}


def _state(refusal: AivillageError | None) -> str:
    """Of the node; what its owner wants is no failure, and stops only work for others."""
    if refusal is None:
        return "ready"
    what = "closed to others" if refusal.code == "OWNER_LIMIT" else "refusing work"
    return f"{what}: {refusal.message}"


def _limit(args: dict[str, Any], usual: int, most: int) -> int:
    """How many rows are asked for. Raises: RequestError: none, or more than an answer holds."""
    limit = int(args.get("limit", usual))
    if not 0 < limit <= most:
        raise RequestError(
            f"an answer holds 1 to {most:,} rows, not {limit:,}", next_step=f"--limit {most}"
        )
    return limit
