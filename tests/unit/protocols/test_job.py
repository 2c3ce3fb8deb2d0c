"""The legal life of a job, and the running hash of what it delivered."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aivillage.protocols import job
from aivillage.protocols.job import ENDED, TABLE, IllegalStepError, JobEvent, State, step

STATES, EVENTS = get_args(State), get_args(JobEvent)
ATTEMPT = bytes(range(16))


@pytest.mark.parametrize(("state", "event"), list(itertools.product(STATES, EVENTS)))
def test_every_pair_is_in_the_table_or_refused(state, event):
    if (state, event) in TABLE:
        assert step(state, event) == TABLE[state, event]
    else:
        with pytest.raises(IllegalStepError, match=f"{state} cannot {event}"):
            step(state, event)


def test_the_undisturbed_life_is_the_one_that_the_docs_draw():
    states = ["new"]
    for event in ("seek", "call", "acknowledged", "finished", "passed", "settled"):
        states.append(step(states[-1], event))
    drawn = "new -> seeking -> calling -> working -> checking -> settling -> done"
    assert " -> ".join(states) == drawn
    assert drawn in job.__doc__


def _reachable(state):
    seen, todo = set(), [state]
    while todo:
        now = todo.pop()
        if now not in seen:
            seen.add(now)
            todo += [after for (before, _), after in TABLE.items() if before == now]
    return seen


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_reached_and_can_end(state):
    assert state in _reachable("new")
    assert _reachable(state) & ENDED


@pytest.mark.parametrize("state", sorted(ENDED))
def test_an_ended_job_stays_as_it_is(state):
    assert _reachable(state) == {state}


@pytest.mark.parametrize("state", sorted(set(STATES) - ENDED - {"settling"}))
def test_a_job_can_fail_or_be_cancelled_until_it_settles(state):
    assert step(state, "fail") == "failed"
    assert step(state, "cancel") == "cancelled"


def test_a_job_that_settles_can_only_be_done():
    assert [after for (state, _), after in TABLE.items() if state == "settling"] == ["done"]


@pytest.mark.parametrize("state", ["calling", "working", "checking"])
def test_a_lost_seller_sends_the_job_looking_again(state):
    assert step(state, "retry") == "seeking"


def test_the_running_hash_is_this_one_forever():
    first = job.running_hash(bytes(32), ATTEMPT, 0, job.token_bytes([1, 2**32 - 1]))
    assert first.hex() == "3e0307433734247226ad35c7af7aa98a7de616ae1914d9de40e7fd8ff16670a7"
    assert (
        job.running_hash(first, ATTEMPT, 1, b"").hex()
        == "46ab724b7554b93a01e345ff628a25bab23ed8e919e7a20429b336600eb94a01"
    )


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_token_bytes_are_four_little_endian_bytes_each(token_ids):
    body = job.token_bytes(token_ids)
    assert [int.from_bytes(body[i : i + 4], "little") for i in range(0, len(body), 4)] == token_ids


@pytest.mark.parametrize(
    "other",
    [
        (b"\1" * 32, ATTEMPT, 0, b"body"),
        (bytes(32), bytes(16), 0, b"body"),
        (bytes(32), ATTEMPT, 1, b"body"),
        (bytes(32), ATTEMPT, 0, b"bodies"),
    ],
)
def test_the_running_hash_depends_on_each_of_its_parts(other):
    assert job.running_hash(*other) != job.running_hash(bytes(32), ATTEMPT, 0, b"body")
