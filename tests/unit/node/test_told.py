"""What was told outlasts a kill before jobs.db has it; and nothing that ended comes back by it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from aivillage.node import told
from aivillage.node.attempts import attempts_of, kept_job
from aivillage.node.jobs import (
    IN_MEMORY,
    open_jobs,
    said_beside,
    told_beside,
)
from aivillage.node.told import FILE_BYTES_MAX, RECORD_BYTES_MAX, Told, read
from tests.conftest import make_peer
from tests.unit.node.test_jobs_store import ATTEMPT, JOB, done, row

HEAD_BYTES = 8


@pytest.fixture
def file(tmp_path):
    made = Told(tmp_path / "told")
    yield made
    made.close()


# ------------------------------------------------------------------ the file


def test_what_was_told_is_read_until_it_is_stored(tmp_path, file):
    records = [b"one", b"", b"three" * 100]
    assert all(map(file.append, records))
    assert read(tmp_path / "told") == records
    for left in (2, 1):
        file.stored()
        assert read(tmp_path / "told") == records, f"{left} are not stored yet"
    file.stored()
    assert (tmp_path / "told").read_bytes() == b""
    assert file.append(b"next")
    assert read(tmp_path / "told") == [b"next"]


def test_there_is_nothing_to_read_where_nobody_wrote(tmp_path):
    assert read(tmp_path / "none") == []


@pytest.mark.parametrize("above", [0, 1])
def test_a_record_has_a_limit(tmp_path, file, above):
    assert file.append(bytes(RECORD_BYTES_MAX + above)) == (not above)
    assert len(read(tmp_path / "told")) == 1 - above


def test_a_file_has_a_limit_and_begins_anew_once_all_is_stored(tmp_path, file):
    count, size_bytes = 16, FILE_BYTES_MAX // 16 - HEAD_BYTES
    assert all(file.append(bytes(size_bytes)) for _ in range(count))
    assert (tmp_path / "told").stat().st_size == FILE_BYTES_MAX
    assert not file.append(b"")
    for _ in range(count):
        file.stored()
    assert file.append(b"")


def test_a_record_that_was_cut_ends_the_file_wherever_it_was_cut(tmp_path, file):
    file.append(b"whole")
    file.append(b"another")
    path, data = tmp_path / "told", (tmp_path / "told").read_bytes()
    for size in range(HEAD_BYTES + 5, len(data)):
        path.write_bytes(data[:size])
        assert read(path) == [b"whole"]


def test_a_record_with_a_wrong_byte_ends_the_file(tmp_path, file):
    file.append(b"whole")
    file.append(b"another")
    path = tmp_path / "told"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read(path) == [b"whole"]


def test_a_disk_that_takes_a_part_or_nothing_is_said_and_hides_nothing(tmp_path, file, monkeypatch):
    write = os.write
    file.append(b"before")
    monkeypatch.setattr(told.os, "write", lambda to, data: write(to, data[:5]))
    assert not file.append(b"in part")

    def full(_to, _data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(told.os, "write", full)
    assert not file.append(b"nothing")
    monkeypatch.undo()
    assert file.append(b"after")
    assert read(tmp_path / "told") == [b"before", b"after"]


def test_what_is_stored_after_the_end_cuts_nobody_elses_file(tmp_path):
    made = Told(tmp_path / "told")
    made.append(b"record")
    number = made._file
    made.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        assert other == number, "the test needs its number again"
        os.write(other, b"of somebody else")
        made.stored()
        assert not made.append(b"late")
        assert (tmp_path / "other").read_bytes() == b"of somebody else"
    finally:
        os.close(other)
    assert read(tmp_path / "told") == [b"record"], "the next start has it"


# ------------------------------------------------------------------ jobs.db


@asynccontextmanager
async def stuck(path):
    """A store whose thread does nothing until the block is left, and the nursery that waits."""
    async with open_jobs(path) as jobs, trio.open_nursery() as nursery:
        going, begun = threading.Event(), threading.Event()
        nursery.start_soon(jobs.transaction, lambda _db: (begun.set(), going.wait())[0])
        await trio.to_thread.run_sync(begun.wait)
        try:
            yield jobs, nursery
        finally:
            going.set()


def copied(folder, to):
    """What a kill at this moment would leave."""
    shutil.copytree(folder, to)
    return to / "jobs.db"


@pytest.fixture
def killed(tmp_path):
    """A jobs.db whose node was killed when it had told a result and stored nothing of the job."""

    async def fill():
        (tmp_path / "node").mkdir()
        async with stuck(tmp_path / "node" / "jobs.db") as (jobs, _):
            jobs.add_soon(row(), lambda: None)
            jobs.begin_attempt(ATTEMPT, JOB, make_peer(1), quote=b"quote")
            with trio.fail_after(2):
                await jobs.passed(*done())
            return copied(tmp_path / "node", tmp_path / "killed")

    return trio.run(fill)


async def test_a_result_that_was_told_is_there_after_a_kill(killed):
    async with open_jobs(killed) as jobs:
        (found,) = await jobs.unfinished()
        assert (found.state, found.result, found.request) == ("settling", b"result", b"\x80")
        (attempt,) = await jobs.attempts(JOB)
        assert (attempt.price, attempt.outcome, attempt.quote) == (77, "done", b"quote")
    assert read(told_beside(killed)) == []


def test_what_reads_beside_a_node_or_after_a_kill_sees_what_was_told(killed):
    assert attempts_of(killed, JOB[:4]) == [ATTEMPT]
    kept = kept_job(killed, JOB[:4])
    assert (kept.job.result, [row.outcome for row in kept.attempts]) == (b"result", ["done"])


async def test_what_is_stored_in_part_is_told_whole(killed, tmp_path):
    (said,) = said_beside(killed)
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.add(row())
        jobs.begin_attempt(ATTEMPT, JOB, make_peer(1), choice=b"{}")
        await jobs.written()
        shutil.copy(told_beside(killed), told_beside(tmp_path / "jobs.db"))
        kept = kept_job(tmp_path / "jobs.db", JOB)
    assert kept.job == said.job
    (attempt,) = kept.attempts
    assert (attempt.price, attempt.outcome, attempt.choice) == (77, "done", b"{}")


async def test_a_job_that_ended_is_not_begun_again_by_what_was_told(killed, tmp_path):
    left = told_beside(killed).read_bytes()
    async with open_jobs(killed) as jobs:
        await jobs.end(JOB, "settled", result=b"result", receipt=b"{}")
    told_beside(killed).write_bytes(left)
    async with open_jobs(killed) as jobs:
        assert await jobs.unfinished() == []
        ended = await jobs.get(JOB)
        assert (ended.state, ended.receipt) == ("settled", b"{}")
        assert len(await jobs.attempts(JOB)) == 1


async def test_a_large_result_is_stored_before_it_is_told(tmp_path):
    async with stuck(tmp_path / "jobs.db") as (jobs, nursery):
        nursery.start_soon(jobs.passed, *done(bytes(RECORD_BYTES_MAX)))
        await trio.testing.wait_all_tasks_blocked()
        assert said_beside(tmp_path / "jobs.db") == []
        assert len(nursery.child_tasks) == 2, "it waits for the thread"


async def test_a_store_in_memory_has_no_file_and_shares_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with open_jobs(Path(IN_MEMORY)) as jobs, open_jobs(Path(IN_MEMORY)) as other:
        await jobs.add(row())
        await jobs.passed(*done())
        assert (await jobs.get(JOB)).result == b"result"
        async with open_jobs(Path(IN_MEMORY)) as later:
            assert await later.get(JOB) is await other.get(JOB) is None
    assert list(tmp_path.iterdir()) == []


async def test_the_file_is_empty_again_once_jobs_db_has_all(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.add(row())
        await jobs.passed(*done())
        assert [each.job.id for each in said_beside(tmp_path / "jobs.db")] == [JOB]
        await jobs.written()
        await trio.testing.wait_all_tasks_blocked()
        assert said_beside(tmp_path / "jobs.db") == []
        assert (await jobs.get(JOB)).result == b"result"
