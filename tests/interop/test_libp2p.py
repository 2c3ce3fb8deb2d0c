"""Our node and other people's libp2p: TCP, Noise, Yamux, ping, identify, streams, our protocol.

Gossipsub is not here: a village's news travels over our own links (node/gossip.py), so a stranger
that speaks gossipsub hears nothing from us.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from aivillage.node import village_key
from aivillage.node.framing import FrameReader
from aivillage.node.links import LinkLimits, open_links
from aivillage.node.transport.libp2p import Libp2pTransport, open_libp2p
from aivillage.protocols import codec
from aivillage.protocols.messages import JOB_PROTOCOL, Hello, ListOperations, Operations
from tests.conftest import make_hello, make_key
from tests.integration.daemons import free_port
from tests.interop import strangers
from tests.interop.go_control import Go, read_message, strings

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]

ECHO, PING, IDENTIFY = "/test/echo/1", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"
BULK = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def go_program() -> Path:
    return strangers.go_daemon()


@pytest.fixture(scope="module")
def js_script() -> Path:
    return strangers.js_script()


@contextlib.asynccontextmanager
async def our_node(village_key: bytes | None = None) -> AsyncIterator[Libp2pTransport]:
    async def echo(stream: Any) -> None:
        while data := await stream.read(65_536):
            await stream.write(data)

    async with open_libp2p(make_key(1), "127.0.0.1:0", village_key) as transport:
        transport.serve(ECHO, echo)
        with trio.fail_after(60):
            yield transport


def in_bytes(transport: Libp2pTransport) -> tuple[bytes, bytes]:
    """Our peer id and our address without it, as libp2p writes them on the wire."""
    import multiaddr
    from libp2p.peer.id import ID

    address = transport.addresses()[0]
    peer = ID.from_base58(transport.peer)
    return peer.to_bytes(), multiaddr.Multiaddr(address.partition("/p2p/")[0]).to_bytes()


@contextlib.asynccontextmanager
async def go_node(program: Path, folder: Path, friend: str) -> AsyncIterator[tuple[Go, int]]:
    """A daemon of go-libp2p that knows nobody but `friend`, and its port."""
    control, port = str(folder / "go.sock"), free_port()
    command = [
        str(program), "-listen", f"/unix{control}", "-hostAddrs", f"/ip4/127.0.0.1/tcp/{port}",
        "-bootstrapPeers", friend, "-quic=false",
    ]  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_quiet, command)
        await answers(control)
        yield Go(control), port
        nursery.cancel_scope.cancel()


async def answers(socket: str) -> None:
    """It is there a moment before anybody listens at it."""
    with trio.fail_after(20):
        while True:
            try:
                await (await trio.open_unix_socket(socket)).aclose()
            except OSError:
                await trio.sleep(0.02)
            else:
                return


async def _quiet(command: list[str]) -> None:
    await trio.run_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )


@contextlib.asynccontextmanager
async def go_linked(program: Path, folder: Path) -> AsyncIterator[tuple[Libp2pTransport, Go, int]]:
    """Ours, and a Go node that has dialled it."""
    async with our_node() as ours, go_node(program, folder, ours.addresses()[0]) as (go, port):
        await go.connect(*in_bytes(ours))
        yield ours, go, port


async def answered(stream: trio.SocketStream, said: bytes) -> bytes:
    """What came back of `said`, which leaves while it is read."""
    heard = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, said)
        while len(heard) < len(said) and (chunk := await stream.receive_some(65_536)):
            heard += chunk
    return heard


async def test_go_dials_us_pings_and_streams(go_program, tmp_path):
    async with go_linked(go_program, tmp_path) as (ours, go, _):
        peer, _ = in_bytes(ours)
        async with await go.open_stream(peer, PING) as stream:
            said = os.urandom(32)
            assert await answered(stream, said) == said
        async with await go.open_stream(peer, ECHO) as stream:
            assert await answered(stream, BULK) == BULK


async def test_go_reads_what_we_say_of_ourselves(go_program, tmp_path):
    async with go_linked(go_program, tmp_path) as (ours, go, _):
        peer, address = in_bytes(ours)
        async with (
            open_links(ours, make_hello, limits=LinkLimits()),
            await go.open_stream(peer, IDENTIFY) as stream,
        ):
            said = await read_message(stream)
        assert {JOB_PROTOCOL, ECHO, PING, IDENTIFY} <= set(strings(said, 3))
        assert address in said.fields[2]


async def test_a_go_program_can_speak_our_protocol(go_program, tmp_path):
    async with (
        go_linked(go_program, tmp_path) as (ours, go, _),
        open_links(ours, make_hello, limits=LinkLimits()) as links,
    ):
        links.on_message = lambda link, frame: link.send(Operations(id=frame.id, operations=()))
        peer, _ = in_bytes(ours)
        async with await go.open_stream(peer, JOB_PROTOCOL) as stream:
            await stream.send_all(codec.frame(make_hello()) + codec.frame(ListOperations(id=1)))
            reader = FrameReader(_AsStream(stream), 1 << 20)
            heard = [codec.decode(await reader.next()) for _ in range(3)]
        assert isinstance(heard[0], Hello)
        assert Operations(id=1, operations=()) in heard


async def test_we_dial_go_and_stream(go_program, tmp_path):
    import multiaddr
    from libp2p.peer.id import ID

    async with our_node() as ours, go_node(go_program, tmp_path, ours.addresses()[0]) as (go, port):
        peer = str(ID(await go.identity()))
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(
                functools.partial(trio.serve_tcp, behind_go, 0, host="127.0.0.1")
            )
            inbox = f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"
            await go.handle(ECHO, multiaddr.Multiaddr(inbox).to_bytes())
            assert await ours.dial(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}") == peer
            stream = await ours.open_stream(peer, ECHO)
            heard = b""
            async with trio.open_nursery() as writing:
                writing.start_soon(stream.write, BULK)
                while len(heard) < len(BULK):
                    heard += await stream.read(65_536)
            assert heard == BULK
            await stream.close()
            nursery.cancel_scope.cancel()


async def behind_go(stream: trio.SocketStream) -> None:
    """A program behind the Go daemon: each connection says whose it is, then is the stream."""
    assert ECHO in set(strings(await read_message(stream), 3))
    async for data in stream:
        await stream.send_all(data)


class _AsStream:
    """A socket, as `FrameReader` wants it."""

    def __init__(self, socket: trio.SocketStream) -> None:
        self._socket = socket

    async def read(self, size_bytes_max: int) -> bytes:
        return await self._socket.receive_some(size_bytes_max)


@pytest.mark.parametrize("private", [False, True])
async def test_javascript_dials_us_pings_identifies_and_streams(js_script, tmp_path, private):
    key, words = None, []
    if private:
        key = village_key.new()
        village_key.store(tmp_path, key)
        words = [str(tmp_path / village_key.KEY_FILE)]
    async with our_node(key) as ours, open_links(ours, make_hello, limits=LinkLimits()):
        done = await trio.run_process(
            ["node", js_script.name, ours.addresses()[0], str(len(BULK)), *words],
            cwd=js_script.parent,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        said = json.loads(done.stdout)
        assert said["peer"] == ours.peer
        assert said["pingMs"] < 5000
        assert {JOB_PROTOCOL, ECHO, PING} <= set(said["protocols"])
        assert (said["echoed"], said["same"]) == (len(BULK), True)
