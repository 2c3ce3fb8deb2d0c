"""The last reason per peer, and no more of them than there is room for."""

from __future__ import annotations

from aivillage.node import reasons
from aivillage.node.reasons import REASON_CHARACTERS_MAX, Reasons
from tests.conftest import make_peer


def test_the_newest_reason_counts_and_is_one_line_of_bounded_length(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reasons.time, "monotonic", lambda: now[0])
    found = Reasons()
    assert found.last(make_peer(1)) == ""
    found.note(make_peer(1), "first")
    now[0] += 5
    found.note(make_peer(1), "second\nline " + "x" * 500)
    now[0] += 7
    assert found.last(make_peer(1)).startswith("second line xxx")
    assert found.last(make_peer(1)).endswith("x, 7 s ago")
    assert len(found.last(make_peer(1))) == REASON_CHARACTERS_MAX + len(", 7 s ago")
    found.forget(make_peer(1))
    assert found.last(make_peer(1)) == ""


def test_reasons_have_a_bound_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(reasons, "REASONS_MAX", 3)
    found = Reasons()
    for number in (1, 2, 3):
        found.note(make_peer(number), "gone")
    found.note(make_peer(1), "again")
    assert all(found.last(make_peer(number)) for number in (1, 2, 3))
    found.note(make_peer(4), "gone")
    assert [bool(found.last(make_peer(n))) for n in (1, 2, 3, 4)] == [True, False, True, True]
