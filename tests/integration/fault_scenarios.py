"""One fault per function, against stock libp2p or against our host; run in a process of its own.

`python fault_scenarios.py NAME stock|patched` prints whether the fault is there, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PROTOCOL = "/test/fault/1"
UNREAD = "/test/unread/1"
"""Its streams stay open, and nobody reads them."""
FAULTS = {}


def fault(scenario):
    FAULTS[scenario.__name__] = scenario
    return scenario


def seed_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def key_of(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed_of(number))


@asynccontextmanager
async def one_host(kind: str, number: int):
    if kind == "patched":
        from aivillage.node.transport.host import run_host
        from aivillage.node.transport.psk import Guard

        key = Ed25519PrivateKey.from_private_bytes(seed_of(number))
        async with run_host(key, "127.0.0.1:0", Guard(None)) as h:
            yield h
        return
    import multiaddr
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair

    listen = [multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]
    host = new_host(key_pair=create_new_key_pair(seed_of(number)), listen_addrs=listen)
    async with host.run(listen_addrs=listen):
        yield host
        await host.close()


@asynccontextmanager
async def hosts(kind: str, count: int = 2):
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(one_host(kind, n + 1)) for n in range(count)]


def address_of(host):
    return next(iter(host.get_network().listeners.values())).get_addrs()[0]


async def connect(client, server):
    """The raw library connection from `client` to `server`."""
    connection = await client.get_network().dial_addr(address_of(server), server.get_id())
    return connection.muxed_conn


async def open_stream(client, server):
    return (await client.new_stream(server.get_id(), [PROTOCOL])).muxed_stream


async def hold(stream) -> None:
    await trio.sleep_forever()


@fault
async def a_handler_exception_ends_the_host(kind):
    async def bad(stream):
        raise ValueError("a bug")

    async def answer(stream):
        await stream.write(b"!")

    try:
        async with hosts(kind) as (client, server):
            server.set_stream_handler(PROTOCOL, bad)
            server.set_stream_handler("/test/good/1", answer)
            await connect(client, server)
            with suppress(Exception):
                await open_stream(client, server)
            await trio.sleep(0.2)
            with trio.fail_after(2):
                good = await client.new_stream(server.get_id(), ["/test/good/1"])
                return await good.read(1) != b"!"
    except BaseException:
        return True


@fault
async def plaintext_lets_anybody_be_anybody(kind):
    import multiaddr
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.keys import KeyPair
    from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport

    victim = create_new_key_pair(seed_of(77))
    own = create_new_key_pair(seed_of(78))

    class Forged:
        def get_public_key(self):
            return victim.public_key

    forged = KeyPair(Forged(), victim.public_key)
    seen = []

    async def who(stream):
        seen.append(str(stream.muxed_conn.peer_id))
        await stream.write(b"!")

    listen = [multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]
    async with hosts(kind, 1) as (server,):
        server.set_stream_handler(PROTOCOL, who)
        attacker = new_host(
            key_pair=own,
            listen_addrs=listen,
            sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(forged)},
        )
        attacker.get_network().retry_config.max_retries = 0
        async with attacker.run(listen_addrs=listen):
            with suppress(Exception), trio.fail_after(3):
                await connect(attacker, server)
                stream = await open_stream(attacker, server)
                await stream.read(1)
            await attacker.close()
    from libp2p.peer.id import ID

    return seen == [str(ID.from_pubkey(victim.public_key))]


@fault
async def a_reader_that_pauses_kills_the_writers_stream(kind):
    total = 24 << 20

    async def slow(stream):
        await trio.sleep(6)
        got = 0
        while got < total:
            got += len(await stream.read(65536))
        await stream.write(b"!")

    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, slow)
        await connect(client, server)
        stream = await open_stream(client, server)
        try:
            await stream.write(bytes(total))
            return await stream.read(1) != b"!"
        except Exception:
            return True


@fault
async def a_peer_may_ignore_the_window(kind):
    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, hold)
        await connect(client, server)
        stream = await open_stream(client, server)
        stream.send_window = 1 << 30
        with suppress(Exception), trio.move_on_after(2):
            await stream.write(bytes(8 << 20))
        await trio.sleep(0.2)
        inbound = server.get_network().get_connections(client.get_id())[0].muxed_conn
        held = sum(len(buffer) for buffer in inbound.stream_buffers.values())
        # The connection must still serve.
        with trio.fail_after(2):
            await open_stream(client, server)
        return held > 2 << 20


@fault
async def a_frame_may_be_sixteen_megabytes(kind):
    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, hold)
        muxed = await connect(client, server)
        stream = await open_stream(client, server)
        header = b"\0\0\0\0" + stream.stream_id.to_bytes(4, "big") + (8 << 20).to_bytes(4, "big")
        with suppress(Exception), trio.move_on_after(2):
            await muxed._write_frame(header)
            await muxed._write_frame(bytes(60_000))
        await trio.sleep(0.2)
        return bool(server.get_network().get_connections(client.get_id()))


@fault
async def streams_are_not_counted(kind):
    running = 0

    async def count(stream):
        nonlocal running
        running += 1
        await trio.sleep_forever()

    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, count)
        muxed = await connect(client, server)
        muxed.stream_backlog_semaphore = trio.Semaphore(10_000)
        refused = 0
        for _ in range(300):
            try:
                await open_stream(client, server)
            except Exception:
                refused += 1
        return running + refused == 300 and running > 256


@fault
async def a_connection_leaves_a_task_behind(kind):
    async with hosts(kind) as (client, server):

        async def cycle():
            muxed = await connect(client, server)
            await client.get_network().close_peer(server.get_id())
            await muxed.event_closed.wait()
            await trio.sleep(0.35)

        await cycle()
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(5):
            await cycle()
        grown = trio.lowlevel.current_statistics().tasks_living - before
        return grown >= 5 and server.get_network()._inbound_limiter.borrowed_tokens >= 5


@fault
async def each_small_read_sends_a_window_update(kind):
    updates = 0
    done = trio.Event()

    async def read_slowly(stream):
        nonlocal updates
        muxed = stream.muxed_stream.conn
        write = muxed._write_frame

        async def counted(data):
            nonlocal updates
            updates += data[1] == 1
            await write(data)

        muxed._write_frame = counted
        for _ in range(100):
            await stream.read(1)
        done.set()

    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, read_slowly)
        await connect(client, server)
        stream = await open_stream(client, server)
        await stream.write(bytes(100))
        await done.wait()
        return updates >= 50


@fault
async def a_frame_waits_a_turn_at_each_free_lock(kind):
    class Turns(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task):
            self.count += task is mine

    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, hold)
        await connect(client, server)
        stream = await open_stream(client, server)
        mine, turns = trio.lowlevel.current_task(), Turns()
        trio.lowlevel.add_instrument(turns)
        for _ in range(50):
            await stream.write(b"?")
        trio.lowlevel.remove_instrument(turns)
        return turns.count >= 2 * 50


@fault
async def a_full_frame_needs_two_noise_messages(kind):
    from libp2p.io.trio import TrioTCPStream

    async with hosts(kind) as (client, server):
        server.set_stream_handler(PROTOCOL, hold)
        await connect(client, server)
        stream = await open_stream(client, server)
        await trio.sleep(0.1)
        writes = 0
        original = TrioTCPStream.write

        async def counted(self, data):
            nonlocal writes
            writes += 1
            await original(self, data)

        TrioTCPStream.write = counted
        await stream.write(bytes(65_507 * 3))
        return writes > 4


@fault
async def a_dial_waits_a_quarter_second_after_success(kind):
    from libp2p.peer.peerinfo import PeerInfo

    async with hosts(kind) as (client, server):
        began = time.perf_counter()
        if kind == "patched":
            from aivillage.node.transport.libp2p import Libp2pTransport
            from aivillage.node.transport.psk import Guard

            async with trio.open_nursery() as nursery:
                transport = Libp2pTransport(client, str(client.get_id()), nursery, Guard(None))
                await transport.dial(f"{address_of(server)}/p2p/{server.get_id()}")
        else:
            await client.connect(PeerInfo(server.get_id(), [address_of(server)]))
        return time.perf_counter() - began > 0.24


@fault
async def known_peers_are_dialled_unasked(kind):
    async with hosts(kind) as (client, server):
        client.get_peerstore().add_addrs(server.get_id(), [address_of(server)], 120)
        await client.get_network().auto_connector.maybe_connect()
        await trio.sleep(0.5)
        return bool(client.get_network().get_connections(server.get_id()))


@fault
async def a_connection_installs_a_root_log_handler(kind):
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
    async with hosts(kind) as (client, server):
        await connect(client, server)
        await client.get_network().close_peer(server.get_id())
    return bool(logging.root.handlers)


@fault
async def a_stopped_peer_stays_connected(kind):
    """The child is a process with a host of the same kind; ours notices through links."""
    child = start_child(kind)
    try:
        address = await trio.to_thread.run_sync(child.stdout.readline)
        if kind == "patched":
            return await _links_miss_it(child, address.strip())
        return await _swarm_misses_it(child, address.strip())
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def start_child(kind):
    command = [sys.executable, __file__, "--child", kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def _swarm_misses_it(child, address):
    import multiaddr
    from libp2p.peer.peerinfo import info_from_p2p_addr

    async with one_host("stock", 1) as host:
        info = info_from_p2p_addr(multiaddr.Multiaddr(address))
        await host.connect(info)
        os.kill(child.pid, signal.SIGSTOP)
        await trio.sleep(4)
        return bool(host.get_network().get_connections(info.peer_id))


async def _links_miss_it(child, address):
    from aivillage.node.links import LinkLimits, open_links
    from aivillage.node.transport.libp2p import _library_peer, open_libp2p

    key = key_of(1)
    limits = LinkLimits(ping_seconds=0.3)
    async with (
        open_libp2p(key, "127.0.0.1:0") as transport,
        open_links(transport, _hello, limits=limits) as links,
    ):
        link = await links.connect(address)
        await trio.sleep(1)
        assert link.rtt_seconds > 0
        alive_while_running = links.get(link.peer) is link
        streams = [await transport.open_stream(link.peer, UNREAD) for _ in range(30)]
        os.kill(child.pid, signal.SIGSTOP)
        # Fill the socket too, so that even a goodbye cannot leave.
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(_write_in_vain, stream)
            with trio.move_on_after(4):
                await link.ended.wait()
            await trio.sleep(1.5)
        connections = transport._open_connections(_library_peer(link.peer))
        gone = links.get(link.peer) is None and not connections
        began = time.monotonic()
    quick = time.monotonic() - began < 2
    return not (alive_while_running and gone and quick)


async def _never_read(_stream):
    await trio.sleep_forever()


async def _write_in_vain(stream):
    from aivillage.protocols.errors import PeerError

    with suppress(PeerError):
        await stream.write(bytes(250_000))


def _hello():
    from aivillage.protocols.messages import Hello

    return Hello(major=1, minor=0, agent="test", boot_epoch=1, clock_unix_ms=0)


async def child(kind):
    if kind == "patched":
        from aivillage.node.links import LinkLimits, open_links
        from aivillage.node.transport.libp2p import open_libp2p

        key = key_of(2)
        async with (
            open_libp2p(key, "127.0.0.1:0") as transport,
            open_links(transport, _hello, limits=LinkLimits()),
        ):
            transport.serve(UNREAD, _never_read)
            print(transport.addresses()[0], flush=True)
            await trio.sleep(60)
    else:
        async with one_host(kind, 2) as host:
            print(f"{address_of(host)}/p2p/{host.get_id()}", flush=True)
            await trio.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        trio.run(child, sys.argv[2])
    else:
        present = trio.run(FAULTS[sys.argv[1]], sys.argv[2])
        sys.stdout.write(json.dumps({"fault": present}) + "\n")
