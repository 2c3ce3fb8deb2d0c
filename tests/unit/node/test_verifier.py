"""Which results are done again, what two answers say of each other, and what a bad one costs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.node import verifier
from aivillage.node.verifier import (
    ALLOWANCE_MICRO_CREDITS,
    CHANCE_MIN,
    CUT_OFF_SECONDS,
    CUT_OFF_SECONDS_MAX,
    TRUSTED_FROM,
    Answer,
    CutOff,
    Share,
    Trust,
    compare,
    cut_off_seconds,
    judge,
    room,
)
from aivillage.protocols.types import AttemptId, PeerId


def share(seller, first, count, kernel="k", identical="guaranteed"):
    return Share(
        attempt=AttemptId(seller.encode()), seller=PeerId(seller), kernel=kernel,
        identical=identical, first=first, count=count,
    )  # fmt: skip


def made(ids, *shares):
    return Answer(token_ids=tuple(ids), shares=shares or (share("a", 0, len(ids)),))


@pytest.mark.parametrize(
    ("count", "chance"),
    [(0, 1.0), (TRUSTED_FROM - 1, 1.0), (TRUSTED_FROM, 0.1), (50, 0.02), (100, 0.01), (101, 0.01)],
)
def test_all_are_done_again_below_ten_and_then_one_in_count(count, chance):
    assert Trust(count=count).chance == pytest.approx(chance)


@given(st.integers(0, 10**9))
def test_there_is_a_floor_below_which_no_chance_ever_sinks(count):
    assert CHANCE_MIN <= Trust(count=count).chance <= 1


def test_a_count_moves_only_on_results_that_were_done_again():
    trust = Trust(count=4, done=4, checked=4)
    assert trust.after_done() == Trust(count=4, done=5, checked=4)
    assert trust.after_same() == Trust(count=5, done=4, checked=5)
    assert trust.after_wrong() == Trust(count=0, done=4, checked=5, failed=1)
    assert Trust(count=40).after_unsettled() == Trust(count=TRUSTED_FROM - 1, unsettled=1)


def test_each_wrong_result_costs_four_times_as_long_up_to_a_month():
    assert [cut_off_seconds(n) / CUT_OFF_SECONDS for n in (1, 2, 3)] == [1, 4, 16]
    assert cut_off_seconds(6) == CUT_OFF_SECONDS_MAX == cut_off_seconds(10**6)
    assert CutOff(1, 5.0, 6.0).after_wrong(100.0) == CutOff(2, 100.0, 100.0 + 4 * 3600)


def test_checks_may_cost_a_part_of_what_jobs_did_and_the_allowance():
    assert room(0, 0, 50) == ALLOWANCE_MICRO_CREDITS
    assert room(1000, ALLOWANCE_MICRO_CREDITS, 50) == 500
    assert room(1000, ALLOWANCE_MICRO_CREDITS + 500, 50) == 0
    assert room(0, 10**9, 50) == 0


def test_two_of_one_class_are_compared_token_by_token():
    assert compare(made([1, 2, 3]), made([1, 2, 3])) == ("same", 3)
    assert compare(made([1, 2, 3]), made([1, 9, 3])) == ("different", 1)
    assert compare(made([1, 2]), made([1, 2, 3])) == ("different", 2)


@pytest.mark.parametrize(
    "other",
    [share("b", 0, 3, kernel="l"), share("b", 0, 3, identical="best effort"), share("b", 0, 3, "")],
)
def test_what_is_not_of_one_class_or_guarantees_nothing_is_not_compared(other):
    assert compare(made([1, 2, 3]), made([9, 9, 9], other)) == ("best effort", 0)
    assert compare(made([9, 9, 9], other), made([1, 2, 3])) == ("best effort", 0)


def test_what_is_said_of_the_tokens_is_compared_too():
    said = bytes(range(16))
    first = msgspec.structs.replace(made([1, 2]), logprobs=said)
    assert compare(first, first) == ("same", 2)
    other = msgspec.structs.replace(first, logprobs=said[:-1] + b"?")
    assert compare(first, other) == compare(other, first) == ("different", 1)
    assert compare(first, made([1, 2])) == ("different", 0)


def test_of_an_answer_that_went_on_in_another_class_only_the_beginning_counts():
    mixed = made([1, 2, 9, 9], share("a", 0, 2), share("b", 2, 2, kernel="l"))
    assert compare(mixed, made([1, 2, 3, 4])) == ("same", 2)
    assert compare(mixed, made([1, 7, 3, 4])) == ("different", 1)
    assert mixed.sellers() == (PeerId("a"),)


def test_the_maker_of_a_token_is_who_delivered_it_and_of_the_end_who_ended():
    answer = made([1, 2, 3, 4], share("a", 0, 2), share("b", 2, 2))
    assert [answer.maker_of(n).seller for n in range(6)] == ["a", "a", "b", "b", "b", "b"]


def test_two_of_three_decide_and_three_that_differ_accuse_nobody():
    one, other, third = made([1]), made([2]), made([3])
    assert judge(one, other, one) == "second"
    assert judge(one, other, other) == "first"
    assert judge(one, other, third) == "nobody"
    assert judge(one, other, None) == "nobody"


def test_a_third_of_another_class_decides_nothing():
    foreign = made([2], share("c", 0, 1, kernel="l"))
    assert judge(made([1]), made([2]), foreign) == "nobody"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_comparing_is_symmetric_and_same_means_equal(ids, data):
    others = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    assert compare(made(ids), made(others)) == compare(made(others), made(ids))
    assert (compare(made(ids), made(others))[0] == "same") == (ids == others)


def test_trust_costs_at_most_one_in_ten_of_what_trusted_peers_do():
    assert max(Trust(count=n).chance for n in range(TRUSTED_FROM, 1000)) <= 0.1
    assert verifier.CHANCE_MIN > 0
