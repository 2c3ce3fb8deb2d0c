"""Who offers stages of a model now, as a plan needs to know them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from aivillage.models.inference import stages
from aivillage.models.inference.catalogue import KnownModel
from aivillage.node.choice import RATES, Explanation
from aivillage.node.records import Work
from aivillage.node.split_plan import (
    WEIGHTS_PER_SECOND_GUESS,
    Placed,
    Plan,
    StagePeer,
    may_hold,
    plan,
)
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.types import PeerId

if TYPE_CHECKING:
    from aivillage.node.trade import Trade


def stage_peers(trade: Trade, model: KnownModel, excluded: Collection[PeerId]) -> list[StagePeer]:
    """Peers with room for a session, without those that failed the job."""
    work, found = Work(stages.OPERATION, model.name), []
    for one in trade.discovery.candidates(*work):
        if one.peer in excluded or trade.book.policy(one.peer).blocked or not one.free_slots:
            continue
        found.append(
            StagePeer(
                peer=one.peer,
                memory_bytes=one.offered.memory_bytes,
                layers_per_second=one.record.speed(work),
                layers_per_second_guess=WEIGHTS_PER_SECOND_GUESS / max(1, model.layer_parameters),
                rtt_seconds=trade.market.rtt_of(one.peer),
                failures=one.record.failures,
            )
        )
    return found


def explanation(found: Plan, prefer: str) -> Explanation:
    """A plan as every choice is laid open; it had no candidates one by one."""
    rate = RATES[prefer]
    return Explanation(why=found.why, prefer=prefer, micro_credits_a_second=rate, candidates=())


def with_draft(found: Plan, model: str) -> Plan:
    """As a plan reads where `model`, if any, guesses for the stages."""
    if not model:
        return found
    return msgspec.structs.replace(found, why=f"{found.why}; {model} guesses where that pays")


def may_be_split(trade: Trade, model: str) -> bool:
    """Whether those that lend layers have room for the model: no plan is made for it."""
    known = trade.workers.shelf.find_divisible(model)
    return known is not None and may_hold(known, stage_peers(trade, known, ()))


def plan_for(trade: Trade, model: str, before: Sequence[Placed] = ()) -> Plan | None:
    """How the model would be split now; None where it cannot be."""
    known = trade.workers.shelf.find_divisible(model)
    if known is None:
        return None
    try:
        return plan(known, stage_peers(trade, known, ()), before)
    except AivillageError:
        return None
