"""Discovery: which offers count, and in which order their sellers are asked."""

import pytest

from aivillage.node import discovery as discovering
from aivillage.node.discovery import OFFER_BYTES_MAX, Discovery
from aivillage.node.records import Record, Work
from aivillage.protocols.codec import pack
from aivillage.protocols.envelope import unseal
from aivillage.protocols.messages import Offer, OfferedOperation, OperationInfo, TaskAd
from aivillage.protocols.pricing import Terms
from tests.conftest import make_key, make_peer

NOW_MS = 1_800_000_000_000


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        seconds = NOW_MS / 1000

    monkeypatch.setattr(discovering.time, "time", lambda: Clock.seconds)
    monkeypatch.setattr(discovering.time, "monotonic", lambda: Clock.seconds)
    return Clock


@pytest.fixture
def found(clock):
    return Discovery(make_key(1))


def offer(by=2, seq=1, *, lives_ms=1000, slots=1, names=("mesh.noop",)):
    return Offer(
        seller=make_peer(by),
        seq=seq,
        not_after_unix_ms=NOW_MS + lives_ms,
        addresses=(f"/memory/{by}/p2p/x",),
        operations=tuple(OfferedOperation(name=name) for name in names),
        free_slots=slots,
    )


def hear(found, news):
    return found.accept(news.seller, news, str(news.seq).encode())


def measured(units_per_second, **counts):
    record = Record(**counts)
    record.measure(Work("mesh.noop"), "", units_per_second)
    return record


def order(found):
    return [candidate.peer for candidate in found.candidates("mesh.noop")]


def test_a_newer_offer_replaces_an_older_one_and_never_the_other_way(found):
    assert hear(found, offer(seq=2, slots=5))
    assert not hear(found, offer(seq=2, slots=6))
    assert not hear(found, offer(seq=1, slots=7))
    assert hear(found, offer(seq=3, slots=8))
    assert [o.free_slots for o in found.offers()] == [8]
    assert [held.envelope for held in found.held()] == [b"3"]


def test_nobody_offers_in_anothers_name_and_we_do_not_listen_to_ourselves(found):
    assert not found.accept(make_peer(3), offer(by=2), b"")
    assert not found.accept(make_peer(1), offer(by=1), b"")
    ad = TaskAd(buyer=make_peer(2), seq=1, not_after_unix_ms=NOW_MS, operation="mesh.noop")
    assert not found.accept(make_peer(3), ad, b"")
    assert found.accept(make_peer(2), ad, b"")


def test_an_offer_ends_when_it_said(found, clock):
    hear(found, offer(lives_ms=1000))
    clock.seconds += 1.0
    assert order(found) == [make_peer(2)]
    clock.seconds += 0.002
    assert order(found) == []
    assert found.held() == []


def test_only_who_offers_it_is_a_candidate(found):
    hear(found, offer(by=2, names=("inference.generate",)))
    hear(found, offer(by=3, names=("inference.generate", "mesh.noop")))
    assert order(found) == [make_peer(3)]


def test_who_failed_comes_last_then_speed_then_room(found):
    for peer, slots in ((2, 1), (3, 9), (4, 1), (5, 1)):
        hear(found, offer(by=peer, slots=slots))
    found.records[make_peer(4)] = measured(100.0)
    found.records[make_peer(5)] = measured(900.0, bad=3)
    assert order(found) == [make_peer(n) for n in (4, 3, 2, 5)]


def test_one_failure_among_many_jobs_is_forgiven(found):
    hear(found, offer(by=2))
    hear(found, offer(by=3))
    found.records[make_peer(2)] = measured(50.0, good=100, bad=1)
    assert order(found)[0] == make_peer(2)


def test_an_unreachable_peer_is_left_alone_for_a_minute_or_until_it_is_back(found, clock):
    hear(found, offer(lives_ms=600_000))
    found.unreachable(make_peer(2))
    assert order(found) == []
    found.reachable(make_peer(2))
    assert order(found) == [make_peer(2)]
    found.unreachable(make_peer(2))
    clock.seconds += discovering.UNREACHABLE_SECONDS
    assert order(found) == [make_peer(2)]


def test_who_said_something_new_since_it_was_unreachable_is_worth_one_more_dial(found, clock):
    hear(found, offer(seq=1, lives_ms=600_000))
    found.unreachable(make_peer(2))
    found.reconsider()
    assert order(found) == []  # it said nothing since
    hear(found, offer(seq=2, lives_ms=600_000))
    assert order(found) == []  # whoever has others leaves it alone
    found.reconsider()
    assert order(found) == [make_peer(2)]
    found.unreachable(make_peer(2))
    found.reconsider()
    assert order(found) == []


def test_every_accepted_offer_is_news_and_a_stale_one_is_not(found):
    before = found.next_news()
    hear(found, offer(seq=2))
    assert before.is_set()
    after = found.next_news()
    hear(found, offer(seq=1))
    assert not after.is_set()


def test_the_table_has_a_bound_that_the_dead_do_not_fill(found, clock, monkeypatch):
    monkeypatch.setattr("aivillage.node.offers.OFFERS_MAX", 2)
    hear(found, offer(by=2))
    hear(found, offer(by=3))
    assert not hear(found, offer(by=4))
    assert hear(found, offer(by=3, seq=2))  # a known one may go on
    clock.seconds += 2
    assert hear(found, offer(by=4, lives_ms=9000))


def test_our_offer_fits_whatever_we_do(found):
    terms = Terms(prices_micro_credits={"calls": 10})
    many = [OperationInfo(name=f"folder.operation{n}", terms=terms) for n in range(100)]
    signer, made = unseal(found.make_offer(many, ["/x"] * 9, 3, 60.0), "offer", Offer)
    assert signer == made.seller == make_peer(1)
    assert len(pack(made)) <= OFFER_BYTES_MAX < len(pack(made)) + 60
    assert 10 < len(made.operations) < 100
    assert (len(made.addresses), made.free_slots) == (4, 3)
    assert made.not_after_unix_ms == NOW_MS + 60_000


def test_what_we_say_later_is_newer_also_after_a_restart(found, clock):
    seqs = [unseal(found.make_offer([], [], 0, 1.0), "offer", Offer)[1].seq for _ in range(3)]
    ad, envelope = found.make_task_ad("mesh.noop", 1.0)
    assert unseal(envelope, "task", TaskAd) == (found.peer, ad)
    assert seqs == sorted(set(seqs))
    assert ad.seq > seqs[-1]
    clock.seconds += 1
    again = Discovery(make_key(1))
    assert unseal(again.make_offer([], [], 0, 1.0), "offer", Offer)[1].seq > ad.seq


def test_among_sellers_never_measured_those_that_are_linked_come_first(found):
    for by in range(2, 40):
        hear(found, offer(by=by, slots=256))
    hear(found, offer(by=50, slots=1))
    found.is_neighbour = {make_peer(50)}.__contains__
    assert order(found)[0] == make_peer(50)
    found.records[make_peer(7)] = measured(900.0, good=1)
    assert order(found)[:2] == [make_peer(7), make_peer(50)]


def test_looking_for_sellers_remembers_none_of_them(found):
    for by in range(2, 40):
        hear(found, offer(by=by))
    assert len(order(found)) == 38
    assert found.records == {}


def test_a_strangers_offer_ends_with_its_link_and_a_members_does_not(found):
    found.accept(make_peer(2), offer(by=2), b"")
    found.accept(make_peer(3), offer(by=3), b"signed")
    assert [held.envelope for held in found.held()] == [b"signed"]
    assert len(order(found)) == 2
    for by in (2, 3, 4):
        found.forget(make_peer(by))
    assert order(found) == [make_peer(3)]
