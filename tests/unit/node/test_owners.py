"""Who signs for whose device, for how long, and what a book makes of it."""

import os
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from aivillage.cli.main import main
from aivillage.ledger.ledger import open_ledger
from aivillage.node import identity, owners, token
from aivillage.node.jobs import open_jobs
from aivillage.node.owners import Owners
from aivillage.node.village import DAY_MS
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.papers import OwnerCertificate
from aivillage.protocols.types import AttemptId
from tests.conftest import make_key, make_peer

OWNER, PHONE, LAPTOP, SELLER, OTHER = 1, 2, 3, 4, 5
NOW = int(time.time() * 1000)
OUT = b"o" * 32


def certificate(device, *, owner=OWNER, days=90, signer=None):
    body = OwnerCertificate(
        owner=make_peer(owner), device=make_peer(device), not_after_unix_ms=NOW + days * DAY_MS
    )
    return seal(make_key(signer or owner), "owner", body)


def adoption(device, days=90):
    return owners.adopt(make_key(OWNER), make_peer(device), days, NOW)


def test_a_token_carries_what_the_owner_signed():
    raw = token.from_text(owners.TOKEN_PREFIX, adoption(PHONE), "adoption")
    found = owners.read(raw, (make_peer(PHONE),), NOW)
    assert (found.owner, found.device) == (make_peer(OWNER), make_peer(PHONE))
    assert found.not_after_unix_ms == NOW + 90 * DAY_MS
    assert owners.read(raw, (make_peer(OTHER), make_peer(PHONE)), NOW) == found  # a former key's


@pytest.mark.parametrize("days", [29, 366])
def test_a_certificate_lasts_a_month_to_a_year(days):
    with pytest.raises(RequestError, match="days"):
        adoption(PHONE, days)
    assert adoption(PHONE, 30)
    assert adoption(PHONE, 365)


def test_only_a_peer_id_is_adopted():
    with pytest.raises(RequestError, match="no peer id"):
        owners.adopt(make_key(OWNER), "somebody", 90, NOW)


@pytest.mark.parametrize(
    "worthless",
    [
        certificate(LAPTOP),
        certificate(PHONE, signer=OTHER),
        certificate(PHONE, days=-1),
        certificate(PHONE, days=400),
        certificate(PHONE)[:-1] + b"\xff",
        msgspec.msgpack.encode([b"", b"", b""]),
    ],
)
async def test_a_certificate_that_proves_nothing_makes_nobody_a_device(tmp_path, worthless):
    with pytest.raises(PeerError):
        owners.read(worthless, (make_peer(PHONE),), NOW)
    async with opened(tmp_path, SELLER) as (found, _):
        assert found.owner_of(make_peer(PHONE), worthless, NOW) is None
        assert found.owner_of(make_peer(PHONE), b"", NOW) is None
        assert found.owner_of(make_peer(PHONE), certificate(PHONE), NOW) == make_peer(OWNER)


@asynccontextmanager
async def opened(folder, number):
    """(the owners of one node, its book), on real stores."""
    async with (
        open_jobs(folder / "jobs.db") as jobs,
        open_ledger(folder / "ledger.db", make_key(number)) as book,
    ):
        found = Owners(book, jobs)
        await found.load()
        yield found, book


async def sell(book, device, amount):
    """Work for `device`, signed or not; how much of `amount` the books allow."""
    attempt, done = AttemptId(os.urandom(16)), 0
    book.begin_sale(device, attempt, b"q" * 32, amount)
    while done < amount:
        if book.deliver(device, attempt, done + 50, OUT):
            done += 50
            continue
        book.want_room(device, 50)
        with trio.move_on_after(0.3) as waited:
            await book.room_changed(device)
        if waited.cancelled_caught:
            break
    book.end_sale(device, attempt)
    return done


async def test_two_devices_of_one_owner_together_never_owe_more_than_the_line(tmp_path):
    phone, laptop, alone = (make_peer(n) for n in (PHONE, LAPTOP, OTHER))
    async with opened(tmp_path, SELLER) as (found, book):
        for device, papers in ((phone, certificate(PHONE)), (laptop, certificate(LAPTOP))):
            owner = found.owner_of(device, papers, NOW)
            await found.set_line(device, 1_000, 1_000, owner)
        await found.set_line(alone, 1_000, 1_000, None)
        done = {phone: 0, laptop: 0}

        async def buy(device):
            done[device] = await sell(book, device, 2_000)

        async with trio.open_nursery() as nursery:  # both at once
            nursery.start_soon(buy, phone)
            nursery.start_soon(buy, laptop)
        assert 500 <= sum(done.values()) <= 1_000
        assert await sell(book, alone, 2_000) == 1_000  # another's line is its own
    async with opened(tmp_path, SELLER) as (_, book):  # and after a restart
        more = await sell(book, phone, 2_000) + await sell(book, laptop, 2_000)
        assert sum(done.values()) + more <= 1_000


async def test_work_between_devices_of_my_owner_is_free_and_only_as_long_as_it_is_mine(tmp_path):
    phone, other = make_peer(PHONE), make_peer(OTHER)
    async with opened(tmp_path, LAPTOP) as (found, book):
        await found.join(adoption(LAPTOP), NOW)
        await found.set_line(phone, 1_000, 100, make_peer(OWNER))
        await found.set_line(other, 1_000, 100, make_peer(SELLER))
        assert (book.view(phone).shared, book.view(other).shared) == (True, False)
        assert found.devices() == [phone]
        await found.set_line(phone, 1_000, 100, None)  # its certificate is over
        assert not book.view(phone).shared
        await found.set_line(phone, 1_000, 100, make_peer(OWNER))
    async with opened(tmp_path, LAPTOP) as (found, book):
        assert found.mine.owner == make_peer(OWNER)
        assert book.view(phone).shared
        again = owners.adopt(make_key(SELLER), make_peer(LAPTOP), 90, NOW)
        await found.join(again, NOW)  # it was sold
        assert not book.view(phone).shared


async def test_what_is_shared_by_word_stays_shared(tmp_path):
    friend = make_peer(OTHER)
    async with opened(tmp_path, LAPTOP) as (found, book):
        await found.join(adoption(LAPTOP), NOW)
        await book.decree(friend, owners.Word(shared=True))
        await found.set_line(friend, 1_000, 100, None)
        assert book.view(friend).shared


async def test_a_token_for_another_device_is_refused(tmp_path):
    async with opened(tmp_path, LAPTOP) as (found, _):
        for text in (adoption(PHONE), adoption(LAPTOP)[:-5], "aiv1.AA", ""):
            with pytest.raises(RequestError):
                await found.join(text, NOW)
        with pytest.raises(RequestError, match="over"):
            await found.join(adoption(LAPTOP), NOW + 91 * DAY_MS)
        assert found.certificate == b""


def test_the_commands_make_a_key_and_a_token(tmp_path, capsys):
    def run(*words):
        code = main(["owner", *words, "--data-dir", str(tmp_path)])
        return code, capsys.readouterr().out

    code, text = run("adopt", make_peer(PHONE))
    assert code == 3
    code, text = run("init")
    assert code == 0
    peer = identity.peer_of(identity.load(tmp_path, owners.OWNER_FILE))
    assert peer in text
    assert run("init")[0] == 3  # never overwritten
    code, text = run("adopt", make_peer(PHONE), "--days", "30")
    raw = token.from_text(owners.TOKEN_PREFIX, text, "adoption")
    assert owners.read(raw, (make_peer(PHONE),), int(time.time() * 1000)).owner == peer
    assert run("adopt", make_peer(PHONE), "--days", "3")[0] == 2
    assert peer in run("show")[1]
    assert run("join", text.strip())[0] == 4
