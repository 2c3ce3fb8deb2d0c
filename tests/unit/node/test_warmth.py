"""Which model is put away for another one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.node.warmth import (
    HALF_LIFE_SECONDS,
    Use,
    Warm,
    bytes_with,
    slots_that_fit,
    to_unload,
    worth,
)


def warm(name, size, value=0.0, *, busy=False):
    return Warm(name=name, memory_bytes=size, worth=value, is_busy=busy)


def test_what_fits_puts_nobody_away_and_one_byte_more_does():
    assert to_unload([warm("a", 6)], 4, 10) == []
    assert to_unload([warm("a", 6)], 5, 10) == ["a"]


def test_the_least_worth_goes_first_and_no_more_than_must():
    three = [warm("dear", 4, 9.0), warm("cheap", 4, 1.0), warm("middle", 2, 5.0)]
    assert to_unload(three, 3, 10) == ["cheap"]
    assert to_unload(three, 5, 10) == ["cheap", "middle"]


def test_a_small_one_stays_where_a_larger_one_has_to_go_all_the_same():
    assert to_unload([warm("small", 1, 1.0), warm("large", 9, 2.0)], 8, 10) == ["large"]


def test_what_is_at_work_stays():
    assert to_unload([warm("a", 6, busy=True)], 5, 10) is None
    assert to_unload([warm("a", 6, busy=True), warm("b", 3, 99.0)], 4, 10) == ["b"]
    assert to_unload([], 11, 10) is None


def test_an_ask_counts_half_after_ten_minutes_and_a_dear_model_more():
    use = Use().asked(0.0).asked(0.0)
    assert use.now(HALF_LIFE_SECONDS) == pytest.approx(1.0)
    assert worth(use, 269, 0.0) == pytest.approx(538)
    assert worth(use.asked(HALF_LIFE_SECONDS), 1, HALF_LIFE_SECONDS) == pytest.approx(2.0)


models = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 9), st.booleans()), max_size=6).map(
    lambda rows: [warm(str(n), s, w, busy=b) for n, (s, w, b) in enumerate(rows)]
)


@given(models, st.integers(0, 30), st.integers(0, 30))
def test_whoever_goes_is_idle_needed_and_enough(loaded, needed, most):
    sizes = {m.name: m.memory_bytes for m in loaded}
    gone = to_unload(loaded, needed, most)
    if gone is None:
        assert sum(m.memory_bytes for m in loaded if m.is_busy) + needed > most
        return
    kept = sum(sizes.values()) - sum(sizes[name] for name in gone)
    assert kept + needed <= most
    assert not {m.name for m in loaded if m.is_busy} & set(gone)
    assert all(kept + sizes[name] + needed > most for name in gone)


def test_as_many_contexts_as_fit_and_not_one_more():
    """A model of 100 with one context, 10 for each further one."""
    assert [slots_that_fit(100, 10, room, 8) for room in (99, 100, 109, 110, 169, 170, 999)] == [
        0, 1, 1, 2, 7, 8, 8,
    ]  # fmt: skip
    assert bytes_with(100, 10, 8) == 170
    assert slots_that_fit(100, 0, 100, 8) == 8


@given(
    memory=st.integers(1, 10**10), context=st.integers(0, 10**9), room=st.integers(0, 10**11),
    most=st.integers(1, 8),
)  # fmt: skip
def test_what_was_planned_fits_with_every_context_full(memory, context, room, most):
    slots = slots_that_fit(memory, context, room, most)
    assert 0 <= slots <= most
    assert not slots or bytes_with(memory, context, slots) <= room
    assert slots == most or bytes_with(memory, context, slots + 1) > room
