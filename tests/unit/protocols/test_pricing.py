"""Terms x usage -> micro-credits; nothing is paid twice, nothing is free by accident."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols.errors import RequestError
from aivillage.protocols.pricing import UNITS_MAX, Terms, dearest_unit, price, price_of_rest
from aivillage.protocols.types import AMOUNT_MAX

TERMS = Terms(prices_micro_credits={"prompt_quads": 3, "output_tokens": 269, "free": 0})
UNITS = st.sampled_from(sorted(TERMS.prices_micro_credits))
USAGE = st.dictionaries(UNITS, st.integers(0, 10**9))


def test_a_usage_costs_the_sum_of_its_units():
    assert price(TERMS, {"prompt_quads": 10, "output_tokens": 2, "free": 5}) == 568


def test_nothing_costs_nothing():
    assert price(TERMS, {}) == 0
    assert price(Terms(prices_micro_credits={}), {}) == 0


def test_a_unit_without_a_price_is_refused_even_if_none_of_it_was_used():
    with pytest.raises(RequestError, match="gpu_seconds"):
        price(TERMS, {"gpu_seconds": 0})


@pytest.mark.parametrize("function", [price, lambda t, u: price_of_rest(t, u, {})])
def test_a_negative_count_is_refused(function):
    with pytest.raises(RequestError):
        function(TERMS, {"output_tokens": 5, "free": -1})


def test_the_largest_price_is_accepted_and_one_more_is_not():
    terms = Terms(prices_micro_credits={"all": AMOUNT_MAX, "one": 1})
    assert price(terms, {"all": 1}) == AMOUNT_MAX
    with pytest.raises(RequestError) as caught:
        price(terms, {"all": 1, "one": 1})
    assert caught.value.code == "TOO_LARGE"


@pytest.mark.parametrize("bad", [-1, AMOUNT_MAX + 1])
def test_a_price_out_of_range_makes_no_terms(bad):
    with pytest.raises(ValueError, match="between 0"):
        Terms(prices_micro_credits={"a": bad})
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"prices_micro_credits": {"a": bad}}, Terms)


def test_terms_name_at_most_so_many_units():
    Terms(prices_micro_credits={str(n): 1 for n in range(UNITS_MAX)})
    with pytest.raises(ValueError, match="at most"):
        Terms(prices_micro_credits={str(n): 1 for n in range(UNITS_MAX + 1)})


def test_what_an_earlier_attempt_delivered_is_not_paid_again():
    usage = {"prompt_quads": 10, "output_tokens": 40}
    done = {"prompt_quads": 10, "output_tokens": 15}
    assert price_of_rest(TERMS, usage, done) == 25 * 269


def test_having_done_more_than_the_usage_earns_no_refund():
    assert price_of_rest(TERMS, {"output_tokens": 1}, {"output_tokens": 9, "unheard": 4}) == 0


def test_a_negative_done_does_not_raise_the_bill():
    with pytest.raises(RequestError, match="negative"):
        price_of_rest(TERMS, {"output_tokens": 1}, {"output_tokens": -9})


@given(USAGE)
def test_with_nothing_done_the_rest_is_the_whole(usage):
    assert price_of_rest(TERMS, usage, {}) == price(TERMS, usage)


@given(st.lists(USAGE, min_size=1, max_size=6))
def test_however_often_a_job_moves_each_unit_is_paid_once(steps):
    """Attempt n delivers up to the running total of `steps[:n]` and bills what is new in it."""
    total, paid = {}, 0
    for step in steps:
        before = dict(total)
        for unit, count in step.items():
            total[unit] = total.get(unit, 0) + count
        paid += price_of_rest(TERMS, total, before)
    assert paid == price(TERMS, total)


@given(USAGE, USAGE, UNITS)
def test_more_work_never_costs_less(usage, done, unit):
    more = usage | {unit: usage.get(unit, 0) + 1}
    assert price_of_rest(TERMS, more, done) >= price_of_rest(TERMS, usage, done)


def test_the_dearest_unit_is_the_smallest_step_of_the_bill():
    assert dearest_unit(TERMS) == 269
    assert dearest_unit(Terms(prices_micro_credits={})) == 0
