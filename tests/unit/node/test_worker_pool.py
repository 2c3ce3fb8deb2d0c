"""The pool of warm workers, without processes."""

import itertools

import pytest
import trio

from aivillage.models.inference import catalogue, engine_torch
from aivillage.models.inference.catalogue import DEFAULT
from aivillage.models.inference.stages import StageRequest, memory_bytes
from aivillage.node import parts
from aivillage.node import workers as node_workers
from aivillage.node.module_runs import WorkerPool
from aivillage.node.warmth import Warm
from aivillage.node.workers import Workers, WorkerSettings
from aivillage.protocols.errors import RefusedError

MODEL = catalogue.MODELS[DEFAULT]


class FakeWorker:
    """Ends slowly, as a process does."""

    _numbers = itertools.count()

    def __init__(self):
        self.number = next(self._numbers)
        self.dead = self.is_busy = self.stopped = False
        self.way_out = -1
        self.idle_since = trio.current_time()

    async def stop(self):
        assert not self.stopped, "ended twice"
        self.stopped = True
        await trio.sleep(0.01)


async def started(*_):
    return FakeWorker()


async def use(pool, key="k"):
    async with pool.worker(key) as worker:
        await trio.sleep(0.001)
        assert not worker.stopped, "a worker on its way out was handed over"


async def test_calls_that_come_while_idle_workers_end_get_others(autojump_clock):
    pool = WorkerPool(started, 4)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(use, pool)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.stop_idle)
        await trio.sleep(0.005)
        for key in ("k", "k", "another", "k"):
            nursery.start_soon(use, pool, key)
    await pool.stop_idle()


def test_the_engine_gets_no_more_slots_than_it_has_rows_for():
    assert node_workers.ENGINE_SLOTS_MAX == engine_torch.SLOTS


@pytest.mark.parametrize(("wanted", "given"), [(3, 3), (256, 8)])
async def test_a_node_with_many_slots_loads_an_engine_with_those_it_can_have(
    tmp_path, monkeypatch, wanted, given
):
    asked = []

    async def load(_nursery, _worker, wanted):
        asked.append(wanted.slots)
        raise KeyError

    async with trio.open_nursery() as nursery:
        found = Workers(nursery, WorkerSettings(engine_slots=wanted), tmp_path)
        monkeypatch.setattr(found._resident, "_start", started)
        monkeypatch.setattr("aivillage.node.resident.load_engine", load)
        with pytest.raises(KeyError):
            await found.engine("inference.generate")
    assert asked == [given]


class Loaded:
    """Stands for an engine that is loaded."""

    def __init__(self):
        self.dead = False
        self.session_count = 0
        self.idle = 0.0

    def idle_seconds(self):
        return self.idle

    async def put_away(self):
        self.dead = True

    async def dispatch(self):
        await trio.lowlevel.checkpoint()


async def test_as_many_stages_are_loaded_as_the_limit_and_the_longest_idle_makes_room(monkeypatch):
    async def load(_nursery, _worker, _wanted):
        return Loaded()

    monkeypatch.setattr(parts, "load_engine", load)
    async with trio.open_nursery() as nursery:
        found = parts.Parts(nursery, started, 4 << 30)
        first, second = [
            await found.stage(StageRequest(first=0, last=last), MODEL, 8)
            for last in range(1, 1 + parts.STAGES_MAX)
        ]
        assert await found.stage(StageRequest(first=0, last=1), MODEL, 8) is first
        first.session_count = second.session_count = 1
        with pytest.raises(RefusedError, match="2 stages are at work"):
            await found.stage(StageRequest(first=0, last=3), MODEL, 8)
        first.session_count, second.session_count, second.idle = 0, 0, 1.0
        await found.stage(StageRequest(first=0, last=3), MODEL, 8)
        assert (first.dead, second.dead) == (False, True)


MUCH = 1 << 40


@pytest.fixture
async def lent(monkeypatch):
    """Room for parts, where loading takes no process and no time."""
    asked = []

    async def load(_nursery, _worker, wanted):
        asked.append(wanted.layers)
        return Loaded()

    monkeypatch.setattr(parts, "load_engine", load)
    async with trio.open_nursery() as nursery:
        found = parts.Parts(nursery, started, 4 << 30)
        found.asked = asked
        yield found


def layers(first, last):
    return StageRequest(first=first, last=last, rows=1, ahead=True)


async def test_layers_loaded_ahead_are_those_that_a_stage_then_has(lent):
    ahead = await lent.ahead(layers(0, 9), MODEL, 8, lambda: MUCH)
    assert await lent.ahead(layers(0, 9), MODEL, 8, lambda: MUCH) is ahead
    assert await lent.stage(StageRequest(first=0, last=9), MODEL, 8) is ahead
    assert await lent.stage(StageRequest(first=9, last=10), MODEL, 8) is not ahead
    assert lent.asked == [(0, 9), (9, 10)]


async def test_layers_are_loaded_ahead_within_the_memory_that_is_left_and_not_a_byte_more(lent):
    one, other = memory_bytes(MODEL, 0, 9), memory_bytes(MODEL, 9, 10)
    with pytest.raises(RefusedError, match="no room"):
        await lent.ahead(layers(0, 9), MODEL, 8, lambda: one - 1)
    await lent.ahead(layers(0, 9), MODEL, 8, lambda: one)
    with pytest.raises(RefusedError, match="no room"):
        await lent.ahead(layers(9, 10), MODEL, 8, lambda: one + other - 1)
    await lent.ahead(layers(9, 10), MODEL, 8, lambda: one + other)
    assert lent.asked == [(0, 9), (9, 10)]


async def test_what_was_used_makes_no_room_for_what_may_never_be(lent):
    used = await lent.stage(StageRequest(first=0, last=9), MODEL, 8)
    used.idle = 500.0
    ahead = await lent.ahead(layers(9, 10), MODEL, 8, lambda: MUCH)
    with pytest.raises(RefusedError, match="no room"):
        await lent.ahead(layers(9, 11), MODEL, 8, lambda: MUCH)
    await lent.stage(StageRequest(first=9, last=12), MODEL, 8)
    assert (used.dead, ahead.dead) == (False, True), "what was only loaded ahead goes first"


async def test_what_was_loaded_ahead_makes_room_for_another_only_after_its_time(
    lent, autojump_clock
):
    first = await lent.ahead(layers(0, 9), MODEL, 8, lambda: MUCH)
    second = await lent.ahead(layers(9, 10), MODEL, 8, lambda: MUCH)
    await trio.sleep(parts.AHEAD_SECONDS_MIN - 0.001)
    with pytest.raises(RefusedError, match="no room"):
        await lent.ahead(layers(9, 11), MODEL, 8, lambda: MUCH)
    first.session_count = 1
    await trio.sleep(0.001)
    await lent.ahead(layers(9, 11), MODEL, 8, lambda: MUCH)
    assert (first.dead, second.dead) == (False, True)


async def test_what_was_loaded_ahead_makes_way_for_a_model_and_what_is_used_does_not(lent):
    used = await lent.stage(StageRequest(first=0, last=9), MODEL, 8)
    ahead = await lent.ahead(layers(9, 10), MODEL, 8, lambda: MUCH)
    both = memory_bytes(MODEL, 0, 9) + memory_bytes(MODEL, 9, 10)
    await lent.make_way(both)
    assert not ahead.dead
    await lent.make_way(both - 1)
    assert (used.dead, ahead.dead) == (False, True)
    await lent.make_way(0)
    assert not used.dead


async def test_an_owner_may_forbid_that_layers_are_loaded_ahead(tmp_path):
    async with trio.open_nursery() as nursery:
        found = Workers(nursery, WorkerSettings(stands_by=False), tmp_path)
        with pytest.raises(RefusedError, match="no layers ahead") as refusal:
            await found.stage_ahead(layers(0, 9))
        assert refusal.value.code == "OWNER_LIMIT"


@pytest.mark.parametrize("missing", [0, 1])
async def test_layers_ahead_share_the_memory_of_loaded_models(lent, tmp_path, monkeypatch, missing):
    needed = memory_bytes(MODEL, 0, 9)
    settings = WorkerSettings(models_memory_bytes_max=needed + 7 - missing)
    async with trio.open_nursery() as nursery:
        found = Workers(nursery, settings, tmp_path)
        found._parts = lent
        monkeypatch.setattr(
            found._resident,
            "warm",
            lambda: [Warm(name="m", memory_bytes=7, worth=0.0, is_busy=True)],
        )
        if missing:
            with pytest.raises(RefusedError, match="no room"):
                await found.stage_ahead(layers(0, 9))
        else:
            await found.stage_ahead(layers(0, 9))


async def test_more_memory_than_a_worker_may_have_is_refused_before_anything_is_loaded():
    async with trio.open_nursery() as nursery:
        found = parts.Parts(nursery, started, memory_bytes(MODEL, 0, 15) - 1)
        with pytest.raises(RefusedError, match="are needed, a worker of this node has"):
            await found.stage(StageRequest(first=0, last=15), MODEL, 8)


async def test_a_failure_while_idle_workers_end_does_not_fell_the_node(
    tmp_path, monkeypatch, autojump_clock
):
    calls = []

    async def fails(*_):
        calls.append(1)
        raise ValueError

    async with trio.open_nursery() as nursery:
        found = Workers(nursery, WorkerSettings(idle_exit_seconds=1.0), tmp_path)
        monkeypatch.setattr(found._pool, "stop_idle", fails)
        nursery.start_soon(found.end_idle)
        await trio.sleep(1.0)
        nursery.cancel_scope.cancel()
    assert len(calls) > 2
