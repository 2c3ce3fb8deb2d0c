"""Runs the ledger under many seeds: `python -m tests.simulation.ledger_sim --seeds 50`.

A failing seed prints what broke and how to run it again.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from tests.simulation import households, invariants, mutants, rings, sybils
from tests.simulation.world import BrokenError, Node, World, broken

STEPS = 200
QUIET_STEPS_MAX = 400
HEALING_DAYS = 8
TOLD_SEEDS = 100


@dataclass
class Outcome:
    seed: int
    failure: str
    crashes: int
    restores: int
    vouchers: int
    transfers: int
    sybils: int
    taken: int
    """The most that strangers had of one honest node, of its pool."""
    cpu_seconds: float = field(default=0.0, compare=False)


def run_seed(seed: int, mutant: str = "", steps: int = STEPS) -> Outcome:
    """One seed to the end; `failure` is empty if every invariant held."""
    started = time.process_time()
    with mutants.planted(mutant) as runner_type:
        world = World(seed, runner_type)
        failure = ""
        try:
            live(world, steps)
        except BrokenError as error:
            failure = str(error)
    honest = [node for node in world.nodes if node.honest and node.lossless]
    return Outcome(
        *(seed, failure, world.crashes, world.restores, world.vouchers, rings.closed(world)),
        sybils=len(world.sybils),
        taken=max(map(sybils.taken_by_strangers, honest), default=0),
        cpu_seconds=time.process_time() - started,
    )


def live(world: World, steps: int) -> None:
    seen = {}
    for _ in range(steps):
        world.trade()
        rings.trade(world)
        sybils.trade(world)
        households.trade(world)
        seen.update({work.attempt: work for work in world.work})
        world.advance()
        invariants.at_every_step(world)
    accepted: dict[tuple[str, str], int] = {}
    become_quiet(world)
    for work in seen.values():
        key = (work.buyer.id, work.seller.id)
        accepted[key] = accepted.get(key, 0) + work.accepted
    invariants.at_every_step(world)
    invariants.paid_for_work(world, accepted)
    invariants.when_quiet(world)
    heal(world)


def become_quiet(world: World) -> None:
    """Faults end, running work ends, and everything must come to rest."""
    world.rates.calm()
    for node in world.nodes:
        if not node.honest and node.lie in {"forgets", "never_pays"}:
            node.lie = "rests"
    for work in world.work:
        world.end(work)
    for _ in range(QUIET_STEPS_MAX):
        world.advance()
        if at_rest(world):
            return
    raise broken("live", "the network does not come to rest")


def at_rest(world: World) -> bool:
    if any(frame.source.honest for frame in world.frames) or not all(
        node.up for node in world.nodes
    ):
        return False
    if any(node.runner.waiting for node in world.nodes) or not rings.at_rest(world):
        return False
    pairs = [
        (a, b) for a in world.nodes for b in world.nodes if a is not b and {a, b} & {*world.members}
    ]
    return all(_pair_at_rest(world, a, b) for a, b in pairs)


def _pair_at_rest(world: World, a: Node, b: Node) -> bool:
    if not world.linked(a, b):
        return False
    partner = a.ledger.desk.partner(b.id)
    if not (a.honest and b.honest):
        return True
    waiting = partner.unconfirmed or partner.receipts or partner.unpaid_since is not None
    return partner.link is not None and partner.link.synced and not waiting


def heal(world: World) -> None:
    """Days pass; then every honest pair with line left can go on."""
    for _ in range(HEALING_DAYS):
        world.now += 86_400
        for _ in range(2):
            world.advance()
    invariants.at_every_step(world)
    invariants.after_days(world)
    for seller in world.members:
        for buyer in world.members:
            if seller is not buyer and seller.honest and buyer.honest:
                invariants.can_work_again(world, seller, buyer)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--mutant", default="", choices=["", *mutants.NAMES])
    parser.add_argument("--jobs", type=int, default=1, help="seeds in so many processes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run = functools.partial(run_seed, mutant=options.mutant, steps=options.steps)
    seeds = range(options.first, options.first + options.seeds)
    with multiprocessing.Pool(options.jobs) as pool:
        outcomes = list(_told(pool.imap(run, seeds), len(seeds)))
    failures = [outcome for outcome in outcomes if outcome.failure]
    summary = {
        "seeds": len(outcomes),
        "failures": len(failures),
        "crashes": sum(outcome.crashes for outcome in outcomes),
        "restores": sum(outcome.restores for outcome in outcomes),
        "vouchers": sum(outcome.vouchers for outcome in outcomes),
        "transfers": sum(outcome.transfers for outcome in outcomes),
        "sybils": sum(outcome.sybils for outcome in outcomes),
        "taken_most": max(outcome.taken for outcome in outcomes),
        "cpu_seconds": round(sum(outcome.cpu_seconds for outcome in outcomes), 1),
        "commit": commit(),
    }
    if options.json:
        print(json.dumps({**summary, "failed": [asdict(outcome) for outcome in failures]}))
    else:
        for outcome in failures:
            print(f"seed {outcome.seed}: {outcome.failure}")
            print(
                f"  again: python -m tests.simulation.ledger_sim --first {outcome.seed} --seeds 1"
            )
        print(" ".join(f"{key}={value}" for key, value in summary.items()))
    return 1 if failures else 0


def _told(outcomes: Iterable[Outcome], of: int) -> Iterator[Outcome]:
    """Each outcome, and now and then how far it is."""
    failed = 0
    for number, outcome in enumerate(outcomes, 1):
        failed += bool(outcome.failure)
        if number % TOLD_SEEDS == 0:
            print(f"# {number} of {of} seeds, {failed} failed", file=sys.stderr, flush=True)
        yield outcome


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
