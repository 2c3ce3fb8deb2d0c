"""A task that fails is an event; a service that fails goes on; only the ledger stops a node."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from aivillage.node.events import Events
from aivillage.node.guard import AGAIN_SECONDS, Tasks, guarded
from aivillage.protocols.errors import NodeError
from tests.simulation.mesh import open_mesh, until


async def test_what_a_task_raises_is_an_event_with_its_traceback(caplog):
    events = Events()

    async def broken(number):
        raise OSError(f"number {number}")

    await guarded(events, "it", broken, 7)
    assert events.recent[-1][1:] == ("task_failed", {"task": "it", "error": "OSError('number 7')"})
    assert "Traceback" in caplog.text
    assert "in broken" in caplog.text


async def test_a_service_pauses_after_a_failure_and_goes_on(autojump_clock):
    events, times = Events(), []

    async def beat():
        times.append(trio.current_time())
        if len(times) < 4:
            raise ValueError
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        Tasks(nursery, events).serve(beat)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [round(at - times[0], 3) for at in times] == [n * AGAIN_SECONDS for n in range(4)]
    assert events.counts["task_failed"] == 3


async def test_a_guarded_task_can_be_cancelled(autojump_clock):
    async with trio.open_nursery() as nursery:
        Tasks(nursery, Events()).start_soon(trio.sleep_forever)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def test_what_still_arrives_when_the_services_have_ended_starts_nothing():
    started = []

    async def work():
        started.append(1)

    async with trio.open_nursery() as nursery:
        tasks = Tasks(nursery, Events())
        tasks.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        tasks.start_soon(work)
    tasks.start_soon(work)
    assert started == [1]


@pytest.mark.parametrize("service", ["known peers", "disk", "offers", "a task"])
async def test_a_node_survives_whatever_its_services_raise(tmp_path, monkeypatch, service):
    async with open_mesh(tmp_path) as mesh:
        node, other = await mesh.add("node"), await mesh.add("other")
        desk, broken = node.desk, [True]

        def failing(real):
            def call(*args):
                if broken[0]:
                    raise NodeError("jobs.db: it is gone") if service == "known peers" else OSError
                return real(*args)

            return call

        if service == "known peers":
            monkeypatch.setattr(desk.jobs, "known_peers", failing(desk.jobs.known_peers))
        elif service == "disk":
            monkeypatch.setattr("aivillage.node.monitor.shutil.disk_usage", failing(lambda _: None))
            desk.monitor._disk_full = True
            monkeypatch.setattr("aivillage.node.monitor.DISK_SECONDS", 0.1)
        elif service == "offers":
            monkeypatch.setattr(desk.discovery, "make_offer", failing(desk.discovery.make_offer))
        else:
            monkeypatch.setattr(desk.ledger, "set_line", failing(desk.ledger.set_line))
            monkeypatch.setattr(desk.jobs, "saw_peer", failing(desk.jobs.saw_peer))
            await mesh.link(node, other)
        await until(lambda: node.events("task_failed"))
        assert not node.closed.is_set()
        if service == "offers":
            broken[0] = False
            await mesh.link(other, node)
            await until(lambda: other.desk.discovery.candidates("mesh.noop"))


async def test_a_ledger_that_cannot_be_written_still_stops_its_node(tmp_path):
    with pytest.RaisesGroup(pytest.RaisesExc(NodeError, match="no commit"), flatten_subgroups=True):
        async with open_mesh(tmp_path) as mesh:
            node = await mesh.add("node")
            node.ledger.stop_for(NodeError("no commit"))
            with trio.fail_after(5):
                await node.closed.wait()
