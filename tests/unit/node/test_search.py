"""Search: an ad on its way, and its answer back."""

import msgspec
import pytest

from aivillage.node import search as searching
from aivillage.node.discovery import Discovery
from aivillage.node.freshness import CLOCK_SKEW_MS_MAX
from aivillage.node.gossip import HOPS_MAX, Gossiper
from aivillage.node.records import Work
from aivillage.node.search import ADS_MAX, ANSWERS_MAX, PASSES_MAX, WALKERS, Search
from aivillage.node.views import ByteBudget
from aivillage.protocols.envelope import seal
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import Gossip, Offer, OfferedOperation
from tests.conftest import make_key, make_peer


class Neighbour:
    def __init__(self, number):
        self.peer = make_peer(number)
        self.heard = []

    def send(self, message, *, may_ride=False):
        self.heard.append(message)


class Node:
    """The search of node 1, with neighbours 2 and on."""

    def __init__(self, count=3, bytes_per_second=10**6):
        self.members = [Neighbour(2 + n) for n in range(count)]
        self.discovery = Discovery(make_key(1))
        self.gossiper = Gossiper(
            lambda: self.members,
            lambda _peer: True,
            self.discovery.accept,
            ByteBudget(bytes_per_second),
        )
        self.search = Search(lambda: self.members, self.gossiper, self.discovery)
        self.gossiper.on_offer = self.search.on_offer

    def receive(self, gossip, source=None):
        self.gossiper.receive((source or self.members[0]).peer, gossip)

    def heard(self, topic):
        return [[g for g in member.heard if g.topic == topic] for member in self.members]


def ad(operation="rag.search", by=40, hops=0, seconds=10.0):
    envelope = Discovery(make_key(by)).make_task_ad(operation, seconds)[1]
    return Gossip(topic="task", envelope=envelope, hops=hops)


def offer(by=50, operation="rag.search", seconds=60.0):
    body = msgspec.structs.replace(
        msgspec.convert({"seller": make_peer(by), "seq": 1, "not_after_unix_ms": 0,
                         "addresses": (), "operations": ()}, Offer),
        not_after_unix_ms=int((searching.time.time() + seconds) * 1000),
        operations=(OfferedOperation(name=operation),),
    )  # fmt: skip
    return Gossip(topic="offer", envelope=seal(make_key(by), "offer", body))


def test_an_ad_that_nobody_here_answers_walks_on_to_one_other_member():
    node = Node()
    node.receive(ad())
    first, *others = node.heard("task")
    assert first == []
    assert [gossip.hops for heard in others for gossip in heard] == [1]


@pytest.mark.parametrize("over", [0, 1])
def test_an_ad_ends_at_its_last_hop(over):
    node = Node()
    node.receive(ad(hops=HOPS_MAX - 1 + over))
    assert sum(map(len, node.heard("task"))) == 1 - over


def test_an_ad_that_comes_again_and_again_is_passed_on_a_few_times():
    node, same = Node(), ad()
    for _ in range(PASSES_MAX + 3):
        node.receive(same)
    assert sum(map(len, node.heard("task"))) == PASSES_MAX


def test_our_own_ad_goes_to_so_many_members_and_does_not_come_back():
    node = Node(WALKERS + 1)
    node.search.advertise(*node.discovery.make_task_ad("rag.search", 10.0))
    assert sum(map(len, node.heard("task"))) == WALKERS


def test_who_does_it_answers_where_the_ad_came_from_and_it_walks_no_further():
    node, mine = Node(), offer(by=1)
    node.search.own_offer = {Work("rag.search"): mine.envelope}.get
    node.receive(ad())
    assert node.heard("task") == [[], [], []]
    assert [[g.envelope for g in heard] for heard in node.heard("offer")] == [
        [mine.envelope], [], []
    ]  # fmt: skip


def test_who_knows_a_seller_answers_for_it():
    node, known = Node(), offer()
    node.receive(known, node.members[2])
    node.receive(ad())
    assert node.heard("task") == [[], [], []]
    assert [g.envelope for g in node.members[0].heard] == [known.envelope]


def test_an_answer_goes_back_the_way_of_its_ad():
    node, found = Node(), offer()
    node.receive(ad())
    node.receive(ad("mesh.noop", by=41), node.members[1])
    node.receive(found, node.members[2])
    assert [g.envelope for g in node.heard("offer")[0]] == [found.envelope]
    assert node.heard("offer")[1:] == [[], []]


def test_one_ad_gets_so_many_answers_and_no_more():
    node = Node()
    node.receive(ad())
    for by in range(50, 50 + ANSWERS_MAX + 2):
        node.receive(offer(by), node.members[2])
    assert len(node.heard("offer")[0]) == ANSWERS_MAX


def test_a_forged_ad_is_an_offence_and_goes_nowhere():
    node, good = Node(), ad()
    forged = good.envelope[:-1] + bytes([good.envelope[-1] ^ 1])
    with pytest.raises(PeerError):
        node.receive(msgspec.structs.replace(good, envelope=forged))
    assert node.heard("task") == [[], [], []]


def test_an_expired_ad_is_not_looked_for(monkeypatch):
    node = Node()
    now = searching.time.time()
    monkeypatch.setattr(searching.time, "time", lambda: now - CLOCK_SKEW_MS_MAX / 1000 - 6)
    old = ad(seconds=5.0)
    monkeypatch.setattr(searching.time, "time", lambda: now)
    node.receive(old)
    assert (node.heard("task"), node.search.wanted()) == ([[], [], []], set())
    node.receive(ad(seconds=5.0))
    assert node.search.wanted() == {"rag.search"}
    monkeypatch.setattr(searching.time, "time", lambda: now + 5.1)
    assert node.search.wanted() == set()


@pytest.mark.parametrize("over", [0, 1])
def test_ads_under_way_have_a_bound(over):
    node = Node()
    for n in range(ADS_MAX + over):
        body, envelope = node.discovery.make_task_ad(f"op-{n}", 10.0)
        node.search.advertise(body, envelope)
    assert len(node.search.wanted()) == ADS_MAX
    assert ("op-0" in node.search.wanted()) != bool(over)


def test_a_walk_keeps_within_the_budget():
    node = Node(bytes_per_second=100)
    for by in range(40, 60):
        node.receive(ad(by=by))
    spent_bytes = sum(len(g.envelope) for heard in node.heard("task") for g in heard)
    assert 0 < spent_bytes <= 8 * 100
