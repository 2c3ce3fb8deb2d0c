"""`make mutants`: plants each bug of `mutants.py` and demands that its own check notices.

Prints `name | killed by | seeds tried`; fails if a bug lives, or only another check noticed it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import NamedTuple

from tests.simulation import ledger_sim, mutants, scenes
from tests.simulation.world import BrokenError

SEEDS_MAX = 60
SCENE = "scene"


class Kill(NamedTuple):
    """`check` is empty for a bug that lived. `others`: checks that noticed it before."""

    check: str
    seeds: int
    others: tuple[str, ...] = ()


def kill(name: str, seeds_max: int = SEEDS_MAX) -> Kill:
    """Runs its scene, or the seeds that are known to show it and then all others."""
    mutant = mutants.MUTANTS[name]
    if mutant.scene:
        check = play(mutant.scene, name)
        killed = check in mutant.killed_by
        return Kill(f"{check}, {mutant.scene}" if killed else "", 0, () if killed else (check,))
    others: list[str] = []
    seeds = list(dict.fromkeys((*mutant.seeds, *range(seeds_max))))
    for tried, seed in enumerate(seeds, 1):
        check = ledger_sim.run_seed(seed, name).failure.split(":")[0]
        if check in mutant.killed_by:
            return Kill(check, tried, tuple(others))
        if check and check not in others:
            others.append(check)
    return Kill("", len(seeds), tuple(others))


def play(scene: str, mutant: str = "") -> str:
    """The check that breaks in this scene; empty if all goes as it should."""
    with mutants.planted(mutant):
        try:
            getattr(scenes, scene)()
        except BrokenError as error:
            return str(error).split(":")[0]
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=mutants.NAMES, default=None)
    options = parser.parse_args(arguments)
    started, alive = time.process_time(), 0
    print("| bug | killed by | seeds tried |\n|---|---|---|")
    for name in options.only or mutants.NAMES:
        killed = kill(name)
        alive += not killed.check
        verdict = killed.check or f"LIVES; noticed by {', '.join(killed.others) or 'nothing'}"
        print(f"| {name} | {verdict} | {killed.seeds or SCENE} |", flush=True)
    for name, (_, reason) in mutants.SURVIVORS.items():
        print(f"| {name} | harmless: {reason} | - |")
    print(f"{alive} alive, {time.process_time() - started:.0f} s of processor time")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
