"""Does free-riding matter in a village, and which limits are right? docs/economics.md answers.

    python benchmarks/economics.py [--quick] [--json]

Villages of product ledgers in one process under virtual time (tests/simulation/economy.py): real
vouchers on real books, made-up demand. Tables, each a function below: `load` (who harms whom when
machines are idle or full), `line` and `exposure` (the limits), `clearing` (rings and a treasury),
`size`, and `attack` (what cheats get, over what the formula allows: never above 1). Keys end in
what they count; `_percent` of jobs are of those that were asked for. Figures are means over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from claims import ROOT, Claims, main

from tests.simulation import economy
from tests.simulation.economy import CREDIT, Member, Plan, Village, settle

WORLD = ROOT / "tests" / "simulation" / "economy.py"
ATTACK_DAYS = 7
WEEKS = 4
PROCESSES = 2
Figures = dict[str, float]


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def group(figures: Figures, name: str, members: list[Member]) -> None:
    """What became of the jobs that `members` asked for."""
    asked = sum(member.asked for member in members)
    if asked:
        figures[f"{name}_refused_percent"] = percent(asked - sum(m.done for m in members), asked)
        if name == "honest":
            for reason in ("line", "busy"):
                refused = sum(member.refused[reason] for member in members)
                figures[f"{name}_{reason}_percent"] = percent(refused, asked)


def top_tenth_percent(village: Village) -> float:
    """The part of all debts that the tenth of members owes which owes most."""
    debts = sorted(
        -sum(pair.balance for pair in member.ledger.desk.pairs()) for member in village.members
    )
    owed = [debt for debt in debts if debt > 0]
    return percent(sum(owed[-max(1, len(village.members) // 10) :]), sum(owed))


def lived(plan: Plan) -> Figures:
    """One village to its last day."""
    village = settle(plan)
    village.live()
    figures: Figures = {
        "sum_of_balances": abs(economy.sum_of_balances(village)),
        "books_that_differ": economy.mirror_faults(village),
    }
    for role in ("honest", "poor", "free"):
        group(figures, role, village.of(role))
    serving = village.of("honest", "poor")
    supplied = plan.days * sum(member.supply for member in serving)
    figures["used_percent"] = percent(sum(member.served for member in serving), supplied)
    figures["jobs_a_day"] = sum(member.done for member in village.members) / plan.days
    figures["honest_credits_a_day"] = sum(m.got for m in serving) / CREDIT / plan.days
    figures["top_tenth_debt_percent"] = top_tenth_percent(village)
    riders = village.of("free")
    if riders:
        taken = economy.extracted(village, riders)
        figures["extracted_credits"] = taken / CREDIT
        figures["extracted_over_bound"] = taken / economy.bound(village, riders, plan.days)
    if plan.clearing != "none":
        figures["jobs_saved"] = village.saved
        figures["rings"] = village.rings
        figures["ring_credits"] = village.ring_amount / CREDIT
    return figures


def cell(claims: Claims, name: str, plan: Plan, seeds: Iterable[int]) -> None:
    """The means over `seeds` of one village's figures, as `<name>_<figure>`.

    The books must agree, and no free-rider may be beyond the bound, in each of them.
    """
    plans = [replace(plan, seed=seed) for seed in seeds]
    with ProcessPoolExecutor(PROCESSES) as pool:
        runs = list(pool.map(lived, plans))
    for key in ("sum_of_balances", "books_that_differ"):
        claims.found[key] += sum(run.pop(key) for run in runs)
    for key in runs[0]:
        claims.add(f"{name}_{key}", statistics.fmean(run[key] for run in runs))
    worst = max(run.get("extracted_over_bound", 0.0) for run in runs)
    claims.found["worst_over_bound"] = max(claims.found["worst_over_bound"], worst)
    print(f"# {name}", file=sys.stderr)


def load(claims: Claims, base: Plan, seeds: range) -> None:
    """Free-riders where machines are idle, just enough, and too few; the line never binds."""
    for loaded in (0.5, 1.0, 1.5):
        for share in (0, 10, 30, 50):
            plan = replace(base, load=loaded, free=share / 100)
            cell(claims, f"load{loaded}_free{share}", plan, seeds)


def line(claims: Claims, base: Plan, seeds: range) -> None:
    """Ten members, four weeks, three in ten ride free: what each line lets happen."""
    base = replace(base, size=10, days=2 * base.days, free=0.3)
    for loaded in (0.5, 1.5):
        for tenths in (1, 10, 100, 1000):
            plan = replace(base, load=loaded, line=tenths * CREDIT // 10)
            cell(claims, f"line{tenths / 10:g}_load{loaded}", plan, seeds)


def clearing(claims: Claims, base: Plan, seeds: range) -> None:
    """What rings, a treasury, clearing ahead and buying from debtors add under short lines."""
    base = replace(base, size=10, days=2 * base.days, load=0.5, free=0.1)
    for tenths in (3, 10, 30):
        plan = replace(base, line=tenths * CREDIT // 10)
        for way in ("none", "rings", "hub"):
            cell(claims, f"clear{tenths / 10:g}_{way}", replace(plan, clearing=way), seeds)
        cell(claims, f"clear{tenths / 10:g}_debtor", replace(plan, choice="debtor"), seeds)
    for tenths in (3, 10):
        plan = replace(base, line=tenths * CREDIT // 10, clearing="early")
        cell(claims, f"clear{tenths / 10:g}_early", plan, seeds)
    measure_room(claims)


def measure_room(claims: Claims) -> None:
    """How much one clearing moves, and the room that it makes at the creditor."""
    village = Village(Plan(size=3), ["honest"] * 3)
    debtor, creditor, middle = village.members
    village.work(debtor, creditor, CREDIT)
    village.work(middle, debtor, CREDIT)
    before = creditor.headroom(debtor)
    moved = village.clear(debtor, creditor, CREDIT)
    claims.add("ring_moves_at_once_micro_credits", moved)
    claims.add("ring_room_at_once_micro_credits", creditor.headroom(debtor) - before)


def exposure(claims: Claims, base: Plan, seeds: range) -> None:
    """X sets how much a ring may move: a quarter of it at a time."""
    small = replace(base, size=10, load=0.5, free=0.1, line=3 * CREDIT // 10, clearing="hub")
    small = replace(small, days=2 * base.days)
    for amount in (2_000, 20_000, 200_000):
        cell(claims, f"exposure{amount}", replace(small, exposure=amount), seeds)
        for signs in (True, False):
            village = Village(Plan(size=10, line=CREDIT, exposure=amount), ["honest"] * 10)
            name = f"exposure{amount}_{'signed' if signs else 'unsigned'}"
            attack(claims, name, village, [village.add("thief")], signs=signs)


def size(claims: Claims, base: Plan, seeds: range) -> None:
    """The same lines among more neighbours."""
    for members in (10, 30, 100) if base.size == 30 else (10,):
        plan = replace(base, size=members, days=7, free=0.1, line=3 * CREDIT // 10, load=0.5)
        cell(claims, f"size{members}", plan, seeds[:1])


# ---------------------------------------------------------------- cheats


def attack(
    claims: Claims, name: str, village: Village, thieves: list[Member], *, signs: bool = True
) -> float:
    """All take what they can each day for a week; returns credits per honest member."""
    honest = village.of("honest")
    for _ in range(ATTACK_DAYS):
        for thief in thieves:
            economy.drain(village, thief, honest, signs=signs)
        for _ in range(24):
            village.pass_hour()
            if village.hub is not None:
                rob_the_hub(village, thieves, honest)
    return judged(claims, name, village, thieves, ATTACK_DAYS)


def judged(claims: Claims, name: str, village: Village, thieves: list[Member], days: int) -> float:
    taken = economy.extracted(village, thieves)
    took = sum(thief.got for thief in thieves)
    claims.found["extracted_and_not_in_the_books"] += abs(taken - took)
    claims.found["sum_of_balances"] += abs(economy.sum_of_balances(village))
    each = taken / CREDIT / len(village.of("honest"))
    claims.add(f"{name}_credits_per_honest", each)
    over = taken / max(1, economy.bound(village, thieves, days))
    claims.add(f"{name}_over_bound", over, at_most=1.0)
    return each


def rob_the_hub(village: Village, thieves: list[Member], honest: list[Member]) -> None:
    """Debts to members become debts to the treasury, and the lines are used again."""
    for thief in thieves:
        for creditor in honest:
            village.clear(thief, creditor, village.plan.exposure)
        economy.drain(village, thief, honest, signs=True)


def attacks(claims: Claims, base: Plan, seeds: range) -> None:
    """Default, sybils and new faces, each in a fresh village of ten honest members."""
    del seeds
    ten, sybils = ["honest"] * 10, (1, 10, 100) if base.size == 30 else (1, 10, 20)
    village = Village(Plan(), ten)
    attack(claims, "default", village, [village.add("thief")])
    plan = Plan(line=CREDIT // 2, clearing="hub")
    village = Village(plan, [*ten, "thief"])
    attack(claims, "default_hub", village, village.of("thief"))
    gains: dict[str, list[float]] = {"strangers": [], "closed": [], "devices": [], "invited": []}
    for count in sybils:
        for way, gain in gains.items():
            pool = 20_000 if way == "strangers" else 0
            village = Village(Plan(line=CREDIT // 5, pool=pool, pool_day=pool), ten)
            thieves = [newcomer(village, way) for _ in range(count)]
            gain.append(attack(claims, f"{way}{count}", village, thieves))
    for way in ("strangers", "closed", "devices"):
        # One stranger alone gets W and no more; relief is for those that come after it.
        claims.add(f"{way}_gain_by_more_identities", gains[way][-1] - gains[way][1], at_most=0)
    for way in ("strangers", "devices", "invited"):
        whitewash(claims, way)


def newcomer(village: Village, way: str) -> Member:
    if way in {"strangers", "closed"}:
        return village.stranger("thief")
    return village.add("thief", owner="one" if way == "devices" else None)


def whitewash(claims: Claims, way: str) -> None:
    """A new identity each week for four weeks."""
    pool = 20_000 if way == "strangers" else 0
    village = Village(Plan(line=CREDIT // 5, pool=pool, pool_day=pool), ["honest"] * 10)
    honest, thieves = village.of("honest"), list[Member]()
    for _ in range(WEEKS):
        thieves.append(newcomer(village, way))
        for _ in range(7):
            economy.drain(village, thieves[-1], honest, signs=True)
            for _ in range(24):
                village.pass_hour()
    judged(claims, f"whitewash_{way}", village, thieves, 7 * WEEKS)


TABLES: dict[str, Callable[[Claims, Plan, range], None]] = {
    "load": load,
    "line": line,
    "clearing": clearing,
    "exposure": exposure,
    "size": size,
    "attack": attacks,
}


def measure(claims: Claims, args: argparse.Namespace) -> None:
    base = Plan(size=10, days=2, jobs_per_day=10) if args.quick else Plan(days=10)
    seeds = range(1, 2) if args.quick else range(1, 3)
    zeros = ("sum_of_balances", "books_that_differ", "extracted_and_not_in_the_books")
    claims.found |= dict.fromkeys((*zeros, "worst_over_bound"), 0)
    for table in TABLES.values():
        table(claims, base, seeds)
    for key in zeros:  # bars at the end, where all villages have added theirs
        claims.add(key, claims.found[key], at_most=0)
    claims.add("worst_over_bound", claims.found["worst_over_bound"], at_most=1.0)
    claims.note("seeds", len(seeds))
    claims.note("world_sha256", hashlib.sha256(WORLD.read_bytes()).hexdigest())


if __name__ == "__main__":
    sys.exit(main(measure, __doc__ or ""))
