"""What one peer may take of a seller."""

import pytest

from aivillage.node import allowances
from aivillage.node.allowances import FreeReading, SlotShares
from aivillage.protocols.errors import RefusedError


def test_nobody_keeps_more_than_half_of_the_slots_while_another_waits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(allowances.time, "monotonic", lambda: now[0])
    shares, held = SlotShares(4), []
    for _ in range(4):
        shares.take("greedy", held)
        held.append("greedy")
    with pytest.raises(RefusedError) as caught:
        shares.take("patient", held)
    assert caught.value.code == "BUSY"
    held.pop()
    with pytest.raises(RefusedError):  # it has three of four, and another one waits
        shares.take("greedy", held)
    shares.take("patient", held)
    held.append("patient")
    now[0] += allowances.WAITING_SECONDS
    held.remove("greedy")
    shares.take("greedy", held)  # nobody has asked for a while


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


def refusal(shares, peer, holders, *, goes_on=False):
    with pytest.raises(RefusedError) as caught:
        shares.take(peer, holders, goes_on=goes_on)
    return caught.value


def test_the_last_quarter_of_the_slots_is_for_work_under_way():
    shares = SlotShares(8)
    six = ["a", "a", "b", "b", "c", "c"]
    shares.take("new", six[:5])
    refused = refusal(shares, "new", six)
    assert (refused.code, "under way" in refused.message) == ("BUSY", True)
    assert refused.next_step
    shares = SlotShares(8)
    shares.take("new", six, goes_on=True)
    shares.take("a", [*six, "d"])
    assert "all slots" in refusal(shares, "a", [*six, "d", "e"], goes_on=True).message


def test_fewer_than_four_slots_have_no_quarter_to_keep():
    SlotShares(3).take("new", ["a", "b"])
    assert "under way" in refusal(SlotShares(4), "new", ["a", "b", "c"]).message


def test_the_kept_slots_protect_nobody_who_has_more_than_a_fair_share():
    SlotShares(4).take("new", ["greedy"] * 3)
