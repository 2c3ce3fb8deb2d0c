"""The frames of one call: in order, without a turn where they are here, and with a clear end."""

import pytest
import trio
import trio.testing

from aivillage.node.inbox import Inbox
from aivillage.protocols.messages import Progress

FRAMES = [Progress(id=1, done=float(at)) for at in range(3)]


async def test_what_is_here_costs_no_turn_and_comes_in_order():
    inbox = Inbox()
    for frame in FRAMES:
        inbox.put(frame)
    assert len(inbox) == 3
    with trio.testing.assert_no_checkpoints():
        assert [await inbox.receive() for _ in FRAMES] == FRAMES


async def test_who_waits_wakes_for_a_frame_and_for_the_end():
    inbox, got = Inbox(), []

    async def read():
        while True:
            got.append(await inbox.receive())

    with trio.fail_after(2), pytest.RaisesGroup(trio.EndOfChannel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for frame in FRAMES:
                await trio.testing.wait_all_tasks_blocked()
                inbox.put(frame)
            inbox.end()
    assert got == FRAMES, "the end overtakes nothing"


async def test_a_cancelled_reader_loses_nothing_and_another_may_follow():
    inbox = Inbox()
    with trio.move_on_after(0.01):
        await inbox.receive()
    inbox.put(FRAMES[0])
    assert await inbox.receive() == FRAMES[0]


async def test_two_readers_are_a_defect():
    inbox = Inbox()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await inbox.receive()
        inbox.put(FRAMES[0])
