"""Links over real sockets: races, a killed peer, the last word before a hang-up, bulk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from aivillage.node.links import LinkLimits, open_links
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import JOB_PROTOCOL, Part, Progress

SCENARIOS = Path(__file__).with_name("fault_scenarios.py")


@asynccontextmanager
async def mesh(key_of, hello_of, *, count=2, limits=None):
    """Nodes ordered by PeerId, the lowest first."""
    async with AsyncExitStack() as stack:
        nodes = []
        for at in range(count):
            transport = await stack.enter_async_context(open_libp2p(key_of(at + 1), "127.0.0.1:0"))
            links = open_links(transport, hello_of, limits=limits or LinkLimits())
            nodes.append(await stack.enter_async_context(links))
        with trio.fail_after(60):
            yield sorted(nodes, key=lambda links: links.transport.peer)


def address(links) -> str:
    return links.transport.addresses()[0]


async def until(condition) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.01)


async def test_races_leave_one_link_that_works(key_of, hello_of):
    async with mesh(key_of, hello_of) as (low, high):
        peers = low.transport.peer, high.transport.peer
        for _ in range(15):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(low.connect, address(high))
                nursery.start_soon(high.connect, address(low))
            heard = []
            low.on_message = high.on_message = lambda link, frame, heard=heard: heard.append(frame)
            await until(lambda: low.get(peers[1]) and high.get(peers[0]))
            await trio.sleep(0.05)
            mine, theirs = low.get(peers[1]), high.get(peers[0])
            assert mine.dialled != theirs.dialled
            mine.send(Progress(id=1, done=0.1))
            theirs.send(Progress(id=2, done=0.2))
            await until(lambda heard=heard: len(heard) == 2)
            await low.drop(peers[1], "next round")
            await until(lambda: not high.all())


async def test_who_comes_back_while_it_is_hung_up_on_can_be_called(key_of, hello_of, monkeypatch):
    """A relay that had hung closed the old connections and forgot the new one with them."""
    async with mesh(key_of, hello_of) as (a, b):
        await b.connect(address(a))
        library = a.transport._swarm.get_connections()[0]
        closing, may_close = trio.Event(), trio.Event()
        close = library.muxed_conn.close

        async def close_slowly():
            closing.set()
            await may_close.wait()
            await close()

        monkeypatch.setattr(library.muxed_conn, "close", close_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.transport.hang_up, b.transport.peer)
            await closing.wait()
            await b.transport.hang_up(a.transport.peer)
            await b.transport.dial(address(a))
            await until(lambda: set(a.transport._swarm.get_connections()) - {library})
            may_close.set()
        stream = await a.transport.open_stream(b.transport.peer, JOB_PROTOCOL)
        await stream.close()


async def test_the_last_frames_before_a_drop_arrive(key_of, hello_of):
    async with mesh(key_of, hello_of) as (a, b):
        heard, reasons = [], []
        b.on_message = lambda link, frame: heard.append(frame)
        b.on_down = lambda link, reason: reasons.append(reason)
        for _ in range(5):
            link = await a.connect(address(b))
            for n in range(100):
                link.send(Progress(id=1, done=float(n)))
            await a.drop(b.transport.peer, "done")
            await until(lambda: not b.all())
        assert len(heard) == 500
        assert len(reasons) == 5


async def test_a_refusal_names_its_reason_to_the_other_side(key_of, hello_of):
    async with mesh(key_of, hello_of) as (a, b):
        reasons = []
        a.on_down = lambda link, reason: reasons.append(reason)

        def refuse(link, frame):
            raise PeerError("forged", code="REPLAYED")

        b.on_message = refuse
        link = await a.connect(address(b))
        link.send(Progress(id=1, done=0.5))
        await until(lambda: reasons)
        assert "REPLAYED forged" in reasons[0]


async def test_large_frames_pass_in_both_directions_at_once(key_of, hello_of):
    async with mesh(key_of, hello_of) as (a, b):
        heard = {"a": 0, "b": 0}

        def count(name):
            def on_message(link, frame):
                heard[name] += len(frame.body)

            return on_message

        a.on_message, b.on_message = count("a"), count("b")
        there = await a.connect(address(b))
        await until(b.all)
        back = b.get(a.transport.peer)
        body = Part(id=2**31, seq=0, body=bytes(1_000_000))

        async def pour(link):
            for _ in range(24):
                while link._queue_bytes > 8 << 20:
                    await trio.sleep(0.01)
                link.send(body)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, there)
            nursery.start_soon(pour, back)
        await until(lambda: heard == {"a": 24_000_000, "b": 24_000_000})


async def test_a_killed_peer_is_noticed_within_a_second_and_can_come_back(key_of, hello_of):
    with trio.fail_after(20):
        async with mesh(key_of, hello_of, count=1) as (links,):
            for _ in range(2):
                child = start_child()
                try:
                    at = await trio.to_thread.run_sync(child.stdout.readline)
                    link = await links.connect(at.strip())
                    os.kill(child.pid, signal.SIGKILL)
                    with trio.fail_after(1):
                        await link.ended.wait()
                    assert links.all() == []
                finally:
                    child.kill()
                    child.wait()
                    child.stdout.close()


def start_child():
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCENARIOS), "--child", "patched"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
    )


@pytest.mark.slow
async def test_sixty_connections_leave_nothing_behind(key_of, hello_of):
    async with mesh(key_of, hello_of) as (a, b):

        async def cycle(count):
            for _ in range(count):
                await a.connect(address(b))
                await a.drop(b.transport.peer, "again")
                await until(lambda: not b.all())
            await trio.sleep(6)
            return trio.lowlevel.current_statistics().tasks_living

        before = await cycle(5)
        assert await cycle(60) <= before + 2


# ------------------------------------------------------------------ in the socket's own turn


@asynccontextmanager
async def linked(key_of, hello_of, limits=None):
    """Two that are linked, and whether the second one took each piece that it was let hear."""
    async with mesh(key_of, hello_of, limits=limits) as (one, other):
        link = await one.connect(address(other))
        await until(lambda: other.get(one.transport.peer))
        theirs = other.get(one.transport.peer)
        offered: list[bool] = []
        ear = theirs._stream._muxed.ear
        take = ear.take

        def counted(piece):
            offered.append(take(piece))
            return offered[-1]

        ear.take = counted
        yield link, other, offered


async def test_small_frames_are_heard_at_once_and_over_the_rate_the_peer_waits(key_of, hello_of):
    limits = LinkLimits(frames_per_second=100)
    async with linked(key_of, hello_of, limits) as (link, other, offered):
        heard = []
        other.on_message = lambda _link, frame: heard.append(frame.done)
        began = trio.current_time()
        for at in range(300):
            link.send(Progress(id=1, done=float(at)))
            await trio.sleep(0.001)  # each in a message of its own
        await until(lambda: len(heard) == 300)
        link.send(Progress(id=1, done=300.0))
        await until(lambda: len(heard) == 301)
        assert trio.current_time() - began >= 1.2, "200 more than at once, 100 a second"
        assert heard == [float(at) for at in range(301)]
        assert sum(offered) >= 50, "while it was within its rate"
        assert not all(offered), "and above it, it had to be read"


async def test_what_is_no_frame_ends_the_link_that_heard_it_and_says_why(key_of, hello_of):
    async with linked(key_of, hello_of) as (link, _other, offered):
        assert link._stream.write_now(b"\x00\x00\x00\x02\xc1\xc1")
        await until(lambda: link.closed_because)
        assert "BAD_REQUEST" in link.closed_because
        assert offered[0], "and nothing after it was taken"
        assert not any(offered[1:])


async def test_a_defect_in_what_hears_ends_that_link_only(key_of, hello_of, caplog):
    async with linked(key_of, hello_of) as (link, other, offered):
        peer = link.peer

        def defect(_link, _frame):
            raise ZeroDivisionError("a defect")

        other.on_message = defect
        link.send(Progress(id=1, done=0.5))
        await until(lambda: link.closed_because)
        assert offered[0], "and nothing after it was taken"
        assert not any(offered[1:])
        assert "ZeroDivisionError" in caplog.text
        other.on_message = lambda _link, _frame: None
        again = await link._owner.connect(address(other))
        assert again.peer == peer, "the connection is as it was"
