"""When guesses pay: by the time of rounds and guesses, by what was right, and by their price."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.models.inference.pace import ROUNDS_MIN, ROUNDS_WITHOUT_MAX, Pace

FAR, NEAR = 0.25, 0.03
"""Seconds of a round at 50 ms a way, and on one machine."""
SECOND = 10_000
ROW = 300


def pace_of(round_seconds, guess_seconds, *, row_price=ROW, second_price=SECOND):
    pace = Pace(row_price=row_price, second_price=second_price)
    for _ in range(ROUNDS_MIN):
        pace.round_took(round_seconds, 0)
    pace.guessed(3 * guess_seconds, 3)
    return pace


def test_nothing_is_guessed_before_rounds_and_guesses_were_measured():
    pace = Pace(row_price=ROW, second_price=SECOND)
    assert pace.worth(15) == 0
    pace.guessed(0.06, 3)
    assert pace.worth(15) == 0
    for _ in range(ROUNDS_MIN):
        pace.round_took(FAR, 0)
    assert pace.worth(15) > 0


def test_far_away_it_guesses_and_beside_fast_stages_it_does_not():
    assert pace_of(FAR, 0.02).worth(15) > 0
    assert pace_of(NEAR, 0.02).worth(15) == 0


def test_who_is_always_right_guesses_ever_more_and_who_is_wrong_stops():
    right, wrong = pace_of(FAR, 0.02), pace_of(FAR, 0.02)
    counts = []
    for _ in range(12):
        made = right.worth(15)
        right.checked(made, made)
        counts.append(made)
        wrong.checked(wrong.worth(15), 0)
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert wrong.worth(15) == 0


def test_who_stopped_is_tried_again_a_while_later():
    pace = pace_of(FAR, 0.02)
    while made := pace.worth(15):
        pace.checked(made, 0)
    for _ in range(ROUNDS_WITHOUT_MAX):
        assert pace.worth(15) == 0
        pace.checked(0, 0)
    assert pace.worth(15) > 0


def test_an_owner_to_whom_time_is_worth_little_buys_no_rows_for_it():
    assert pace_of(FAR, 0.02, second_price=1_000).worth(15) == 0
    dear, free = pace_of(FAR, 0.02, row_price=1_000), pace_of(FAR, 0.02, row_price=0)
    assert dear.worth(15) < free.worth(15)


def test_rows_that_take_long_in_the_stages_are_no_gain():
    pace = pace_of(FAR, 0.02)
    for _ in range(8):
        pace.round_took(FAR + 3 * 0.1, 3)
    assert pace.worth(15) == 0


def test_one_round_that_stood_still_says_little_and_a_faster_one_with_guesses_counts():
    pace = pace_of(NEAR, 0.02)
    pace.round_took(5.0, 0)
    assert pace.round_seconds < 2 * NEAR
    far = pace_of(FAR, 0.02)
    for _ in range(12):
        far.round_took(NEAR, 3)
    assert far.worth(15) == 0


@given(
    st.floats(0.001, 10), st.floats(0.0001, 10), st.integers(0, 15),
    st.lists(st.integers(0, 15), max_size=40),
)  # fmt: skip
def test_it_never_wants_more_than_there_is_place_for(round_seconds, guess_seconds, most, rights):
    pace = pace_of(round_seconds, guess_seconds)
    for right in rights:
        made = pace.worth(most)
        assert 0 <= made <= most
        pace.checked(made, min(made, right))


@pytest.mark.parametrize("count", [0, 1])
def test_guesses_that_did_not_come_took_their_time(count):
    pace = Pace(row_price=ROW, second_price=SECOND)
    pace.guessed(0.5, count)
    assert pace.guess_seconds == 0.5
