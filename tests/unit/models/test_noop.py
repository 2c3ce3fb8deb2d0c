"""mesh.noop: exact in estimate, meter and check."""

import time

import msgspec
import pytest

from aivillage.models.mesh.noop import MODULE, NoopRequest, NoopResult
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import Machine, PartEvent, ResultEvent
from aivillage.protocols.pricing import Terms, price


class Here:
    """A context whose run is cancelled after `polls` polls."""

    def __init__(self, delivered=(), polls=10**9):
        self.delivered, self.polls = delivered, polls
        self.deadline_seconds, self.seed, self.scratch = 0.0, 0, ""

    def cancelled(self):
        self.polls -= 1
        return self.polls < 0


def run(request, context):
    events = list(MODULE.run(request, context))
    return [e for e in events if isinstance(e, PartEvent)], events[-1]


def test_a_call_and_its_parts_cost_ten_each():
    request = NoopRequest(parts=3)
    usage, _ = MODULE.estimate(request, Machine())
    assert price(Terms(prices_micro_credits=MODULE.prices_micro_credits()), usage) == 40


def test_the_meter_counts_what_came_and_never_more_than_was_asked():
    request = NoopRequest(parts=3)
    assert MODULE.meter(request, NoopResult(parts=2)) == {"calls": 1, "parts": 2}
    assert MODULE.meter(request, NoopResult(parts=9)) == {"calls": 1, "parts": 3}


def test_a_run_passes_its_own_check():
    request = NoopRequest(note="hello", parts=2)
    parts, end = run(request, Here())
    assert len(parts) == 2
    assert isinstance(end, ResultEvent)
    result = msgspec.msgpack.decode(end.body, type=NoopResult)
    assert MODULE.check(request, result).ok
    assert not MODULE.check(request, msgspec.structs.replace(result, note="other")).ok


def test_a_run_goes_on_after_the_delivered_parts():
    parts, _ = run(NoopRequest(parts=3), Here(delivered=(b"\x00", b"\x01")))
    assert [part.body for part in parts] == [b"\x02"]


def test_a_cancelled_sleep_ends_soon_and_without_a_result():
    begun = time.monotonic()
    assert list(MODULE.run(NoopRequest(sleep_seconds=30, parts=2), Here(polls=2))) == []
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("fields", [{"sleep_seconds": 61}, {"parts": -1}, {"else": 1}])
def test_a_request_out_of_bounds_is_refused(fields):
    with pytest.raises(RequestError, match="BAD_REQUEST"):
        unpack(NoopRequest, msgspec.msgpack.encode(fields))
