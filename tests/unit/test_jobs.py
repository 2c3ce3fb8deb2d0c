"""jobs.db across versions of this program, and on what an interrupted attempt leaves."""

from __future__ import annotations

import apsw
import pytest
import trio

from aivillage.node.jobs import APPLICATION_ID, SCHEMA_VERSION, JobRow, open_jobs
from aivillage.protocols.errors import ConfigError, LedgerError
from aivillage.protocols.types import AttemptId, JobId, PeerId

JOB = JobId("ab" * 16)
ATTEMPT = AttemptId(bytes(16))


async def _with_an_attempt(path):
    async with open_jobs(path) as jobs:
        row = JobRow(
            id=JOB, operation="mesh.noop", request=b"\x80", state="new", ceiling=1, deadline=None,
            peer="", created=1.0,
        )  # fmt: skip
        await jobs.add(row)
        jobs.begin_attempt(ATTEMPT, JOB, PeerId("somebody"))


@pytest.mark.parametrize(
    ("version", "sub_jobs"), [(1, False), (1, True), (2, True), (3, True), (4, True)]
)
async def test_an_older_store_opens_and_keeps_its_attempts(tmp_path, version, sub_jobs):
    path = tmp_path / "jobs.db"
    await _with_an_attempt(path)
    db = apsw.Connection(str(path))
    db.execute("DROP TABLE peer_speed")
    since = {4: ("choice",), 3: ("choice", "quote", "done")}
    for column in since.get(version, ("kernel", "identical", "quote", "done", "choice")):
        db.execute(f"ALTER TABLE attempt DROP COLUMN {column}")
    for column in ("prefer", "mesh"):
        db.execute(f"ALTER TABLE job DROP COLUMN {column}")
    if not sub_jobs:
        for column in ("local", "parent"):
            db.execute(f"ALTER TABLE job DROP COLUMN {column}")
    db.pragma("user_version", version)
    db.close()
    async with open_jobs(path) as jobs:
        (row,) = await jobs.unfinished()
        assert (row.id, row.local, row.parent) == (JOB, False, "")
        (attempt,) = await jobs.attempts(JOB)
        assert (attempt.id, attempt.kernel, attempt.identical) == (ATTEMPT, "", "")
        done = b"\x80" if version == 4 else b""
        assert (attempt.quote, attempt.done, attempt.choice) == (b"", done, b"")
        assert (row.prefer, bool(row.mesh)) == ("", False)
        assert await jobs.records() == {}


async def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "jobs.db"
    await _with_an_attempt(path)
    db = apsw.Connection(str(path))
    db.pragma("user_version", SCHEMA_VERSION + 1)
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="version"):
        async with open_jobs(path):
            raise AssertionError("it opened")
    assert path.read_bytes() == before
    assert APPLICATION_ID.to_bytes(4, "big") in before


async def test_an_interrupted_attempt_keeps_its_price_and_its_kernel(tmp_path):

    path = tmp_path / "jobs.db"
    await _with_an_attempt(path)
    async with open_jobs(path) as jobs:
        for seq, price in ((0, 5), (1, 9)):
            stored = trio.Event()
            kernel = ("cpu", "guaranteed")
            jobs.keep((JOB, seq, ATTEMPT), b"x", price, kernel, stored.set)
            await stored.wait()
        (attempt,) = await jobs.attempts(JOB)
    assert attempt.price == 9
    assert (attempt.kernel, attempt.identical) == ("cpu", "guaranteed")


async def test_a_piece_whose_books_fail_does_not_keep_the_others_waiting(tmp_path):
    path = tmp_path / "jobs.db"
    await _with_an_attempt(path)
    async with open_jobs(path) as jobs:
        stored = trio.Event()

        def fails():
            raise LedgerError("above the ceiling")

        jobs.keep((JOB, 0, ATTEMPT), b"x", 1, ("", ""), fails)
        jobs.keep((JOB, 1, ATTEMPT), b"y", 2, ("", ""), stored.set)
        with trio.fail_after(3):
            await stored.wait()
        assert await jobs.delivered(JOB) == [b"x", b"y"]
