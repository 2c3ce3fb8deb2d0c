"""Gossip: what is heard, of whom, and who hears of us."""

import msgspec
import pytest

from aivillage.node import gossip as gossiping
from aivillage.node.freshness import LIFETIME_MS_MAX
from aivillage.node.gossip import (
    FRAME_BYTES,
    FRESH_MAX,
    GOSSIP_BYTES_MAX,
    HOPS_MAX,
    NEWS_PER_SECOND,
    Gossiper,
)
from aivillage.node.views import ByteBudget
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import Gossip, Offer, TaskAd
from tests.conftest import make_key, make_peer

NOW_MS = 1_800_000_000_000


class Neighbour:
    def __init__(self, number, error=None):
        self.peer = make_peer(number)
        self.heard = []
        self.error = error

    def send(self, message, *, may_ride=False):
        if self.error:
            raise self.error
        self.heard.append(message)


class World:
    """A gossiper with two neighbours and a clock that stands still."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.wall_ms = NOW_MS
        self.news = []
        self.wanted = True
        self.strangers = set()
        monkeypatch.setattr(gossiping.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gossiping.time, "time", lambda: self.wall_ms / 1000)
        self.a, self.b = Neighbour(1), Neighbour(2)
        self.neighbours = [self.a, self.b]
        self.budget = ByteBudget(8192)
        self.kept, self.ads = [], []
        self.gossiper = Gossiper(
            lambda: self.neighbours,
            lambda peer: peer not in self.strangers,
            self.accept,
            self.budget,
        )
        self.gossiper.on_offer = lambda *found: self.kept.append(found)
        self.gossiper.on_ad = lambda *found: self.ads.append(found)

    def accept(self, signer, news, envelope):
        self.news.append((signer, news, envelope))
        return self.wanted

    def receive(self, gossip, source=None):
        self.gossiper.receive((source or self.a).peer, gossip)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def offer(seq=1, by=9, not_after=NOW_MS + 1000):
    body = Offer(
        seller=make_peer(by),
        seq=seq,
        not_after_unix_ms=not_after,
        addresses=("/memory/a",),
        operations=(),
    )
    return Gossip(topic="offer", envelope=seal(make_key(by), "offer", body))


def ad(by=9):
    body = TaskAd(
        buyer=make_peer(by), seq=1, not_after_unix_ms=NOW_MS + 1000, operation="mesh.noop"
    )
    return Gossip(topic="task", envelope=seal(make_key(by), "task", body))


def test_an_offer_of_somebody_else_is_kept_and_not_passed_on(world):
    world.receive(offer())
    assert world.a.heard == world.b.heard == []
    assert [envelope for _, envelope in world.kept] == [offer().envelope]
    assert world.news[0][0] == make_peer(9)


def test_the_same_news_is_taken_once_whoever_brings_it(world):
    world.receive(offer())
    world.receive(offer())
    world.receive(msgspec.structs.replace(offer(), hops=3), world.b)
    assert len(world.news) == len(world.kept) == 1
    world.gossiper.unlearn(offer().envelope)
    world.receive(offer())
    assert len(world.news) == 2


def test_what_is_no_news_to_us_is_not_told_further(world):
    world.wanted = False
    world.receive(offer())
    world.receive(ad())
    assert (len(world.news), world.kept, world.ads) == (2, [], [])


def test_an_ad_is_checked_once_and_its_other_ways_are_heard_too(world):
    world.receive(ad())
    again = msgspec.structs.replace(ad(), hops=3)
    world.receive(again, world.b)
    assert len(world.news) == 1
    assert [(source, gossip) for source, gossip, _ in world.ads] == [
        (world.a.peer, ad()),
        (world.b.peer, again),
    ]
    assert [news is None for _, _, news in world.ads] == [False, True]


def test_our_own_offer_goes_out_and_is_not_taken_back(world):
    mine = offer(by=7)
    world.gossiper.publish(mine.envelope)
    world.receive(msgspec.structs.replace(mine, hops=2))
    assert world.a.heard == world.b.heard == [mine]
    assert world.news == []


@pytest.mark.parametrize("over", [0, 1])
def test_a_fresh_offer_goes_to_a_few_neighbours_and_to_each_in_turn(world, over):
    world.neighbours = [Neighbour(n) for n in range(1, FRESH_MAX + 1 + over)]
    for seq in range(2):
        world.now += 1
        world.gossiper.publish(offer(seq, by=30).envelope)
        assert sum(len(n.heard) for n in world.neighbours) == FRESH_MAX * (seq + 1)
    counts = [len(n.heard) for n in world.neighbours]
    assert max(counts) - min(counts) <= 1


def test_what_is_said_keeps_within_the_budget(world):
    size_bytes = len(offer().envelope) + FRAME_BYTES
    world.budget.take(8192 * 6 - 2 * size_bytes, world.now)
    assert [world.gossiper.say(world.a, offer()) for _ in range(3)] == [True, True, False]
    assert len(world.a.heard) == 2
    world.now += size_bytes / 8192 + 1e-6
    assert world.gossiper.say(world.a, offer())
    assert not world.gossiper.say(world.a, offer())
    world.gossiper.publish(offer().envelope)
    assert len(world.a.heard) == 4
    assert len(world.b.heard) == 1


def test_the_last_hop_is_heard_and_one_beyond_is_not(world):
    world.receive(msgspec.structs.replace(offer(1), hops=HOPS_MAX))
    world.receive(msgspec.structs.replace(offer(2), hops=HOPS_MAX + 1))
    assert [news.seq for _, news, _ in world.news] == [1]


def test_a_topic_of_a_newer_version_is_no_offence(world):
    world.receive(Gossip(topic="weather", envelope=b"?"))
    assert world.news == []


@pytest.mark.parametrize("over", [0, 1])
def test_gossip_has_a_size(world, over):
    too_long = Gossip(topic="offer", envelope=bytes(GOSSIP_BYTES_MAX + over))
    with pytest.raises(PeerError) as caught:
        world.receive(too_long)
    assert (caught.value.code == "TOO_LARGE") == bool(over)


def test_forged_news_is_an_offence(world):
    good = offer().envelope
    with pytest.raises(PeerError):
        world.receive(Gossip(topic="offer", envelope=good[:-1] + bytes([good[-1] ^ 1])))
    assert world.news == []


def test_news_under_a_wrong_topic_is_an_offence_and_hides_nothing(world):
    with pytest.raises(PeerError):
        world.receive(Gossip(topic="task", envelope=offer().envelope))
    world.receive(offer(), world.b)
    assert len(world.news) == 1


@pytest.mark.parametrize(
    ("lifetime_ms", "taken"),
    [(0, 1), (-1, 0), (LIFETIME_MS_MAX, 1), (LIFETIME_MS_MAX + 1, 0)],
)
def test_news_counts_while_it_lives_and_no_longer_than_ten_minutes(world, lifetime_ms, taken):
    world.receive(offer(not_after=NOW_MS + lifetime_ms))
    assert len(world.news) == taken


def test_a_neighbour_has_a_budget_and_what_it_lost_another_may_bring(world):
    for seq in range(NEWS_PER_SECOND + 1):
        world.receive(offer(seq))
    assert (len(world.news), world.gossiper.dropped) == (NEWS_PER_SECOND, 1)
    world.receive(offer(NEWS_PER_SECOND), world.b)
    assert len(world.news) == NEWS_PER_SECOND + 1
    world.now += 1.01 / NEWS_PER_SECOND
    world.receive(offer(NEWS_PER_SECOND + 1))
    assert len(world.news) == NEWS_PER_SECOND + 2
    world.receive(offer(NEWS_PER_SECOND + 2))
    assert world.gossiper.dropped == 2
    world.gossiper.forget(world.a.peer)
    world.receive(offer(NEWS_PER_SECOND + 3))
    assert len(world.news) == NEWS_PER_SECOND + 3


@pytest.mark.parametrize(
    "error", [PeerError("gone", code="PEER_LOST"), RequestError("no", code="TOO_LARGE")]
)
def test_a_neighbour_that_takes_nothing_costs_the_others_nothing(world, error):
    world.a.error = error
    world.gossiper.publish(offer().envelope)
    assert len(world.b.heard) == 1


def test_what_is_remembered_has_a_bound(world, monkeypatch):
    monkeypatch.setattr(gossiping, "SEEN_MAX", 3)
    for seq in range(5):
        world.receive(offer(seq))
    assert len(world.gossiper._seen) == 3


def test_a_stranger_tells_us_nothing_and_a_member_may_bring_the_same(world):
    news = offer()
    world.strangers.add(world.a.peer)
    world.receive(news)
    assert world.news == []
    world.receive(news, world.b)
    assert len(world.news) == len(world.kept) == 1


def test_a_strangers_own_offer_is_heard_and_goes_no_further(world):
    world.strangers.add(world.a.peer)
    world.receive(offer(by=1))
    assert [(signer, envelope) for signer, _, envelope in world.news] == [(world.a.peer, b"")]
    assert world.kept == []


def test_our_offer_goes_to_strangers_too(world):
    world.strangers.add(world.a.peer)
    world.gossiper.publish(offer().envelope)
    assert world.a.heard == world.b.heard == [offer()]
