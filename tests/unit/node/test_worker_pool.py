"""The pool of warm workers, without processes."""

import itertools

import pytest
import trio

from aivillage.models.inference import engine_torch
from aivillage.node import workers as node_workers
from aivillage.node.module_runs import WorkerPool
from aivillage.node.workers import Workers, WorkerSettings


class FakeWorker:
    """Ends slowly, as a process does."""

    _numbers = itertools.count()

    def __init__(self):
        self.number = next(self._numbers)
        self.dead = self.is_busy = self.stopped = False
        self.idle_since = trio.current_time()

    async def stop(self):
        assert not self.stopped, "ended twice"
        self.stopped = True
        await trio.sleep(0.01)


async def started():
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

    async def load(_worker, _model, slots, engine):
        asked.append(slots)
        raise KeyError

    async with trio.open_nursery() as nursery:
        found = Workers(nursery, WorkerSettings(engine_slots=wanted), tmp_path)
        monkeypatch.setattr(found, "_start", started)
        monkeypatch.setattr(node_workers, "load_engine", load)
        with pytest.raises(KeyError):
            await found.engine("inference.generate")
    assert asked == [given]


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
