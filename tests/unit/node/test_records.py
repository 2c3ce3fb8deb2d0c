"""How peers did: a speed is of one kind of work on one kind of kernel, and outlives the node."""

import pytest

from aivillage.models.inference.generate import GenerateRequest
from aivillage.node import records
from aivillage.node.jobs import open_jobs
from aivillage.node.records import SPEEDS_MAX, Record, Work, work_of
from aivillage.protocols.codec import pack
from tests.conftest import make_peer

NOOP, CHAT = Work("mesh.noop"), Work("inference.generate", "a-model")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    seconds = iter(range(1000, 100_000))
    monkeypatch.setattr(records.time, "time", lambda: float(next(seconds)))


def test_a_speed_is_a_mean_that_nothing_but_work_moves():
    record = Record()
    record.measure(NOOP, "", 100.0)
    record.measure(NOOP, "", 200.0)
    record.measure(NOOP, "", 0.0)
    assert record.speed(NOOP) == pytest.approx(130.0)
    record.rate(good=True)
    record.rate(good=False)
    assert (record.good, record.bad, record.failures) == (1, 1, 0.25)
    assert record.speed(NOOP) == pytest.approx(130.0)


def test_who_is_fast_at_one_thing_is_not_known_at_another():
    record = Record()
    record.measure(NOOP, "", 9000.0)
    assert record.speed(CHAT) == 0.0
    record.measure(CHAT, "cpu", 30.0)
    assert record.speed(NOOP) == 9000.0
    assert record.speed(CHAT) == 30.0
    assert record.speed(Work("inference.generate", "another")) == 0.0
    assert record.units_per_second == 30.0


def test_a_new_machine_begins_anew_and_the_old_one_is_remembered():
    record = Record()
    record.measure(CHAT, "cpu", 30.0)
    record.measure(CHAT, "gpu", 900.0)
    assert record.speed(CHAT) == 900.0
    record.measure(CHAT, "cpu", 40.0)
    assert record.speed(CHAT) == pytest.approx(33.0)


def test_kernels_without_end_push_out_the_oldest():
    record = Record()
    for number in range(SPEEDS_MAX + 1):
        record.measure(CHAT, f"k{number}", 1.0)
    assert len(record.speeds) == SPEEDS_MAX
    assert (CHAT, "k0") not in record.speeds
    assert (CHAT, "k1") in record.speeds


def test_work_is_told_apart_by_its_model():
    request = pack(GenerateRequest(prompt="x"))
    assert work_of("inference.generate", request) == Work(
        "inference.generate", GenerateRequest(prompt="x").model
    )
    assert work_of("mesh.noop", b"\x80") == NOOP


async def test_what_was_seen_of_a_peer_survives_a_restart_and_follows_its_key(tmp_path):
    record = Record(3, 1)
    record.measure(CHAT, "cpu", 30.0)
    record.measure(NOOP, "", 500.0)
    own = Record()
    own.measure(NOOP, "", 800.0)
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.saw_peer(make_peer(1), ())
        jobs.rate_peer(make_peer(1), record)
        jobs.rate_peer(make_peer(1), record)
        jobs.rate_peer(make_peer(9), own)
        await jobs.rename_peer(make_peer(1), make_peer(2))
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        assert await jobs.records() == {make_peer(2): record, make_peer(9): own}
        assert [known.id for known in await jobs.known_peers()] == [make_peer(2)]
