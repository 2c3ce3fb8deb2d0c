"""What comes next on a descriptor; and its end, however that comes, is no error and no hang."""

import os
import socket

import pytest
import trio

from aivillage.node.transport.arrivals import arrived


@pytest.fixture
def ends():
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    yield pair
    for end in pair:
        end.close()


async def test_what_came_and_what_comes_is_taken_up_to_the_size_asked_for(ends):
    ours, theirs = ends
    theirs.send(b"abcdef")
    assert await arrived(ours.fileno(), 4) == b"abcd"
    assert await arrived(ours.fileno(), 4) == b"ef"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(later, theirs.send, b"late")
        assert await arrived(ours.fileno(), 100) == b"late"


async def later(call, *args):
    await trio.sleep(0.01)
    call(*args)


async def test_an_end_a_closed_and_a_reset_one_give_nothing(ends):
    ours, theirs = ends
    theirs.close()
    with trio.fail_after(2):
        assert await arrived(ours.fileno(), 100) == b""
        assert await arrived(-1, 100) == b""
        read, write = os.pipe()
        os.close(write)
        os.close(read)
        assert await arrived(read, 100) == b""


async def test_closing_under_a_waiting_reader_wakes_it():
    ours, theirs = trio.socket.socketpair()
    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(later, ours.close)
            assert await arrived(ours.fileno(), 100) == b""
    theirs.close()
