"""mesh.fetch: its terms. What the nodes do is in tests/integration/test_fetch.py."""

from __future__ import annotations

import pytest

from aivillage.models.mesh.fetch import MODULE, FetchRequest, FetchResult
from aivillage.protocols.errors import RequestError
from aivillage.protocols.ports import Machine
from aivillage.protocols.pricing import Terms, price

CID = "00" * 32


def test_a_thousand_chunks_are_what_a_job_may_cost_unasked():
    usage, seconds = MODULE.estimate(FetchRequest(cid=CID, count=1000), Machine())
    assert price(Terms(prices_micro_credits=MODULE.prices_micro_credits()), usage) == 100_000
    assert seconds > 0


def test_the_meter_counts_no_more_than_was_asked_for_between_nodes():
    asked = FetchRequest(cid=CID, count=4)
    assert MODULE.meter(asked, FetchResult(mebibytes=9)) == {"mebibytes": 4}
    assert MODULE.meter(asked, FetchResult(mebibytes=3)) == {"mebibytes": 3}
    assert MODULE.meter(FetchRequest(cid=CID), FetchResult(mebibytes=9)) == {"mebibytes": 9}
    assert not MODULE.check(asked, FetchResult(mebibytes=5)).ok
    assert MODULE.check(asked, FetchResult(mebibytes=4)).ok


def test_no_worker_runs_it():
    with pytest.raises(RequestError, match="by itself"):
        MODULE.run(FetchRequest(cid=CID), None)
