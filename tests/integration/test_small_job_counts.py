"""What a small job takes of the loop, in counts: they do not depend on the machine, time does.

Each turn and each scope is some ten microseconds of a job that has a thousand. See
docs/decisions/0034-what-a-small-job-no-longer-enters.md.
"""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from tests.integration.loopback_nodes import villagers

pytestmark = pytest.mark.slow

JOBS = 40


class Turns(trio.abc.Instrument):
    """Of each kind of task."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken[task.name.rpartition(".")[2]] += 1


@pytest.fixture
def scopes(monkeypatch):
    """How many scopes with a deadline or a shield were entered, by anybody."""
    entered = [0]
    enter = trio.CancelScope.__enter__

    def counted(self):
        entered[0] += 1
        return enter(self)

    monkeypatch.setattr(trio.CancelScope, "__enter__", counted)
    return entered


async def test_a_small_job_takes_few_turns_and_enters_few_scopes(tmp_path, scopes):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        await ann.lends_to(bob)
        await bob.offers_of("mesh.noop")
        for _ in range(5):
            await bob.done("mesh.noop", mesh=True, note="warm")
        turns, before = Turns(), scopes[0]
        trio.lowlevel.add_instrument(turns)
        for _ in range(JOBS):
            await bob.done("mesh.noop", mesh=True, note="x")
        trio.lowlevel.remove_instrument(turns)
        entered = scopes[0] - before - JOBS  # the test's own, one a job
    assert turns.taken["_live"] <= 3 * JOBS, "begins, is acknowledged, is done"
    assert turns.taken["_serve"] <= 2.5 * JOBS, "begins, and the worker answers"
    assert entered <= 7 * JOBS, "of both nodes, their timers included"
