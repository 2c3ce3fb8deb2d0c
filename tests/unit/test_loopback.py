"""What only the in-memory network has: partitions, cuts, delays, losses, and one seed."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.node.transport.loopback import (
    BUFFER_BYTES,
    CONNECT_SECONDS_MAX,
    RETRANSMIT_SECONDS,
    LoopbackNetwork,
)
from aivillage.protocols.errors import ConfigError, PeerError

SINK = "/test/sink/1"


@asynccontextmanager
async def pair(network, peer_of):
    """Two connected nodes, a stream from the first, and the queue of its (time, bytes)."""
    send, receive = trio.open_memory_channel(10_000)

    async def sink(stream):
        while data := await stream.read(65536):
            send.send_nowait((trio.current_time(), data))

    async with network.open("a", peer_of(1)) as a, network.open("b", peer_of(2)) as b:
        b.serve(SINK, sink)
        await a.dial(b.addresses()[0])
        yield a, b, await a.open_stream(b.peer, SINK), receive


async def test_latency_delays_a_dial_by_a_round_trip_and_a_chunk_by_one_way(
    peer_of, autojump_clock
):
    network = LoopbackNetwork(latency_seconds=0.05)
    began = trio.current_time()
    async with pair(network, peer_of) as (_a, _b, stream, heard):
        assert trio.current_time() - began == pytest.approx(0.2)  # the dial, then the stream
        sent = trio.current_time()
        await stream.write(b"x")
        at, data = await heard.receive()
        assert (round(at - sent, 6), data) == (0.05, b"x")


async def test_a_partition_stalls_in_silence_and_healing_delivers(peer_of, autojump_clock):
    network = LoopbackNetwork()
    async with pair(network, peer_of) as (a, b, stream, heard):
        network.partition(["a"], ["b"])
        await stream.write(b"late")
        with trio.move_on_after(60) as scope:
            await heard.receive()
        assert scope.cancelled_caught
        began = trio.current_time()
        with pytest.raises(PeerError):
            await a.open_stream(b.peer, SINK)
        assert trio.current_time() - began == pytest.approx(CONNECT_SECONDS_MAX)
        network.heal()
        assert (await heard.receive())[1] == b"late"


async def test_a_cut_breaks_both_ends_and_a_dial_mends(peer_of, autojump_clock):
    network = LoopbackNetwork()
    async with pair(network, peer_of) as (a, b, stream, _heard):
        network.cut("b", "a")
        with pytest.raises(PeerError):
            await stream.write(b"x")
        with pytest.raises(PeerError):
            await b.open_stream(a.peer, SINK)
        assert await a.dial(b.addresses()[0]) == b.peer
        assert await a.open_stream(b.peer, SINK)


async def test_jitter_and_loss_delay_but_keep_the_order(peer_of, autojump_clock):
    network = LoopbackNetwork(7, latency_seconds=0.01, jitter_seconds=0.05, loss=0.2)
    async with pair(network, peer_of) as (_a, _b, stream, heard):
        sent, got, began = b"", b"", trio.current_time()
        for n in range(200):
            await stream.write(bytes([n]))
            sent += bytes([n])
            await trio.sleep(0.01)
        while len(got) < 200:
            at, data = await heard.receive()
            got += data
        assert got == sent
        assert at - began > RETRANSMIT_SECONDS


def delays(seed: int) -> list[float]:
    network = LoopbackNetwork(seed, latency_seconds=0.01, jitter_seconds=0.05, loss=0.1)
    return [network.delay_seconds() for _ in range(100)]


async def test_the_same_seed_gives_the_same_delays():
    assert delays(1) == delays(1)
    assert delays(1) != delays(2)


async def test_a_writer_waits_while_the_buffer_is_full(peer_of, autojump_clock):
    async def deaf(stream):
        await trio.sleep(100)

    network = LoopbackNetwork()
    async with pair(network, peer_of) as (a, b, _stream, _heard):
        b.serve("/test/deaf/1", deaf)
        stream = await a.open_stream(b.peer, "/test/deaf/1")
        await stream.write(bytes(BUFFER_BYTES))
        with trio.move_on_after(10) as scope:
            await stream.write(b"x")
        assert scope.cancelled_caught


async def test_a_name_is_taken_once_and_free_again_afterwards(peer_of):
    network = LoopbackNetwork()
    async with network.open("a", peer_of(1)):
        with pytest.raises(ConfigError):
            async with network.open("a", peer_of(2)):
                raise AssertionError("two nodes share a name")
    async with network.open("a", peer_of(2)) as again:
        assert again.peer == peer_of(2)


async def test_a_node_that_ends_is_lost_to_its_peers(peer_of, autojump_clock):
    network = LoopbackNetwork(latency_seconds=0.01)
    async with network.open("a", peer_of(1)) as a:
        async with network.open("b", peer_of(2)) as b:
            await a.dial(b.addresses()[0])
        await trio.sleep(1)
        with pytest.raises(PeerError):
            await a.open_stream(peer_of(2), SINK)
