"""Real nodes whose clocks differ by ten minutes, and one that sleeps."""

from __future__ import annotations

import pytest

from tests.house import ROOT
from tests.integration.daemons import Yard, paused, settled, wait_for

SKEWED_CLOCK = """
import os, time
_ahead = float(os.environ["TEST_CLOCK_AHEAD_SECONDS"])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _ahead
time.time_ns = lambda: _time_ns() + int(_ahead * 1e9)
"""
"""As `sitecustomize`: every process of the node sees this clock; the machine keeps its own."""
pytestmark = pytest.mark.slow
QUICK = ("--set", "heartbeat_seconds=0.3", "--set", "offer_seconds=0.5")


@pytest.fixture
def yard(tmp_path):
    with Yard(tmp_path) as yard:
        yield yard


@pytest.mark.parametrize("ahead", [600, -600])
def test_nodes_whose_clocks_are_ten_minutes_apart_find_each_other_and_trade(yard, tmp_path, ahead):
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SKEWED_CLOCK)
    ann = yard.daemon("ann").start(*QUICK)
    bob = yard.daemon("bob")
    bob._environment = bob._environment | {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "TEST_CLOCK_AHEAD_SECONDS": str(ahead),
    }
    bob.start("--join", ann.ask("invite")["token"], *QUICK)
    yard.know_each_other(ann, bob, seconds=15)
    for buyer, seller in ((ann, bob), (bob, ann)):
        for _ in range(2):
            job = buyer.submit("mesh.noop", peer=seller.peer, note="x")
            assert buyer.job_ended(job, 20)["state"] == "done"
    settled([ann, bob], 15)
    why = ann.run("peers", "--why", bob.peer[-8:]).out
    assert (
        f"its clock is {abs(ahead) // 60} min {'ahead of' if ahead > 0 else 'behind'} ours" in why
    )


def test_a_node_that_was_stopped_in_its_sleep_comes_back_by_itself(yard):
    """At 30 times the pace: the lid is closed for 20 heartbeats and three lives of an offer."""
    ann, bob = yard.village("ann", "bob", flags=QUICK)
    yard.know_each_other(ann, bob)
    with paused(bob):
        wait_for(lambda: ann.ask("status")["members"] == 0, 6, "ann notices")
        wait_for(lambda: not ann.sellers_known("mesh.noop"), 6, "bob's offer ends")
        (shown,) = [peer for peer in ann.ask("peers") if peer["peer"] == bob.peer]
        assert "no sign of life" in shown["why"] or "could not be reached" in shown["why"]
    wait_for(lambda: ann.ask("status")["members"] == 1, 20, f"bob is back\n{yard.logs()}")
    yard.know_each_other(ann, bob)
    job = ann.submit("mesh.noop", peer=bob.peer, note="x")
    assert ann.job_ended(job, 20)["state"] == "done"
