"""Jobs on this machine's own workers, in whole nodes on the in-memory network."""

from __future__ import annotations

import json

import apsw
import msgspec
import pytest
import trio

from aivillage.models.inference import catalogue
from aivillage.node.jobs import open_jobs
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import AivillageError, RequestError
from aivillage.protocols.messages import Part, Progress, Text
from aivillage.protocols.types import JobId
from tests.integration.loopback_nodes import opened, villagers

pytestmark = pytest.mark.slow

try:
    catalogue.weights_path(catalogue.known(catalogue.DEFAULT))
    MISSING = ""
except AivillageError as error:
    MISSING = str(error)
needs_model = pytest.mark.skipif(bool(MISSING), reason=MISSING or "present")


@pytest.fixture
async def alone(tmp_path):
    """A node that knows nobody."""
    async with opened(LoopbackNetwork(), tmp_path, "ann", 1) as node:
        yield node


async def test_a_node_that_knows_nobody_does_its_own_job_for_nothing(alone):
    result, receipt = await alone.done("mesh.noop", note="hello", parts=2, local=True)
    assert result == {"note": "hello", "parts": 2}
    assert receipt.sellers == (alone.peer,)
    assert (receipt.price_micro_credits, receipt.why) == (0, "local")
    assert receipt.usage == {"calls": 1, "parts": 2}
    assert await alone.net() == 0
    assert (await alone.ledger.audit()).entries == 0, "the ledger never heard of it"


async def test_a_local_job_streams_its_parts_and_its_progress(alone):
    await alone.done("mesh.noop", parts=3, local=True)
    assert [frame.seq for frame in alone.heard if isinstance(frame, Part)] == [0, 1, 2]
    assert [frame.done for frame in alone.heard if isinstance(frame, Progress)] == [1, 2, 3]


async def test_a_local_job_is_recorded_like_any_other(alone):
    await alone.done("mesh.noop", note="hello", local=True)
    (listed,) = await alone.desk.on_jobs({})
    shown = await alone.desk.on_job({"job": listed["job"]})
    assert (shown["state"], shown["local"]) == ("done", True)
    assert shown["result"] == {"note": "hello", "parts": 0}
    assert [(a["seller"], a["outcome"]) for a in shown["attempts"]] == [(alone.peer, "done")]


async def test_a_local_job_can_be_cancelled_and_its_worker_is_free_again(alone):
    running = await alone.begin("mesh.noop", sleep_seconds=60, local=True)
    with trio.fail_after(10):
        while running.pursuit.state != "working":
            await trio.sleep(0.01)
        await alone.desk.on_cancel({"job": running.pursuit.row.id})
        await running.ended.wait()
        assert running.error.code == "CANCELLED"
        (listed,) = await alone.desk.on_jobs({})
        assert listed["state"] == "cancelled"
        await alone.done("mesh.noop", local=True)


async def test_a_local_job_ends_at_its_deadline(alone):
    running = await alone.submit("mesh.noop", sleep_seconds=60, local=True, deadline_seconds=0.5)
    assert running.error.code == "DEADLINE"


async def test_a_local_job_has_no_peer_and_a_wrong_request_is_not_recorded(alone):
    with pytest.raises(RequestError, match="local job has no peer"):
        await alone.begin("mesh.noop", local=True, to=alone.peer)
    with pytest.raises(RequestError):
        await alone.begin("mesh.noop", parts=-1, local=True)
    assert await alone.desk.on_jobs({}) == []


async def test_a_local_result_is_checked(alone, monkeypatch):
    from aivillage.protocols.ports import Verdict

    async def refuse(operation, request, result):
        return Verdict(ok=False, reason="made up")

    monkeypatch.setattr(alone.workers, "check", refuse)
    running = await alone.submit("mesh.noop", local=True)
    assert (running.error.code, "made up" in running.error.message) == ("JOB_FAILED", True)
    assert running.pursuit.state == "failed"


async def test_a_local_job_goes_to_nobody_although_a_peer_offers_it(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        await bob.lends_to(ann)
        await ann.offers_of("mesh.noop")
        _, receipt = await ann.done("mesh.noop", local=True)
        assert receipt.sellers == (ann.peer,)
        assert bob.desk.events.counts["sale_ended"] == 0
        _, receipt = await ann.done("mesh.noop", mesh=True)
        assert receipt.sellers == (bob.peer,)


async def test_nobody_offers_it_so_the_next_step_names_local(alone, monkeypatch):
    from aivillage.node import market

    monkeypatch.setattr(market, "SEEK_SECONDS", 0.1)
    running = await alone.submit("mesh.noop")
    assert running.error.code == "NO_PEER"
    assert "--local" in running.error.next_step


async def test_an_interrupted_local_job_is_done_after_a_restart(tmp_path):
    network = LoopbackNetwork()
    async with opened(network, tmp_path, "ann", 1) as ann:
        running = await ann.begin("mesh.noop", parts=2, sleep_seconds=1, local=True)
        job = running.pursuit.row.id
        with trio.fail_after(10):
            while not ann.heard:  # its first part has come
                await trio.sleep(0.01)
        await _forget_the_end(ann, job)
    async with opened(network, tmp_path, "ann", 1) as ann:
        with trio.fail_after(20):
            while (row := await ann.desk.jobs.get(job)).ended is None:
                await trio.sleep(0.05)
    assert (row.state, bool(row.local)) == ("done", True)
    assert json.loads(row.receipt)["why"] == "local"


async def _forget_the_end(node, job):
    """As after kill -9: nothing of the end is written."""

    async def end(*_args, **_more):
        return None

    node.desk.jobs.end = end
    assert (await node.desk.jobs.get(job)).ended is None


async def test_an_orphaned_sub_job_is_not_begun_again_after_a_restart(tmp_path):
    network = LoopbackNetwork()
    async with opened(network, tmp_path, "ann", 1) as ann:
        running = await ann.begin("mesh.noop", local=True)
        row = msgspec.structs.replace(running.pursuit.row, id=JobId("ab" * 16), parent="attempt")
        await ann.desk.jobs.add(row)
    async with opened(network, tmp_path, "ann", 1) as ann:
        with trio.fail_after(10):
            while (found := await ann.desk.jobs.get(row.id)).ended is None:
                await trio.sleep(0.02)
        assert (found.state, found.parent) == ("cancelled", "attempt")
        assert await ann.desk.jobs.attempts(row.id) == []


async def test_a_jobs_file_of_the_first_version_is_read_on(tmp_path):
    path = tmp_path / "jobs.db"
    async with open_jobs(path):
        pass
    db = apsw.Connection(str(path))
    db.execute("ALTER TABLE job DROP COLUMN local; ALTER TABLE job DROP COLUMN parent")
    db.execute("INSERT INTO job(id, operation, request, state, ceiling, created)"
               " VALUES('ab', 'mesh.noop', x'80', 'new', 5, 1.0)")  # fmt: skip
    db.pragma("user_version", 1)
    db.close()
    for _ in range(2):  # the second time there is nothing left to do
        async with open_jobs(path) as jobs:
            row = await jobs.get("ab")
            assert (row.ceiling, bool(row.local), row.parent) == (5, False, "")


@needs_model
async def test_a_local_answer_is_bit_for_bit_that_of_a_peer(tmp_path):
    request = {"prompt": "Name three colours.", "max_tokens": 12, "temperature": 0.7, "seed": 5}
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        await bob.lends_to(ann)
        await ann.offers_of("inference.generate")
        local, receipt = await ann.done("inference.generate", **request, local=True)
        streamed = "".join(frame.text for frame in ann.heard if isinstance(frame, Text))
        bought, bill = await ann.done("inference.generate", **request, mesh=True)
        assert local == bought
        assert streamed == local["text"]
        assert (receipt.price_micro_credits, receipt.identical) == (0, "guaranteed")
        assert receipt.usage == bill.usage
        assert bill.sellers == (bob.peer,)
