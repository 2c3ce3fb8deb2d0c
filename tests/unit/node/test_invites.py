"""How often an invite is good, what its list says, and that a revoked one is dead."""

from __future__ import annotations

import apsw
import pytest

from aivillage.node import invites, village
from aivillage.node.invites import DAYS_MAX, NOTE_MAX, USES_MAX, Invites
from aivillage.node.jobs import open_jobs
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.papers import Invite
from tests.conftest import make_key, make_peer

FAR_MS = 2**52


def made(number=1, ends_ms=FAR_MS):
    return Invite(
        village=village.village_of(make_peer(1)), inviter=make_peer(1), addresses=(),
        nonce=bytes([number]) * 16, not_after_unix_ms=ends_ms, line_micro_credits=7,
    )  # fmt: skip


async def refused(store, nonce, guest):
    with pytest.raises(RefusedError) as caught:
        await store.use(nonce, guest)
    assert caught.value.code == "OWNER_LIMIT"
    return caught.value.message


@pytest.mark.parametrize("uses", [1, 3])
async def test_an_invite_admits_as_many_as_it_says_and_each_may_ask_again(tmp_path, uses):
    one = made()
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        store = Invites(jobs)
        await store.add(one, uses, "")
        for number in range(uses):
            await store.use(one.nonce, make_peer(number + 2))
            await store.use(one.nonce, make_peer(number + 2))
        assert "used already" in await refused(store, one.nonce, make_peer(9))
    async with open_jobs(tmp_path / "jobs.db") as jobs:  # and after a restart
        assert "used already" in await refused(Invites(jobs), one.nonce, make_peer(9))
        await Invites(jobs).use(one.nonce, make_peer(2))


async def test_a_revoked_invite_admits_nobody_not_even_who_used_it(tmp_path):
    one, other = made(0xAB), made(0xAC)
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        store = Invites(jobs)
        for invite in (one, other):
            await store.add(invite, 5, "")
        await store.use(one.nonce, make_peer(2))
        found = await store.revoke("ABAB")
        assert (found.id, found.state, found.uses_left) == ("abababab", "revoked", 0)
        for guest in (2, 3):
            assert "revoked" in await refused(store, one.nonce, make_peer(guest))
        await store.use(other.nonce, make_peer(2))
        assert {i.id: i.state for i in await store.listing()} == {
            "abababab": "revoked", "acacacac": "open",
        }  # fmt: skip


@pytest.mark.parametrize("name", ["", "ab", "aba", "%", "____", "ffff", "abab'"])
async def test_to_revoke_one_invite_it_must_be_named(tmp_path, name):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        store = Invites(jobs)
        await store.add(made(0xAB), 1, "")
        with pytest.raises(RequestError):
            await store.revoke(name)
        assert (await store.listing())[0].state == "open"


async def test_the_list_says_uses_left_end_note_and_who_came(tmp_path):
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        store = Invites(jobs)
        await store.add(made(1), 3, "for the choir")
        await store.use(made(1).nonce, make_peer(5))
        await store.add(made(2), 1, "")
        await store.use(made(2).nonce, make_peer(6))
        await store.add(made(3, ends_ms=1), 1, "")
        expired, used_up, choir = await store.listing()
    assert (choir.state, choir.uses_left, choir.uses, choir.note) == ("open", 2, 3, "for the choir")
    assert (choir.ends_unix, choir.line_micro_credits) == (FAR_MS / 1000, 7)
    assert [guest.peer for guest in choir.guests] == [make_peer(5)]
    assert (used_up.state, used_up.uses_left) == ("used up", 0)
    assert (expired.state, expired.uses_left) == ("expired", 0)


async def test_what_an_earlier_version_noted_of_its_invites_still_counts(tmp_path):
    async with open_jobs(tmp_path / "jobs.db"):
        pass
    db = apsw.Connection(str(tmp_path / "jobs.db"))
    db.execute("CREATE TABLE used_invite(nonce BLOB PRIMARY KEY, guest TEXT NOT NULL, at REAL)")
    db.execute("INSERT INTO used_invite VALUES(?, ?, 5)", (b"n" * 16, make_peer(2)))
    db.close()
    async with open_jobs(tmp_path / "jobs.db") as jobs:
        store = Invites(jobs)
        await store.use(b"n" * 16, make_peer(2))
        assert "used already" in await refused(store, b"n" * 16, make_peer(3))
        await store.use(b"m" * 16, make_peer(3))  # made there, not used there: good once
        assert "used already" in await refused(store, b"m" * 16, make_peer(2))


def test_uses_days_and_note_have_bounds():
    invites.check(1, 1, "")
    invites.check(USES_MAX, DAYS_MAX, "n" * NOTE_MAX)
    for uses, days, note in (
        (0, 1, ""), (USES_MAX + 1, 1, ""), (1, 0, ""), (1, DAYS_MAX + 1, ""),
        (1, 1, "n" * (NOTE_MAX + 1)),
    ):  # fmt: skip
        with pytest.raises(RequestError):
            invites.check(uses, days, note)


def test_an_invites_days_are_in_the_token():
    token = village.make_invite(make_key(1), b"v" * 32, (), 7, 1_000, 30)
    assert village.read_invite(token).not_after_unix_ms == 1_000 + 30 * village.DAY_MS
