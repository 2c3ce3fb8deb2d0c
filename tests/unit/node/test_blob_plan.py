"""Who brings which chunk: all of them come, few come twice, whoever stops."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.node.blob_plan import COPIES_MAX, Plan, Run
from aivillage.protocols.types import PeerId

ANN, BOB, CYD = map(PeerId, ("ann", "bob", "cyd"))


def test_runs_begin_where_nobody_is_and_leave_out_what_is_had():
    plan = Plan(10, {3})
    assert plan.take(ANN, 16) == Run(0, 3)
    assert plan.take(BOB, 4) == Run(4, 8)
    assert plan.take(CYD, 4) == Run(8, 10)
    assert plan.missing == 9


def test_who_has_nothing_to_do_takes_the_last_half_of_the_longest_run():
    plan = Plan(9, set())
    plan.take(ANN, 9)
    plan.got(ANN, 0)
    assert plan.take(BOB, 16) == Run(5, 9)
    assert [plan.wants(ANN), plan.at_work()] == [True, [ANN, BOB]]
    for index in range(1, 5):
        plan.got(ANN, index)
    assert not plan.wants(ANN), "the rest of its run is another's now"


def test_the_chunk_that_a_source_is_at_is_not_taken_from_it_but_copied_once():
    plan = Plan(1, set())
    plan.take(ANN, 4)
    assert plan.take(BOB, 4) is None
    assert plan.copy(BOB, ANN) == Run(0, 1)
    assert plan.copy(CYD, ANN) is None, f"{COPIES_MAX} bring it"
    plan.got(BOB, 0)
    assert (plan.missing, plan.wants(ANN), plan.at_work()) == (0, False, [])


def test_what_a_lost_source_did_not_bring_is_anybodys():
    plan = Plan(4, set())
    plan.take(ANN, 4)
    plan.got(ANN, 0)
    plan.drop(ANN)
    assert plan.take(BOB, 4) == Run(1, 4)


@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 10_000),
    sources=st.integers(1, 5),
)
def test_all_chunks_come_and_copies_stay_few_whatever_happens(count, seed, sources):
    """Each source may stop at any chunk; one that never does is enough."""
    draw = random.Random(seed)
    plan = Plan(count, {i for i in range(count) if draw.random() < 0.2})
    peers = [PeerId(f"p{n}") for n in range(sources)]
    at: dict[PeerId, Run] = {}
    brought = len(plan.had)
    for _ in range(2_000):
        if not plan.missing:
            break
        peer = draw.choice(peers)
        if peer not in at:
            run = plan.take(peer, draw.randint(1, 16))
            victims = [one for one in plan.at_work() if one != peer]
            if run is None and victims:
                run = plan.copy(peer, draw.choice(victims))
            if run is not None:
                at[peer] = run
        elif peer != peers[0] and draw.random() < 0.1:
            plan.drop(peer)
            del at[peer]
        else:
            first, end = at[peer]
            plan.got(peer, first)
            brought += 1
            at[peer] = Run(first + 1, end)
        for one in list(at):
            if at[one].first == at[one].end or not plan.wants(one):
                plan.drop(one)
                del at[one]
    assert plan.missing == 0
    assert plan.had == set(range(count))
    assert brought <= count + 4 * sources * max(1, count).bit_length()


def test_one_run_at_a_time():
    plan = Plan(4, set())
    plan.take(ANN, 1)
    with pytest.raises(AssertionError):
        plan.take(ANN, 1)
