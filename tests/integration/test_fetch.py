"""Blobs on the mesh: asked for, paid chunk by chunk, from all who have them, and from no stranger."""

from __future__ import annotations

import os

import msgspec
import pytest
import trio

from aivillage.protocols.errors import RefusedError
from aivillage.protocols.manifest import CHUNK_BYTES
from aivillage.protocols.messages import Fetch
from aivillage.protocols.types import Cid
from tests.integration.loopback_nodes import Node, villagers

MIB = 1 << 20


def body_of(count: int) -> bytes:
    """`count` chunks, the last one not full."""
    return os.urandom(count * CHUNK_BYTES - 17)


async def fetched(node: Node, cid: Cid, **request) -> tuple[dict, object]:
    return await node.done("mesh.fetch", cid=cid.hex(), **request)


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
        nets = [await node.net() for node in (ann, bob, cyd)]
        assert sum(nets) == 0
        assert nets[2] == -receipt.price_micro_credits
