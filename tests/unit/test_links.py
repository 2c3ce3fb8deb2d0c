"""Links over the in-memory network; time is autojumped."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio

from aivillage.node.links import open_links
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import JobError, PeerError, RequestError
from aivillage.protocols.messages import (
    Accepted,
    Cancel,
    Failure,
    Hello,
    Ledger,
    ListOperations,
    Operations,
    Progress,
    Step,
    StepItem,
)
from tests.mesh import LIMITS, Recorder, mesh, settle


@pytest.fixture
def two(hello_of, peer_of):
    return lambda **options: mesh(hello_of, peer_of, **options)


async def test_connect_is_idempotent_and_both_sides_are_up(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        assert await a.links.connect(b.address) is link
        await settle()
        assert (a.events, b.events) == (["up"], ["up"])
        assert link.peer == b.peer
        assert b.links.get(a.peer).hello.agent == "test"
        assert b.links.all() == [b.links.get(a.peer)]
    assert (a.events, b.events) == (["up", "down"], ["up", "down"])


async def test_frames_arrive_in_order_and_step_is_a_frame(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        sent = [Progress(id=1, done=float(n)) for n in range(500)]
        sent.append(Step(seq=1, items=(StepItem(1, 0, (5,), "x", b"12345678"),)))
        for frame in sent:
            link.send(frame)
        await settle()
        assert b.frames == sent


async def test_ask_returns_the_answer_and_a_failure_becomes_its_exception(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)

        def answer(back, frame) -> None:
            if isinstance(frame, ListOperations):
                back.send(Operations(id=frame.id, operations=()))
            else:
                back.send(Failure(id=frame.id, code="BAD_REQUEST", message="no"))

        b.links.on_message = answer
        question = ListOperations(id=link.next_id())
        assert await link.ask(question, timeout_seconds=5) == Operations(
            id=question.id, operations=()
        )
        with pytest.raises(RequestError, match="no"):
            await link.ask(Cancel(id=link.next_id()), timeout_seconds=5)


async def test_ask_without_an_answer_is_deadline_and_without_a_peer_is_lost(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        with pytest.raises(JobError) as caught:
            await link.ask(ListOperations(id=link.next_id()), timeout_seconds=3)
        assert caught.value.code == "DEADLINE"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.links.transport.hang_up, b.peer)
            with pytest.raises(PeerError) as lost:
                await link.ask(ListOperations(id=link.next_id()), timeout_seconds=60)
        assert lost.value.code == "PEER_LOST"
        with pytest.raises(PeerError):
            link.send(Accepted(id=1))


async def test_ids_of_the_two_sides_never_meet(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        back = b.links.get(a.peer)
        mine = {link.next_id() for _ in range(50)}
        theirs = {back.next_id() for _ in range(50)}
        assert not mine & theirs


async def test_an_inbox_takes_its_id_and_ends_with_peer_lost(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        call = link.next_id()
        inbox = link.open_inbox(call)
        back = b.links.get(a.peer)
        back.send(Progress(id=call, done=0.5))
        back.send(Progress(id=call + 2, done=0.1))
        assert await inbox.receive() == Progress(id=call, done=0.5)
        await settle()
        assert a.frames == [Progress(id=call + 2, done=0.1)]
        await b.links.drop(a.peer, "test")
        last = await inbox.receive()
        assert isinstance(last, Failure)
        assert last.code == "PEER_LOST"
        with pytest.raises(trio.EndOfChannel):
            await inbox.receive()


async def test_an_inbox_at_its_limit_holds_and_past_it_ends_with_busy(two, autojump_clock):
    async with two(limits=replace(LIMITS, inbox_frames_max=10)) as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        inbox = link.open_inbox(1)
        for n in range(11):
            b.links.get(a.peer).send(Progress(id=1, done=float(n)))
        await settle()
        got = [await inbox.receive() for _ in range(len(inbox))]
        with pytest.raises(trio.EndOfChannel):
            await inbox.receive()
        assert got[:10] == [Progress(id=1, done=float(n)) for n in range(10)]
        assert [frame.code for frame in got[10:]] == ["BUSY"]
        assert a.links.get(b.peer) is link


async def test_a_closed_inbox_hands_later_frames_to_on_message(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        link.open_inbox(1)
        link.close_inbox(1)
        link.close_inbox(1)
        b.links.get(a.peer).send(Progress(id=1, done=1.0))
        await settle()
        assert a.frames == [Progress(id=1, done=1.0)]


async def test_a_peer_that_does_not_read_is_dropped_at_the_queue_limit(two, autojump_clock):
    limits = replace(LIMITS, queue_frames_max=100)
    async with two(limits=limits) as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        for _ in range(1 + 100):  # the first leaves at once
            link.send(Accepted(id=1))
        with pytest.raises(PeerError, match="too slowly"):
            link.send(Accepted(id=1))
        assert a.links.get(b.peer) is None
        assert a.events == ["up", "down"]


async def test_a_rider_joins_the_write_that_leaves_anyway(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        riders = [Ledger(blobs=(b"receipt",))]
        a.links.before_write = lambda link: riders.pop() if riders else None
        link.send(Accepted(id=2))
        await settle()
        assert b.frames == [Accepted(id=2), Ledger(blobs=(b"receipt",))]


async def test_a_frame_that_rides_alone_is_not_overtaken_by_the_next(two, autojump_clock):
    limits = replace(LIMITS, ride_seconds=0.005)
    # Between the moment at which it gives up waiting and its leaving; whose turn is first in a
    # round of the loop is a draw.
    for turns in [0, 1, 2, 3] * 15:
        async with two(limits=limits) as (a, b):
            link = await a.links.connect(b.address)
            await settle()
            link.send(Accepted(id=2), may_ride=True)
            await trio.sleep(limits.ride_seconds)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            link.send(Progress(id=2, done=1.0))
            await settle()
            assert b.frames == [Accepted(id=2), Progress(id=2, done=1.0)], turns


async def test_the_first_of_a_turn_leaves_at_once_and_the_others_together(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        writes = []
        stream = link._stream
        plain, now = stream.write, stream.write_now
        stream.write = lambda data: writes.append(("soon", data)) or plain(data)
        stream.write_now = lambda data: writes.append(("now", data)) or now(data)
        frames = [Progress(id=2, done=float(at)) for at in range(4)]
        for frame in frames:
            link.send(frame)
        assert [way for way, _ in writes] == ["now"]
        await settle()
        assert [way for way, _ in writes] == ["now", "soon"]
        assert b.frames == frames


async def test_two_hundred_races_leave_one_link_that_works(hello_of, peer_of, autojump_clock):
    for seed in range(200):
        network = LoopbackNetwork(seed, latency_seconds=0.02, jitter_seconds=0.05)
        rng = random.Random(seed)

        async def later(node, address, rng=rng):
            await trio.sleep(rng.random() * 0.15)
            await node.links.connect(address)

        async with mesh(hello_of, peer_of, network=network) as (a, b):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(later, a, b.address)
                nursery.start_soon(later, b, a.address)
            await trio.sleep(1)
            for node, other in ((a, b), (b, a)):
                assert node.events.count("up") - node.events.count("down") == 1, seed
                node.links.get(other.peer).send(Progress(id=9, done=float(seed)))
            assert a.links.get(b.peer).dialled != b.links.get(a.peer).dialled, seed
            await trio.sleep(1)
            assert a.frames == b.frames == [Progress(id=9, done=float(seed))], seed


async def test_in_a_dead_heat_the_stream_of_the_lower_peer_wins(two, autojump_clock):
    network = LoopbackNetwork(latency_seconds=0.05)
    async with two(network=network) as (low, high):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(low.links.connect, high.address)
            nursery.start_soon(high.links.connect, low.address)
        assert low.links.get(high.peer).dialled
        assert not high.links.get(low.peer).dialled


async def test_a_new_connection_replaces_a_link_that_only_one_side_lost(two, autojump_clock):
    network = LoopbackNetwork(latency_seconds=0.01)
    async with two(network=network) as (low, high):
        first = await low.links.connect(high.address)
        await settle(1)
        network.partition(["n0"], ["n1"])
        await high.links.drop(low.peer, "cable pulled")
        assert low.links.get(high.peer) is first
        network.heal()
        second = await high.links.connect(low.address)
        await settle(5)
        assert low.links.get(high.peer) is not first
        assert low.links.get(high.peer) is not None
        assert high.links.get(low.peer) is second


@pytest.mark.parametrize("healthy_seconds", [20.1, 25, 29.9])
async def test_three_missed_pings_drop_the_link(two, autojump_clock, healthy_seconds):
    network = LoopbackNetwork()
    async with two(network=network) as (a, b):
        await a.links.connect(b.address)
        await settle(healthy_seconds)
        assert a.events == ["up"]
        network.partition(["n0"], ["n1"])
        began = trio.current_time()
        while a.links.get(b.peer):
            await trio.sleep(0.5)
        assert 20 <= trio.current_time() - began <= 31
        assert "no sign of life" in a.reasons[0]


async def test_a_pong_measures_the_round_trip(two, autojump_clock):
    async with two(network=LoopbackNetwork(latency_seconds=0.04)) as (a, b):
        link = await a.links.connect(b.address)
        await settle(1)
        assert link.rtt_seconds == pytest.approx(0.08)


async def test_another_major_version_is_refused_and_a_minor_one_passes(two, autojump_clock):
    hellos = iter([Hello(major=2, minor=0, agent="", boot_epoch=1, clock_unix_ms=0)])

    def hello():
        return next(hellos, Hello(major=1, minor=9, agent="", boot_epoch=1, clock_unix_ms=0))

    async with two(hello=hello) as (a, b):
        with pytest.raises(PeerError) as caught:
            await a.links.connect(b.address)
        assert caught.value.code == "VERSION_UNSUPPORTED"
        assert (await a.links.connect(b.address)).hello.minor == 9


async def test_over_the_frame_rate_the_reader_pauses_and_loses_nothing(two, autojump_clock):
    limits = replace(LIMITS, frames_per_second=100, queue_frames_max=1000)
    async with two(limits=limits) as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        began = trio.current_time()
        for n in range(500):
            link.send(Progress(id=1, done=float(n)))
        while len(b.frames) < 500:
            await trio.sleep(0.1)
            assert trio.current_time() - began < 20
        link.send(Progress(id=1, done=500.0))
        while len(b.frames) < 501:
            await trio.sleep(0.1)
        assert 3 <= trio.current_time() - began <= 6


async def test_closing_flushes_what_was_queued(two, autojump_clock):
    network = LoopbackNetwork(latency_seconds=0.1)
    async with two(network=network) as (a, b):
        link = await a.links.connect(b.address)
        for n in range(50):
            link.send(Progress(id=1, done=float(n)))
        await a.links.drop(b.peer, "done")
        await settle(1)
        assert b.events == ["up", "down"]
    assert len(b.frames) == 50


async def test_closing_does_not_wait_longer_than_the_flush_time(two, autojump_clock):
    network = LoopbackNetwork()
    async with two(network=network) as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        network.partition(["n0"], ["n1"])
        for _ in range(10):
            link.send(Ledger(blobs=(bytes(4000),) * 50))
        began = trio.current_time()
        await a.links.drop(b.peer, "done")
        assert trio.current_time() - began <= 2.1


async def test_a_frame_over_the_peers_own_limit_is_refused_here(two, hello_of, autojump_clock):
    async with two(hello=lambda: hello_of(max_frame_bytes=1000)) as (a, b):
        link = await a.links.connect(b.address)
        with pytest.raises(RequestError) as caught:
            link.send(Ledger(blobs=(bytes(1000),)))
        assert caught.value.code == "TOO_LARGE"
        link.send(Ledger(blobs=(bytes(900),)))


async def test_connecting_to_nobody_is_peer_lost_and_to_nonsense_bad_request(two, autojump_clock):
    async with two() as (a, b):
        with pytest.raises(PeerError):
            await a.links.connect(f"/memory/nobody/p2p/{b.peer}")
        with pytest.raises(RequestError):
            await a.links.connect("nonsense")
        with pytest.raises(RequestError):
            await a.links.connect(a.address)


async def test_a_cancelled_owner_closes_its_links_and_the_peer_hears_of_it(
    hello_of, peer_of, autojump_clock
):
    network = LoopbackNetwork()
    async with (
        network.open("b", peer_of(2)) as transport,
        open_links(transport, hello_of, limits=LIMITS) as links,
    ):
        b = Recorder(links)

        async def owner() -> None:
            async with (
                network.open("a", peer_of(1)) as transport,
                open_links(transport, hello_of, limits=LIMITS) as links,
            ):
                await links.connect(b.address)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner)
            await settle()
            assert b.events == ["up"]
            nursery.cancel_scope.cancel()
            began = trio.current_time()
        await settle()
        assert trio.current_time() - began < 3
        assert b.events == ["up", "down"]


async def test_a_failing_on_up_costs_that_link_only(two, caplog, autojump_clock):
    async with two(count=3) as (a, b, c):
        b.links.on_up = lambda link: 1 / 0 if link.peer == a.peer else None
        await a.links.connect(b.address)
        await c.links.connect(b.address)
        await settle(2)
        assert a.links.all() == []
        assert b.links.get(c.peer) is not None
        assert "link_callback_failed" in caplog.messages


async def test_links_that_share_a_write_leave_together(two, autojump_clock):
    """One write for all that is queued: what a frame costs is the write, not the frame."""
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle()
        writes = []
        write = link._stream.write

        async def counted(data: bytes) -> None:
            writes.append(len(data))
            await write(data)

        link._stream.write = counted
        for _ in range(1000):
            link.send(Accepted(id=2))
        await settle()
        assert len(writes) == 1
        assert len(b.frames) == 1000


async def test_a_frame_that_may_ride_goes_before_the_next_one(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        link.send(Accepted(id=1), may_ride=True)
        link.send(Progress(id=1, done=1.0))
        await settle(0.0001)
        assert b.frames == [Accepted(id=1), Progress(id=1, done=1.0)]


async def test_a_frame_that_finds_nothing_to_ride_with_goes_alone(two, autojump_clock):
    async with two() as (a, b):
        link = await a.links.connect(b.address)
        await settle(1)  # the first ping would be a frame to ride with
        for number in (1, 3):
            link.send(Accepted(id=number), may_ride=True)
            await settle(0.9 * LIMITS.ride_seconds)
            assert Accepted(id=number) not in b.frames
            await settle(0.2 * LIMITS.ride_seconds)
            assert b.frames[-1] == Accepted(id=number)
