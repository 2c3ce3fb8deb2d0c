"""One suite, two transports: what links rely on holds in memory and over libp2p alike."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio

from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.protocols.errors import ConfigError, PeerError, RequestError
from aivillage.protocols.ports import SomebodyElseError

ECHO = "/test/echo/1"
BIG = bytes(range(256)) * 4096 * 4  # 4 MiB


@pytest.fixture(params=["loopback", "libp2p"])
def mesh(request, key_of, peer_of):
    """Opens `count` nodes that serve an echo; also says how to make an address."""

    @asynccontextmanager
    async def open_mesh(count=2):
        network = LoopbackNetwork()
        async with AsyncExitStack() as stack:
            nodes = []
            for at in range(count):
                if request.param == "loopback":
                    node = network.open(f"n{at}", peer_of(at + 1))
                else:
                    node = open_libp2p(key_of(at + 1), "127.0.0.1:0")
                nodes.append(await stack.enter_async_context(node))
                nodes[-1].serve(ECHO, echo)
            with trio.fail_after(30):
                yield nodes

    return open_mesh


async def echo(stream) -> None:
    while data := await stream.read(65536):
        await stream.write(data)


async def read_exactly(stream, size) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = await stream.read(65536)
        if not chunk:
            break
        data += chunk
    return bytes(data)


async def echoes(node, peer) -> bool:
    """Whether `peer` still serves: a fresh stream, there and back."""
    stream = await node.open_stream(peer, ECHO)
    await stream.write(b"are you there")
    answer = await read_exactly(stream, 13)
    await stream.close()
    return answer == b"are you there"


async def test_dial_gives_the_peer_and_is_idempotent(mesh, peer_of):
    async with mesh() as (a, b):
        assert (a.peer, b.peer) == (peer_of(1), peer_of(2))
        address = b.addresses()[0]
        assert address.endswith(f"/p2p/{b.peer}")
        assert await a.dial(address) == b.peer
        assert await a.dial(address) == b.peer
        assert await echoes(a, b.peer)


async def test_the_dialled_side_can_open_streams_too(mesh):
    async with mesh() as (a, b):
        await a.dial(b.addresses()[0])
        while True:
            try:
                assert await echoes(b, a.peer)
                break
            except PeerError:
                await trio.sleep(0.01)


async def test_somebody_else_at_the_address_is_peer_lost_and_a_retry_works(mesh, peer_of):
    async with mesh() as (a, b):
        address = b.addresses()[0]
        wrong = address.replace(b.peer, peer_of(9))
        with pytest.raises(SomebodyElseError) as caught:
            await a.dial(wrong)
        assert caught.value.code == "PEER_LOST"
        assert caught.value.found == b.peer
        assert await a.dial(address) == b.peer
        assert await echoes(a, b.peer)


async def test_nobody_at_the_address_is_peer_lost_every_time(mesh):
    async with mesh() as (a, b):
        address = b.addresses()[0]
        gone = address.replace("/n1/", "/gone/").replace(address.split("/")[4], "1")
        for _ in range(2):
            with pytest.raises(PeerError) as caught:
                await a.dial(gone)
            assert caught.value.code == "PEER_LOST"


@pytest.mark.parametrize("address", ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/memory/x/p2p/", "/"])
async def test_a_malformed_address_is_a_bad_request(mesh, address):
    async with mesh(count=1) as (a,):
        with pytest.raises(RequestError):
            await a.dial(address)


async def test_the_own_address_is_a_bad_request(mesh):
    async with mesh(count=1) as (a,):
        with pytest.raises(RequestError):
            await a.dial(a.addresses()[0])


async def test_four_mebibytes_travel_both_ways_at_once(mesh):
    async with mesh() as (a, b):
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, BIG)
            assert await read_exactly(stream, len(BIG)) == BIG
        assert stream.peer == b.peer


async def test_the_end_of_a_stream_is_empty_bytes_after_all_data(mesh):
    async with mesh() as (a, b):

        async def give(stream) -> None:
            await stream.write(BIG[:300_000])

        b.serve("/test/give/1", give)
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, "/test/give/1")
        await trio.sleep(0.1)
        assert await read_exactly(stream, len(BIG)) == BIG[:300_000]
        assert await stream.read(1) == b""
        assert await stream.read(1) == b""
        await stream.close()


async def test_a_closed_stream_ends_the_others_reader(mesh):
    ended = trio.Event()

    async def until_end(stream) -> None:
        while await stream.read(65536):
            pass
        ended.set()

    async with mesh() as (a, b):
        b.serve("/test/sink/1", until_end)
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, "/test/sink/1")
        await stream.write(b"x")
        await stream.close()
        await stream.close()
        with trio.fail_after(2):
            await ended.wait()
        with pytest.raises(PeerError):
            await stream.write(b"x")


async def test_an_exception_in_a_handler_fells_only_its_stream(mesh, caplog):
    async def bad(stream) -> None:
        await stream.read(1)
        raise ValueError("a bug in a handler")

    async with mesh() as (a, b):
        b.serve("/test/bad/1", bad)
        await a.dial(b.addresses()[0])
        healthy = await a.open_stream(b.peer, ECHO)
        stream = await a.open_stream(b.peer, "/test/bad/1")
        await stream.write(b"x")
        with suppress(PeerError):
            assert await stream.read(1) == b""
        await healthy.write(b"still here")
        assert await read_exactly(healthy, 10) == b"still here"
        assert await echoes(a, b.peer)
        assert "stream_handler_failed" in caplog.messages


async def test_a_cancelled_reader_leaves_the_stream_usable(mesh):
    async with mesh() as (a, b):
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, ECHO)
        for _ in range(20):
            with trio.move_on_after(0.005) as scope:
                await stream.read(1)
            assert scope.cancelled_caught
        await stream.write(BIG[:100_000])
        assert await read_exactly(stream, 100_000) == BIG[:100_000]


async def test_a_cancelled_writer_leaves_the_connection_usable(mesh):
    async def never_read(stream) -> None:
        await trio.sleep_forever()

    async with mesh() as (a, b):
        b.serve("/test/deaf/1", never_read)
        await a.dial(b.addresses()[0])
        for _ in range(3):
            stream = await a.open_stream(b.peer, "/test/deaf/1")
            with trio.move_on_after(0.05) as scope:
                while True:
                    await stream.write(BIG)
            assert scope.cancelled_caught
        assert await echoes(a, b.peer)


async def test_a_hang_up_is_seen_by_the_other_side(mesh):
    seen = trio.Event()

    async def hold(stream) -> None:
        try:
            await stream.read(1)
        except PeerError:
            seen.set()

    async with mesh() as (a, b):
        b.serve("/test/hold/1", hold)
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, "/test/hold/1")
        await trio.sleep(0.05)
        await a.hang_up(b.peer)
        await a.hang_up(b.peer)
        with trio.fail_after(2):
            await seen.wait()
        with pytest.raises(PeerError):
            await stream.read(1)
        with pytest.raises(PeerError):
            await a.open_stream(b.peer, ECHO)
        assert await a.dial(b.addresses()[0]) == b.peer
        assert await echoes(a, b.peer)


async def test_writing_to_a_vanished_peer_is_peer_lost(mesh):
    async with mesh() as (a, b):
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, ECHO)
        await b.hang_up(a.peer)
        with pytest.raises(PeerError) as caught, trio.fail_after(5):
            await write_on(stream, b"x" * 1000)
        assert caught.value.code == "PEER_LOST"


async def test_a_blocked_writer_is_woken_by_a_hang_up(mesh):
    async def never_read(stream) -> None:
        await trio.sleep_forever()

    async with mesh() as (a, b):
        b.serve("/test/deaf/1", never_read)
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, "/test/deaf/1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_until_lost, stream)
            await trio.sleep(0.1)
            with trio.fail_after(3):
                await a.hang_up(b.peer)


async def write_on(stream, data) -> None:
    while True:
        await stream.write(data)
        await trio.sleep(0.01)


async def write_until_lost(stream) -> None:
    with pytest.raises(PeerError):
        await write_on(stream, BIG)


async def test_an_unknown_protocol_and_an_unknown_peer_are_peer_lost(mesh, peer_of):
    async with mesh() as (a, b):
        await a.dial(b.addresses()[0])
        with pytest.raises(PeerError):
            await a.open_stream(b.peer, "/test/unknown/1")
        with pytest.raises(PeerError):
            await a.open_stream(peer_of(9), ECHO)
        assert await echoes(a, b.peer)


async def test_two_connections_at_once_both_serve(mesh):
    async with mesh(count=3) as (a, b, c):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.dial, b.addresses()[0])
            nursery.start_soon(b.dial, a.addresses()[0])
            nursery.start_soon(a.dial, c.addresses()[0])
        for one, other in ((a, b), (b, a), (a, c)):
            assert await echoes(one, other.peer)


async def test_leaving_the_block_ends_handlers_and_is_quick(mesh):
    async def hold(stream) -> None:
        await stream.read(1)

    async with mesh() as (a, b):
        b.serve("/test/hold/1", hold)
        await a.dial(b.addresses()[0])
        await a.open_stream(b.peer, "/test/hold/1")
        began = trio.current_time()
    assert trio.current_time() - began < 2


async def test_a_cancelled_owner_leaves_quickly(mesh):
    async def hold(stream) -> None:
        await stream.read(1)

    async def owner(started) -> None:
        async with mesh() as (a, b):
            b.serve("/test/hold/1", hold)
            await a.dial(b.addresses()[0])
            stream = await a.open_stream(b.peer, "/test/hold/1")
            started.set()
            await stream.read(1)

    async with trio.open_nursery() as nursery:
        started = trio.Event()
        nursery.start_soon(owner, started)
        await started.wait()
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
        began = trio.current_time()
    assert trio.current_time() - began < 2


# ------------------------------------------------------------------ through a third node
JOIN = "/test/join/1"
JOINED = "/test/joined/1"


async def joined(nodes):
    """Each of the first two has a stream that the third joined to the other's."""
    one, other, relay = nodes
    send, receive = trio.open_memory_channel(1)

    async def join(near) -> None:
        far = await relay.open_stream(other.peer, JOINED)
        async with trio.open_nursery() as nursery:
            for source, sink in ((near, far), (far, near)):
                nursery.start_soon(pump, source, sink, nursery.cancel_scope)
        await far.close()

    async def hold(stream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    relay.serve(JOIN, join)
    other.serve(JOINED, hold)
    for end in (one, other):
        await end.dial(relay.addresses()[0])
    while other.peer not in relay.callers():
        await trio.sleep(0.01)
    near = await one.open_stream(relay.peer, JOIN)
    return near, await receive.receive()


async def pump(source, sink, scope) -> None:
    with suppress(PeerError):
        while data := await source.read(65536):
            await sink.write(data)
    scope.cancel()


async def adopted(nodes, meant=None):
    """Makes the two joined streams a connection; gives the peers that each end proved."""
    one, other, _relay = nodes
    near, far = await joined(nodes)
    found = {}

    async def accept() -> None:
        with suppress(PeerError):
            found["accepted"] = await other.adopt(far, None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        found["dialled"] = await one.adopt(near, meant or other.peer)
    return found, near


async def test_an_adopted_stream_is_a_connection_both_ways(mesh):
    async with mesh(count=3) as nodes:
        one, other, relay = nodes
        found, _ = await adopted(nodes)
        assert found == {"dialled": other.peer, "accepted": one.peer}
        assert await echoes(one, other.peer)
        assert await echoes(other, one.peer)
        # Nobody dialled the two ends themselves.
        assert one.callers() == other.callers() == ()
        assert set(relay.callers()) == {one.peer, other.peer}


async def test_an_adopted_connection_ends_with_its_stream_and_with_its_relay(mesh):
    async with mesh(count=3) as nodes:
        one, other, relay = nodes
        _, near = await adopted(nodes)
        stream = await one.open_stream(other.peer, ECHO)
        await near.close()
        await lost(stream)
        await adopted(nodes)
        stream = await one.open_stream(other.peer, ECHO)
        await relay.hang_up(one.peer)
        await lost(stream)


async def test_a_hang_up_ends_an_adopted_connection_and_its_stream(mesh):
    async with mesh(count=3) as nodes:
        one, other, _ = nodes
        _, near = await adopted(nodes)
        await one.hang_up(other.peer)
        with pytest.raises(PeerError):
            await one.open_stream(other.peer, ECHO)
        await lost(near)


async def lost(stream) -> None:
    with pytest.raises(PeerError), trio.fail_after(5):
        while True:
            await stream.write(b"x")
            await trio.sleep(0.01)


async def test_somebody_else_at_the_other_end_of_an_adopted_stream_is_found_out(mesh, peer_of):
    async with mesh(count=3) as nodes:
        caught = None
        try:
            await adopted(nodes, meant=peer_of(9))
        except* SomebodyElseError as group:
            caught = group.exceptions[0]
        assert caught.code == "PEER_LOST"
        assert caught.found == nodes[1].peer
        with pytest.raises(PeerError):
            await nodes[0].open_stream(peer_of(9), ECHO)


async def test_nobody_at_the_other_end_is_peer_lost_and_not_waited_for_when_cancelled(mesh):
    async with mesh(count=3) as nodes:
        near, far = await joined(nodes)
        with trio.move_on_after(0.2) as scope:
            await nodes[0].adopt(near, nodes[1].peer)
        assert scope.cancelled_caught
        with pytest.raises(PeerError), trio.fail_after(5):
            await nodes[1].adopt(far, None)
        assert await echoes(nodes[0], nodes[2].peer)


async def test_a_direct_dial_goes_beside_an_adopted_connection_and_outlives_it(mesh):
    async with mesh(count=3) as nodes:
        one, other, _ = nodes
        _, near = await adopted(nodes)
        assert await one.dial(other.addresses()[0]) == other.peer
        while one.peer not in other.callers():
            await trio.sleep(0.01)
        await near.close()
        await trio.sleep(0.3)
        assert await echoes(one, other.peer)


async def test_a_port_is_free_again_after_its_owner_was_cancelled(key_of):
    with trio.CancelScope() as scope:
        async with open_libp2p(key_of(1), "127.0.0.1:0") as node:
            port = node.addresses()[0].split("/")[4]
            scope.cancel()
            await trio.sleep(1)
    async with open_libp2p(key_of(1), f"127.0.0.1:{port}") as again:
        assert again.addresses()[0].split("/")[4] == port


async def test_a_port_in_use_is_a_config_error_that_names_it(key_of):
    async with open_libp2p(key_of(1), "127.0.0.1:0") as first:
        port = first.addresses()[0].split("/")[4]
        with pytest.raises(ConfigError, match=f"port {port}") as caught:
            async with open_libp2p(key_of(2), f"127.0.0.1:{port}"):
                raise AssertionError("it shares the port")
        assert "choose another" in caught.value.next_step


@pytest.mark.parametrize("listen", ["", "4051", "localhost:4051", "127.0.0.1:99999", "1.2.3:x"])
async def test_a_malformed_listen_address_is_a_config_error(key_of, listen):
    with pytest.raises(ConfigError, match="no address to listen on"):
        async with open_libp2p(key_of(1), listen):
            raise AssertionError("it listens")
