"""The scheduler of maps: who gets which task when, what is paid at most, and when it gives up."""

from __future__ import annotations

import itertools
import random

import pytest

from aivillage.node import fanout
from aivillage.node.fanout import (
    HERE,
    Begin,
    Drop,
    Ended,
    Fault,
    GiveUp,
    Offered,
    Plan,
    Seen,
    State,
    Stop,
    Tick,
    step,
)
from aivillage.protocols.pricing import Terms
from aivillage.protocols.types import PeerId

ANN, BOB = PeerId("ann"), PeerId("bob")
PRICE = 10
LOST = Fault("PEER_LOST", "gone")
BUSY = Fault("BUSY", "full")
BROKEN = Fault("JOB_FAILED", "a defect")


class Map:
    """A map under test: its state, and every effect so far."""

    def __init__(self, count, *, budget=10**6, each=10**6, parallel=48):
        tasks = {line: {"calls": 1} for line in range(1, count + 1)}
        plan = Plan(tasks=tasks, order=tuple(tasks), budget=budget, each=each, parallel=parallel)
        self.state = State(plan=plan, moved_at=0.0)
        self.running = {}
        self.given_up = {}

    def tell(self, event, now=0.0):
        """The effects of one event."""
        self.state, effects = step(self.state, event, now)
        for effect in effects:
            if isinstance(effect, Begin):
                self.running[effect.number] = effect
            elif isinstance(effect, GiveUp):
                self.given_up[effect.line] = effect.fault.code
        return effects

    def see(self, *, now=0.0, price=PRICE, **places):
        terms = Terms(prices_micro_credits={"calls": price})
        offers = [Offered(peer=PeerId(p), terms=terms, places=n) for p, n in places.items()]
        return self.tell(Seen(tuple(offers)), now)

    def end(self, begin, now, *, spent=None, fault=None):
        del self.running[begin.number]
        spent = (0 if fault or begin.peer == HERE else PRICE) if spent is None else spent
        return self.tell(Ended(number=begin.number, spent=spent, fault=fault), now)

    def at(self, peer):
        return [begin for begin in self.running.values() if begin.peer == peer]

    def lines(self):
        return sorted(begin.line for begin in self.running.values())


def test_every_free_place_gets_a_task_in_order():
    it = Map(10)
    begun = it.see(ann=2, bob=3)
    assert [begin.line for begin in begun] == [1, 2, 3, 4, 5]
    assert (len(it.at(ANN)), len(it.at(BOB))) == (2, 3)


def test_no_more_run_at_once_than_the_owner_said():
    assert len(Map(10, parallel=4).see(ann=8)) == 4


def test_tasks_are_pulled_so_a_fast_worker_does_more_of_them():
    it = Map(12)
    it.see(ann=1, bob=1)
    (slow,) = it.at(BOB)
    for second in range(1, 9):
        it.end(it.at(ANN)[0], float(second))
        assert it.at(BOB)[0] is slow
    assert it.state.done == 8


def test_here_a_task_costs_nothing_and_is_taken_first_where_all_are_free():
    (begin,) = Map(1).tell(Seen((_here(4), _offer(ANN, 4))))
    assert (begin.peer, begin.ceiling) == (HERE, 0)


def _here(places):
    return Offered(peer=HERE, terms=Terms(prices_micro_credits={}), places=places)


def _offer(peer, places, price=PRICE):
    terms = Terms(prices_micro_credits={"calls": price})
    return Offered(peer=peer, terms=terms, places=places)


# ------------------------------------------------------------------ money


def test_the_ceilings_of_what_runs_fit_the_budget_and_the_next_unit_does_not():
    assert len(Map(5, budget=3 * PRICE).see(ann=8)) == 3
    assert len(Map(5, budget=3 * PRICE - 1).see(ann=8)) == 2


def test_a_task_above_its_own_ceiling_is_given_to_nobody():
    assert len(Map(1, each=PRICE).see(ann=1)) == 1
    it = Map(1, each=PRICE - 1)
    it.see(ann=1)
    assert it.given_up == {1: "PRICE_ABOVE_CEILING"}


def test_what_a_task_did_not_cost_is_there_for_the_next_one():
    it = Map(2, budget=PRICE)
    it.see(ann=2)
    it.end(it.at(ANN)[0], 1.0, spent=0)
    assert it.lines() == [2]


def test_when_the_budget_is_spent_the_rest_fails_and_says_why():
    it = Map(3, budget=2 * PRICE)
    it.see(ann=1)
    for second in (1.0, 2.0):
        it.end(it.at(ANN)[0], second)
    assert it.given_up == {3: "PRICE_ABOVE_CEILING"}
    assert it.state.ended
    assert it.state.spent == 2 * PRICE


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_budget_holds_and_every_task_ends_once(seed):
    """Workers come, go, fail, are full and are slow; what they may charge, they charge."""
    draw = random.Random(seed)
    it, count = Map(60, budget=draw.choice([150, 400, 10**6])), 60
    won, ended_twice = set(), []
    now = 0.0
    for _ in itertools.takewhile(lambda _: not it.state.ended, range(20_000)):
        now += draw.random() / 2
        if not it.running or draw.random() < 0.3:
            it.see(now=now, ann=2, bob=3) if draw.random() < 0.8 else it.see(now=now, bob=3)
            continue
        begin = draw.choice(list(it.running.values()))
        fault = draw.choice([None, None, None, LOST, BUSY, BROKEN])
        already = it.state.tries[begin.number].is_dropped
        it.end(begin, now, spent=begin.ceiling if fault in {None, LOST} else 0, fault=fault)
        if fault is None and not already:
            ended_twice += [begin.line] if begin.line in won else []
            won.add(begin.line)
        held = sum(t.ceiling for t in it.state.tries.values())
        assert it.state.spent + held <= it.state.plan.budget
    assert it.state.ended
    assert not ended_twice
    assert len(won) + len(it.given_up) == count
    assert (it.state.done, it.state.failed) == (len(won), len(it.given_up))


# ------------------------------------------------------------------ stragglers


def _one_left(count=4, **plan):
    """All but the first task done in no time; the first one runs since 0."""
    it = Map(count, **plan)
    it.see(ann=1, bob=1)
    for number in range(1, count):
        it.end(it.at(BOB)[0], number / 100)
    assert it.lines() == [1]
    return it


def test_a_straggler_is_begun_again_elsewhere_after_two_and_a_half_medians_and_not_sooner():
    it = _one_left()
    it.state = fanout._replace(it.state, took=(2.0, 2.0, 2.0))
    assert it.tell(Tick(), 4.99) == ()
    (second,) = it.tell(Tick(), 5.0)
    assert (second.line, second.peer) == (1, BOB)
    assert it.tell(Tick(), 50.0) == (), "and only once"


def test_nobody_is_slow_while_tasks_wait_or_too_few_are_done():
    it = Map(3)
    it.see(ann=1)
    assert it.tell(Tick(), 100.0) == ()
    it = Map(2)
    it.see(ann=1, bob=1)
    it.end(it.at(BOB)[0], 0.1)
    assert it.tell(Tick(), 100.0) == ()


@pytest.mark.parametrize("first_wins", [True, False])
def test_the_first_result_wins_and_the_other_try_is_dropped(first_wins):
    it = _one_left()
    first, (second,) = it.at(ANN)[0], it.tell(Tick(), 10.0)
    winner, loser = (first, second) if first_wins else (second, first)
    effects = it.end(winner, 11.0)
    assert effects == (Drop(loser.number),)
    assert not it.state.ended, "what the loser costs is not known yet"
    assert it.end(loser, 11.1, spent=0, fault=Fault("CANCELLED", "")) == ()
    assert it.state.ended
    assert (it.state.done, it.state.failed, it.state.spent) == (4, 0, 4 * PRICE)


def test_a_second_try_needs_room_in_the_budget():
    assert len(_one_left(budget=5 * PRICE).tell(Tick(), 100.0)) == 1
    assert _one_left(budget=5 * PRICE - 1).tell(Tick(), 100.0) == ()


def test_a_task_whose_second_try_fails_waits_for_the_first():
    it = _one_left()
    (second,) = it.tell(Tick(), 10.0)
    it.end(second, 10.5, fault=BROKEN)
    assert it.lines() == [1]
    assert it.state.waiting == 0


# ------------------------------------------------------------------ what goes wrong


def test_a_lost_workers_tasks_go_on_elsewhere_before_any_new_one():
    it = Map(8)
    it.see(ann=2, bob=2)
    lost = it.at(ANN)
    for begin in lost:
        it.end(begin, 1.0, fault=LOST)
    done = it.at(BOB)[0]
    it.end(done, 1.5)
    assert it.at(BOB)[-1].line in {begin.line for begin in lost}
    assert not it.at(ANN)


def test_a_full_worker_has_as_many_places_as_it_works_on_and_gets_one_more_later():
    it = Map(40)
    it.see(ann=6)
    for begin in it.at(ANN)[4:]:
        it.end(begin, 0.1, fault=BUSY)
    assert len(it.at(ANN)) == 4
    for second in range(30):
        it.end(it.at(ANN)[0], 1.0 + second)
    assert len(it.at(ANN)) > 4


def test_a_worker_that_said_too_little_is_found_out():
    it = Map(40)
    it.see(ann=1)
    for second in range(4):
        it.end(it.at(ANN)[0], 1.0 + second)
    assert len(it.at(ANN)) >= 2


def test_who_takes_nothing_is_asked_ever_more_seldom():
    it, asked = Map(1), []
    it.see(ann=1)
    now = 0.0
    while now < 20.0:
        for begin in it.at(ANN):
            asked.append(now)
            it.end(begin, now, fault=BUSY)
        now += 0.1
        it.tell(Tick(), now)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert 5 <= len(asked) <= 9
    assert gaps == sorted(gaps)


def test_a_task_that_three_workers_fail_is_given_up_with_the_last_reason():
    it = Map(1)
    it.see(ann=1, bob=1, cat=1, dan=1)
    for second in range(fanout.FAULTS_MAX):
        assert not it.given_up
        (begin,) = it.running.values()
        it.end(begin, float(second), fault=BROKEN)
    assert it.given_up == {1: "JOB_FAILED"}
    assert it.state.ended


def test_a_task_is_not_given_again_to_who_failed_it():
    it = Map(1)
    it.see(ann=1, bob=1)
    (first,) = it.running.values()
    it.end(first, 1.0, fault=BROKEN)
    (second,) = it.running.values()
    assert second.peer != first.peer
    it.end(second, 2.0, fault=BROKEN)
    assert it.given_up == {1: "JOB_FAILED"}, "nobody is left"


def test_a_task_is_tried_eight_times_where_its_peers_vanish_and_not_a_ninth():
    it = Map(1)
    for second in range(fanout.TRIES_MAX):
        it.see(now=float(second), ann=1)
        assert len(it.running) == 1
        it.end(it.at(ANN)[0], float(second), fault=LOST)
    assert it.given_up == {1: "PEER_LOST"}


def test_where_nobody_comes_all_that_waits_fails_after_a_while():
    it = Map(2)
    it.tell(Seen(()), fanout.PATIENCE_SECONDS - 0.01)
    assert not it.given_up
    it.tell(Tick(), fanout.PATIENCE_SECONDS)
    assert it.given_up == {1: "NO_PEER", 2: "NO_PEER"}
    assert it.state.ended


def test_a_stopped_map_drops_what_runs_and_begins_nothing():
    it = Map(5)
    it.see(ann=2)
    numbers = list(it.running)
    assert it.tell(Stop()) == tuple(Drop(number) for number in numbers)
    assert it.tell(Stop()) == ()
    for begin in it.at(ANN):
        assert it.end(begin, 1.0, fault=Fault("CANCELLED", "")) == ()
    assert it.state.ended
    assert not it.given_up
