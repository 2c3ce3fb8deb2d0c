"""Whose turn it is at a seller."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aivillage.node.fair_queue import (
    PEERS_MAX,
    RETRY_SECONDS_MIN,
    WEIGHT_MAX,
    Ask,
    Bounds,
    FairQueue,
)
from aivillage.protocols.errors import RefusedError

MANY = 1 << 16


def queue(places=2, waiting=8, of_one=4, kinds=None):
    bounds = Bounds(places=places, waiting_max=waiting, waiting_peer_max=of_one)
    return FairQueue(bounds, lambda kind: (kinds or {}).get(kind, MANY))


class Door:
    """Numbers asks as they come."""

    def __init__(self, line):
        self.line, self.count, self.now = line, 0, 0.0

    def come(self, peer, **words):
        self.count += 1
        ask = Ask(number=self.count, peer=peer, **words)
        return ask, self.line.enter(ask, self.now)

    def begun(self):
        found = []
        while (ask := self.line.begin(self.now)) is not None:
            found.append(ask)
        return found

    def refused(self, peer, **words):
        with pytest.raises(RefusedError) as caught:
            self.come(peer, **words)
        assert caught.value.code == "BUSY"
        return caught.value


def test_as_many_begin_as_there_are_places_and_the_next_one_waits():
    door = Door(queue(places=2))
    asks = [door.come("a")[0] for _ in range(3)]
    assert door.begun() == asks[:2]
    assert (door.line.running, door.line.waiting, door.line.free("")) == (2, 1, 0)
    door.line.leave(asks[0].number, 1, 1.0)
    assert door.begun() == asks[2:]


def test_a_peer_that_wants_little_does_not_wait_for_one_that_wants_much():
    door = Door(queue(places=1, waiting=64, of_one=64))
    for _ in range(30):
        door.come("heavy")
    first = door.begun()
    light = [door.come("light")[0] for _ in range(3)]
    order = []
    while first:
        door.line.leave(first[0].number, 1, 0.0)
        first = door.begun()
        order += [ask.peer for ask in first]
    assert [at for at, peer in enumerate(order) if peer == "light"] == [0, 2, 4]
    assert len(order) == 29 + len(light)


def test_long_jobs_count_for_what_they_are():
    door = Door(queue(places=1, waiting=64, of_one=64))
    for _ in range(5):
        door.come("long", cost=100)
    for _ in range(20):
        door.come("short", cost=10)
    order = []
    while begun := door.begun():
        order.append(begun[0].peer)
        door.line.leave(begun[0].number, begun[0].cost, 0.0)
    assert order[:22] == 2 * (["long"] + 10 * ["short"])


def test_what_was_not_used_is_given_back_and_what_was_beyond_it_is_charged():
    for used, first in ((10, "claims much"), (100, "honest")):
        door = Door(queue(places=1))
        door.come("claims much", cost=100)
        begun = door.begun()
        door.come("honest", cost=50)
        door.come("claims much", cost=100)
        door.line.leave(begun[0].number, used, 0.0)
        second = door.begun()[0]
        assert second.peer == "honest"  # it had nothing yet
        door.come("honest", cost=50)
        door.line.leave(second.number, 50, 0.0)
        assert door.begun()[0].peer == first, used


def test_a_pause_saves_nothing_up():
    door = Door(queue(places=1, waiting=64, of_one=64))
    for _ in range(10):
        door.come("steady")
    for _ in range(5):
        door.line.leave(door.begun()[0].number, 1, 0.0)
    for _ in range(5):
        door.come("fresh")
    order = []
    while begun := door.begun():
        order.append(begun[0].peer)
        door.line.leave(begun[0].number, 1, 0.0)
    assert order[:4].count("fresh") == 2  # turn by turn, and not five in a row


@pytest.mark.parametrize("weight", range(1, WEIGHT_MAX + 1))
def test_a_weight_is_a_share_and_never_more(weight):
    door = Door(queue(places=1, waiting=256, of_one=128))
    for _ in range(100):
        door.come("heavier", weight=weight)
        door.come("plain")
    order = []
    while begun := door.begun():
        order.append(begun[0].peer)
        door.line.leave(begun[0].number, 1, 0.0)
    served = order[: 10 * (weight + 1)]
    assert abs(served.count("heavier") - 10 * weight) <= 1
    assert abs(served.count("plain") - 10) <= 1


def test_the_owners_own_come_first_and_take_none_of_the_places_for_others():
    door = Door(queue(places=1, kinds={"m": 2}))
    other = door.come("a", kind="m")[0]
    assert door.begun() == [other]
    waits = door.come("b", kind="m")[0]
    mine = door.come("", kind="m", own=True)[0]
    assert door.begun() == [mine]
    again = door.come("", kind="m", own=True)[0]
    door.line.leave(other.number, 1, 0.0)
    assert door.begun() == [again]
    door.line.leave(mine.number, 1, 0.0)
    assert door.begun() == [waits]


def test_what_goes_on_goes_before_new_work_but_not_always():
    door = Door(queue(places=1, waiting=64, of_one=64))
    first = door.come("a")[0]
    door.begun()
    for _ in range(4):
        door.come("new")
    for _ in range(4):
        door.come("claims", goes_on=True)
    order = []
    door.line.leave(first.number, 1, 0.0)
    while begun := door.begun():
        order.append(begun[0].peer)
        door.line.leave(begun[0].number, 1, 0.0)
    assert order[0] == "claims"
    for at in range(0, 8, 2):
        assert "new" in order[at : at + 2]


def test_a_kind_that_is_full_holds_up_no_other():
    door = Door(queue(places=4, kinds={"m": 1}))
    one = door.come("a", kind="m")[0]
    two = door.come("a", kind="m")[0]
    three = door.come("b", kind="other")[0]
    assert door.begun() == [one, three]
    assert (door.line.free("m"), door.line.free("other")) == (0, 2)
    door.line.leave(one.number, 1, 0.0)
    assert door.begun() == [two]


def test_one_peer_has_as_many_waiting_as_it_may_and_not_one_more():
    door = Door(queue(places=1, waiting=8, of_one=3))
    door.come("a")
    door.begun()
    for _ in range(3):
        door.come("a")
    error = door.refused("a")
    assert "yours" in error.message
    assert error.retry_after_seconds >= RETRY_SECONDS_MIN
    assert door.come("b")[1] is None


def test_as_many_wait_as_may_and_the_next_takes_the_place_of_the_longest_lines_last():
    door = Door(queue(places=1, waiting=4, of_one=4))
    door.come("a")
    door.begun()
    waiting = [door.come("a")[0] for _ in range(4)]
    assert door.come("b")[1] == waiting[3]
    assert door.come("b")[1] == waiting[2]
    error = door.refused("b")  # both have two now
    assert "all slots are taken" in error.message
    assert door.line.waiting == 4
    assert door.come("c")[1] is not None
    assert door.line.waiting == 4


def test_where_nobody_may_wait_a_free_place_is_still_taken():
    door = Door(queue(places=1, waiting=0, of_one=0))
    door.come("a")
    door.begun()
    door.refused("b")


def test_the_wait_is_what_is_ahead_at_the_pace_that_was_measured():
    door = Door(queue(places=2, waiting=64, of_one=64))
    probe = Ask(number=10_000, peer="me", cost=10, guess_seconds=100.0)
    assert door.line.wait_seconds(probe, 0.0) == 0.0
    for _ in range(2):
        door.come("a", cost=10)
    first = door.begun()
    door.line.leave(first[0].number, 10, 5.0)  # half a second for a micro-credit
    door.line.leave(first[1].number, 10, 5.0)
    for _ in range(4):
        door.come("a", cost=10)
    door.now = 5.0
    assert len(door.begun()) == 2
    assert door.line.wait_seconds(probe, 5.0) == pytest.approx((5 + 5) / 2)  # it had nothing yet
    assert door.line.wait_seconds(probe, 8.0) == pytest.approx((2 + 2) / 2)
    late = Ask(number=10_001, peer="a", cost=10)
    assert door.line.wait_seconds(late, 5.0) == pytest.approx((5 + 5 + 20 * 0.5) / 2)
    assert door.line.retry_seconds(9.0) == pytest.approx(1.0)


def test_what_a_call_waited_for_after_its_turn_counts_in_nobodys_pace():
    door = Door(queue(places=1))
    one = door.come("a", cost=10)[0]
    door.begun()
    door.line.works(one.number, 60.0)  # its model was loaded until then
    door.line.leave(one.number, 10, 65.0)
    door.come("a", cost=10)
    door.now = 65.0
    door.begun()
    probe = Ask(number=10_000, peer="me", cost=10)
    assert door.line.wait_seconds(probe, 65.0) == pytest.approx(5.0)


def test_those_who_are_away_are_forgotten_beyond_a_bound():
    door = Door(queue(places=1, waiting=4, of_one=4))
    stays = door.come("stays", cost=1)[0]
    door.begun()
    for number in range(PEERS_MAX + 10):
        ask = door.come(f"p{number}")[0]
        door.line.leave(ask.number, 0, 0.0)
        assert len(door.line._meters) <= PEERS_MAX + 1
    door.line.leave(stays.number, 1, 0.0)
    assert not door.line._meters


class Queueing(RuleBasedStateMachine):
    """Whatever comes and goes: bounds hold, nothing stands still, and shares are fair."""

    @initialize(places=st.integers(1, 4), waiting=st.integers(0, 6), of_one=st.integers(0, 4))
    def open(self, places, waiting, of_one):
        self.kinds = {"m": 2}
        self.line = queue(places, waiting, of_one, self.kinds)
        self.open_asks, self.running, self.count, self.now = {}, {}, 0, 0.0

    @rule(
        peer=st.sampled_from("abcd"), cost=st.integers(1, 50), weight=st.integers(1, WEIGHT_MAX),
        kind=st.sampled_from(["", "m"]), goes_on=st.booleans(), own=st.booleans(),
    )  # fmt: skip
    def comes(self, peer, cost, weight, kind, goes_on, own):
        self.count += 1
        ask = Ask(
            number=self.count, peer="" if own else peer, kind=kind, cost=cost, weight=weight,
            goes_on=goes_on, own=own,
        )  # fmt: skip
        had_room = self._fits(ask)
        try:
            dropped = self.line.enter(ask, self.now)
        except RefusedError as error:
            assert not had_room, "refused although a place is free"
            assert error.retry_after_seconds > 0
            return
        if dropped is not None:
            del self.open_asks[dropped.number]
            assert not dropped.own
        self.open_asks[ask.number] = ask
        self._begin()

    def _fits(self, ask):
        of_kind = sum(one.kind == ask.kind for one in self.running.values())
        others = sum(not one.own for one in self.running.values())
        return of_kind < self.kinds.get(ask.kind, MANY) and (
            ask.own or others < self.line.bounds.places
        )

    def _begin(self):
        while (ask := self.line.begin(self.now)) is not None:
            assert self._fits(ask)
            self.running[ask.number] = self.open_asks.pop(ask.number)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), used=st.integers(0, 60))
    def ends(self, data, used):
        number = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[number]
        self.line.leave(number, used, self.now)
        self._begin()

    @precondition(lambda self: self.open_asks)
    @rule(data=st.data())
    def gives_up(self, data):
        number = data.draw(st.sampled_from(sorted(self.open_asks)))
        del self.open_asks[number]
        self.line.leave(number, 0, self.now)
        self._begin()

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def bounds_hold_and_no_place_stands_empty(self):
        if not hasattr(self, "line"):
            return
        others = [ask for ask in self.open_asks.values() if not ask.own]
        assert self.line.waiting == len(others) <= self.line.bounds.waiting_max
        lines = self.line.peers_waiting()
        assert all(n <= self.line.bounds.waiting_peer_max for n in lines.values())
        assert self.line.running <= self.line.bounds.places
        assert not any(self._fits(ask) for ask in self.open_asks.values()), "not work conserving"


TestQueueing = Queueing.TestCase
TestQueueing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=30),
    greedy=st.integers(1, 100),
    places=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_who_has_less_done_waits_for_no_more_than_the_work_that_others_had(costs, greedy, places):
    """No starvation: while one waits, another is served its own share and one job of each more."""
    door = Door(queue(places, waiting=MANY, of_one=MANY))
    for _ in range(4 * len(costs) + 100):
        door.come("greedy", cost=greedy)
    for cost in costs:
        door.come("patient", cost=cost)
    served = {"greedy": 0, "patient": 0}
    running = door.begun()
    left = len(costs)
    while left:
        ask = running.pop(0)
        served[ask.peer] += ask.cost
        left -= ask.peer == "patient"
        door.line.leave(ask.number, ask.cost, 0.0)
        running += door.begun()
        bound = served["patient"] + max(costs) + (places + 1) * greedy
        assert not left or served["greedy"] <= bound
