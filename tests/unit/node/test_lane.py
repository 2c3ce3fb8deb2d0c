"""What lies between the library and a socket: it reads ahead, and gives its locks away at once."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from aivillage.node.transport.patches import PROMPT_TURNS, PromptLock
from aivillage.node.transport.psk import AHEAD_BYTES, FIRST_WORDS, NONCE_BYTES, Lane, xsalsa20

KEY = bytes(range(32))


class Socket:
    """Hands out what came, as a socket does, and counts how often it was asked."""

    def __init__(self, came: bytes) -> None:
        self.came, self.asked = came, 0

    async def read(self, n: int | None) -> bytes:
        self.asked += 1
        size = len(self.came) if n is None else n
        piece, self.came = self.came[:size], self.came[size:]
        return piece

    async def write(self, data: bytes) -> None:
        pass


def words(key: bytes | None, said: bytes) -> bytes:
    if key is None:
        return FIRST_WORDS + said
    nonce = bytes(NONCE_BYTES)
    return nonce + xsalsa20(key, nonce).encrypt(FIRST_WORDS + said)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(
    "sizes", [(2, 40, 2, 40, None), (1,) * 90, (0, 50, 1_000), (3, AHEAD_BYTES)]
)
async def test_a_lane_reads_ahead_and_hands_out_what_came_in_order(key, sizes):
    said = bytes(range(84))
    socket = Socket(words(key, said))
    lane = Lane(socket, key)
    await lane.begin()
    assert await lane.read(len(FIRST_WORDS)) == FIRST_WORDS
    before = socket.asked
    got = [await lane.read(size) for size in sizes]
    assert b"".join(got) == said[: len(b"".join(got))]
    assert all(len(one) <= size for one, size in zip(got, sizes, strict=True) if size is not None)
    assert len(b"".join(got)) >= min(len(said), sum(size or 0 for size in sizes))
    assert socket.asked - before <= 8, "small pieces come out of one read"
    assert await lane.read(10) == b""


@pytest.mark.parametrize("n", [AHEAD_BYTES - 1, AHEAD_BYTES])
async def test_what_is_read_ahead_has_a_bound(n):
    socket = Socket(words(None, bytes(3 * AHEAD_BYTES)))
    lane = Lane(socket, None)
    await lane.read(len(FIRST_WORDS))
    assert len(await lane.read(n)) == n
    assert len(socket.came) == 2 * AHEAD_BYTES, "never more than that lies between"


async def test_nothing_is_read_where_nothing_is_asked_for():
    socket = Socket(words(None, b"abc"))
    lane = Lane(socket, None)
    await lane.read(len(FIRST_WORDS))
    before = socket.asked
    assert await lane.read(0) == b""
    assert socket.asked == before


class Turns(trio.abc.Instrument):
    """Counts the turns that trio gives to one task: who runs first in a batch is drawn, so
    what a neighbour got done in between says nothing certain."""

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.task, self.taken = task, 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken += task is self.task


async def test_a_free_lock_costs_no_turn_but_every_sixteenth_time():
    turns = Turns(trio.lowlevel.current_task())
    trio.lowlevel.add_instrument(turns)
    lock = PromptLock()
    for _ in range(PROMPT_TURNS - 1):
        async with lock:
            pass
    assert turns.taken == 0, "nobody else ran"
    async with lock:
        pass
    assert turns.taken == 1, "then everybody may"


async def test_a_taken_lock_is_waited_for_in_turn():
    lock, order = PromptLock(), []

    async def enter(name: str) -> None:
        async with lock:
            order.append(name)
            await trio.lowlevel.checkpoint()
            order.append(name)

    async with trio.open_nursery() as nursery, lock:
        for name in "ab":
            nursery.start_soon(enter, name)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
    assert order == ["a", "a", "b", "b"]
