"""`context.call` of a module that runs for somebody else: a job of that node's, on the mesh."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from aivillage.node import market
from aivillage.protocols.errors import ConfigError
from tests.integration.loopback_nodes import villagers

pytestmark = pytest.mark.slow

ENABLED = {"enable": ("test.ask",)}


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """The asking module, as pip would have put it on the path."""
    site = tmp_path / "site"
    info = site / "asking_module-0.1.0.dist-info"
    info.mkdir(parents=True)
    source = Path(__file__).parent / "asking_module.py"
    (site / "asking_module.py").write_text(source.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: asking_module\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[aivillage.modules]\ntest.ask = asking_module:MODULE\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))


@asynccontextmanager
async def three(tmp_path, **bobs):
    """Ann buys, Bob runs the asking module, Cyd does what it asks for. Ann can check, not sell."""
    of = {
        "ann": ENABLED | {"serve": False},
        "bob": ENABLED | bobs,
    }
    async with villagers(tmp_path, "ann", "bob", "cyd", of=of) as nodes:
        ann, bob, cyd = nodes
        await bob.lends_to(ann)
        await cyd.lends_to(bob)
        await ann.offers_of("test.ask")
        await bob.offers_of("mesh.noop")
        yield nodes


async def settled(*nodes):
    """Returns once nothing is in transit."""
    with trio.fail_after(20):
        while sum([await node.net() for node in nodes]) or any(
            [(await node.ledger.balance()).in_transit for node in nodes]
        ):
            await trio.sleep(0.02)


async def test_a_sub_job_is_done_by_a_third_node_and_paid_by_whoever_runs_the_module(tmp_path):
    async with three(tmp_path) as (ann, bob, cyd):
        result, receipt = await ann.done("test.ask", times=2, to=bob.peer)
        assert result == {"said": ["number 0", "number 1"]}
        assert (receipt.sellers, receipt.price_micro_credits) == ((bob.peer,), 1000)
        await settled(ann, bob, cyd)
        assert [await node.net() for node in (ann, bob, cyd)] == [-1000, 1000 - 20, 20]
        rows = await bob.desk.jobs.latest(10)
        assert [(row.state, row.ceiling) for row in rows] == [("done", 50)] * 2
        assert {row.parent for row in rows} == {
            attempt.id.hex()
            for row in await ann.desk.jobs.latest(1)
            for attempt in await ann.desk.jobs.attempts(row.id)
        }


async def test_a_sub_job_above_what_the_sale_earns_is_refused_whatever_the_buyers_ceiling(tmp_path):
    async with three(tmp_path) as (ann, bob, _):
        result, _ = await ann.done("test.ask", budget=1001, to=bob.peer)
        assert result == {"said": ["PRICE_ABOVE_CEILING"]}
        assert await bob.desk.jobs.latest(1) == []


async def test_the_ninth_sub_job_of_a_sale_is_refused(tmp_path):
    async with three(tmp_path) as (ann, bob, _):
        result, _ = await ann.done("test.ask", times=9, to=bob.peer)
        assert result["said"] == [f"number {n}" for n in range(8)] + ["OWNER_LIMIT"]


async def test_cancelling_a_job_cancels_its_sub_job(tmp_path):
    async with three(tmp_path) as (ann, bob, cyd):
        running = await ann.begin("test.ask", sleep_seconds=60, to=bob.peer)
        with trio.fail_after(15):
            while not cyd.desk.seller.running():
                await trio.sleep(0.02)
            ann.desk.buyer.cancel(running.pursuit.row.id)
            while cyd.desk.seller.running() or bob.desk.buyer.running():
                await trio.sleep(0.02)
        (row,) = await bob.desk.jobs.latest(5)
        assert row.state == "cancelled"


async def test_a_buyer_hears_signs_of_life_while_a_sub_job_takes_its_time(tmp_path, monkeypatch):
    from aivillage.node import sale

    monkeypatch.setattr(sale, "BEAT_SECONDS", 0.1)
    async with three(tmp_path) as (ann, bob, _):
        await ann.done("test.ask", sleep_seconds=0.5, to=bob.peer)
        notes = [frame.note for frame in ann.heard if hasattr(frame, "note")]
        assert notes.count("waiting for mesh.noop") >= 3


async def test_modules_that_wait_in_every_worker_do_not_keep_out_what_they_wait_for(tmp_path):
    """A node runs two at a time, and each sub-job's result has to be checked in a worker."""
    async with three(tmp_path) as (ann, bob, _):
        results = []

        async def one():
            results.append((await ann.done("test.ask", sleep_seconds=0.3, to=bob.peer))[0])

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(one)
        assert results == [{"said": ["number 0"]}] * 3


async def test_sub_jobs_of_a_local_job_are_local_and_free(tmp_path):
    async with villagers(tmp_path, "ann", **ENABLED) as (ann,):
        result, receipt = await ann.done("test.ask", times=2, local=True)
        assert result == {"said": ["number 0", "number 1"]}
        assert receipt.price_micro_credits == 0
        rows = await ann.desk.jobs.latest(10)
        assert [bool(row.local) for row in rows] == [True] * 3
        assert [row.parent for row in rows if row.parent] == [receipt.job] * 2


async def test_sub_jobs_of_a_local_jobs_sub_jobs_count_with_it(tmp_path):
    """Three that ask for three each would be twelve; after eight it is enough."""
    async with villagers(tmp_path, "ann", **ENABLED) as (ann,):
        result, _ = await ann.done("test.ask", operation="test.ask", times=3, depth=1, local=True)
        said = [f"number {n}" for n in range(3)]
        assert result["said"] == [*said, *said, "OWNER_LIMIT"]


async def test_why_an_engine_did_not_load_reaches_the_buyer_with_its_code(tmp_path, monkeypatch):
    async def refuse(_operation):
        raise ConfigError("the weights are not on this machine")

    monkeypatch.setattr(market, "SEEK_SECONDS", 2.0)
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        bob.workers.engine = refuse
        await bob.lends_to(ann)
        await ann.offers_of("inference.generate")
        running = await ann.submit("inference.generate", prompt="hi", max_tokens=2)
        failed = [f for _, name, f in ann.desk.events.recent if name == "attempt_failed"]
        assert [f["code"] for f in failed] == ["CONFIG"]
        assert "the weights are not on this machine" in running.error.message
