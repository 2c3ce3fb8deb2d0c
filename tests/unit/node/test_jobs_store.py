"""jobs.db: what was delivered counts once it is stored, and a damaged file is said."""

import time

import apsw
import pytest
import trio

from aivillage.node import jobs as store
from aivillage.node import records
from aivillage.node.jobs import AttemptRow, JobRow, open_jobs
from aivillage.protocols.errors import ConfigError, NodeError
from aivillage.protocols.types import AttemptId, JobId
from tests.conftest import make_peer

JOB, OTHER = JobId("ab" * 16), JobId("ac" * 16)
ATTEMPT = AttemptId(b"a" * 16)


def row(job=JOB, **changes):
    fields = {
        "id": job, "operation": "mesh.noop", "request": b"\x80", "state": "new",
        "ceiling": 100, "deadline": None, "peer": "", "created": 1.0,
    }  # fmt: skip
    return JobRow(**(fields | changes))


async def with_attempt(jobs):
    await jobs.add(row())
    jobs.begin_attempt(ATTEMPT, JOB, make_peer(1))


def done(result=b"result", price=77):
    attempt = AttemptRow(
        id=ATTEMPT, job=JOB, seller=make_peer(1), price=price, outcome="done", created=2.0,
        quote=b"quote", done=b"\x80",
    )  # fmt: skip
    return row(state="settling", result=result), attempt


async def kept(jobs, *bodies, first=0, price=0):
    """Keeps bodies in one go, and returns when all are durable."""
    left, done = [len(bodies)], trio.Event()

    def durable():
        left[0] -= 1
        if not left[0]:
            done.set()

    for seq, body in enumerate(bodies, first):
        jobs.keep((JOB, seq, ATTEMPT), body, price + 10 * seq, ("", ""), durable)
    with trio.fail_after(5):
        await done.wait()


async def test_a_job_is_found_by_the_beginning_of_its_id_where_that_is_one(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.add(row())
        await jobs.add(row(OTHER, created=2.0))
        assert (await jobs.get("ab")).id == JOB
        assert await jobs.get("a") is None
        assert await jobs.get("") is None
        assert await jobs.get("*") is None
        assert [found.id for found in await jobs.latest(5)] == [OTHER, JOB]


async def test_only_a_job_without_an_end_is_gone_on_with(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.add(row())
        await jobs.add(row(OTHER))
        await jobs.end(OTHER, "failed", code="NO_PEER", message="nobody")
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        (found,) = await jobs.unfinished()
        assert (found.id, found.state) == (JOB, "new")
        ended = await jobs.get(OTHER)
        assert (ended.state, ended.code, ended.message) == ("failed", "NO_PEER", "nobody")


async def test_output_is_durable_before_it_counts_and_comes_back_in_order(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await with_attempt(jobs)
        await kept(jobs, b"0", b"1", b"2")
        await kept(jobs, b"3", first=3)
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        assert await jobs.delivered(JOB) == [b"0", b"1", b"2", b"3"]
        (attempt,) = await jobs.attempts(JOB)
        assert (attempt.price, attempt.outcome) == (30, "")


async def test_output_that_comes_while_a_group_is_written_goes_in_the_next_one(
    tmp_path, monkeypatch
):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await with_attempt(jobs)
        groups, real = [], jobs._stored

        async def slow(rows):
            groups.append(len(rows))
            await trio.sleep(0.02)
            return await real(rows)

        monkeypatch.setattr(jobs, "_stored", slow)
        done = []
        for seq in range(5):
            jobs.keep((JOB, seq, ATTEMPT), b"x", 0, ("", ""), lambda n=seq: done.append(n))
            await trio.sleep(0.012)
        with trio.fail_after(5):
            while len(done) < 5:
                await trio.sleep(0.005)
        assert done == [0, 1, 2, 3, 4]
        assert sum(groups) == 5
        assert len(groups) < 5


async def test_on_a_full_disk_output_waits_unaccepted(tmp_path, monkeypatch):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await with_attempt(jobs)
        real, full, done = jobs.transaction, [1], trio.Event()

        async def run(work):
            if full:
                full.pop()
                raise NodeError("full", code="DISK_FULL")
            return await real(work)

        monkeypatch.setattr(jobs, "transaction", run)
        jobs.keep((JOB, 0, ATTEMPT), b"x", 7, ("", ""), done.set)
        await trio.sleep(0.1)
        assert not full
        assert not done.is_set()
        with trio.fail_after(3):
            await done.wait()
        assert await jobs.delivered(JOB) == [b"x"]


async def test_what_a_liar_delivered_is_forgotten_and_replaced(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await with_attempt(jobs)
        await kept(jobs, b"lie", b"lie")
        await jobs.forget_delivered(JOB)
        assert await jobs.delivered(JOB) == []
        await kept(jobs, b"late lie")
        await kept(jobs, b"truth")
        assert await jobs.delivered(JOB) == [b"truth"]


async def test_a_passed_result_and_its_price_are_stored_together(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await with_attempt(jobs)
        await jobs.passed(*done())
        (found,) = await jobs.unfinished()
        assert (found.state, found.result) == ("settling", b"result")
        (attempt,) = await jobs.attempts(JOB)
        assert (attempt.price, attempt.outcome) == (77, "done")


async def test_peers_certificates_and_settings_survive(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.saw_peer(make_peer(1), ("/a",))
        await jobs.saw_peer(make_peer(1), ("/b", "/c"))
        await jobs.add_certificates(b"v", (b"one", b"two"))
        await jobs.add_certificates(b"v", (b"one",))
        await jobs.set_setting("village", b"v")
        await jobs.set_setting("village", b"w")
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        (peer,) = await jobs.known_peers()
        assert (peer.id, peer.addresses) == (make_peer(1), ("/b", "/c"))
        assert sorted(await jobs.certificates(b"v")) == [b"one", b"two"]
        assert await jobs.certificates(b"w") == ()
        assert (await jobs.setting("village"), await jobs.setting("other")) == (b"w", None)


async def test_a_corrupt_file_is_refused_and_told_how_to_go_on(tmp_path):
    path = tmp_path / "jobs.db"
    path.write_bytes(b"this is no database " * 500)
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        async with open_jobs(path):
            pass
    assert f"mv {path}" in caught.value.next_step


@pytest.mark.parametrize(
    "pragma",
    [f"user_version={store.SCHEMA_VERSION + 1}", "application_id=1"],
    ids=["a newer version", "another program's"],
)
async def test_a_file_that_is_not_of_this_version_is_left_alone(tmp_path, pragma):
    path = tmp_path / "jobs.db"
    async with open_jobs(path) as jobs:
        await jobs.add(row())
    db = apsw.Connection(str(path))
    db.execute(f"PRAGMA {pragma}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="version"):
        async with open_jobs(path):
            pass
    assert path.read_bytes() == before


async def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError):
        async with open_jobs(tmp_path / "no" / "jobs.db"):
            pass


# ------------------------------------------------------------------ what nobody waits for


async def test_a_question_finds_what_was_left_for_later(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        heard = []
        jobs.add_soon(row(), lambda: heard.append("stored"))
        jobs.begin_attempt(ATTEMPT, JOB, make_peer(1))
        jobs.end_attempt(ATTEMPT, 7, "done")
        assert not heard
        assert [(a.price, a.outcome) for a in await jobs.attempts(JOB)] == [(7, "done")]
        assert heard == ["stored"]


async def test_what_was_left_for_later_goes_by_itself(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        stored = trio.Event()
        jobs.add_soon(row(), stored.set)
        with trio.fail_after(5):
            await stored.wait()


async def test_what_was_left_for_later_is_stored_at_a_clean_stop(tmp_path):
    record = records.Record(good=3)
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.saw_peer(make_peer(1), ())
        jobs.add_soon(row(), lambda: None)
        jobs.rate_peer_seldom(make_peer(1), record)
        record.rate(good=True)  # it is stored as it is by then
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        assert len(await jobs.unfinished()) == 1
        assert [known.good for known in await jobs.known_peers()] == [4]


async def test_later_on_a_full_disk_waits_its_turn_and_is_not_overtaken(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        pages = "PRAGMA max_page_count = {}"
        await jobs.transaction(lambda db: db.execute(pages.format(1)).fetchall())
        jobs.add_soon(row(request=bytes(1 << 16)), lambda: None)
        with pytest.raises(NodeError) as caught:
            await jobs.transaction(lambda db: db.execute("SELECT 1").fetchall())
        assert caught.value.code == "DISK_FULL"
        # The next group begins with what the disk owes, so an end never comes before its job.
        jobs._db.execute(pages.format(1_000_000)).fetchall()
        await jobs.end(JOB, "failed", code="NO_PEER")
        assert (await jobs.get(JOB)).state == "failed"


async def test_a_piece_of_work_that_fails_takes_nobody_with_it(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.add(row())

        def breaks(db):
            db.execute("UPDATE job SET ceiling=1")
            raise ZeroDivisionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(jobs.add, row(OTHER))
            with pytest.raises(ZeroDivisionError):
                await jobs.transaction(breaks)
        assert [found.ceiling for found in await jobs.latest(5)] == [100, 100]


async def test_a_write_that_nobody_waits_for_any_more_is_done(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + 0.001
            await jobs.transaction(lambda db: (time.sleep(0.05), db.execute(_ADD_ONE))[0])
        assert await jobs.setting("k") == b"v"


_ADD_ONE = "INSERT INTO setting VALUES('k', x'76')"
