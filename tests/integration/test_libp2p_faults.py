"""Each fault of stock libp2p that we patch: there without us, gone with us.

The scenarios run in processes of their own, since a patch cannot be taken off again.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from aivillage.node.transport import patches
from aivillage.node.transport.host import CONNECTIONS_MAX
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.protocols.errors import ConfigError, PeerError

SCENARIOS = Path(__file__).with_name("fault_scenarios.py")
REPOSITORY = Path(__file__).parents[2]
FAULTS = (
    "a_handler_exception_ends_the_host",
    "plaintext_lets_anybody_be_anybody",
    "a_peer_may_ignore_the_window",
    "a_frame_may_be_sixteen_megabytes",
    "streams_are_not_counted",
    "a_connection_leaves_a_task_behind",
    "each_small_read_sends_a_window_update",
    "a_frame_waits_a_turn_at_each_free_lock",
    "a_full_frame_needs_two_noise_messages",
    "a_dial_waits_a_quarter_second_after_success",
    "known_peers_are_dialled_unasked",
    "a_connection_installs_a_root_log_handler",
    pytest.param("a_reader_that_pauses_kills_the_writers_stream", marks=pytest.mark.slow),
    pytest.param("a_stopped_peer_stays_connected", marks=pytest.mark.slow),
)


async def fault_present(name: str, kind: str) -> bool:
    done = await trio.run_process(
        [sys.executable, "-W", "ignore", str(SCENARIOS), name, kind],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_stdout=True,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"the {kind} arm of {name} failed"
    return json.loads(done.stdout.splitlines()[-1])["fault"]


@pytest.mark.parametrize("name", FAULTS)
async def test_stock_libp2p_has_the_fault_and_our_host_has_not(name):
    assert await fault_present(name, "stock"), "stock libp2p is cured: drop the patch"
    assert not await fault_present(name, "patched")


def test_every_patch_is_applied_only_to_the_version_it_was_written_for(monkeypatch):
    monkeypatch.setattr(patches, "version", lambda name: "0.9.0")
    with pytest.raises(ConfigError, match=r"0\.9\.0 is installed") as caught:
        patches.apply()
    assert patches.PINNED in caught.value.next_step


def test_applying_the_patches_twice_changes_nothing():
    from libp2p.network.connection.swarm_connection import SwarmConn
    from libp2p.stream_muxer.yamux.yamux import Yamux

    patches.apply()
    kept = SwarmConn._unpatched__handle_muxed_stream, Yamux._unpatched_accept_stream
    patches.apply()
    assert (SwarmConn._unpatched__handle_muxed_stream, Yamux._unpatched_accept_stream) == kept


GARBAGE = {
    "random bytes": os.urandom(5000),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "nothing": b"",
    "half a greeting": b"\x13/multistream/1.0",
    "half a handshake": b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(10),
    "bad noise": b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32) * 40,
    "huge varint": b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(1000),
    "huge line": b"\xff\xff\x7f" + bytes(60_000),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_on_a_raw_socket_costs_that_socket_only(name, key_of):
    async def echo(stream) -> None:
        await stream.write(await stream.read(100))

    async with (
        open_libp2p(key_of(1), "127.0.0.1:0") as node,
        open_libp2p(key_of(2), "127.0.0.1:0") as friend,
    ):
        node.serve("/test/echo/1", echo)
        port = int(node.addresses()[0].split("/")[4])
        sockets = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(5)]
        for socket in sockets:
            await socket.send_all(GARBAGE[name])
        for socket in sockets[:3]:
            await socket.aclose()
        await trio.sleep(0.1)
        with trio.fail_after(5):
            await friend.dial(node.addresses()[0])
            stream = await friend.open_stream(node.peer, "/test/echo/1")
            await stream.write(b"hello")
            assert await stream.read(100) == b"hello"
            await stream.close()
        for socket in sockets[3:]:
            await socket.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="dials from 127.0.0.2")
async def test_a_host_full_of_silent_sockets_takes_nobody_elses_place(key_of):
    async with (
        open_libp2p(key_of(1), "127.0.0.1:0") as node,
        open_libp2p(key_of(2), "127.0.0.1:0") as friend,
    ):
        port = int(node.addresses()[0].split("/")[4])
        sockets = [
            await trio.open_tcp_stream("127.0.0.1", port, local_address="127.0.0.2")
            for _ in range(CONNECTIONS_MAX + 20)
        ]
        with trio.fail_after(5):
            assert await friend.dial(node.addresses()[0]) == node.peer
        for socket in sockets:
            await socket.aclose()


async def test_streams_may_hold_four_mebibytes_unread_and_not_a_byte_more(key_of):
    async def hold(_stream) -> None:
        await trio.sleep_forever()

    async with (
        open_libp2p(key_of(1), "127.0.0.1:0") as node,
        open_libp2p(key_of(2), "127.0.0.1:0") as friend,
    ):
        node.serve("/test/hold/1", hold)
        await friend.dial(node.addresses()[0])
        *full, last = [await friend.open_stream(node.peer, "/test/hold/1") for _ in range(33)]
        for stream in full:
            await stream.write(bytes(patches.UNREAD_BYTES_MAX // 32))
        (connection,) = next(iter(node._swarm.connections.values()))
        muxed = connection.muxed_conn
        with trio.fail_after(5):
            while sum(map(len, muxed.stream_buffers.values())) < patches.UNREAD_BYTES_MAX:
                await trio.sleep(0.01)
        assert not any(stream.closed for stream in muxed.streams.values())
        await last.write(b"!")
        with trio.fail_after(5), pytest.raises(PeerError):
            await last.read(1)
        assert not any(stream.closed for stream in muxed.streams.values())
        assert sum(map(len, muxed.stream_buffers.values())) == patches.UNREAD_BYTES_MAX


@pytest.mark.skipif(sys.platform != "linux", reason="dials from 127.0.0.2")
async def test_one_host_under_many_names_gets_its_places_and_no_more(key_of, monkeypatch):
    assert patches.PLACES_PER_HOST_MAX * 2 == CONNECTIONS_MAX
    monkeypatch.setattr(patches, "PLACES_PER_HOST_MAX", 3)
    async with open_libp2p(key_of(1), "127.0.0.1:0") as node, AsyncExitStack() as stack:
        names = [
            await stack.enter_async_context(open_libp2p(key_of(number), "127.0.0.1:0"))
            for number in range(2, 7)
        ]
        (address,) = node.addresses()
        for name in names[:3]:
            assert await name.dial(address) == node.peer
        with pytest.raises(PeerError):
            await names[3].dial(address)
        with monkeypatch.context() as elsewhere:
            dial = functools.partial(trio.open_tcp_stream, local_address="127.0.0.2")
            elsewhere.setattr(trio, "open_tcp_stream", dial)
            assert await names[4].dial(address) == node.peer
        await names[0].hang_up(node.peer)
        await trio.sleep(0.3)
        assert await names[3].dial(address) == node.peer
