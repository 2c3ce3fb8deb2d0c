"""Private villages: who has the pre-shared key connects, whoever has not is told why not."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.transport.loopback import LoopbackNetwork
from aivillage.node.transport.psk import FIRST_WORDS, NONCE_BYTES, xsalsa20
from aivillage.protocols.errors import PeerError
from tests.conftest import make_key, make_peer
from tests.integration.daemons import Yard, wait_for
from tests.integration.relayed import ECHO, echo, echoes, until, world

KEY, OTHER = b"k" * 32, b"o" * 32
BIG = bytes(range(256)) * 4096  # 1 MiB


@asynccontextmanager
async def opened(number, key):
    async with open_libp2p(make_key(number), "127.0.0.1:0", key) as node:
        node.serve(ECHO, echo)
        with trio.fail_after(30):
            yield node


async def test_two_with_the_key_talk_also_in_bulk_and_can_be_probed():
    async with opened(1, KEY) as a, opened(2, KEY) as b:
        await a.probe(b.addresses()[0])
        await a.dial(b.addresses()[0])
        stream = await a.open_stream(b.peer, ECHO)
        heard = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, BIG)
            while len(heard) < len(BIG):
                heard += await stream.read(65_536)
        await stream.close()
        assert heard == BIG
        assert (a.refused(), b.refused()) == ((0, ""), (0, ""))


@pytest.mark.parametrize(
    ("mine", "theirs", "why"),
    [(KEY, OTHER, "another key"), (KEY, None, "no key|another key than this node's, or none"),
     (None, KEY, "a key that this node lacks")],
)  # fmt: skip
async def test_without_the_same_key_a_dial_fails_at_once_and_says_why(mine, theirs, why):
    async with opened(1, mine) as a, opened(2, theirs) as b:
        for attempt in (a.dial, a.probe):
            with pytest.raises(PeerError, match=why) as caught:
                with trio.fail_after(5):  # a timeout of the handshake would take ten
                    await attempt(b.addresses()[0])
            assert caught.value.code == "PEER_LOST"
            assert "invite" in caught.value.next_step
        await until(lambda: b.refused()[0] == 2)
        assert b.refused()[1].startswith("127.0.0.1: ")
        with pytest.raises(PeerError):
            await a.open_stream(b.peer, ECHO)


async def test_the_twin_in_memory_keeps_strangers_out_too():
    network = LoopbackNetwork()
    async with network.open("a", make_peer(1)) as a, network.open("b", make_peer(2)) as b:
        a.village_key = KEY
        with pytest.raises(PeerError, match="another village key"):
            await a.dial(b.addresses()[0])
        assert b.refused()[0] == 1
        b.village_key = KEY
        assert await a.dial(b.addresses()[0]) == b.peer


async def test_a_key_that_changes_holds_for_the_next_connection():
    async with opened(1, None) as a, opened(2, KEY) as b:
        a.village_key = KEY
        assert await a.dial(b.addresses()[0]) == b.peer


async def raw_stream(node):
    return await trio.open_tcp_stream("127.0.0.1", int(node.addresses()[0].split("/")[4]))


async def test_every_byte_may_come_alone_and_the_nonce_comes_before_anything_is_said():
    async with opened(1, KEY) as node, await raw_stream(node) as stream:
        heard = bytearray()
        while len(heard) < NONCE_BYTES:  # before we said a word: some programs wait for it
            heard += await stream.receive_some(NONCE_BYTES - len(heard))
        nonce = b"n" * NONCE_BYTES
        ours = xsalsa20(KEY, nonce).encrypt(FIRST_WORDS + b"\x07/noise\n")
        for at in range(len(nonce + ours)):
            await stream.send_all((nonce + ours)[at : at + 1])
        theirs, said = xsalsa20(KEY, bytes(heard)), b""
        while len(said) < len(FIRST_WORDS + b"\x07/noise\n"):
            said += theirs.decrypt(await stream.receive_some(100))
        assert said == FIRST_WORDS + b"\x07/noise\n"
        assert node.refused() == (0, "")


@pytest.mark.parametrize("size", [0, NONCE_BYTES - 1])
async def test_who_ends_before_its_nonce_is_whole_is_refused(size):
    async with opened(1, KEY) as node, await raw_stream(node) as stream:
        await stream.send_all(b"n" * size)
        await stream.aclose()
        await until(lambda: node.refused()[0] == 1)


async def test_the_first_wrong_byte_after_the_nonce_ends_it():
    async with opened(1, KEY) as node, await raw_stream(node) as stream:
        await stream.send_all(b"n" * NONCE_BYTES)
        await trio.sleep(0.05)
        assert node.refused()[0] == 0
        await stream.send_all(xsalsa20(OTHER, b"n" * NONCE_BYTES).encrypt(FIRST_WORDS))
        await until(lambda: node.refused()[0] == 1)
        assert "another key" in node.refused()[1]


async def test_a_seller_behind_a_relay_is_reached_in_a_private_village():
    async with world() as here:
        relay, buyer = [await here.node(village_key=KEY) for _ in range(2)]
        seller = await here.node(mode="always", village_key=KEY)
        await seller.links.connect(relay.address)
        await until(seller.circuits.relays)
        await buyer.links.connect(seller.behind(relay))
        assert buyer.circuits.relay_of(seller.peer) == relay.peer
        assert await echoes(buyer, seller.peer, BIG)
        stranger = await here.node()
        with pytest.raises(PeerError, match="a key that this node lacks"):
            await stranger.links.connect(seller.behind(relay))


@pytest.mark.slow
def test_an_invite_is_all_that_a_newcomer_needs_and_nobody_else_gets_in(tmp_path):
    with Yard(tmp_path) as yard:
        ann = yard.daemon("ann")
        assert ann.run("init").code == 0
        mark = ann.read("village-key", "new")["fingerprint"]
        ann.start()
        assert ann.read("village-key", "show") == {"private": True, "fingerprint": mark}
        assert f"private (key {mark[:8]}" in ann.run("status").out
        token = ann.ask("invite")["token"]
        bob = yard.daemon("bob").start("--join", token)
        cat = yard.daemon("cat").start()
        assert (
            cat.run("join", ann.ask("invite")["token"]).code == 0
        )  # a running one, of an open village until now
        for guest in (bob, cat):
            assert guest.ask("status")["private"]["fingerprint"] == mark
            assert guest.read("village-key", "show")["fingerprint"] == mark
            assert guest.stop() == 0
            guest.restart()
        yard.know_each_other(ann, bob, cat)
        bob.stop()
        assert bob.run("village-key", "remove").code == 0
        bob.restart()
        why = wait_for(
            lambda: (w := bob.run("peers", "--why", ann.peer[-8:]).out) and "lacks" in w and w,
            30, yard.logs,
        )  # fmt: skip
        assert "its village has a key that this node lacks" in " ".join(why.split())
        kept_out = wait_for(lambda: ann.ask("status")["private"]["refused"], 20, ann.log_end)
        assert kept_out >= 1
        told = next(
            c for c in ann.run("doctor", "--json").json["checks"] if "refused" in c["detail"]
        )
        assert (told["what"], told["level"]) == ("village key", "warn")
        key = ann.data_dir.joinpath("village.key").read_text().split()[-1]
        for daemon in yard.daemons:
            assert key not in daemon.log.read_text()
            assert "Traceback" not in daemon.log.read_text(), daemon.log_end(100)
        assert "connection_outside_the_village" in ann.log.read_text()
