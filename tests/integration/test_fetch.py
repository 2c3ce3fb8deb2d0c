"""A peer that asks for a blob."""

from __future__ import annotations

import pytest

from aivillage.protocols.errors import RefusedError
from aivillage.protocols.messages import Fetch
from tests.integration.loopback_nodes import villagers


async def test_a_peer_that_asks_for_a_blob_hears_at_once_that_it_is_not_offered(tmp_path):
    async with villagers(tmp_path, "ann", "bob") as (ann, bob):
        link = bob.desk.links.get(ann.peer)
        with pytest.raises(RefusedError) as caught:
            await link.ask(Fetch(id=link.next_id(), cid=bytes(32)), timeout_seconds=5)
        assert caught.value.code == "NOT_OFFERED"
        assert bob.desk.links.get(ann.peer) is link, "and the link lives on"
