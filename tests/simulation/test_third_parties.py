"""Being connected proves nothing: what a peer says counts for its own calls and its own pair."""

from __future__ import annotations

import stat

import apsw
import msgspec
import pytest
import trio

from aivillage.protocols import codec, messages
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import CONTROL_MESSAGES, PEER_MESSAGES, Ask, Started
from tests.simulation.mesh import open_mesh, price_of, result_of, settled, until
from tests.simulation.test_market import PROMPT, expected
from tests.simulation.test_market_failures import paused_job
from tests.unit.node.test_control import owner_of
from tests.unit.protocols.samples import FULL


def samples(*kinds):
    return [frame for frame in FULL if isinstance(frame, kinds)]


async def test_a_third_party_neither_answers_nor_ends_a_call_of_another_pair(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller, third = await mesh.add("seller"), await mesh.add("third")
        await mesh.knows(buyer, seller, third)
        await mesh.link(third, seller)
        running = await paused_job(buyer, seller, peer=seller.peer)
        ((_, call),) = buyer.desk.buyer._trade.attempts
        to_buyer = third.desk.links.get(buyer.peer)
        item = messages.StepItem(
            session=call, first=5, token_ids=(7,), text="lie", hash8=bytes(8), read_bytes=26
        )
        to_buyer.send(messages.Step(seq=1, items=(item,)))
        to_buyer.send(messages.Failure(id=call, code="JOB_FAILED", message="a lie"))
        to_buyer.send(
            messages.Finished(id=call, attempt=bytes(16), result=b"\x80", usage={}, out_hash=b"")
        )
        third.desk.links.get(seller.peer).send(messages.Cancel(id=call))
        for node, kind in ((buyer, messages.Finished), (seller, messages.Cancel)):
            await until(lambda n=node, k=kind: any(isinstance(f, k) for f in n.heard))
        assert not running.ended.is_set()
        assert len(running.pursuit.output.ids) == 5
        seller.script.go.set()
        await running.ended.wait()
        assert result_of(running) == expected(PROMPT, 12)
        await settled(buyer, seller, price_of(PROMPT, 12))
        assert buyer.ledger.view(third.peer).owed_by_me == 0


ANSWERS = (
    messages.Operations, messages.QuoteReply, messages.Accepted, messages.Started,
    messages.Progress, messages.Part, messages.Finished, messages.Joined, messages.PairView,
    messages.Step, messages.Cancel, messages.Pong,
)  # fmt: skip
NEVER_ASKED = 2**31 - 1


async def test_answers_that_nobody_asked_for_change_nothing(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, other = await mesh.add("buyer", serve=False), await mesh.add("other")
        await mesh.knows(buyer, other)
        link = other.desk.links.get(buyer.peer)
        before = buyer.desk.villagers.membership.certificates
        for frame in samples(*ANSWERS):
            asked = {"id": NEVER_ASKED} if hasattr(frame, "id") else {}
            link.send(msgspec.structs.replace(frame, **asked))
        assert {type(frame) for frame in samples(*ANSWERS)} == set(ANSWERS)
        assert (await buyer.ask(PROMPT, tokens=2)).error is None
        assert other.desk.links.get(buyer.peer) is link
        assert buyer.desk.villagers.membership.certificates == before
        await settled(buyer, other, price_of(PROMPT, 2))


async def test_the_control_socket_is_for_its_owner_alone(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node")
        mode = node.paths.socket.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600


async def test_what_peers_say_is_not_heard_on_the_control_socket(tmp_path):
    only_peers = tuple(kind for kind in PEER_MESSAGES if kind not in CONTROL_MESSAGES)
    async with open_mesh(tmp_path) as mesh:
        node = await mesh.add("node")
        async with owner_of(node) as client:
            for frame in samples(*only_peers):
                await client.say(frame)
            await client.say(Ask(id=99, what="status"))
            answer = await client.hear()
        assert (answer.id, answer.value["sales_running"], answer.value["jobs_running"]) == (
            99,
            0,
            0,
        )
        assert node.ledger.views() == []


async def test_a_stranger_may_ask_for_terms_and_gets_no_work(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        stranger = await mesh.add("stranger", stranger=True)
        await mesh.link(stranger, seller)
        link = stranger.desk.links.get(seller.peer)
        with trio.fail_after(5):
            listed = await link.ask(messages.ListOperations(id=link.next_id()), timeout_seconds=3)
        assert [operation.name for operation in listed.operations]
        running = await stranger.ask("abcd", tokens=2, peer=seller.peer)
        assert running.error.code == "INSUFFICIENT_CREDITS"
        assert seller.script.made == 0


async def test_a_generous_peer_does_not_make_us_generous(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        buyer, seller = await mesh.add("buyer", serve=False), await mesh.add("seller")
        await mesh.knows(buyer, seller)
        await until(lambda: buyer.ledger.view(seller.peer).received_line)  # else the truth is last
        standing = messages.Standing(line_micro_credits=10**12, exposure_micro_credits=10**12)
        seller.desk.links.get(buyer.peer).send(standing)
        await until(lambda: buyer.ledger.view(seller.peer).received_line == 10**12)
        most = buyer.settings.village_exposure_micro_credits
        db = apsw.Connection(str(buyer.paths.ledger), flags=apsw.SQLITE_OPEN_READONLY)
        (kept,) = db.execute("SELECT received_exposure FROM peer WHERE peer=?", (seller.peer,))
        db.close()
        assert kept == (most,)


@pytest.mark.parametrize(("field", "limit"), [("kernel_class", 256), ("identical", 128)])
def test_what_a_seller_says_of_its_kernel_has_a_limit(field, limit):
    def decoded(size):
        framed = codec.frame(Started(id=1, **{field: "x" * size}))
        return codec.decode(framed[codec.LENGTH_BYTES :])

    assert len(getattr(decoded(limit), field)) == limit
    with pytest.raises(PeerError):
        decoded(limit + 1)
