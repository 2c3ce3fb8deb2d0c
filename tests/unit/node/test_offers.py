"""Who comes back by an old offer: nobody. Whose clock may be wrong: anybody's, within bounds."""

from __future__ import annotations

import msgspec
import pytest

from aivillage.node import offers as board
from aivillage.node.discovery import Discovery
from aivillage.node.freshness import CLOCK_SKEW_MS_MAX, LIFETIME_MS_MAX, REPLAY_MS_MAX, left_ms
from aivillage.node.offers import DEPARTED_SECONDS, Offers, is_farewell
from aivillage.protocols.envelope import unseal
from aivillage.protocols.messages import Offer, OfferedOperation
from tests.conftest import make_key, make_peer

NOW_MS = 1_800_000_000_000
BOB = make_peer(2)
SKEWS_MS = [-600_000, 0, 600_000]


class Clock:
    """Both clocks of this machine; they go on together."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(board.time, "time", lambda: NOW_MS / 1000 + self.seconds)
        monkeypatch.setattr(board.time, "monotonic", lambda: 50.0 + self.seconds)

    def offer(self, seq, *, lives_ms=120_000, ahead_ms=0, by=2):
        """As its seller makes it now, whose clock is so much ahead of ours."""
        return Offer(
            seller=make_peer(by),
            seq=seq,
            not_after_unix_ms=NOW_MS + int(self.seconds * 1000) + ahead_ms + lives_ms,
            lifetime_ms=lives_ms,
            addresses=("/memory/bob",),
            operations=(OfferedOperation(name="mesh.noop"),),
        )

    def farewell(self, seq, by=2):
        made = self.offer(seq, by=by)
        return Offer(
            seller=made.seller, seq=seq, not_after_unix_ms=made.not_after_unix_ms,
            lifetime_ms=made.lifetime_ms, addresses=(), operations=(),
        )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def sellers(found):
    return [offer.seller for offer in found.all()]


# ------------------------------------------------------------------ departure


def test_a_departure_outlives_every_offer_from_before_it(clock):
    """The oldest offer that anybody would still take, at the last moment that it could be."""
    assert DEPARTED_SECONDS * 1000 > REPLAY_MS_MAX
    found = Offers()
    oldest = clock.offer(8, lives_ms=LIFETIME_MS_MAX, ahead_ms=CLOCK_SKEW_MS_MAX)
    assert found.take(clock.offer(9), b"9")
    found.take(clock.farewell(10), b"10")
    assert sellers(found) == []
    while left_ms(
        oldest.not_after_unix_ms, oldest.lifetime_ms, NOW_MS + int(clock.seconds * 1000)
    ) is not None:  # fmt: skip
        assert not found.take(oldest, b"8")
        assert found.has_left(BOB)
        clock.seconds += 60
    assert clock.seconds > 2000
    assert sellers(found) == []


def test_only_a_newer_word_of_its_own_brings_a_departed_peer_back(clock):
    found = Offers()
    old = clock.offer(9)
    found.take(clock.farewell(10), b"10")
    assert not found.take(old, b"9")
    assert not found.take(clock.offer(10), b"10")
    assert found.take(clock.offer(11), b"11")
    assert sellers(found) == [BOB]
    assert not found.has_left(BOB)


def test_meeting_a_peer_overrides_its_departure_also_where_its_clock_was_set_back(clock):
    found = Offers()
    found.take(clock.farewell(10), b"10")
    found.met(BOB)
    assert not found.has_left(BOB)
    assert found.take(clock.offer(3), b"3")
    assert sellers(found) == [BOB]


def test_an_old_farewell_takes_nobody_down(clock):
    found = Offers()
    farewell = clock.farewell(10)
    assert found.take(clock.offer(11), b"11")
    assert not found.take(farewell, b"10")
    assert sellers(found) == [BOB]


def test_nobody_says_farewell_for_another():
    found = Discovery(make_key(1))
    signer, farewell = unseal(Discovery(make_key(3)).make_farewell(), "offer", Offer)
    assert is_farewell(farewell)
    assert not found.accept(signer, farewell, b"x")  # nobody heard of it by us: no news
    assert found.has_left(signer)
    forged = Offer(
        seller=BOB, seq=2**52, not_after_unix_ms=farewell.not_after_unix_ms,
        lifetime_ms=farewell.lifetime_ms, addresses=(), operations=(),
    )  # fmt: skip
    assert not found.accept(signer, forged, b"x")
    assert not found.has_left(BOB)


def test_an_expired_offer_does_not_live_again_when_it_is_played_again(clock):
    found = Offers()
    offer = clock.offer(9, ahead_ms=-600_000)  # its clock is behind: no end of it to go by
    assert found.take(offer, b"9")
    clock.seconds += 121
    assert sellers(found) == []
    assert not found.take(offer, b"9")


def test_a_replaced_key_offers_nothing_whatever_it_signs(clock):
    found = Offers()
    assert found.take(clock.offer(9), b"9")
    found.replaced(BOB)
    assert sellers(found) == []
    assert not found.take(clock.offer(2**52), b"x")


def test_who_is_remembered_has_a_bound(clock, monkeypatch):
    monkeypatch.setattr(board, "OFFERS_MAX", 3)
    found = Offers()
    for by in range(2, 8):
        found.take(clock.farewell(1, by=by), b"x")
    assert [by for by in range(2, 8) if found.has_left(make_peer(by))] == [5, 6, 7]


def test_gossip_never_makes_an_unreachable_peer_reachable(clock):
    """Its offers are no sign of life: they may have been under way when it died."""
    found = Discovery(make_key(1))
    assert found.accept(BOB, clock.offer(1), b"1")
    found.unreachable(BOB)
    for seq in range(2, 5):
        assert found.accept(BOB, clock.offer(seq), b"x")
        assert found.candidates("mesh.noop") == []
    found.reachable(BOB)
    assert [c.peer for c in found.candidates("mesh.noop")] == [BOB]


# ------------------------------------------------------------------ clocks


@pytest.mark.parametrize("ahead_ms", SKEWS_MS)
def test_an_offer_lives_its_lifetime_though_the_clocks_are_ten_minutes_apart(clock, ahead_ms):
    found = Offers()
    assert found.take(clock.offer(1, ahead_ms=ahead_ms), b"1")
    clock.seconds += 119.9
    assert sellers(found) == [BOB]
    clock.seconds += 0.2
    assert sellers(found) == []


def test_where_clocks_agree_an_offer_ends_everywhere_at_once(clock):
    offer = clock.offer(1)
    clock.seconds += 100
    found = Offers()  # a newcomer's, who hears it from a neighbour
    assert found.take(offer, b"1")
    clock.seconds += 21
    assert sellers(found) == []


@pytest.mark.parametrize(
    ("lifetime_ms", "left", "expected"),
    [
        (120_000, 120_000, 120_000),
        (120_000, 7, 7),
        (120_000, 0, 0),
        (120_000, -1, 120_000),
        (120_000, 120_001, 120_000),
        (120_000, -CLOCK_SKEW_MS_MAX, 120_000),
        (120_000, -CLOCK_SKEW_MS_MAX - 1, None),
        (120_000, 120_000 + CLOCK_SKEW_MS_MAX, 120_000),
        (120_000, 120_001 + CLOCK_SKEW_MS_MAX, None),
        (LIFETIME_MS_MAX, 1, 1),
        (LIFETIME_MS_MAX + 1, 1, None),
        (0, LIFETIME_MS_MAX, LIFETIME_MS_MAX),  # of an earlier version
        (0, LIFETIME_MS_MAX + 1, None),
        (0, -1, None),
    ],
)
def test_what_is_left_of_news(lifetime_ms, left, expected):
    assert left_ms(NOW_MS + left, lifetime_ms, NOW_MS) == expected


def test_a_seller_that_moved_is_held_as_moved_since_its_first_offer_there(clock):
    found = Offers()

    def said(seq, address):
        clock.seconds += 1.0
        offer = msgspec.structs.replace(clock.offer(seq), addresses=(address,))
        assert found.take(offer, b"signed")
        (held,) = found.held()
        return held.moved_unix_ms, offer.not_after_unix_ms

    assert said(1, "/here")[0] == 0
    moved, since = said(2, "/there")
    assert moved == since
    assert said(3, "/there")[0] == since
    again, at = said(4, "/here")
    assert again == at > since
