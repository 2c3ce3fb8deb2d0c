"""A village of machines that are not alike: none of them is taken for a liar.

One computes with other instructions, one with two threads, one is far away and its clock is ten
minutes ahead, one runs the previous version of this program. Everybody checks every result; the
weights are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aivillage.models.inference import catalogue
from aivillage.protocols.errors import AivillageError
from aivillage.protocols.messages import VERSION_MINOR
from tests.house import ROOT
from tests.integration.daemons import Daemon, Yard, settled, wait_for
from tests.integration.test_clocks import SKEWED_CLOCK
from tests.integration.wan import Wan, missing
from tests.interop import previous

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    NO_WEIGHTS = ""
except AivillageError as error:
    NO_WEIGHTS = str(error)

WHY_NOT = NO_WEIGHTS or missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "present"),
]

GENERATE = "inference.generate"
PARIS = {"prompt": "What is the capital of France?", "max_tokens": 10}
ANSWER = "The capital of France is Paris."
DELAY_SECONDS, LOSS = 0.05, 0.01
CLOCKS_SECONDS = 600
FLAGS = ("--set", "offer_seconds=2")
CHECKS = ("--set", "verify_percent_max=1000")
"""Whatever they cost."""


class Village(NamedTuple):
    near: Daemon
    """Where people ask; it sells too."""
    plain: Daemon
    threaded: Daemon
    far: Daemon
    old: Daemon | None
    """None: this clone has no previous version."""

    def all(self) -> list[Daemon]:
        return [daemon for daemon in self if daemon is not None]


def changed(daemon: Daemon, **environment: str) -> Daemon:
    daemon._environment = daemon._environment | environment
    return daemon


def clock(folder: Path, ahead_seconds: int) -> dict[str, str]:
    """The environment of a node whose clock is wrong."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SKEWED_CLOCK)
    return {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "TEST_CLOCK_AHEAD_SECONDS": str(ahead_seconds),
    }


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Village]:
    folder = tmp_path_factory.mktemp("village")
    with Wan(delay_seconds=DELAY_SECONDS, loss=LOSS) as wan, Yard(folder) as yard:
        near = wan.move(yard.daemon("near"), "left").start(*FLAGS, *CHECKS)

        def joins(name: str, *flags: str, side: str = "left", **environment: str) -> Daemon:
            daemon = changed(wan.move(yard.daemon(name), side), **environment)
            return daemon.start("--join", near.ask("invite")["token"], *FLAGS, *flags)

        plain = joins("plain", *CHECKS, ATEN_CPU_CAPABILITY="default")
        threaded = joins("threaded", *CHECKS, "--set", "worker_threads=2")
        far = joins("far", *CHECKS, side="right", **clock(folder / "clock", CLOCKS_SECONDS))
        old = None
        if not previous.missing():
            source = previous.unpack_to(folder / "previous")
            old = joins("old", *CHECKS, PYTHONPATH=str(source))
        found = Village(near, plain, threaded, far, old)
        yard.know_each_other(*found.all())
        yield found
        for daemon in found.all():
            assert "Traceback" not in daemon.log.read_text(), daemon.log_end(200)


def ask(buyer: Daemon, seller: Daemon) -> str:
    return buyer.submit(GENERATE, peer=seller.peer, **PARIS)


def answered(buyer: Daemon, job: str) -> str:
    """The text that was sold to `buyer`."""
    found = buyer.job_ended(job, 120)
    assert found["state"] == "done", (found, buyer.log_end())
    return str(found["result"]["text"])


def results(daemon: Daemon) -> list[dict[str, Any]]:
    return [row for peer in daemon.ask("reputation")["peers"] for row in peer["results"]]


def looked_at(daemon: Daemon) -> bool:
    """Whether each result that `daemon` bought was done again, or nobody could do it again."""
    jobs = daemon.ask("jobs")
    bought = sum(job["state"] == "done" and not job["parent"] for job in jobs)
    unchecked = daemon.ask("reputation")["spending"]["unchecked"]
    told = sum(row["checked"] for row in results(daemon)) + sum(unchecked.values())
    return told >= bought and all(job["ended_unix"] for job in jobs)


def rows_of(daemon: Daemon, seller: Daemon) -> list[dict[str, Any]]:
    return [row for row in results(daemon) if row["peer"] == seller.peer]


def trade(pairs: list[tuple[Daemon, Daemon]]) -> None:
    """All of them at once: the first of a pair buys."""
    jobs = [(buyer, ask(buyer, seller)) for buyer, seller in pairs]
    assert {answered(*job) for job in jobs} == {ANSWER}


def test_machines_that_are_not_alike_work_for_each_other_and_nobody_is_accused(village):
    near, plain, threaded, far, old = village
    trade([(near, seller) for seller in village.all()[1:]])
    ring = [(plain, threaded), (threaded, far), (far, plain), (far, near)]
    trade(ring if old is None else [*ring, (old, plain), (old, far), (threaded, old)])
    for buyer in village.all():
        wait_for(lambda buyer=buyer: looked_at(buyer), 60, f"{buyer.name} looked at all")

    accused = [
        row for buyer in village.all() for row in results(buyer) if row["failed"] or row["faults"]
    ]
    doubted = [row for buyer in village.all() for row in results(buyer) if row["unsettled"]]
    assert (accused, doubted) == ([], [])
    assert all("result_wrong" not in daemon.log.read_text() for daemon in village.all())
    kernels = {row["kernel"] for buyer in village.all() for row in results(buyer) if row["kernel"]}
    # Other instructions, other threads, everybody else; and the former version, which takes torch.
    assert len(kernels) == 3 + (old is not None), kernels
    assert all(row["checked"] for row in rows_of(near, far))
    # Of other classes too: read in one pass, and held to what rounding explains.
    others = [plain, threaded] if old is None else [plain, threaded, old]
    assert any(row["checked"] for one in others for row in rows_of(near, one))
    settled(village.all(), 30)


def test_the_village_is_as_mixed_as_it_says(village):
    peers = {row["peer"]: row["why"] for row in village.near.ask("peers")}
    assert "its clock is 10 min ahead of ours" in peers[village.far.peer]
    rtt_ms = {row["peer"]: row["rtt_ms"] for row in village.near.ask("peers")}
    assert rtt_ms[village.far.peer] >= 2_000 * DELAY_SECONDS
    if village.old is None:
        pytest.skip(previous.missing())
    assert previous.minor_version() < VERSION_MINOR
    assert {row["peer"] for row in village.old.ask("peers")} >= {village.near.peer}
