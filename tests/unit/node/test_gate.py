"""The gate between restarts: what it keeps, what it forgets, and what it cannot read."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import msgspec
import pytest
import trio

from aivillage.node import gate as gates
from aivillage.node.events import Events
from aivillage.node.gate import open_gate
from aivillage.node.jobs import open_jobs
from aivillage.node.limits import Limits, Pause
from aivillage.protocols.errors import ConfigError, RefusedError

KEPT = {"limits": {"day_micro_credits": 7}, "pause": None}


@asynccontextmanager
async def opened(folder, whose=lambda peer: peer):
    async with open_jobs(folder / "jobs.db") as jobs:
        yield await open_gate(jobs, (folder / "blobs",), Events(), whose)


async def test_the_owners_word_and_the_days_counts_outlast_a_restart(tmp_path):
    async with opened(tmp_path) as gate:
        await gate.set_limits(Limits(day_micro_credits=10, quiet_hours=("22:00-07:00",)))
        await gate.set_pause(Pause())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gate.run)
            await trio.lowlevel.checkpoint()
            gate.take("p", 10)
            nursery.cancel_scope.cancel()  # before its next look: it is written all the same
    async with opened(tmp_path) as gate:
        assert gate.limits == Limits(day_micro_credits=10, quiet_hours=("22:00-07:00",))
        assert gate.pause == Pause()
        assert gate.day.peers == {"p": 10}
        with pytest.raises(RefusedError):
            gate.take("p", 1)


@pytest.mark.parametrize(
    "stored",
    [
        b"\xc1",
        msgspec.msgpack.encode([{"moon_phases": ["full"]}, None]),
        msgspec.msgpack.encode({**KEPT, "limits": {"moon_phases": ["full"]}}),
    ],
)
async def test_limits_of_another_version_stop_the_start_and_are_not_forgotten(tmp_path, stored):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        await jobs.set_setting("owner_limits", stored)
        with pytest.raises(ConfigError) as caught:
            await open_gate(jobs, (), Events(), lambda peer: peer)
        assert caught.value.next_step
        assert await jobs.setting("owner_limits") == stored


async def test_what_strangers_take_counts_on_one_name_and_a_day_ends_at_midnight(tmp_path):
    async with opened(tmp_path, lambda _peer: "") as gate:
        await gate.set_limits(Limits(peer_day_micro_credits=10))
        gate.take("one", 6)
        gate.take("two", 4)
        gate.take("two", 0)  # nothing is always free
        for stranger in ("one", "two", "three"):
            with pytest.raises(RefusedError):
                gate.require_today(stranger)
        tomorrow = datetime.now().astimezone() + timedelta(days=1)
        gate.now = lambda: tomorrow
        gate.require_today("three", 10)
        with pytest.raises(RefusedError):
            gate.require_today("three", 11)


async def test_who_became_known_counts_on_its_own_name_at_the_next_look(tmp_path):
    known = []
    async with opened(tmp_path, lambda peer: peer if known else "") as gate:
        gate.take("p", 5)
        known.append("p")
        await gate.look()
        gate.take("p", 2)
        assert gate.day.peers == {"": 5, "p": 2}
        assert gates.LOOK_SECONDS <= 1.0


async def test_a_node_tells_once_that_it_closed_and_once_that_it_opened(tmp_path):
    async with opened(tmp_path) as gate:
        told = []
        gate.on_change = lambda: told.append(gate.refusal() is None)
        await gate.set_pause(Pause())
        await gate.look()
        await gate.look()
        await gate.set_pause(None)
        assert set(told) == {True, False}
        assert gate._events.counts["closed_to_others"] == 1
        assert gate._events.counts["opened_to_others"] == 1
