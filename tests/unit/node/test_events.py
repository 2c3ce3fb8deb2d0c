"""Lines of what happens often are written with others: in order, with their own time, none lost."""

import logging
import re
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from aivillage.node.events import TOGETHER_SECONDS, Events, LineFormatter


@pytest.fixture
def lines(caplog):
    """What was logged so far: when it says that it was, and the event."""
    caplog.set_level(logging.INFO, "aivillage")

    def read():
        return [(record.created, record.getMessage().split()[0]) for record in caplog.records]

    return read


def names(lines):
    return [name for _, name in lines()]


@asynccontextmanager
async def writing_together():
    """Events whose writer runs until the block is left."""
    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.write_together)
        await trio.testing.wait_all_tasks_blocked()
        yield events
        nursery.cancel_scope.cancel()


async def test_a_line_of_what_happens_often_is_written_with_others_and_bears_its_time(
    lines, autojump_clock, monkeypatch
):
    now = [1000.25]
    monkeypatch.setattr("aivillage.node.events.time.time", lambda: now[0])
    async with writing_together() as events:
        events.emit_often("job_ended", job="a")
        now[0] += 0.01
        events.emit_often("job_ended", job="b")
        assert events.counts["job_ended"] == 2, "told to whoever asks at once"
        assert [name for _, name, _ in events.recent] == ["job_ended"] * 2
        assert lines() == []
        await trio.sleep(TOGETHER_SECONDS + 0.001)
        assert lines() == [(1000.25, "job_ended"), (1000.26, "job_ended")]


async def test_no_line_of_a_later_event_is_written_before_it(lines):
    async with writing_together() as events:
        events.emit_often("job_ended")
        events.emit("peer_lost", level=logging.WARNING)
        assert names(lines) == ["job_ended", "peer_lost"]


async def test_what_waits_at_a_clean_end_is_written_and_what_follows_it_at_once(lines):
    async with writing_together() as events:
        events.emit_often("job_ended")
    assert names(lines) == ["job_ended"]
    events.emit_often("sale_ended")
    assert names(lines) == ["job_ended", "sale_ended"], "nobody would write it later"


def test_a_line_has_its_own_milliseconds():
    record = logging.makeLogRecord({"msg": "%s %s", "args": ("job_ended", "{}"), "name": "a"})
    record.created, record.msecs = 1000.25, 250.0
    assert re.search(r",250 .* job_ended {}$", LineFormatter().format(record))
