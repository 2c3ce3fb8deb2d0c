"""Who computes which layers: the fewest hops, within every memory, and no promise of speed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.models.inference import catalogue
from aivillage.models.inference.stages import memory_bytes
from aivillage.node import parts
from aivillage.node.split_plan import (
    STAGES_A_PEER,
    Placed,
    StagePeer,
    layers_held,
    may_hold,
    plan,
    stand_bys,
    stand_in,
)
from aivillage.protocols.errors import RefusedError

MODEL = catalogue.known(catalogue.DEFAULT)
MB = 1 << 20
assert STAGES_A_PEER == parts.STAGES_MAX


def peer(name, megabytes=800, speed=300.0, rtt=0.01, **fields):
    return StagePeer(
        peer=name, memory_bytes=megabytes * MB, layers_per_second=speed, rtt_seconds=rtt, **fields
    )


def test_the_whole_model_goes_to_one_peer_that_holds_it_though_two_are_nearer():
    found = plan(
        MODEL, [peer("near1", rtt=0.001), peer("near2", rtt=0.001), peer("far", 2000, rtt=0.5)]
    )
    assert found.stages == (Placed(peer="far", first=0, last=30),)


def test_the_fewest_stages_win_and_of_those_the_fastest():
    found = plan(MODEL, [peer("a"), peer("b", rtt=0.4), peer("c"), peer("d", 650)])
    assert {one.peer for one in found.stages} == {"a", "c"}
    assert [(one.first, one.last) for one in found.stages] == [(0, 15), (15, 30)]
    assert found.tokens_per_second == pytest.approx(1 / (30 / 300 + 0.02))


def test_a_faster_peer_computes_more_layers():
    found = plan(MODEL, [peer("slow", speed=100.0), peer("fast", speed=400.0)])
    shares = {one.peer: one.last - one.first for one in found.stages}
    assert shares["fast"] == layers_held(MODEL, 800 * MB, ends=1) > shares["slow"]


def test_the_plan_says_what_to_expect_and_claims_no_speed():
    why = plan(MODEL, [peer("a"), peer("b", speed=0.0)]).why
    assert "nobody offers SmolLM2-135M-Instruct whole (1021 MB)" in why
    assert "8.3 tokens/s expected (never measured: guessed)" in why
    assert "100 ms of work and 20 ms of travel" in why
    assert "not for speed" in why


def test_peers_that_do_not_hold_it_together_are_refused():
    with pytest.raises(RefusedError, match="do not hold it together"):
        plan(MODEL, [peer("a", 520), peer("b", 520)])
    with pytest.raises(RefusedError) as refusal:
        plan(MODEL, [])
    assert refusal.value.code == "NO_PEER"


def test_a_model_whose_layers_are_not_known_is_not_split():
    import msgspec

    assert not may_hold(msgspec.structs.replace(MODEL, layers=0), [peer("a", 9000)])
    with pytest.raises(RefusedError, match="cannot be split"):
        plan(msgspec.structs.replace(MODEL, layers=0), [peer("a", 9000)])


def test_measurements_that_differ_little_move_no_layers():
    plans = {
        plan(MODEL, [peer("a", speed=s), peer("b", speed=t), peer("c", speed=300.0)]).stages
        for s, t in ((300, 300), (310, 290), (290, 310))
    }
    assert len(plans) == 1


BEFORE = (Placed(peer="b", first=0, last=14), Placed(peer="a", first=14, last=30))


@pytest.mark.parametrize(
    ("peers", "is_kept"),
    [
        ([peer("a"), peer("b"), peer("c")], True),
        ([peer("a"), peer("b"), peer("c", rtt=0.0), peer("d", rtt=0.0)], True),
        ([peer("a"), peer("b", speed=151.0), peer("c"), peer("d")], True),
        ([peer("a"), peer("b", speed=80.0), peer("c"), peer("d")], False),
        ([peer("a"), peer("b", failures=0.5), peer("c")], False),
        ([peer("a"), peer("b", failures=0.4), peer("c")], True),
        ([peer("a"), peer("c")], False),
        ([peer("a", 650), peer("b"), peer("c")], False),
        ([peer("a"), peer("b"), peer("whole", 2000)], False),
    ],
)
def test_the_last_plan_is_kept_while_it_can_be_and_is_nearly_as_good(peers, is_kept):
    assert (plan(MODEL, peers, BEFORE).stages == BEFORE) is is_kept


def test_a_plan_in_which_one_peer_came_to_have_two_stages_is_not_kept():
    both = (Placed(peer="a", first=0, last=15), Placed(peer="a", first=15, last=30))
    assert {one.peer for one in plan(MODEL, [peer("a"), peer("b")], both).stages} == {"a", "b"}


@given(
    st.lists(
        st.builds(
            peer,
            st.uuids().map(str),
            st.integers(300, 1200),
            st.floats(1, 1000),
            st.floats(0, 1),
        ),
        max_size=6,
    )
)
def test_every_plan_covers_the_model_once_and_fits_every_memory(peers):
    try:
        found = plan(MODEL, peers)
    except RefusedError:
        return
    assert [one.first for one in found.stages] == [0, *(one.last for one in found.stages[:-1])]
    assert found.stages[-1].last == MODEL.layers
    memory = {one.peer: one.memory_bytes for one in peers}
    assert may_hold(MODEL, peers)
    for one in found.stages:
        assert memory_bytes(MODEL, one.first, one.last) <= memory[one.peer]


@pytest.mark.parametrize("ends", [0, 1, 2])
def test_as_many_layers_are_held_as_fit_and_not_one_more(ends):
    first, last = {0: (1, 6), 1: (0, 5), 2: (0, 30)}[ends]
    needed = memory_bytes(MODEL, first, last)
    assert layers_held(MODEL, needed, ends=ends) == last - first
    assert layers_held(MODEL, needed - 1, ends=ends) == last - first - 1


def test_a_stand_in_is_outside_of_the_chain_where_there_is_one():
    lost = Placed(peer="a", first=0, last=15)
    others = [peer("b", rtt=0.001), peer("c", rtt=0.2), peer("tiny", 500), peer("a")]
    assert stand_in(MODEL, others, lost, ["b"]).peer == "c"
    assert stand_in(MODEL, others[:1], lost, ["b"]).peer == "b"
    with pytest.raises(RefusedError, match="nobody"):
        stand_in(MODEL, others[2:], lost, ["b"])


def test_who_has_the_layers_loaded_stands_in_before_who_is_nearer():
    lost = Placed(peer="a", first=0, last=15)
    others = [peer("near", rtt=0.001), peer("ready", rtt=0.2), peer("tiny", 500)]
    assert stand_in(MODEL, others, lost, []).peer == "near"
    assert stand_in(MODEL, others, lost, [], "ready").peer == "ready"
    assert stand_in(MODEL, others, lost, [], "gone").peer == "near"
    assert stand_in(MODEL, others, lost, [], "tiny").peer == "near"


def test_stand_bys_are_outside_of_the_chain_with_room_and_whoever_has_less_comes_first():
    stage = Placed(peer="a", first=0, last=15)
    peers = [peer("a"), peer("b"), peer("c", rtt=0.001), peer("d", rtt=0.2), peer("tiny", 500)]
    chain = Counter(a=STAGES_A_PEER, b=STAGES_A_PEER)

    def found(**busy):
        return [one.peer for one in stand_bys(MODEL, peers, stage, chain + Counter(busy))]

    assert found() == ["c", "d"]
    assert found(c=STAGES_A_PEER - 1) == ["d", "c"]
    assert found(c=STAGES_A_PEER) == ["d"]


@given(
    st.lists(
        st.builds(peer, st.uuids().map(str), st.integers(600, 1000), st.floats(30, 1000)),
        min_size=2,
        max_size=4,
    ),
    st.floats(30, 1000),
)
def test_a_split_is_never_said_to_be_faster_than_the_whole_at_its_fastest_peer(peers, speed):
    """And where one peer holds the model, it is not split, however slow that peer is."""
    try:
        found = plan(MODEL, peers)
    except RefusedError:
        return
    assert len(found.stages) > 1
    fastest = max(peers, key=lambda one: one.speed)
    whole = plan(MODEL, [peer(fastest.peer, 4000, fastest.speed)])
    assert found.tokens_per_second <= whole.tokens_per_second * (1 + 1e-9)
    alone = plan(MODEL, [*peers, peer("whole", 4000, speed)])
    assert [one.peer for one in alone.stages] == ["whole"]
    assert "split" not in alone.why
