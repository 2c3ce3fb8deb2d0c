"""Gossip: what is passed on, to whom, and what is not."""

import msgspec
import pytest

from aivillage.node import gossip as gossiping
from aivillage.node.freshness import LIFETIME_MS_MAX
from aivillage.node.gossip import (
    GOSSIP_BYTES_MAX,
    HOPS_MAX,
    NEWS_PER_SECOND,
    Gossiper,
)
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import PeerError, RequestError
from aivillage.protocols.messages import Gossip, Offer
from tests.conftest import make_key, make_peer

NOW_MS = 1_800_000_000_000


class Neighbour:
    def __init__(self, number, error=None):
        self.peer = make_peer(number)
        self.heard = []
        self.error = error

    def send(self, message):
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
        self.gossiper = Gossiper(
            lambda: [self.a, self.b], lambda peer: peer not in self.strangers, self.accept
        )

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
        seller=make_peer(by), seq=seq, not_after_unix_ms=not_after, addresses=(), operations=()
    )
    return Gossip(topic="offer", envelope=seal(make_key(by), "offer", body))


def test_news_goes_to_everybody_but_its_bringer_one_hop_older(world):
    world.receive(offer())
    assert world.a.heard == []
    assert world.b.heard == [msgspec.structs.replace(offer(), hops=1)]
    assert world.news[0][0] == make_peer(9)


def test_the_same_news_is_taken_once_whoever_brings_it(world):
    world.receive(offer())
    world.receive(offer())
    world.receive(msgspec.structs.replace(offer(), hops=3), world.b)
    assert (len(world.news), len(world.b.heard), world.a.heard) == (1, 1, [])


def test_what_is_no_news_to_us_is_not_passed_on(world):
    world.wanted = False
    world.receive(offer())
    assert (len(world.news), world.b.heard) == (1, [])


def test_our_own_news_goes_to_all_and_is_not_taken_back(world):
    mine = offer(by=7)
    world.gossiper.publish(mine.topic, mine.envelope)
    world.receive(msgspec.structs.replace(mine, hops=2))
    assert world.a.heard == world.b.heard == [mine]
    assert world.news == []


def test_the_last_hop_is_heard_and_one_beyond_is_not(world):
    world.receive(msgspec.structs.replace(offer(1), hops=HOPS_MAX))
    world.receive(msgspec.structs.replace(offer(2), hops=HOPS_MAX + 1))
    assert [news.seq for _, news, _ in world.news] == [1]


def test_a_topic_of_a_newer_version_is_no_offence(world):
    world.receive(Gossip(topic="weather", envelope=b"?"))
    assert (world.news, world.b.heard) == ([], [])


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
    world.gossiper.publish("offer", offer().envelope)
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
    assert (world.news, world.b.heard) == ([], [])
    world.receive(news, world.b)
    assert len(world.news) == 1
    assert world.a.heard == []


def test_a_strangers_own_offer_is_heard_and_goes_no_further(world):
    world.strangers.add(world.a.peer)
    world.receive(offer(by=1))
    assert [(signer, envelope) for signer, _, envelope in world.news] == [(world.a.peer, b"")]
    assert world.b.heard == []


def test_our_offer_goes_to_everybody_and_what_we_need_to_members_only(world):
    world.strangers.add(world.a.peer)
    world.gossiper.publish("offer", b"o")
    world.gossiper.publish("task", b"t")
    assert [gossip.topic for gossip in world.a.heard] == ["offer"]
    assert [gossip.topic for gossip in world.b.heard] == ["offer", "task"]
