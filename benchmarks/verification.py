"""How soon a liar is found, what looking costs, and whether anybody honest is accused.

    python benchmarks/verification.py [--quick] [--json]

Whole nodes in one process on the in-memory network: the product's buyer, seller, books and
verification with the settings that everybody starts with. Their engine is scripted, so that a lie
costs no model. `formula_` keys are the chance of at least one check falling on a lie
(docs/verification.md), `detection_` the part of villages in which the liar was cut off. A seller
cheats at random on so many per cent of its answers, in turn by the lies that pass the check of
every result: truncation, another request's tokens, a cheaper model's. `patient` is a liar that
is honest for ten results first and then lies on the given part; the worst case.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path

import trio
from claims import Claims, main

from aivillage.models.inference.generate import GenerateRequest
from aivillage.node.config import Settings
from aivillage.node.replication import BUDGET, Replicator
from aivillage.node.reputation import Key
from aivillage.node.verifier import TRUSTED_FROM, Trust
from aivillage.protocols.codec import pack
from tests.simulation.cheats import (
    CHEATS,
    Cheat,
    Choose,
    after,
    now_and_then,
    of_a_cheaper_model,
    wrong_text,
)
from tests.simulation.mesh import Node, open_mesh

JOBS = 100
FURTHER = (10, 30, 300, 1000)
"""Jobs for which only the formula is told."""
TOKENS = 4
RATES = (1, 5, 20, 100)
DEVIATIONS = 3.0
"""By so many standard errors all that was found may miss the formula."""
OPERATION = "inference.generate"


def detection(jobs: int, percent: float, honest: int = 0) -> float:
    """The chance that a liar is found within `jobs` jobs, `honest` ones before them.

    Over the counts it may have: a result is done again with the count's chance, and is then a lie
    with the given one. What is not done again moves nothing.
    """
    lie = percent / 100
    unseen = {0: 1.0}
    for job in range(honest + jobs):
        after_job: dict[int, float] = {}
        for count, part in unseen.items():
            chance = Trust(count=count).chance
            right = 1.0 if job < honest else 1 - lie
            after_job[count + 1] = after_job.get(count + 1, 0.0) + part * chance * right
            after_job[count] = after_job.get(count, 0.0) + part * (1 - chance)
        unseen = after_job
    return 1 - sum(unseen.values())


class Village:
    """A buyer that looks, a seller that may lie, and two that do not.

    `jobs`, `accused` (honest ones found wrong) and `unchecked` are over all that was lived here.
    """

    def __init__(self, buyer: Node, liar: Node, honest: list[Node], rng: random.Random) -> None:
        self.buyer, self.liar, self.honest, self.rng = buyer, liar, honest, rng
        self.replicator: Replicator = buyer.desk.replicator
        self.replicator.draw = rng.random
        self.replicator.shuffle = rng.shuffle
        self.jobs = self.accused = 0

    def trust(self, node: Node) -> Trust:
        model = GenerateRequest(prompt="x").model
        key = Key(node.peer, OPERATION, model, node.script.kernel_class)
        return self.replicator.reputation.of(key)

    def forget(self) -> None:
        """Everybody is a newcomer again; what was spent stays spent."""
        self.accused += sum(self.trust(node).failed for node in self.honest)
        self.replicator.reputation._trust.clear()
        self.replicator.reputation._cut.clear()

    async def job(self, *, deadline: float | None = None) -> None:
        """One, at the seller that may lie, and what is done about it."""
        self.jobs += 1
        request = GenerateRequest(prompt=f"{self.jobs:06}", max_tokens=TOKENS)
        await self.buyer.ask(
            operation=OPERATION, request=pack(request), peer=self.liar.peer, deadline=deadline
        )
        await self.replicator.idle.wait()

    async def lived(self, jobs: int, cheat: Choose, *, deadline: float | None = None) -> int:
        """The job after which a newcomer that cheats like this was found; 0: it was not."""
        self.liar.script.cheat = cheat
        found = 0
        for number in range(1, jobs + 1):
            await self.job(deadline=deadline)
            if self.trust(self.liar).failed:
                found = number
                break
        self.forget()
        return found


@asynccontextmanager
async def village(rng: random.Random) -> AsyncIterator[Village]:
    with tempfile.TemporaryDirectory() as folder:
        async with open_mesh(Path(folder)) as mesh:
            percent = Settings().verify_percent_max
            buyer = await mesh.add("buyer", serve=False, verify_percent_max=percent)
            buyer.script.is_check_cheap = True
            sellers = [await mesh.add(name) for name in ("liar", "one", "two")]
            await mesh.knows(buyer, *sellers)
            yield Village(buyer, sellers[0], sellers[1:], rng)


async def curve(
    claims: Claims, here: Village, percent: int, trials: int, lies: Iterator[Cheat]
) -> tuple[float, float]:
    """One point of it, measured and by formula. What was found beyond that, and the variance."""
    seen = 0
    for _ in range(trials):
        cheat = now_and_then(next(lies), percent, here.rng)
        seen += bool(await here.lived(JOBS, cheat))
    formula, key = detection(JOBS, percent), f"after_{JOBS}_jobs_at_{percent}_percent"
    claims.add(f"detection_{key}", seen / trials)
    claims.add(f"formula_{key}", formula)
    claims.add(f"trials_{key}", trials)
    for jobs in FURTHER:
        claims.add(f"formula_after_{jobs}_jobs_at_{percent}_percent", detection(jobs, percent))
    print(f"# {key}", file=sys.stderr)
    return seen - trials * formula, trials * formula * (1 - formula)


async def patient(claims: Claims, here: Village, trials: int) -> None:
    """Honest until it is trusted, and then never: the answers that were wrong until it is found."""
    lies = 0
    for _ in range(trials):
        found = await here.lived(400, after(of_a_cheaper_model, TRUSTED_FROM))
        lies += found - TRUSTED_FROM
    claims.add("patient_lies_until_found", lies / trials)
    claims.add("formula_patient_lies_until_found", 1 / Trust(count=TRUSTED_FROM).chance)
    for percent in RATES:
        chance = detection(JOBS, percent, honest=TRUSTED_FROM)
        claims.add(f"formula_patient_after_{JOBS}_jobs_at_{percent}_percent", chance)


async def obvious(claims: Claims, here: Village, trials: int) -> None:
    """Wrong text fails the check of every result: found at the first lie."""
    rate = 20
    seen = [
        await here.lived(JOBS, now_and_then(wrong_text, rate, here.rng), deadline=0.5)
        for _ in range(trials)
    ]
    claims.add(f"wrong_text_detection_at_{rate}_percent", sum(map(bool, seen)) / trials)


async def honest(claims: Claims, here: Village, jobs: int) -> None:
    """What looking costs where nobody lies; one peer is of a class with other bits."""
    reputation, odd = here.replicator.reputation, here.honest[1]
    odd.script.kernel_class, odd.script.key = "scripted/2", "other hardware"
    before = reputation.trusted_jobs_spent, reputation.trusted_checks_spent
    found = await here.lived(jobs, lambda _request: None)
    spent = reputation.trusted_jobs_spent - before[0]
    checks = reputation.trusted_checks_spent - before[1]
    claims.add("honest_jobs", jobs)
    claims.add("overhead_percent_trusted", 100 * checks / spent, at_most=10)
    here.accused += bool(found)
    odd.script.kernel_class, odd.script.key = here.liar.script.kernel_class, ""


async def measured(claims: Claims, args: argparse.Namespace) -> None:
    rng, lies = random.Random(7), cycle(CHEATS.values())
    trials = {1: 2, 5: 6, 20: 10, 100: 10} if args.quick else {1: 6, 5: 40, 20: 30, 100: 21}
    async with village(rng) as here:
        started = trio.current_time()
        await honest(claims, here, 100 if args.quick else 300)
        points = [await curve(claims, here, p, trials[p], lies) for p in RATES]
        beyond, variance = (sum(parts) for parts in zip(*points, strict=True))
        off = abs(beyond) / math.sqrt(variance)
        claims.add("deviations_from_formula", off, at_most=DEVIATIONS)
        await patient(claims, here, 2 if args.quick else 8)
        await obvious(claims, here, 3)
        reputation = here.replicator.reputation
        claims.add("jobs", here.jobs)
        claims.add("honest_accused", here.accused, at_most=0)
        share = 100 * reputation.checks_spent / reputation.jobs_spent
        claims.add("overhead_percent_all", share, at_most=Settings().verify_percent_max)
        claims.add("checks_left_out_for_money", reputation.unchecked.get(BUDGET, 0))
        claims.add("ms_a_job", 1000 * (trio.current_time() - started) / here.jobs)


def measure(claims: Claims, args: argparse.Namespace) -> None:
    trio.run(measured, claims, args)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__ or ""))
