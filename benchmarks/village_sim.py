"""Offers and jobs in villages of 10, 100 and 1,000 nodes. docs/scale.md says what it means.

    python benchmarks/village_sim.py [--quick] [--json]

All nodes in one process and one thread, under virtual time (tests/simulation/large_village.py says
what of the node runs: all that hears, links, dials, sells, buys and books, with real signatures;
and what is made up: the engine, clocks, delays of 20 to 40 ms, SQLite in memory). Made up here:
nodes arrive twenty a second, each knowing the founder only; one in fifty, at least one, sells the
rare operation; a fifth of the nodes leaves every hour, at once and unannounced, and is back five
minutes later; each node asks for a job every 100 s, three in ten for the rare operation. A job
waits ten seconds for a seller; one that fails although one was there for the last five of them, or
from its beginning, counts as failed, and as `jobs_nobody_could` otherwise. Pings are a minute apart
instead of ten seconds: they are counted beside, never among the messages.

`messages` are what offers and ads travel in. `find_s` is from a job's wish for the rare operation
to a seller that said yes, quote included. `cold_find_s` is until an offer is there of an operation
that one node sells, which starts, with no links yet, at the moment when another one begins to look
for it; `cold_found` is the part of those found within the ten seconds that a job waits. `hub` is
the busiest node. `narrow_` villages have a tenth of a view and a quarter of the neighbours: a node
there knows as small a part of all offers as in a village ten times as large. `messages_flatness` is
the most messages a node of all villages over the least.

`crowd_` is the beginning of a village of 800 at an eighth of its price: 100 nodes with an eighth of
the bytes that a node may say, of the view and nearly of the neighbours, who all came within 40 s
and buy at once. Its jobs count among no others: many begin before anybody could know a seller.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from unittest import mock

import trio
from claims import Claims, main

from aivillage.node import exchange, villagers
from aivillage.node.config import Settings
from aivillage.node.market import SEEK_SECONDS
from tests.simulation import large_village
from tests.simulation.large_village import NEWS, RARE, Plan, Village

SIZES = {10: (30.0, 900.0), 100: (30.0, 100.0), 1000: (20.0, 30.0)}
"""Nodes -> seconds of virtual time before the counting, and of it: the larger, the dearer."""
QUICK = {10: (30.0, 300.0), 100: (20.0, 30.0)}
NARROW = {10: (60.0, 600.0), 40: (60.0, 120.0), 160: (60.0, 60.0)}
NARROW_QUICK = {10: (60.0, 300.0), 40: (60.0, 60.0)}
NARROW_VIEW, NARROW_NEIGHBOURS = 12, 4
CROWD_VIEW, CROWD_NEIGHBOURS = 16, 6
CROWD = Plan(
    size=100,
    rare_sellers=2,
    join_seconds=0.4,
    settings=Settings(
        heartbeat_seconds=60.0, village_line_micro_credits=10**9, gossip_bytes_per_second=1024
    ),
)
CROWD_SECONDS, CROWD_JOBS_PER_SECOND = (20.0, 30.0), 3.0
CROWD_BAR = 0.98
FLATNESS_BAR = 1.5
DONE_BAR = 0.999
LATECOMERS = 10
LIARS, VICTIMS = 5, 45
GREED_SECONDS = 60.0
LENT_MICRO_CREDITS = 100
"""Ten small jobs: at the default of 20,000 a liar would be busy for hours of virtual time."""
PINGS = ("Ping", "Pong")


def percentile_95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1) + 0.5)] if values else 0.0


async def lived(
    claims: Claims, name: str, plan: Plan, times: tuple[float, float], jobs_per_second: float
) -> Village:
    """One village to its end, its figures as `<name>_<figure>`."""
    started, (warm_seconds, seconds) = time.process_time(), times
    async with trio.open_nursery() as nursery:
        village = Village(plan, nursery)
        await village.settle()
        await trio.sleep(warm_seconds)
        village.clear_counts()
        claims.add(f"{name}_rare_known_at_first", village.knows(RARE) / len(village.present()))
        print(
            f"# {plan.size} nodes, {time.process_time() - started:.0f} s: counting", file=sys.stderr
        )
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as life:
                life.start_soon(village.churn)
                life.start_soon(village.demand, jobs_per_second, 0.3)
        traffic(claims, village, name, seconds)
        await village.quiet()
        found = [each for member in village.members for each in member.found_seconds]
        claims.add(f"{name}_find_s_p95", percentile_95(found))
        cold = await village.find_cold(LATECOMERS)
        claims.add(f"{name}_cold_find_s_p95", percentile_95(cold))
        claims.add(f"{name}_cold_found", statistics.fmean(each <= SEEK_SECONDS for each in cold))
        claims.add(f"{name}_jobs", village.done + village.failed)
        claims.add(f"{name}_jobs_failed", village.failed)
        claims.add(f"{name}_jobs_nobody_could", village.nobody_could)
        why = sorted(village.errors.items())
        claims.note(f"{name}_errors", ", ".join(f"{error}: {count}" for error, count in why))
        claims.add(f"{name}_left", village.left)
        claims.add(f"{name}_credits_sum", village.sum_of_balances())
        claims.add(f"{name}_cpu_seconds", time.process_time() - started)
        nursery.cancel_scope.cancel()
    own = {key: value for key, value in claims.found.items() if key.startswith(f"{name}_")}
    print(f"# {own}", file=sys.stderr)
    return village


def traffic(claims: Claims, village: Village, name: str, seconds: float) -> None:
    """What was said in that time, and what was known at its end."""
    members = village.members
    rates = [count / seconds for count in village.sent(NEWS)]
    claims.add(f"{name}_messages_per_node_per_s", statistics.fmean(rates))
    claims.add(f"{name}_hub_messages_per_s", max(rates))
    sent_bytes = [member.sent_bytes / seconds for member in members]
    claims.add(f"{name}_bytes_per_node_per_s", statistics.fmean(sent_bytes))
    claims.add(f"{name}_hub_bytes_per_s", max(sent_bytes))
    claims.add(f"{name}_pings_per_node_per_s", statistics.fmean(village.sent(PINGS)) / seconds)
    degrees = village.degrees()
    claims.add(f"{name}_links_median", statistics.median(degrees))
    claims.add(f"{name}_links_most", degrees[-1])
    claims.add(f"{name}_offers_held", village.mean_view())
    claims.add(f"{name}_rare_known_fraction", village.knows(RARE) / len(village.present()))


def grown(claims: Claims, prefix: str, sizes: dict[int, tuple[float, float]]) -> list[Village]:
    """Villages of all sizes, and how flat their traffic is."""
    villages, rates = [], []
    for size, times in sizes.items():
        name, plan = f"{prefix}{size}", Plan(size=size, rare_sellers=max(1, size // 50))
        life = functools.partial(lived, claims, name, plan, times, size / 100)
        villages.append(large_village.run(life))
        rates.append(claims.found[f"{name}_messages_per_node_per_s"])
    claims.add(f"{prefix}messages_per_node_per_s", max(rates))
    claims.add(f"{prefix}messages_flatness", max(rates) / min(rates), at_most=FLATNESS_BAR)
    found = [claims.found[f"{prefix}{size}_find_s_p95"] for size in sizes]
    claims.add(f"{prefix}find_s_p95", max(found), at_most=1.0)
    return villages


def crowded(claims: Claims) -> None:
    """Everybody comes at once, to a founder that can tell few of them of anybody."""
    with (
        mock.patch.object(exchange, "VIEW_MAX", CROWD_VIEW),
        mock.patch.object(villagers, "NEIGHBOURS", CROWD_NEIGHBOURS),
    ):
        life = functools.partial(
            lived, claims, "crowd", CROWD, CROWD_SECONDS, CROWD_JOBS_PER_SECOND
        )
        village = large_village.run(life)
    done = village.done / (village.done + village.failed)
    claims.add("crowd_jobs_done_fraction", done, at_least=CROWD_BAR)
    claims.add("crowd_credits_sum", abs(village.sum_of_balances()), at_most=0)


async def robbed(claims: Claims) -> None:
    """One in ten takes work and never pays: what it gains, and what the others do meanwhile."""
    settings = Settings(
        heartbeat_seconds=60.0,
        village_line_micro_credits=10**9,
        village_exposure_micro_credits=LENT_MICRO_CREDITS,
    )
    async with trio.open_nursery() as nursery:
        village = Village(Plan(size=LIARS + VICTIMS, liars=LIARS, settings=settings), nursery)
        await village.settle()
        await trio.sleep(20)
        with trio.move_on_after(GREED_SECONDS):
            async with trio.open_nursery() as life:
                life.start_soon(village.demand, VICTIMS / 10, 0.0)
                for liar in village.members[-LIARS:]:
                    life.start_soon(village.greed, liar)
        gains = list(village.gains())
        claims.add("liar_gain", max(gain / most for gain, most in gains), at_most=1.0)
        claims.add("liar_gain_micro_credits", sum(gain for gain, _ in gains) / LIARS)
        claims.add("liar_gain_most_micro_credits", sum(most for _, most in gains) / LIARS)
        claims.add("liar_jobs", village.stolen)
        claims.add("robbed_jobs_done_fraction", village.done / (village.done + village.failed))
        nursery.cancel_scope.cancel()


def measure(claims: Claims, args: argparse.Namespace) -> None:
    with (
        mock.patch.object(exchange, "VIEW_MAX", NARROW_VIEW),
        mock.patch.object(villagers, "NEIGHBOURS", NARROW_NEIGHBOURS),
    ):
        villages = grown(claims, "narrow_", NARROW_QUICK if args.quick else NARROW)
    villages += grown(claims, "n", QUICK if args.quick else SIZES)
    for key in [key for key in claims.found if key.startswith(("nmessages", "nfind"))]:
        claims.found[key[1:]] = claims.found.pop(key)
    large_village.run(lambda: robbed(claims))
    if not args.quick:
        crowded(claims)
    done, failed = sum(v.done for v in villages), sum(v.failed for v in villages)
    claims.add("jobs_done_fraction", done / (done + failed), at_least=DONE_BAR)
    claims.add("credits_sum", sum(abs(v.sum_of_balances()) for v in villages), at_most=0)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__.splitlines()[0]))
