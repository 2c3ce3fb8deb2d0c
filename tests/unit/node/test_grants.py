"""What a founder may issue, what a holder keeps, and what a member makes of it."""

from contextlib import asynccontextmanager

import apsw
import pytest

from aivillage.ledger.ledger import open_ledger
from aivillage.node import grants, village, who
from aivillage.node.config import Settings
from aivillage.node.grants import Grants, from_token, to_token
from aivillage.node.jobs import open_jobs
from aivillage.node.membership import Membership
from aivillage.node.village import DAY_MS, certify
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import RefusedError, RequestError
from aivillage.protocols.messages import Granted, Ping
from aivillage.protocols.papers import Grant
from tests.conftest import make_key, make_peer

FOUNDER, HOLDER, MEMBER, OTHER = 1, 2, 3, 4
HOME = village.village_of(make_peer(FOUNDER))
SETTINGS = Settings(
    village_line_micro_credits=1_000, village_grant_cap_micro_credits=500,
    grant_cap_micro_credits=2_000,
)  # fmt: skip


@asynccontextmanager
async def opened(folder, number, settings=SETTINGS):
    """The grants of one node of the village, on real stores."""
    folder = folder / str(number)
    folder.mkdir(exist_ok=True)
    key = make_key(number)
    async with (
        open_jobs(folder / "jobs.db") as jobs,
        open_ledger(folder / "ledger.db", key) as book,
    ):
        membership = Membership(make_peer(number), jobs)
        membership.village = HOME
        found = Grants(key, settings, membership, book, jobs)
        await found.load()
        yield found


def signed(amount=100, *, holder=HOLDER, issuer=FOUNDER, signer=None, days=30, of=HOME, number=0):
    grant = Grant(
        village=of, issuer=make_peer(issuer), holder=make_peer(holder),
        amount_micro_credits=amount, id=number.to_bytes(16, "big"),
        not_after_unix_ms=grants._now() + days * DAY_MS,
    )  # fmt: skip
    return seal(make_key(signer or issuer), "grant", grant)


def shown(found, *envelopes, peer=HOLDER, papers=()):
    found.met(make_peer(peer), envelopes)
    return found.guaranteed(make_peer(peer), papers)


async def test_a_grant_goes_from_the_founder_to_its_holder_and_counts_at_a_member(tmp_path):
    async with opened(tmp_path, FOUNDER) as founder:
        granted = await founder.issue(make_peer(HOLDER), 300, 30)
        (row,) = founder.listing()["issued"]
        assert (row.holder, row.amount_micro_credits) == (make_peer(HOLDER), 300)
    async with opened(tmp_path, HOLDER) as holder:
        assert await holder.take(from_token(to_token(granted)))
        assert not await holder.take(granted)
    async with opened(tmp_path, HOLDER) as holder:
        assert holder.said() == (granted.envelope,)
        assert [row.amount_micro_credits for row in holder.listing()["held"]] == [300]
    async with opened(tmp_path, MEMBER) as member:
        assert shown(member, granted.envelope) == 300
        assert shown(member, granted.envelope, granted.envelope) == 300  # once
        member.left(make_peer(HOLDER))
        assert member.guaranteed(make_peer(HOLDER), ()) == 0


async def test_what_is_issued_within_a_month_stays_below_the_cap_over_restarts(tmp_path):
    async with opened(tmp_path, FOUNDER) as founder:
        await founder.issue(make_peer(HOLDER), 1_500, 30)
    async with opened(tmp_path, FOUNDER) as founder:
        with pytest.raises(RefusedError, match="leaves 500"):
            await founder.issue(make_peer(HOLDER), 501, 30)
        await founder.issue(make_peer(OTHER), 500, 1)
        with pytest.raises(RefusedError, match="leaves 0"):
            await founder.issue(make_peer(HOLDER), 1, 30)


async def test_the_cap_comes_back_after_thirty_days_and_not_before(tmp_path, monkeypatch):
    now = grants._now()
    async with opened(tmp_path, FOUNDER) as founder:
        await founder.issue(make_peer(HOLDER), 2_000, 1)
        monkeypatch.setattr(grants, "_now", lambda: now + 29 * DAY_MS)
        with pytest.raises(RefusedError):
            await founder.issue(make_peer(HOLDER), 1, 1)
        assert founder.listing()["issued"] == []  # over, and still counted
        monkeypatch.setattr(grants, "_now", lambda: now + 31 * DAY_MS)
        await founder.issue(make_peer(HOLDER), 2_000, 1)
        assert len(founder._issued) == 1


async def test_an_issued_grant_is_on_disk_before_it_leaves(tmp_path, monkeypatch):
    async with opened(tmp_path, FOUNDER) as founder:

        async def fails(_key, _value):
            raise RequestError("no room")

        monkeypatch.setattr(founder._jobs, "set_durably", fails)
        with pytest.raises(RequestError):
            await founder.issue(make_peer(HOLDER), 1_000, 30)
        assert founder.listing()["issued"] == []
        monkeypatch.undo()
        await founder.issue(make_peer(HOLDER), 2_000, 30)
        db = apsw.Connection(str(tmp_path / str(FOUNDER) / "jobs.db"))
        assert db.execute("SELECT count(*) FROM setting WHERE key = 'grants_issued'").get == 1
        db.close()


@pytest.mark.parametrize(("amount", "days"), [(0, 30), (-1, 30), (5, 0), (5, 366)])
async def test_a_grant_is_of_something_for_a_while(tmp_path, amount, days):
    async with opened(tmp_path, FOUNDER) as founder:
        with pytest.raises(RequestError):
            await founder.issue(make_peer(HOLDER), amount, days)


async def test_a_member_grants_nothing(tmp_path):
    async with opened(tmp_path, MEMBER) as member:
        with pytest.raises(RefusedError, match="founder"):
            await member.issue(make_peer(HOLDER), 5, 30)


async def test_no_more_are_listed_than_a_person_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(grants, "ISSUED_MAX", 2)
    async with opened(tmp_path, FOUNDER) as founder:
        for _ in range(2):
            await founder.issue(make_peer(HOLDER), 1, 30)
        with pytest.raises(RefusedError):
            await founder.issue(make_peer(HOLDER), 1, 30)


FORGED = [
    signed(signer=OTHER),
    signed(issuer=OTHER),
    signed(holder=OTHER),
    signed(of=bytes(32)),
    signed(days=-1),
    signed(days=400),
    signed()[:-1] + b"\xff",
    b"",
]


@pytest.mark.parametrize("forged", FORGED)
async def test_a_grant_that_is_forged_or_over_counts_nothing(tmp_path, forged):
    async with opened(tmp_path, MEMBER) as member:
        assert shown(member, forged) == 0
        assert shown(member, forged, signed(number=9)) == 100  # and hides nothing
    async with opened(tmp_path, HOLDER) as holder:
        with pytest.raises(RequestError, match="not valid"):
            await holder.take(Granted(envelope=forged))
        assert holder.said() == ()


async def test_many_grants_add_up_to_the_cap_and_no_further(tmp_path):
    many = [signed(200, number=n) for n in range(6)]
    async with opened(tmp_path, MEMBER) as member:
        assert shown(member, *many[:2]) == 400
        assert shown(member, *many) == 500
    unset = Settings(village_line_micro_credits=700)
    async with opened(tmp_path, MEMBER, unset) as member:
        assert shown(member, *many) == 700
        assert shown(member, *many[:1]) == 200


async def test_a_grant_that_is_over_is_noticed_once(tmp_path, monkeypatch):
    now = grants._now()
    async with opened(tmp_path, MEMBER) as member:
        assert shown(member, signed(days=1)) == 100
        assert member.over() == []
        monkeypatch.setattr(grants, "_now", lambda: now + 2 * DAY_MS)
        assert member.over() == [make_peer(HOLDER)]
        assert member.over() == []
        assert member.guaranteed(make_peer(HOLDER), ()) == 0


async def test_a_founders_later_key_is_believed_by_its_certificate(tmp_path):
    envelope = signed(issuer=OTHER)
    paper = certify(
        make_key(FOUNDER), HOME, make_peer(OTHER), line=5, not_after_unix_ms=2**53 - 1,
        may_invite=True,
    )  # fmt: skip
    plain = certify(make_key(FOUNDER), HOME, make_peer(OTHER), line=5, not_after_unix_ms=2**53 - 1)
    async with opened(tmp_path, MEMBER) as member:
        assert shown(member, envelope, papers=(paper,)) == 100
        assert shown(member, envelope, papers=(plain,)) == 0
    async with opened(tmp_path, HOLDER) as holder:
        assert await holder.take(Granted(envelope=envelope, certificates=(paper,)))
        assert holder._membership.certificates == (paper,)  # to show with it


async def test_a_neighbour_shows_four_at_a_time(tmp_path):
    peer, many = make_peer(HOLDER), [signed(10, number=n) for n in range(6)]
    async with opened(tmp_path, MEMBER) as member:
        assert not member.showed(peer, many[0])  # nobody here
        assert shown(member, *many[:4]) == 40
        assert member.showed(peer, many[5])
        assert not member.showed(peer, many[5])
        assert member.guaranteed(peer, ()) == 40


@pytest.mark.parametrize("text", ["", "aiv1.AAAA", "aivg1.AAAA", "aivg1.%%%"])
def test_a_token_that_is_no_grant_is_refused(text):
    with pytest.raises(RequestError, match="not valid"):
        from_token(text)


def test_a_token_of_another_message_is_refused():
    from aivillage.node import token
    from aivillage.protocols import codec

    with pytest.raises(RequestError, match="something else"):
        from_token(token.to_text(grants.TOKEN_PREFIX, codec.encode(Ping(nonce=1))))


def test_a_peer_is_named_by_its_id_or_the_end_of_one_that_is_known():
    one, two = make_peer(1), make_peer(2)
    assert who.named(one[-6:], [one, two]) == one
    assert who.named(make_peer(3), [one, two]) == make_peer(3)
    for text in ("", "zzzzzz", one[:5]):
        with pytest.raises(RequestError):
            who.named(text, [one, two])
    with pytest.raises(RequestError, match="2 peers"):
        who.named(one[-1], [one, f"x{one[-1]}"])
