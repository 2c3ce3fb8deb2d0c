"""Whether others can dial a node, as others find it."""

from __future__ import annotations

import pytest

from aivillage.node import reachability
from aivillage.protocols.errors import RefusedError
from aivillage.protocols.messages import Reach, Reached
from tests.simulation.mesh import open_mesh, until, without


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(reachability, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(reachability, "LOOK_SECONDS", 0.05)


async def said(node):
    found = (await node.desk.on_status({}))["reachable"]
    return found["state"], found["why"]


async def becomes(node, state):
    await until(lambda: node.desk.villagers.reachability.verdict.state == state)
    return node.desk.villagers.reachability.verdict


async def test_a_node_that_a_villager_dials_back_is_reachable_and_one_behind_a_router_not(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        mesh.network.hidden = {"shut"}
        helper, shut = await mesh.add("helper"), await mesh.add("shut")
        state, why = await said(shut)
        assert (state, "no villager is here" in why) == ("unknown", True)
        await mesh.link(shut, helper)
        found = await becomes(shut, "not reachable")
        assert helper.peer[-8:] in found.why
        assert "forward" in found.next_step
        assert "dialled shut" not in (await becomes(helper, "reachable")).why
        assert shut.events("reachability_found")[0]["state"] == "not reachable"
        # The router's owner lets it in.
        mesh.network.hidden = set()
        shut.desk.villagers.reachability._note(await shut.desk.villagers.reachability.look())
        assert (await said(shut))[0] == "reachable"


async def test_helpers_of_an_earlier_version_leave_it_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr("aivillage.node.daemon.VERSION_MINOR", 1)
    async with open_mesh(tmp_path) as mesh:
        helper, asker = await mesh.add("helper"), await mesh.add("asker")
        await mesh.link(asker, helper)
        found = await asker.desk.villagers.reachability.look()
        assert (found.state, "earlier versions" in found.why) == ("unknown", True)
        assert not [frame for frame in helper.heard if isinstance(frame, Reach)]


async def ask(asker, helper, address):
    link = asker.desk.links.get(helper.peer)
    return await link.ask(Reach(id=link.next_id(), address=address), timeout_seconds=5)


async def test_strangers_third_parties_and_the_impatient_are_not_dialled_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reachability, "FIRST_SECONDS", 1000)
    async with open_mesh(tmp_path) as mesh:
        helper, asker = await mesh.add("helper"), await mesh.add("asker")
        victim = await mesh.add("victim")
        stranger = await mesh.add("stranger", stranger=True)
        for node in (asker, stranger):
            await mesh.link(node, helper)
        probed = []
        real = helper.desk.links.transport.probe

        async def probe(address):
            probed.append(address)
            await real(address)

        helper.desk.links.transport.probe = probe
        with pytest.raises(RefusedError, match="only villagers"):
            await ask(stranger, helper, stranger.address)
        for address in (victim.address, f"/memory/victim/p2p/{asker.peer}"):
            with pytest.raises(RefusedError, match="only where you come from"):
                await ask(asker, helper, address)
        assert probed == []
        for _ in range(reachability.BURST):
            reply = await ask(asker, helper, asker.address)
            assert isinstance(reply, Reached)
            assert (reply.reached, reply.seen_from) == (True, "asker")
        with pytest.raises(RefusedError) as caught:
            await ask(asker, helper, asker.address)
        assert caught.value.code == "BUSY"
        await asker.desk.links.drop(helper.peer, "to come again")
        await mesh.link(asker, helper)
        with pytest.raises(RefusedError):
            await ask(asker, helper, asker.address)
        assert len(probed) == reachability.BURST


async def test_no_more_is_dialled_at_a_time_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reachability, "FIRST_SECONDS", 1000)
    async with open_mesh(tmp_path) as mesh:
        helper, asker = await mesh.add("helper"), await mesh.add("asker")
        await mesh.link(asker, helper)
        board = helper.desk.villagers.reachability
        board._probes = reachability.PROBES_MAX - 1
        assert (await ask(asker, helper, asker.address)).reached
        await until(lambda: board._probes == reachability.PROBES_MAX - 1)
        board._probes = reachability.PROBES_MAX
        with pytest.raises(RefusedError) as caught:
            await ask(asker, helper, asker.address)
        assert caught.value.code == "BUSY"


async def test_a_helper_that_never_answers_leaves_it_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(reachability, "ANSWER_SECONDS", 0.1)
    async with open_mesh(tmp_path) as mesh:
        helper, asker = await mesh.add("helper"), await mesh.add("asker")
        with without(helper, Reached):
            await mesh.link(asker, helper)
            found = await asker.desk.villagers.reachability.look()
        assert (found.state, "did not try" in found.why) == ("unknown", True)
