"""Who computes which layers of a split answer: pure.

Splitting makes a large model possible, never one answer faster: each token goes through all layers
in turn, and over the network between them. So the fewest stages win, and among those the least time
a token. The layers are shared out by speed, within what each one's memory holds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from aivillage.models.inference.catalogue import KnownModel
from aivillage.models.inference.stages import (
    end_bytes,
    fixed_bytes,
    layer_bytes,
    memory_bytes,
)
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.types import PeerId, Seconds

LOST_SECONDS: Final[Seconds] = 0.05
"""What a stage that is lost costs, shared out over the tokens of a usual answer."""
PEERS_MAX: Final = 5
"""Looked at, the best first: all orders of them are 120, some 10 ms of the daemon's loop."""
STAGES_MAX: Final = 5
STAGES_A_PEER: Final = 2
"""That one peer may have loaded: `parts.py`."""
WEIGHTS_PER_SECOND_GUESS: Final = 1.06e9
"""Of a peer never measured, one token at a time: one slow core, 300 layers of our model."""
KEEP_FACTOR: Final = 1.5
"""How much slower than the best the last plan may be, and is kept: its layers are loaded."""
FAILURES_KEPT_MAX: Final = 0.5
"""A peer that failed of late is none to keep."""
RTT_SECONDS_GUESS: Final[Seconds] = 0.05
"""To a peer without a link."""


class StagePeer(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one that offers stages."""

    peer: PeerId
    memory_bytes: int
    layers_per_second: float = 0.0
    """Measured, one token at a time; 0: never."""
    layers_per_second_guess: float = 300.0
    rtt_seconds: Seconds | None = None
    failures: float = 0.0

    @property
    def speed(self) -> float:
        return self.layers_per_second or self.layers_per_second_guess

    @property
    def distance(self) -> Seconds:
        return RTT_SECONDS_GUESS if self.rtt_seconds is None else self.rtt_seconds

    def seconds(self, layers: int) -> Seconds:
        """One token through so many layers here, and back."""
        return layers / self.speed + self.distance


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Layers first..last-1 at one peer."""

    peer: PeerId
    first: int
    last: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens_per_second` is what is expected of one answer without a right guess in it."""

    stages: tuple[Placed, ...]
    tokens_per_second: float
    why: str


def plan(model: KnownModel, peers: Sequence[StagePeer], before: Sequence[Placed] = ()) -> Plan:
    """The fewest stages that hold `model`; of those, the fastest for one answer.

    `before`: what the last answer's stages were in the end, kept where that is nearly as good.

    Raises:
        RefusedError: NO_PEER, they do not hold it together.
    """
    if not model.layers:
        raise RefusedError(
            f"{model.name} cannot be split", code="NO_PEER", next_step="find a peer that has it"
        )
    best = sorted(peers, key=lambda peer: (peer.failures, peer.seconds(model.layers)))[:PEERS_MAX]
    for count in range(1, min(STAGES_MAX, len(best)) + 1):
        if not may_hold(model, best, count):
            continue
        found = [
            (_seconds(order, shares), order, shares)
            for order in itertools.permutations(best, count)
            if (shares := _shares(model, order))
        ]
        if found:
            fastest = min(found, key=_rank)
            return _laid_out(model, *(_kept(model, peers, before, fastest) or fastest))
    raise RefusedError(
        f"nobody offers all of {model.name}, and the {len(best)} that offer layers of it do not "
        "hold it together",
        code="NO_PEER",
        next_step="more peers with --enable inference.stage, or more worker_memory_mb",
    )


def stand_in(
    model: KnownModel,
    peers: Sequence[StagePeer],
    lost: Placed,
    chain: Sequence[PeerId],
    ready: PeerId | None = None,
) -> StagePeer:
    """Who computes the layers of a lost stage instead.

    `ready`, which has them loaded; else one that has none of the chain, if any.

    Raises:
        RefusedError: NO_PEER.
    """
    needed = memory_bytes(model, lost.first, lost.last)
    able = [peer for peer in peers if peer.memory_bytes >= needed and peer.peer != lost.peer]
    if not able:
        raise RefusedError(
            f"layers {lost.first} to {lost.last - 1} were lost with {lost.peer[-8:]}, and nobody "
            "else holds them",
            code="NO_PEER",
            next_step="submit it again",
        )
    layers = lost.last - lost.first

    def rank(one: StagePeer) -> tuple[bool, bool, float, Seconds]:
        return one.peer != ready, one.peer in chain, one.failures, one.seconds(layers)

    return min(able, key=rank)


def stand_bys(
    model: KnownModel, peers: Sequence[StagePeer], stage: Placed, busy: Counter[PeerId]
) -> list[StagePeer]:
    """Who could load the layers of `stage` ahead, the best first.

    `busy`: the chain's peers, and those that stand by already, with how much they have: who has
    less comes first, and who has two stages is full.
    """
    needed, layers = memory_bytes(model, stage.first, stage.last), stage.last - stage.first
    able = [p for p in peers if p.memory_bytes >= needed and busy[p.peer] < STAGES_A_PEER]
    return sorted(able, key=lambda one: (busy[one.peer], one.failures, one.seconds(layers)))


def may_hold(model: KnownModel, peers: Sequence[StagePeer], count: int = STAGES_MAX) -> bool:
    """Whether `count` of `peers` have room for the model, its ends left out: told at once."""
    rooms = sorted(layers_held(model, peer.memory_bytes, ends=0) for peer in peers)
    return bool(model.layers) and sum(rooms[-count:]) >= model.layers


def layers_held(model: KnownModel, memory: int, *, ends: int) -> int:
    """How many layers fit into so much memory beside `ends` ends of the model."""
    left = memory - fixed_bytes(model) - end_bytes(model) * ends
    return max(0, left // layer_bytes(model))


_Sharing = tuple[Seconds, Sequence[StagePeer], Sequence[int]]


def _kept(
    model: KnownModel, peers: Sequence[StagePeer], before: Sequence[Placed], best: _Sharing
) -> _Sharing | None:
    """The last plan where all of its peers are there, fit, did not fail and are fast enough."""
    by_peer = {peer.peer: peer for peer in peers if peer.failures < FAILURES_KEPT_MAX}
    distinct = {one.peer for one in before}
    if len(distinct) != len(best[1]) or len(before) != len(best[1]) or not distinct <= {*by_peer}:
        return None
    order, shares = [by_peer[x.peer] for x in before], [x.last - x.first for x in before]
    needed = [memory_bytes(model, one.first, one.last) for one in before]
    if any(peer.memory_bytes < size for peer, size in zip(order, needed, strict=True)):
        return None
    seconds = _seconds(order, shares)
    return (seconds, order, shares) if seconds <= KEEP_FACTOR * best[0] else None


def _shares(model: KnownModel, order: Sequence[StagePeer]) -> list[int]:
    """Layers of each in turn, so that they need equally long; none where they do not fit."""
    last = len(order) - 1
    room = [
        layers_held(model, peer.memory_bytes, ends=(at == 0) + (at == last))
        for at, peer in enumerate(order)
    ]
    if min(room) < 1 or sum(room) < model.layers:
        return []
    shares = [1] * len(order)
    for _ in range(model.layers - len(order)):
        open_ones = [at for at in range(len(order)) if shares[at] < room[at]]
        shares[min(open_ones, key=lambda at: (shares[at] + 1) / _class(order[at].speed))] += 1
    return shares


def _class(speed: float) -> float:
    """A speed to the next power of two: layers are not loaded anew for less."""
    return 2.0 ** round(math.log2(speed))


def _rank(one: _Sharing) -> tuple[float, list[PeerId]]:
    """Those about as fast are told apart by name, not by noise: they have their layers loaded."""
    _, order, shares = one
    work = sum(layers / _class(peer.speed) for peer, layers in zip(order, shares, strict=True))
    away = sum(round(peer.distance, 2) for peer in order)
    lost = sum(round(peer.failures, 1) for peer in order) * LOST_SECONDS
    return round(work + away + lost, 3), [peer.peer for peer in order]


def _seconds(order: Sequence[StagePeer], shares: Sequence[int]) -> Seconds:
    return sum(peer.seconds(layers) for peer, layers in zip(order, shares, strict=True))


def _laid_out(
    model: KnownModel, seconds: Seconds, order: Sequence[StagePeer], shares: Sequence[int]
) -> Plan:
    edges = [0, *itertools.accumulate(shares)]
    placed = tuple(
        Placed(peer=peer.peer, first=first, last=last)
        for peer, (first, last) in zip(order, itertools.pairwise(edges), strict=True)
    )
    away = sum(peer.distance for peer in order)
    where = ", ".join(f"{one.first}-{one.last - 1} at {one.peer[-8:]}" for one in placed)
    guessed = "" if all(peer.layers_per_second for peer in order) else " (never measured: guessed)"
    needed = memory_bytes(model, 0, model.layers) >> 20
    must = "; split because it must be, not for speed" if len(placed) > 1 else ""
    why = (
        f"nobody offers {model.name} whole ({needed} MB); layers {where}: about "
        f"{1 / seconds:.1f} tokens/s expected{guessed}, {(seconds - away) * 1000:.0f} ms of work "
        f"and {away * 1000:.0f} ms of travel a token{must}"
    )
    return Plan(stages=placed, tokens_per_second=1 / seconds, why=why)
