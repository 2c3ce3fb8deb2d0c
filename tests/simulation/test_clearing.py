"""Netting by itself, on a mesh of real books: when it begins, what it may move, and its end."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from aivillage.node.clearing import RINGS_MAX, rings
from aivillage.protocols import messages
from aivillage.protocols.errors import LedgerError
from aivillage.protocols.types import PeerId
from aivillage.protocols.vouchers import RING_MAX
from tests.simulation.mesh import Node, open_mesh, until, without

LINE, EXPOSURE = 10_000, 4_000
STEP, QUARTER = EXPOSURE // 4, LINE // 4
OFTEN = 0.2
VILLAGE = {
    "village_line_micro_credits": LINE,
    "village_exposure_micro_credits": EXPOSURE,
    "serve": False,
}


@asynccontextmanager
async def village(folder, *looks: float, **settings: int):
    """Members that all know each other; each nets after so many seconds."""
    async with open_mesh(folder) as mesh:
        nodes = [
            await mesh.add(f"n{number}", netting_seconds=seconds, **(VILLAGE | settings))
            for number, seconds in enumerate(looks)
        ]
        for one in nodes:
            for other in nodes[nodes.index(one) + 1 :]:
                await mesh.link(one, other)
        pairs = [(one, other) for one in nodes for other in nodes if one is not other]
        for one, other in pairs:
            await until(lambda o=one, p=other.peer: o.ledger.view(p).synced)
            await until(lambda o=one, p=other.peer: o.ledger.view(p).received_line == LINE)
        yield nodes


async def owe(debtor: Node, creditor: Node, amount: int) -> None:
    """By a present, so that no engine is needed; both books have it when this returns."""
    before = owed(debtor, creditor)
    await debtor.ledger.give(creditor.peer, amount)
    await until(lambda: creditor.ledger.owed_by(debtor.peer) >= max(0, before + amount))


def owed(debtor: Node, creditor: Node) -> int:
    return debtor.ledger.owed_to(creditor.peer) - debtor.ledger.owed_by(creditor.peer)


async def agreed(*nodes: Node) -> None:
    """Nothing is under way, both books of each pair say the same, and each is right."""

    def quiet() -> bool:
        return all(owed(a, b) == -owed(b, a) for a in nodes for b in nodes if a is not b)

    for node in nodes:
        await until(lambda n=node: not any(v.routed for v in n.ledger.views()))
    await until(quiet)
    assert sum([(await node.ledger.balance()).net for node in nodes]) == 0
    for node in nodes:
        report = await node.ledger.audit()
        assert report.ok, report.first_error


async def test_a_debt_beyond_a_quarter_of_its_line_is_paid_by_who_owes_us(tmp_path):
    async with village(tmp_path, OFTEN, 600, 600) as (a, b, c):
        await owe(b, a, QUARTER + 200)
        await owe(a, c, QUARTER)  # at the limit: it stays
        await trio.sleep(4 * OFTEN)
        assert not a.events("debt_netted")
        await owe(a, c, 1)
        await until(lambda: a.events("debt_netted"))
        await agreed(a, b, c)
        assert (owed(a, c), owed(b, a), owed(b, c)) == (0, 199, QUARTER + 1)
        (netted,) = a.events("debt_netted")
        assert netted == {"peer": c.peer, "micro_credits": QUARTER + 1}


async def test_only_what_others_owe_is_moved_and_nobodys_line_is_used(tmp_path):
    async with village(tmp_path, OFTEN, 600, 600) as (a, b, c):
        await owe(b, a, 300)
        await owe(a, c, 2 * QUARTER)
        await until(lambda: a.events("debt_netted"))
        await trio.sleep(4 * OFTEN)
        await agreed(a, b, c)
        assert (owed(a, c), owed(b, a), owed(b, c)) == (2 * QUARTER - 300, 0, 300)


async def test_who_cannot_pass_it_on_costs_nothing_and_the_node_goes_on_looking(tmp_path):
    async with village(tmp_path, OFTEN, 600, 600) as (a, b, c):
        await b.ledger.set_received(c.peer, 0, 0)  # as if c lent b nothing
        await owe(b, a, QUARTER + STEP)
        await owe(a, c, QUARTER + 1)
        before = len(a.heard)
        await until(lambda: any(isinstance(f, messages.Ledger) for f in a.heard[before:]))
        await trio.sleep(4 * OFTEN)
        await agreed(a, b, c)
        assert (owed(a, c), owed(b, a), owed(b, c)) == (QUARTER + 1, QUARTER + STEP, 0)
        assert not a.events("debt_netted")
        await b.ledger.set_received(c.peer, LINE, EXPOSURE)
        await until(lambda: a.events("debt_netted"))
        await agreed(a, b, c)
        assert owed(a, c) == 0


async def test_all_members_of_a_ring_net_at_once_and_it_ends(tmp_path):
    """Each sees its own debt and its own debtor; together they would move three times too much."""
    at_once = {"village_exposure_micro_credits": 4 * EXPOSURE}  # all that is owed in one go
    async with village(tmp_path, 600, 600, 600, **at_once) as nodes:
        a, b, c = nodes
        ring = [(a, b), (b, c), (c, a)]

        async def all_net() -> list[int]:
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(node.desk.clearing.net_all)
            await agreed(*nodes)
            return [owed(*pair) for pair in ring]

        rest, turns = [0, 0, 0], 4  # who is first is a draw
        for _ in range(turns):
            async with trio.open_nursery() as nursery:
                for debtor, creditor in ring:
                    nursery.start_soon(owe, debtor, creditor, 3 * QUARTER)
            while any(owed(*pair) > QUARTER for pair in ring):
                rest = await all_net()
            assert len({*rest}) == 1
            assert -2 * QUARTER // RING_MAX <= rest[0] <= QUARTER, "three small rests, turned round"
            assert await all_net() == rest
        netted = [e["micro_credits"] for node in nodes for e in node.events("debt_netted")]
        assert sum(netted) == 3 * QUARTER * turns - rest[0]  # it never turned round and back


async def test_one_debt_is_moved_by_one_at_a_time(tmp_path):
    async with village(tmp_path, OFTEN, 600, 600) as (a, b, c):
        await owe(b, a, QUARTER)
        await owe(a, c, QUARTER)
        with without(b, messages.Ledger):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.desk.clearing.try_clear, c.peer, STEP)
                await until(lambda: any(v.routed for v in a.ledger.views()))
                with pytest.raises(LedgerError, match="being moved already"):
                    await a.desk.clearing.clear(c.peer, STEP)
                await a.ledger.give(c.peer, 1)  # now it would net
                await trio.sleep(4 * OFTEN)
                assert len(await a.ledger.open_transfers()) == 1
                nursery.cancel_scope.cancel()


def test_rings_are_tried_by_source_and_no_more_than_the_limit():
    debtors = [PeerId(f"debtor{number}") for number in range(RINGS_MAX + 1)]
    assert rings("c", debtors[:RINGS_MAX], []) == [(one, "c") for one in debtors[:RINGS_MAX]]
    assert rings("c", debtors, []) == [(one, "c") for one in debtors[:RINGS_MAX]]
    first, second, hub = debtors[0], debtors[1], PeerId("hub")
    assert rings("c", debtors, [hub])[:4] == [
        (first, "c"), (first, hub, "c"), (second, "c"), (second, hub, "c"),
    ]  # fmt: skip
    assert len(rings("c", debtors, [hub])) == RINGS_MAX
    assert rings("c", [first, hub], [hub, "c"]) == [(first, "c"), (first, hub, "c"), (hub, "c")]
