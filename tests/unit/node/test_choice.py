"""The score: each term tells, the owner's rate settles time against money, and nobody is vetoed."""

from random import Random

import pytest

from aivillage.node import choice
from aivillage.node.choice import Facts, about_as_good, explores, in_order, pick, stays, weigh
from tests.conftest import make_peer

BALANCED = choice.RATES["balanced"]


def facts(peer=2, **changes):
    usual = {"units": 100, "units_per_second": 10.0, "rtt_seconds": 0.01, "neighbour": True}
    return Facts(peer=make_peer(peer), **(usual | changes))


def weighed(peer=2, rate=BALANCED, **changes):
    return weigh(facts(peer, **changes), rate)


def winner(*found, explore=False, seed=1):
    return pick(found, Random(seed), explore=explore).facts.peer


def home(**changes):
    return weighed(1, here=True, rtt_seconds=0.0, **changes)


@pytest.mark.parametrize(
    "worse",
    [
        {"units_per_second": 5.0},
        {"load": 2},
        {"has_room": False},
        {"rtt_seconds": 3.0},
        {"rtt_seconds": None, "units_per_second": 9.8},
        {"wait_seconds": 3.0},
        {"failures": 0.5},
        {"price": 50_000},
    ],
    ids=str,
)
def test_every_term_alone_decides(worse):
    assert winner(weighed(2, **worse), weighed(3)) == make_peer(3)
    assert winner(weighed(3), weighed(2, **worse)) == make_peer(3)


def test_a_queue_before_many_slots_is_a_shorter_wait_than_before_one():
    """100 units at 10 a second: ten seconds for each job that is ahead of ours."""
    assert weighed(load=16).score.wait == 160
    assert weighed(load=16, slots=8).score.wait == 20
    assert weighed(load=7, slots=8).score.wait < weighed(load=8, slots=8).score.wait


def test_what_a_seller_says_of_the_wait_makes_it_look_worse_and_never_better():
    assert weighed(load=8, slots=8, wait_seconds=25.0).score.wait == 25
    assert weighed(load=8, slots=8, wait_seconds=0.0).score.wait == 10
    endless = weighed(wait_seconds=float("inf")).score.wait
    assert endless == choice.WAIT_SECONDS_MAX


def test_who_owes_us_counts_as_a_quarter_faster_and_no_more():
    debtor = weighed(2, owes_us=True)
    assert winner(debtor, weighed(3, units_per_second=12.0)) == make_peer(2)
    assert winner(debtor, weighed(3, units_per_second=13.0)) == make_peer(3)


@pytest.mark.parametrize(("prefer", "chosen"), [("fast", 2), ("balanced", 2), ("cheap", 3)])
def test_the_owners_rate_settles_how_many_seconds_a_credit_is_worth(prefer, chosen):
    """Ten seconds less for 0.05 credits more: worth it at 0.01 a second, and not at 0.001."""
    rate = choice.RATES[prefer]
    quick = weighed(2, rate, price=60_000, units_per_second=10.0)
    cheap = weighed(3, rate, price=10_000, units_per_second=5.0)
    assert winner(quick, cheap) == make_peer(chosen)


def test_the_rate_is_exact_to_the_micro_credit():
    """One second at 0.01 credits a second is worth 10,000 micro-credits, not one more."""
    base, faster = {"units": 20, "units_per_second": 10.0}, {"units": 10, "units_per_second": 10.0}
    assert weighed(2, **base).total == pytest.approx(weighed(3, **faster, price=10_000).total)
    assert weighed(2, **base).total < weighed(3, **faster, price=10_001).total


def test_a_peer_never_measured_is_guessed_at_five_units_a_second_or_worse():
    assert weighed(units_per_second=0.0, guess_seconds=1.0).score.work == 20.0
    assert weighed(units_per_second=0.0, guess_seconds=30.0).score.work == 30.0


def test_a_peer_never_measured_is_no_worse_than_a_slow_one():
    assert winner(weighed(2, units_per_second=0.0), weighed(3, units_per_second=4.0)) == (
        make_peer(2)
    )


def test_the_twentieth_choice_tries_somebody_new_once():
    new = weighed(3, units_per_second=0.0)
    turns = [winner(weighed(2), new, explore=explores(n, [], None)) for n in range(40)]
    assert [n for n, peer in enumerate(turns) if peer == make_peer(3)] == [19, 39]


@pytest.mark.parametrize(("price", "tried"), [(2000, True), (2001, False)])
def test_somebody_new_is_tried_at_twice_the_price_at_most(price, tried):
    new = weighed(3, units_per_second=0.0, price=price)
    assert (winner(weighed(2, price=1000), new, explore=True) == make_peer(3)) == tried


def test_who_failed_is_not_tried_as_new():
    new = weighed(3, units_per_second=0.0, failures=0.3)
    assert winner(weighed(2), new, explore=True) == make_peer(2)


# ------------------------------------------------------------------ here


def test_this_machine_wins_a_tie_and_a_faster_peer_beats_it():
    assert winner(home(), weighed(2)) == make_peer(1)
    assert winner(home(), weighed(2, units_per_second=20.0)) == make_peer(2)
    assert winner(home(), weighed(2, units_per_second=20.0, price=60_000)) == make_peer(1)


def test_work_that_runs_here_makes_this_machine_slower():
    assert winner(home(load=1), weighed(2)) == make_peer(2)


def test_nobody_is_asked_where_no_offer_is_better_than_this_machine():
    assert stays(home(), [weighed(2), weighed(3)], explore=False)
    assert stays(home(), [], explore=False)
    assert not stays(home(), [weighed(2), weighed(3, units_per_second=20.0)], explore=False)
    assert not stays(None, [weighed(2)], explore=False)


def test_against_this_machine_a_peer_is_tried_at_once_where_none_was_measured():
    new = weighed(2, units_per_second=0.0)
    assert explores(0, [new], home())
    assert not stays(home(), [new], explore=True)
    assert not explores(0, [new, weighed(3, units_per_second=1.0)], home())
    assert winner(home(), new, explore=True) == make_peer(2)


@pytest.mark.parametrize(("units", "goes_out"), [(10, False), (11, True)])
def test_what_takes_a_second_here_stays(units, goes_out):
    new = weighed(2, units_per_second=0.0, units=units)
    assert explores(19, [new], home(units=units)) == goes_out


# ------------------------------------------------------------------ the draw


def test_of_two_that_are_about_as_good_the_less_loaded_wins():
    busy, idle = weighed(2, units=1, load=1, units_per_second=25.0), weighed(3, units=1)
    assert busy.total < idle.total
    assert winner(busy, idle) == make_peer(3)


def test_on_fresh_news_the_better_of_two_wins_and_on_old_news_either():
    def winners(age):
        pair = [weighed(2, age_seconds=age), weighed(3, units_per_second=9.0, age_seconds=age)]
        return {winner(*pair, seed=seed) for seed in range(30)}

    assert winners(choice.FRESH_SECONDS) == {make_peer(2)}
    assert winners(choice.FRESH_SECONDS + 0.1) == {make_peer(2), make_peer(3)}


def test_who_is_clearly_worse_never_wins_a_draw():
    pair = [weighed(2, age_seconds=60), weighed(3, units_per_second=7.0, age_seconds=60)]
    assert about_as_good(pair) == pair[:1]
    assert {winner(*pair, seed=seed) for seed in range(30)} == {make_peer(2)}


def test_the_smaller_score_is_drawn_rather_than_the_greater():
    some = [weighed(2), weighed(3, units_per_second=8.0)]
    firsts = [choice._shuffled(some, Random(seed))[0].facts.peer for seed in range(2000)]
    share = firsts.count(make_peer(2)) / 2000
    assert share == pytest.approx(10.0 / 18.0, abs=0.04)


def test_those_that_are_asked_are_drawn_from_all_that_are_about_as_good():
    many = [weighed(n) for n in range(2, 12)]
    asked = {
        one.facts.peer
        for seed in range(30)
        for one in in_order(many, 3, Random(seed), explore=False)[:3]
    }
    assert len(asked) == 10
    assert in_order(many[:3], 3, Random(0), explore=False) == many[:3]


def test_a_thousand_identities_do_not_hide_one_known_seller():
    unknown = [weighed(n, units_per_second=0.0, neighbour=False) for n in range(3, 100)]
    known = weighed(2, units_per_second=1.0)
    assert in_order([*unknown, known], 3, Random(0), explore=False)[0] is known


def test_an_exploring_choice_asks_somebody_new_too():
    known = [weighed(n) for n in range(2, 8)]
    new = weighed(9, units_per_second=0.0, neighbour=False)
    assert in_order([*known, new], 3, Random(0), explore=False)[-1] is new
    assert in_order([*known, new], 3, Random(0), explore=True)[2] is new


# ------------------------------------------------------------------ why


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({"units_per_second": 5.0}, "slower by 10 s"),
        ({"units_per_second": 0.0}, "slower by 10 s, as a guess: never measured"),
        ({"load": 2}, "busier by 20 s"),
        ({"rtt_seconds": 1.01}, "further away by 2 s"),
        ({"failures": 0.5}, "fails more often by 10 s"),
        ({"price": 50_000}, "too dear by 0.05 credits, which count as 5 s"),
    ],
    ids=str,
)
def test_a_loser_is_told_the_term_that_it_lost_by(worse, said):
    assert choice.why_not(weighed(2, **worse), weighed(3)) == said


def test_the_winner_is_told_from_a_drawn_one_and_a_tried_one():
    best, other = weighed(2), weighed(3, units_per_second=9.0)
    assert choice.why_of(best, [best], 0) == "the only one"
    assert choice.why_of(best, [best, other], 0) == "best of 2"
    assert choice.why_of(other, [best, other], 0) == "as good as the best of 2, drawn"
    new = weighed(4, units_per_second=0.0)
    assert "tried" in choice.why_of(new, [best, new], 0)
    assert choice.why_of(new, [new], 0, home()) == "new, so tried once in place of this machine"
    assert choice.why_of(home(), [best, other, new], 0) == "here: faster than the best of 3 peers"
    free = home(units_per_second=9.0)
    dear = [weighed(2, price=50_000), weighed(3, price=60_000)]
    assert choice.why_of(free, dear, 0) == (
        "here: slower than the best of 2 peers by 1.1 s, but free"
    )
    assert choice.why_of(home(), [], 3) == "here: none of 3 peers said yes"
