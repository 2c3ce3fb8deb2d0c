"""What a running call is fed: in turn, within its limits, and not waited for without end."""

import pytest
import trio

from aivillage.node.inputs import (
    INPUT_SECONDS,
    INPUTS_WAITING_BYTES_MAX,
    INPUTS_WAITING_MAX,
    Inputs,
)
from aivillage.protocols import codec
from aivillage.protocols.errors import JobError, PeerError, RefusedError, RequestError
from aivillage.protocols.messages import Input, Passed
from aivillage.protocols.types import INPUT_BYTES_MAX


def fed(seq, body=b"x", *, end=False):
    return Input(id=1, seq=seq, body=body, end=end)


async def test_inputs_come_out_in_turn_and_end():
    inputs = Inputs(taken=True)
    for seq in range(3):
        inputs.put(fed(seq, bytes([seq + 1])))
    inputs.put(fed(3, b"", end=True))
    assert [(await inputs.next()).body for _ in range(3)] == [b"\1", b"\2", b"\3"]
    assert await inputs.next() is None


def passed(seq, body=b"y", **said):
    return Passed(ticket=bytes(16), seq=seq, body=body, **said)


async def test_what_the_stage_before_hands_over_is_taken_in_turn_and_once():
    inputs = Inputs(taken=True, is_shared=True)
    inputs.pass_in(passed(0, hops=1, draws=3))
    inputs.put(fed(0))  # of the buyer, who did not know
    inputs.pass_in(passed(2))  # too early
    inputs.put(fed(1))
    inputs.pass_in(passed(1))  # too late
    inputs.pass_in(passed(2))
    inputs.put(fed(3, b"", end=True))
    inputs.pass_in(passed(4))
    got = [await inputs.next() for _ in range(3)]
    assert [(one.body, one.seq, one.is_passed) for one in got] == [
        (b"y", 0, True), (b"x", 1, False), (b"y", 2, True),
    ]  # fmt: skip
    assert (got[0].hops, got[0].draws) == (1, 3)
    assert await inputs.next() is None


async def test_nobody_hands_over_to_a_call_that_its_buyer_feeds_alone():
    alone, left = Inputs(taken=True), Inputs(taken=True, is_shared=True)
    left.put(Input(id=1, seq=0, body=b"x", alone=True))
    for inputs, seq in ((alone, 0), (left, 1)):
        inputs.pass_in(passed(seq))
        inputs.put(fed(seq, b"", end=True))
    assert (await left.next()).body == b"x"
    assert await left.next() is None
    assert await alone.next() is None


async def test_of_a_neighbour_as_much_waits_as_the_limits_and_the_rest_is_dropped():
    inputs = Inputs(taken=True, is_shared=True)
    for seq in range(INPUTS_WAITING_MAX + 1):
        inputs.pass_in(passed(seq))
    await inputs.next()
    inputs.put(fed(INPUTS_WAITING_MAX))  # it was not taken, so this is in turn
    large = Inputs(taken=True, is_shared=True)
    count = INPUTS_WAITING_BYTES_MAX // INPUT_BYTES_MAX
    for seq in range(count + 1):
        large.pass_in(passed(seq, bytes(INPUT_BYTES_MAX)))
    await large.next()
    large.put(fed(count))


async def test_an_input_out_of_turn_after_the_end_or_to_a_call_that_takes_none_is_a_fault():
    inputs = Inputs(taken=True)
    inputs.put(fed(0))
    for seq in (0, 2):
        with pytest.raises(PeerError):
            inputs.put(fed(seq))
    inputs.put(fed(1, end=True))
    with pytest.raises(PeerError):
        inputs.put(fed(2))
    with pytest.raises(PeerError):
        Inputs(taken=False).put(fed(0))


async def test_as_many_inputs_wait_as_the_limit_and_not_one_more():
    inputs = Inputs(taken=True)
    for seq in range(INPUTS_WAITING_MAX):
        inputs.put(fed(seq))
    with pytest.raises(RefusedError, match="64 inputs wait"):
        inputs.put(fed(INPUTS_WAITING_MAX))


async def test_as_many_bytes_wait_as_the_limit_and_not_one_more():
    inputs = Inputs(taken=True)
    count = INPUTS_WAITING_BYTES_MAX // INPUT_BYTES_MAX
    for seq in range(count):
        inputs.put(fed(seq, bytes(INPUT_BYTES_MAX)))
    await inputs.next()
    inputs.put(fed(count, bytes(INPUT_BYTES_MAX)))
    with pytest.raises(RefusedError):
        inputs.put(fed(count + 1))


def test_an_input_has_as_many_bytes_as_the_limit_and_not_one_more():
    longest = fed(0, bytes(INPUT_BYTES_MAX))
    assert codec.decode(codec.frame(longest)[codec.LENGTH_BYTES :]) == longest
    with pytest.raises((PeerError, RequestError)):
        codec.decode(codec.frame(fed(0, bytes(INPUT_BYTES_MAX + 1)))[codec.LENGTH_BYTES :])


async def test_a_buyer_that_feeds_nothing_is_waited_for_a_minute(autojump_clock):
    inputs = Inputs(taken=True)
    began = trio.current_time()
    with pytest.raises(JobError, match="no input came"):
        await inputs.next()
    assert trio.current_time() - began == pytest.approx(INPUT_SECONDS)
