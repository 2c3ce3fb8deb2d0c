"""Views: what is kept of many offers, and which of them are told."""

import random

import pytest

from aivillage.node import views
from aivillage.node.views import FEW, MIX, VIEW_MAX, ByteBudget, Held
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import (
    HAVE_BYTES,
    OFFERS_PER_ANSWER_MAX,
    Offer,
    OfferedOperation,
)
from aivillage.protocols.types import PeerId

NOW_MS = 1_800_000_000_000
LIFE_MS = 120_000


def offer(by, *names, left_ms=LIFE_MS):
    return Offer(
        seller=PeerId(f"peer-{by}"),
        seq=1,
        not_after_unix_ms=NOW_MS + left_ms,
        addresses=(),
        operations=tuple(OfferedOperation(name=name) for name in names),
    )


def many(count, *names, start=0, **options):
    return [offer(n, *names, **options) for n in range(start, start + count)]


def pressed(offers, *, linked=(), wanted=(), most=VIEW_MAX, seed=1):
    """What is left of them, taken in one after the other."""
    kept, rng = {}, random.Random(seed)
    for each in offers:
        kept[each.seller] = each
        goes = views.crowded_out(kept.values(), lambda p: p in linked, wanted, rng.choice, most)
        if goes is not None:
            del kept[goes]
    return list(kept.values())


@pytest.mark.parametrize("over", [0, 1])
def test_a_view_holds_its_limit_and_no_more(over):
    offers, pick = many(VIEW_MAX + over, "a"), random.Random(1).choice
    goes = views.crowded_out(offers, lambda _peer: False, (), pick, VIEW_MAX)
    assert (goes is not None) == bool(over)


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_offers_of_one_operation_leave_the_rare_one(seed):
    rare = offer("rare", "rag.search")
    honest = many(40, "inference.generate", start=5000)
    offers = [rare, *honest, *many(1000, "mesh.noop")]
    assert rare in pressed(offers, seed=seed)
    kept = pressed(offers[::-1], seed=seed)  # whoever comes first
    assert rare in kept
    assert all(each in kept for each in honest)
    assert len(kept) == VIEW_MAX


def test_operations_share_a_view_evenly_when_all_are_common():
    offers = [each for n in range(1000) for each in (offer(n, "a"), offer(f"b{n}", "b"))]
    kept = pressed(offers)
    assert abs(sum(o.operations[0].name == "a" for o in kept) - VIEW_MAX // 2) <= 1


def test_the_sample_of_one_operation_depends_on_chance_alone():
    samples = [{o.seller for o in pressed(many(400, "a"), seed=seed)} for seed in (1, 2)]
    assert samples[0] != samples[1]
    assert pressed(many(400, "a"), seed=1) == pressed(many(400, "a"), seed=1)


def test_a_rare_operation_among_common_ones_counts():
    both = offer("both", "mesh.noop", "rag.search")
    assert both in pressed([both, *many(1000, "mesh.noop")])


def test_linked_peers_are_kept_beyond_the_limit():
    offers = many(VIEW_MAX + 5, "a")
    linked = {each.seller for each in offers}
    assert len(pressed(offers, linked=linked)) == VIEW_MAX + 5
    others = many(VIEW_MAX + 1, "a", start=5000)
    assert len(pressed([*offers, *others], linked=linked)) == 2 * VIEW_MAX + 5


def test_who_has_more_links_than_a_view_holds_still_hears_of_others():
    offers = many(VIEW_MAX + 5, "a")
    last = offer("last", "a")
    assert last in pressed([*offers, last], linked={each.seller for each in offers})


def test_what_is_looked_for_goes_last_and_is_not_kept_without_end():
    invented = [offer(n, f"invented-{n}") for n in range(300)]
    sought = offer("sought", "rag.search")
    assert sought in pressed([sought, *invented], wanted={"rag.search"})
    flood = many(300, "rag.search", start=1000)
    assert len(pressed([*invented, *flood], wanted={"rag.search"})) == VIEW_MAX


def test_who_does_nothing_does_one_thing():
    rare = offer("rare", "a")
    assert rare in pressed([*many(200), rare])


def held(*offers):
    return [Held(each, each.seller.encode()) for each in offers]


KNOWN = many(FEW, "a", start=9000)
"""So many that an asker is told the rarest first."""


def told(own, theirs, *, unknown=99, bytes_most=10**6, seed=1):
    has, chance = views.heard(views.said(theirs)), random.Random(seed).random
    found = views.worth_sending(held(*own), has, unknown, NOW_MS, bytes_most, chance)
    return [each.offer.seller for each in found]


def test_the_rarest_is_told_first_and_then_what_lives_longest():
    own = [offer(1, "a", left_ms=10), offer(2, "a", left_ms=20), offer(3, "b", left_ms=5)]
    assert told(own, KNOWN) == ["peer-3", "peer-2", "peer-1"]
    assert told(own, KNOWN, unknown=1) == ["peer-3"]
    assert told(own, KNOWN, unknown=0) == []


@pytest.mark.parametrize(("knows", "by_chance"), [(FEW - 1, True), (FEW, False)])
def test_who_knows_few_is_told_anybody(knows, by_chance):
    own = [offer("rare", "b"), *many(30, "a")]
    first = {told(own, KNOWN[:knows], unknown=1, seed=seed)[0] for seed in range(20)}
    assert (len(first) > 10) == by_chance
    assert (first == {"peer-rare"}) != by_chance


@pytest.mark.parametrize(("left_ms", "news"), [(60_000, True), (60_001, False)])
def test_a_known_offer_is_news_when_it_lives_twice_as_long(left_ms, news):
    assert bool(told([offer(1, "a")], [offer(1, "a", left_ms=left_ms)], unknown=0)) == news


def test_an_expired_version_is_renewed():
    assert told([offer(1, "a", left_ms=50)], [offer(1, "a", left_ms=-10)], unknown=0)


@pytest.mark.parametrize(("since_ms", "news"), [(-1, False), (0, False), (1, True)])
def test_where_a_seller_is_now_is_news_to_who_knows_where_it_was(since_ms, news):
    known = offer(1, "a", left_ms=100_000)
    moved = Held(offer(1, "a"), b"1", known.not_after_unix_ms + since_ms)
    has = views.heard(views.said([known]))
    assert bool(views.worth_sending([moved], has, 0, NOW_MS, 10**6, random.random)) == news


@pytest.mark.parametrize("over", [0, 1])
def test_an_answer_has_a_size(over):
    assert len(told(many(OFFERS_PER_ANSWER_MAX + over, "a"), [])) == OFFERS_PER_ANSWER_MAX


def test_an_answer_keeps_within_the_bytes_that_are_left():
    size_bytes = len("peer-10")
    own = many(5, "a", start=10)
    assert len(told(own, [], bytes_most=3 * size_bytes)) == 3
    assert len(told(own, [], bytes_most=3 * size_bytes - 1)) == 2
    assert told(own, [], bytes_most=-1) == []


@pytest.mark.parametrize("cut", [1, HAVE_BYTES - 1])
def test_a_list_that_is_cut_is_an_offence(cut):
    have = views.said(many(2, "a"))
    assert len(views.heard(have)) == 2
    with pytest.raises(PeerError):
        views.heard(have[:-cut])


def test_a_full_view_still_asks_for_some():
    assert views.room(127, 128) == MIX + 1
    assert views.room(128, 128) == views.room(178, 128) == MIX


def test_a_budget_is_what_it_says_over_any_time():
    budget = ByteBudget(100)
    assert budget.take(800, 50.0, own=True)
    assert not budget.take(1, 50.0, own=True)
    assert budget.take(100, 51.0, own=True)
    assert not budget.take(1, 51.0, own=True)
    assert budget.left_bytes(1e6, own=True) == 800
    assert not budget.take(801, 1e6, own=True)


def test_a_quarter_of_a_budget_is_for_our_own_news():
    budget = ByteBudget(100)
    assert not budget.take(601, 50.0)
    assert budget.take(600, 50.0)
    assert not budget.take(1, 50.0)
    assert budget.take(200, 50.0, own=True)
    assert not budget.take(1, 51.9)  # what is our own fills up first
    assert budget.take(1, 52.1)
