"""Devices of one owner on a mesh: what their hellos show, and what follows."""

from __future__ import annotations

import time

from aivillage.node import owners
from tests.conftest import make_key, make_peer
from tests.simulation.mesh import Node, open_mesh, price_of, until

OWNER = make_key(77)


async def adopt(node: Node) -> None:
    text = owners.adopt(OWNER, node.peer, 90, int(time.time() * 1000))
    await node.desk.on_owner_join({"token": text})


async def test_a_member_hears_whose_devices_others_are(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        phone = await mesh.add("phone", serve=False)
        laptop = await mesh.add("laptop")
        await mesh.link(phone, seller)
        await adopt(phone)  # linked already: it says hello again
        await adopt(laptop)
        await mesh.link(phone, seller)
        await mesh.link(laptop, seller)
        await mesh.link(phone, laptop)
        for device in (phone, laptop):
            await until(lambda d=device: seller.ledger.view(d.peer).owner == make_peer(77))
            assert not seller.ledger.view(device.peer).shared
        await until(lambda: laptop.ledger.view(phone.peer).shared)
        await until(lambda: phone.ledger.view(laptop.peer).shared)
        shown = await phone.desk.on_owner({})
        assert (shown["owner"], shown["devices"]) == (make_peer(77), [laptop.peer])


async def test_what_two_devices_sign_stays_within_one_line(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller", village_line_micro_credits=5_000)
        devices = [await mesh.add(name, serve=False) for name in ("phone", "laptop")]
        for device in devices:
            await adopt(device)
            await mesh.knows(device, seller)
        bought = 0
        for _ in range(4):
            for device in devices:
                running = await device.ask("hello", tokens=3, deadline=1.0)
                bought += running.error is None
        owed = sum(device.ledger.view(seller.peer).owed_by_me for device in devices)
        assert 2 <= bought < 8
        assert bought * price_of("hello", 3) <= owed <= 5_000


async def test_a_device_is_its_owners_even_outside_the_village(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        laptop = await mesh.add("laptop")
        phone = await mesh.add("phone", serve=False, stranger=True)
        await adopt(phone)
        await adopt(laptop)
        await mesh.link(phone, laptop)
        await until(lambda: laptop.ledger.view(phone.peer).shared)
        assert laptop.ledger.view(phone.peer).line == 0


async def test_who_shows_somebody_elses_certificate_is_nobodys_device(tmp_path):
    async with open_mesh(tmp_path) as mesh:
        seller = await mesh.add("seller")
        phone = await mesh.add("phone", serve=False)
        thief = await mesh.add("thief", serve=False)
        await adopt(phone)
        await adopt(seller)
        thief.desk.owners.certificate = phone.desk.owners.certificate
        await mesh.link(thief, seller)
        await until(lambda: seller.ledger.view(thief.peer).line)
        view = seller.ledger.view(thief.peer)
        assert (view.owner, view.shared) == ("", False)
