"""Blobs on the mesh: asked for, paid by the chunk, from all who have them, given to no stranger."""

from __future__ import annotations

import os

import msgspec
import pytest
import trio

from aivillage.ledger.exposure import Word
from aivillage.node import attempts, blob_fetch, blob_shop, explain
from aivillage.node.blob_room import beside
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.manifest import CHUNK_BYTES
from aivillage.protocols.messages import Fetch, Submit
from aivillage.protocols.types import Cid, JobId
from tests.integration.loopback_nodes import Node, villagers

MIB = 1 << 20


def body_of(count: int) -> bytes:
    """`count` chunks, the last one not full."""
    return os.urandom(count * CHUNK_BYTES - 17)


async def fetched(node: Node, cid: Cid, **request) -> tuple[dict, object]:
    return await node.done("mesh.fetch", cid=cid.hex(), **request)


PAY_SECONDS = 10


async def comes_to(node, micro_credits):
    """Pay follows the answer by a moment: vouchers of one beat go together."""
    with trio.fail_after(PAY_SECONDS):
        while await node.net() != micro_credits:
            await trio.sleep(0.01)


async def test_a_blob_comes_from_two_members_and_each_is_paid_for_what_it_brought(tmp_path):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = body_of(9)
        cid = ann.desk.blobs.store.put(body)
        assert bob.desk.blobs.store.put(body) == cid
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        result, receipt = await fetched(cyd, cid)
        assert cyd.desk.blobs.store.get(cid, verify=True).read_bytes() == body
        assert result == {"size_bytes": len(body), "mebibytes": receipt.usage["mebibytes"]}
        assert set(receipt.sellers) == {ann.peer, bob.peer}
        assert receipt.price_micro_credits == 100 * receipt.usage["mebibytes"]
        await comes_to(cyd, -receipt.price_micro_credits)
        with trio.fail_after(PAY_SECONDS):
            while sum([await node.net() for node in (ann, bob, cyd)]):
                await trio.sleep(0.01)


async def test_who_has_a_blob_is_told_to_members_only(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        link = bob.desk.links.get(ann.peer)
        held = await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
        manifest = ann.desk.blobs.store.manifest(cid)
        assert (held.size_bytes, held.root, held.hashes) == (6, manifest.root, b"")
        other = Fetch(id=link.next_id(), cid=bytes(32))
        with pytest.raises(RefusedError, match="no such blob"):
            await link.ask(other, timeout_seconds=5)
        await ann.ledger.decree(bob.peer, Word(blocked=True))
        with pytest.raises(RefusedError, match="no work for you"):
            await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
        await ann.ledger.decree(bob.peer, Word(blocked=False))
        ann.desk.villagers._members.clear()
        with pytest.raises(RefusedError, match="its own village"):
            await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
        assert bob.desk.links.get(ann.peer) is link, "and the link lives on"


async def test_a_stranger_gets_no_chunk_even_for_nothing(tmp_path):
    """Its line would refuse it as well: here everything is free, and there is a pool."""
    free = {"price_percent": 0, "stranger_pool_micro_credits": 10_000}
    async with villagers(tmp_path, "ann", "bob", of={"ann": free}) as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        await bob.offers_of("mesh.fetch")
        sources = bob.desk.blobs._sources
        held = await sources.ask(cid, (), ())
        manifest = ann.desk.blobs.store.manifest(cid)
        ann.desk.villagers._members.clear()
        sources.ask = lambda _cid, _names, without: answer(
            {peer: said for peer, said in held.items() if peer not in without}
        )
        sources.manifest = lambda *_args: answer(manifest)
        running = await bob.submit("mesh.fetch", cid=cid.hex(), deadline_seconds=20)
        assert "its own village" in str(running.error)
        assert not bob.desk.blobs.store.has(cid)


async def answer(value):
    return value


async def test_an_owner_who_denies_fetches_gives_no_blobs(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        gate = ann.desk.seller.door._gate
        await gate.set_limits(
            msgspec.structs.replace(gate.limits, operations_denied=("mesh.fetch",))
        )
        link = bob.desk.links.get(ann.peer)
        with pytest.raises(RefusedError) as caught:
            await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
        assert caught.value.code == "NOT_OFFERED"


async def test_an_older_peer_hears_that_it_is_not_offered(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        theirs = ann.desk.links.get(bob.peer)
        theirs.hello = msgspec.structs.replace(theirs.hello, minor=2)
        link = bob.desk.links.get(ann.peer)
        with pytest.raises(RefusedError) as caught:
            await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
        assert caught.value.code == "NOT_OFFERED"


async def test_no_more_questions_of_a_link_wait_than_the_limit(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        link, codes = bob.desk.links.get(ann.peer), []

        async def ask():
            try:
                await link.ask(Fetch(id=link.next_id(), cid=cid), timeout_seconds=5)
                codes.append("held")
            except RefusedError as error:
                codes.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(blob_shop.QUESTIONS_PER_LINK + 1):
                nursery.start_soon(ask)
        assert sorted(codes) == ["BUSY", *["held"] * blob_shop.QUESTIONS_PER_LINK]


async def test_a_bad_chunk_names_its_source_and_drops_only_that_one(tmp_path, monkeypatch):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = body_of(8)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        honest = blob_shop.BlobShop._chunk
        of_bob = bob.desk.blobs.store

        async def lying(shop, file, manifest, index):
            chunk = await honest(shop, file, manifest, index)
            return bytes(len(chunk)) if shop._store is of_bob else chunk

        monkeypatch.setattr(blob_shop.BlobShop, "_chunk", lying)
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        _, receipt = await fetched(cyd, cid)
        assert cyd.desk.blobs.store.get(cid, verify=True).read_bytes() == body
        assert receipt.sellers == (ann.peer,)
        assert receipt.price_micro_credits == 800, "nobody is paid for what is wrong"
        notes = [frame.note for frame in cyd.heard if hasattr(frame, "note")]
        assert any(bob.peer[-8:] in note and "not what its hash says" in note for note in notes)
        reputation = cyd.desk.replicator.reputation
        assert reputation.is_cut_off(bob.peer, "mesh.fetch")
        assert not reputation.is_cut_off(ann.peer, "mesh.fetch")
        (evidence,) = await reputation.evidence(bob.peer)
        assert "chunk" in evidence.reason
        assert cyd.desk.discovery.record_of(bob.peer).bad == 1


async def test_a_false_manifest_costs_what_it_brought_and_its_friends_are_left_out(tmp_path):
    """Two vouch for other bytes under the name; with the root they would not even be asked."""
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = body_of(3)
        cid = ann.desk.blobs.store.put(body)
        wrong = bob.desk.blobs.store.put(body_of(3))
        place = bob.desk.blobs.store._path(cid)
        place.parent.mkdir(exist_ok=True)
        there = bob.desk.blobs.store.get(wrong)
        beside(there, ".hashes").rename(beside(place, ".hashes"))
        there.rename(place)
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        root = ann.desk.blobs.store.manifest(cid).root.hex()
        _, receipt = await fetched(cyd, cid, root=root)
        assert receipt.sellers == (ann.peer,)
        cyd.desk.blobs.store.remove(cid)
        cyd.desk.blobs._trade.market.cut_off = lambda _operation: {}
        first = cyd.desk.blobs._sources.ask

        async def bob_first(*args):
            found = await first(*args)
            return {peer: found[peer] for peer in sorted(found, key=lambda p: p != bob.peer)}

        cyd.desk.blobs._sources.ask = bob_first
        _, receipt = await fetched(cyd, cid)
        assert set(receipt.sellers) == {ann.peer, bob.peer}
        assert receipt.price_micro_credits == 600
        assert cyd.desk.blobs.store.get(cid, verify=True).read_bytes() == body
        assert cyd.desk.replicator.reputation.is_cut_off(bob.peer, "mesh.fetch")


async def test_who_was_found_wrong_is_not_asked_again_unless_it_is_named(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(b"a blob")
        blobs = bob.desk.blobs
        await blobs._accuse(ann.peer, JobId("0" * 32), "a chunk was wrong")
        assert await blobs._sources.ask(cid, (), ()) == {}
        assert set(await blobs._sources.ask(cid, (ann.peer[-6:],), ())) == {ann.peer}
        await bob.desk.replicator.reputation.forgive(ann.peer)
        assert set(await blobs._sources.ask(cid, (), ())) == {ann.peer}
        await bob.ledger.decree(ann.peer, Word(blocked=True))
        assert await blobs._sources.ask(cid, (), ()) == {}


async def test_a_cancelled_fetch_pays_what_it_has_and_goes_on_with_the_rest(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        body = body_of(12)
        cid = ann.desk.blobs.store.put(body)
        await bob.offers_of("mesh.fetch")
        gate = ann.desk.seller.door._gate
        await gate.set_limits(
            msgspec.structs.replace(gate.limits, sent_bytes_per_second_max=4 * MIB)
        )
        running = await bob.begin("mesh.fetch", cid=cid.hex())
        with trio.fail_after(20):
            while not bob.heard or not any(getattr(f, "done", 0) >= 3 * MIB for f in bob.heard):
                await trio.sleep(0.02)
            bob.desk.buyer.cancel(running.pursuit.row.id)
            await running.ended.wait()
        assert running.error.code == "CANCELLED"
        paid = running.pursuit.spent
        assert 300 <= paid < 1200
        await gate.set_limits(msgspec.structs.replace(gate.limits, sent_bytes_per_second_max=None))
        _, receipt = await fetched(bob, cid)
        assert paid + receipt.price_micro_credits == 1200, "no chunk is paid twice"
        assert bob.desk.blobs.store.get(cid, verify=True).read_bytes() == body
        await comes_to(ann, 1200)


async def test_a_slow_source_is_out_paced(tmp_path):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = body_of(16)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        gate = bob.desk.seller.door._gate
        await gate.set_limits(
            msgspec.structs.replace(gate.limits, sent_bytes_per_second_max=MIB // 2)
        )
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        _, receipt = await fetched(cyd, cid)
        job = cyd.desk.buyer._trade.jobs
        brought = {attempt.seller: 0 for attempt in await job.attempts(receipt.job)}
        for attempt in await job.attempts(receipt.job):
            brought[attempt.seller] += attempt.price // 100
        assert brought[bob.peer] <= 3
        assert brought[ann.peer] >= 14


async def test_what_costs_more_than_the_ceiling_is_not_begun(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        cid = ann.desk.blobs.store.put(body_of(3))
        await bob.offers_of("mesh.fetch")
        kept = bob.desk.blobs.store.put(b"it need not make room for what is too dear")
        bob.desk.blobs.store._store_bytes_max = 3 * MIB
        running = await bob.submit("mesh.fetch", cid=cid.hex(), ceiling_micro_credits=299)
        assert bob.desk.blobs.store.has(kept)
        assert running.error.code == "PRICE_ABOVE_CEILING"
        assert running.pursuit.spent == 0
        bob.desk.blobs.store.pin(kept, keep=True)
        running = await bob.submit("mesh.fetch", cid=cid.hex())
        assert running.error.code == "TOO_LARGE"
        bob.desk.blobs.store.pin(kept, keep=False)
        _, receipt = await fetched(bob, cid, ceiling_micro_credits=300)
        assert receipt.price_micro_credits == 300


async def test_a_blob_for_nothing_is_a_favour_in_both_books(tmp_path):
    async with villagers(tmp_path, "ann", "bob", of={"ann": {"price_percent": 0}}) as (ann, bob):
        cid = ann.desk.blobs.store.put(body_of(2))
        await bob.offers_of("mesh.fetch")
        _, receipt = await fetched(bob, cid)
        assert receipt.price_micro_credits == 0
        assert bob.desk.blobs.store.has(cid)
        assert [f.worth for f in await bob.ledger.favours(5)] == [200]


async def test_nobody_has_it_and_an_empty_one_needs_no_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(blob_fetch, "SEEK_SECONDS", 0.5)
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        await bob.offers_of("mesh.fetch")
        running = await bob.submit("mesh.fetch", cid="00" * 32, deadline_seconds=20)
        assert running.error.code == "NO_PEER"
        cid = ann.desk.blobs.store.put(b"")
        result, _ = await fetched(bob, cid)
        assert result == {"size_bytes": 0, "mebibytes": 0}


async def test_a_blob_in_use_by_a_sale_is_not_evicted(tmp_path):
    async with villagers(tmp_path, "ann", "bob", blob_store_bytes_max=10 * MIB) as (ann, bob):
        store = ann.desk.blobs.store
        cid = store.put(body_of(8))
        await bob.offers_of("mesh.fetch")
        gate = ann.desk.seller.door._gate
        await gate.set_limits(
            msgspec.structs.replace(gate.limits, sent_bytes_per_second_max=2 * MIB)
        )
        running = await bob.begin("mesh.fetch", cid=cid.hex())
        with trio.fail_after(20):
            while not ann.desk.seller.running():
                await trio.sleep(0.02)
            with pytest.raises(RequestError, match="pinned or in use"):
                await trio.to_thread.run_sync(store.put, bytes(4 * MIB))
            await running.ended.wait()
        assert running.error is None
        store.put(bytes(4 * MIB))
        assert not store.has(cid), "and once it is sold it may go"


async def test_the_library_gives_a_path_to_what_runs_in_the_node(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        body = body_of(2)
        cid = ann.desk.blobs.store.put(body)
        await bob.offers_of("mesh.fetch")
        paths: list = []
        async with trio.open_nursery() as nursery:
            for _ in range(2):  # the second one waits for the first, and pays nothing

                async def fetch():
                    paths.append(await bob.desk.blobs.fetch_blob(cid))

                nursery.start_soon(fetch)
        assert [path.read_bytes() for path in paths] == [body, body]
        await comes_to(ann, 200)
        assert paths[0] == await bob.desk.blobs.fetch_blob(cid)


@pytest.mark.parametrize("how", [{"local": True}, {"verify": True}])
async def test_a_fetch_is_neither_local_nor_done_again(tmp_path, how):
    async with villagers(tmp_path, "ann") as (ann,):
        request = msgspec.msgpack.encode({"cid": "00" * 32})
        submit = Submit(id=1, operation="mesh.fetch", request=request, **how)
        with pytest.raises(RequestError, match="done by nodes"):
            await ann.desk.buyer.submit(submit, ann.heard.append)


async def test_the_bill_of_a_fetch_is_explained_attempt_by_attempt(tmp_path):
    async with villagers(tmp_path, "ann", "bob", "cyd") as (ann, bob, cyd):
        body = body_of(6)
        cid = ann.desk.blobs.store.put(body)
        bob.desk.blobs.store.put(body)
        await bob.lends_to(cyd)
        await cyd.offers_of("mesh.fetch")
        _, receipt = await fetched(cyd, cid)
        path = tmp_path / "cyd" / "jobs.db"
        kept = attempts.kept_job(path, receipt.job)
        found = explain.explain(kept, {})
        assert found.sum_micro_credits == receipt.price_micro_credits == found.stored_micro_credits
        assert found.ok
