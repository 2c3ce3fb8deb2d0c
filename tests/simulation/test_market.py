"""The market, end to end: what is paid, by whom, for what, when everybody is honest."""

from __future__ import annotations

from contextlib import asynccontextmanager

from aivillage.protocols.messages import Text
from tests.simulation.mesh import open_mesh, price_of, result_of, settled


@asynccontextmanager
async def pair(folder, **seller_settings):
    """A founder that buys, one member that sells."""
    async with open_mesh(folder) as mesh:
        buyer = await mesh.add("buyer", serve=False)
        seller = await mesh.add("seller", **seller_settings)
        await mesh.knows(buyer, seller)
        yield mesh, buyer, seller


async def test_a_job_is_paid_exactly_its_own_meter_and_both_books_agree(tmp_path):
    async with pair(tmp_path) as (_, buyer, seller):
        prompt, said = "a prompt of 26 bytes......", []
        running = await buyer.ask(prompt, tokens=12, say=said.append)
        price = price_of(prompt, 12)
        assert running.pursuit.receipt().price_micro_credits == price
        assert running.pursuit.receipt().sellers == (seller.peer,)
        assert "".join(f.text for f in said if isinstance(f, Text)) == result_of(running).text
        await settled(buyer, seller, price)
