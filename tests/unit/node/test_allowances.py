"""What one peer may take of a seller."""

import pytest

from aivillage.node import allowances
from aivillage.node.allowances import FreeReading
from aivillage.protocols.errors import RefusedError


def test_free_reading_has_a_budget_that_comes_back_within_the_hour(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(allowances.time, "monotonic", lambda: now[0])
    reading = FreeReading()
    reading.take("peer", 90, 100)
    reading.take("peer", 1_000, 100)  # the last one may overdraw it
    with pytest.raises(RefusedError) as caught:
        reading.take("peer", 1, 100)
    assert caught.value.code == "OWNER_LIMIT"
    reading.take("peer", 0, 100)  # nothing is always free
    reading.take("other", 1, 100)
    now[0] += 10.0 * allowances.HOUR_SECONDS
    reading.take("peer", 1, 100)
    with pytest.raises(RefusedError):
        reading.take("stranger", 1, 0)
