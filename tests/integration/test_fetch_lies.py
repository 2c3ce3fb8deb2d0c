"""Sources that break the protocol of a fetch: each falls out alone, and gets nothing for it."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio

from aivillage.node import blob_shop, blob_sources
from aivillage.node.blob_shop import PIECE_BYTES, BlobShop
from aivillage.node.blob_sources import ASKED_MAX, Sources
from aivillage.node.inputs import Inputs
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES
from aivillage.protocols.messages import Fetch, Finished, Held, Part, Submit
from aivillage.protocols.types import Cid, PeerId
from tests.integration.loopback_nodes import villagers

CHUNKS = 6
CID = Cid(bytes(32))


def changed(part: Part, **fields) -> list[Part]:
    return [msgspec.structs.replace(part, **fields)]


LIES = {
    "a piece out of order": lambda part: changed(part, seq=part.seq + 1),
    "a piece twice": lambda part: [part, part],
    "nothing as a piece": lambda part: changed(part, body=b""),
    "more than a chunk": lambda part: changed(part, body=part.body + bytes(CHUNK_BYTES - 100_000)),
    "another running hash": lambda part: changed(part, hash8=bytes(8)) if part.hash8 else [part],
    "no chunk at all": lambda part: [
        Finished(
            id=part.id, attempt=bytes(16), result=b"", usage={"mebibytes": 9}, out_hash=bytes(32)
        )
    ],
    "a question": lambda part: [Fetch(id=part.id, cid=bytes(32))],
}


def lying(monkeypatch, peer: PeerId, lie) -> None:
    """What leaves from sales of `peer` goes through `lie` first."""
    honest = blob_shop._flush

    async def flush(link, pieces):
        if link.mine == peer:
            told = [said for piece in list(pieces) for said in lie(piece)]
            pieces.clear()
            pieces.extend(told)
        await honest(link, pieces)

    monkeypatch.setattr(blob_shop, "_flush", flush)


def named(node) -> None:
    """Each link knows whose it is, so that one of several nodes in this process can lie."""
    for link in node.desk.links.all():
        link.mine = node.peer


@pytest.mark.parametrize("kind", LIES)
async def test_a_source_that_breaks_the_protocol_falls_out_alone(tmp_path, monkeypatch, kind):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = random.Random(1).randbytes(CHUNKS * CHUNK_BYTES)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        for node in (ann, bob):
            named(node)
        lying(monkeypatch, bob.peer, LIES[kind])
        result, receipt = await cyd.done("mesh.fetch", cid=cid.hex())
        assert receipt.sellers == (ann.peer,)
        assert receipt.price_micro_credits == 100 * result["mebibytes"] == 100 * CHUNKS
        assert cyd.desk.blobs.store.get(cid, verify=True).read_bytes() == body
        attempts = await cyd.desk.jobs.attempts(receipt.job)
        assert {a.outcome for a in attempts if a.seller == bob.peer} <= {"BAD_REQUEST", "rejected"}
        assert cyd.desk.discovery.record_of(bob.peer).bad >= 1


async def test_a_source_that_falls_silent_is_not_waited_for(tmp_path, monkeypatch):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = random.Random(2).randbytes(CHUNKS * CHUNK_BYTES)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        of_bob, honest = bob.desk.blobs.store, BlobShop._chunk

        async def silent(shop, *args):
            if shop._store is of_bob:
                await trio.sleep_forever()
            return await honest(shop, *args)

        monkeypatch.setattr(BlobShop, "_chunk", silent)
        with trio.fail_after(20):  # its silence alone would be noticed after 30 s
            _, receipt = await cyd.done("mesh.fetch", cid=cid.hex())
        assert receipt.sellers == (ann.peer,)
        tried = {attempt.seller for attempt in await cyd.desk.jobs.attempts(receipt.job)}
        assert tried == {ann.peer, bob.peer}


async def test_a_damaged_blob_is_refused_by_its_seller_and_nobody_is_accused(tmp_path):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = random.Random(3).randbytes(CHUNKS * CHUNK_BYTES)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        path = bob.desk.blobs.store.get(cid)
        path.chmod(0o600)
        path.write_bytes(bytes(len(body)))
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        _, receipt = await cyd.done("mesh.fetch", cid=cid.hex())
        assert receipt.sellers == (ann.peer,)
        assert not cyd.desk.replicator.reputation.is_cut_off(bob.peer, "mesh.fetch")


@pytest.mark.parametrize(
    ("first", "count", "ok"),
    [(0, 2, True), (1, 1, True), (0, 3, False), (2, 1, False), (0, 0, False)],
)
async def test_a_call_names_chunks_that_there_are(tmp_path, first, count, ok):
    """At the last chunk and one beyond it."""
    async with villagers(tmp_path, "ann") as (ann,):
        cid = ann.desk.blobs.store.put(bytes(CHUNK_BYTES + 1))
        heard: list[Part] = []
        shop = ann.desk.seller.by_node["mesh.fetch"].__self__
        shop._require_welcome = lambda _peer: None
        sale, till, ended = scripted(cid, first, count, heard)
        if ok:
            await shop.serve(sale, till)
            assert ended == [{"mebibytes": count}]
            sizes = [CHUNK_BYTES, 1][first : first + count]
            assert sum(len(part.body) for part in heard) == sum(sizes)
            assert all(len(part.body) <= PIECE_BYTES for part in heard)
        else:
            with pytest.raises(RequestError, match="has 2 chunks"):
                await shop.serve(sale, till)
            assert not heard


def scripted(cid, first, count, heard):
    """A sale over a link that only writes down what leaves."""
    from aivillage.models.mesh.fetch import FetchRequest
    from aivillage.node.sale import Sale, Till
    from aivillage.node.steps import StepWriter
    from aivillage.protocols.codec import pack
    from aivillage.protocols.messages import Call
    from aivillage.protocols.pricing import Terms

    class Wire:
        peer = PeerId("cyd")

        def send(self, message, *, may_ride):
            heard.append(message)

        async def drained(self, _size):
            await trio.lowlevel.checkpoint()

    terms, ended = Terms(prices_micro_credits={"mebibytes": 1}), []
    request = pack(FetchRequest(cid=cid.hex(), first=first, count=count))
    call = Call(
        id=1, attempt=bytes(16), operation="mesh.fetch", request=request, quote_hash=bytes(32),
        ceiling_micro_credits=99, deadline_seconds=9,
    )  # fmt: skip

    async def fine(*_args):
        await trio.lowlevel.checkpoint()

    sale = Sale(
        link=Wire(), call=call, attempt=bytes(16), ticket=None, terms=terms, listed=terms,
        scope=trio.CancelScope(), steps=StepWriter(Wire()), inputs=Inputs(taken=False),
    )  # fmt: skip
    return sale, Till(fine, fine, lambda _sale, _body, usage: ended.append(usage)), ended


# ------------------------------------------------------------------ questions


class Member:
    """A link whose peer has every blob, or refuses."""

    def __init__(self, number: int, *, has: bool = True) -> None:
        self.peer = PeerId(f"peer{number:02}")
        self.asked = 0
        self._has = has

    def next_id(self) -> int:
        return 1

    async def ask(self, question, *, timeout_seconds):
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if not self._has:
            raise RefusedError("no", code="NOT_OFFERED")
        return Held(id=1, size_bytes=1, root=bytes(32))


@pytest.mark.parametrize("count", [ASKED_MAX, ASKED_MAX + 1])
async def test_no_more_members_are_asked_than_the_limit(count):
    members = [Member(number) for number in range(count)]
    found = await Sources(lambda: members).ask(CID, (), ())
    assert len(found) == sum(member.asked for member in members) == ASKED_MAX


async def test_only_named_members_are_asked_and_none_that_are_out():
    members = [Member(number, has=number != 3) for number in range(6)]
    sources = Sources(lambda: members)
    assert set(await sources.ask(CID, ("01", "03", "peer04"), {PeerId("peer04")})) == {"peer01"}
    assert [member.asked for member in members] == [0, 1, 0, 1, 0, 0]


async def test_a_member_that_is_gone_gives_no_manifest():
    with pytest.raises(blob_sources.PeerError, match="gone"):
        await Sources(list).manifest(PeerId("peer01"), CID, Held(id=1, size_bytes=1, root=CID))


# ------------------------------------------------------------------ what a fetch is not


async def test_a_fetch_has_nothing_to_explain_before_and_names_a_whole_blob(tmp_path):
    async with villagers(tmp_path, "ann") as (ann,):
        request = msgspec.msgpack.encode({"cid": "00" * 32})
        submit = Submit(id=1, operation="mesh.fetch", request=request)
        with pytest.raises(RequestError, match="all who have it"):
            await ann.desk.buyer.explain(submit)
        running = await ann.submit("mesh.fetch", cid="00" * 32, count=1)
        assert running.error.code == "BAD_REQUEST"
        for wrong in ({"cid": "00"}, {"cid": "00" * 32, "root": "x"}, {"cid": "G" * 64}):
            body = msgspec.msgpack.encode(wrong)
            with pytest.raises(RequestError):
                await ann.desk.buyer.submit(
                    Submit(id=1, operation="mesh.fetch", request=body), ann.heard.append
                )
