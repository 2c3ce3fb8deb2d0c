"""The owner's limits as pure functions: each at its limit and one beyond, under a clock of ours."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import msgspec
import pytest

from aivillage.node import limits
from aivillage.node.limits import Day, Facts, Limits, Pace, Pause
from aivillage.protocols.errors import RequestError

ZONE = timezone(timedelta(hours=2))
OPERATIONS = {"mesh.noop", "inference.generate"}


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-11-27T{text}").replace(tzinfo=ZONE)


NOON = at("12:00:00")
NO_FACTS = Facts()


def closed(*, pause=None, facts=NO_FACTS, now=NOON, **settings):
    return limits.closed(Limits(**settings), pause, facts, now)


def is_typed(refusal) -> bool:
    return refusal is not None and refusal.code == "OWNER_LIMIT" and bool(refusal.next_step)


# ------------------------------------------------------------------ the whole node


def test_without_limits_nothing_is_refused_whatever_is_so():
    facts = Facts(on_mains=False, busy_cores=99.0, disk_bytes=1 << 50)
    assert closed(facts=facts) is None
    assert limits.over_day(Limits(), Day(peers={"p": 10**12}, total=10**12), "p", 10**12) is None
    assert limits.not_offered(Limits(), "mesh.noop") is None


@pytest.mark.parametrize(
    ("time", "shut"),
    [
        ("21:59:59", False),
        ("22:00:00", True),
        ("23:59:59", True),
        ("00:00:00", True),
        ("06:59:59", True),
        ("07:00:00", False),
        ("12:29:59", False),
        ("12:30:00", True),
        ("12:45:00", False),
    ],
)
def test_quiet_hours_begin_and_end_on_the_minute_and_go_over_midnight(time, shut):
    refusal = closed(quiet_hours=("22:00-07:00", "12:30-12:45"), now=at(time))
    assert is_typed(refusal) is shut


def test_quiet_hours_say_when_they_end_and_can_be_all_day():
    assert "07:00" in closed(quiet_hours=("22:00-07:00",), now=at("23:00:00")).message
    for time in ("00:00:00", "23:59:59"):
        assert closed(quiet_hours=("00:00-24:00",), now=at(time))


def test_a_pause_ends_at_its_second_or_never():
    until = NOON.timestamp()
    assert is_typed(closed(pause=Pause(until), now=NOON - timedelta(seconds=1)))
    assert closed(pause=Pause(until), now=NOON) is None
    assert is_typed(closed(pause=Pause(), now=NOON + timedelta(days=999)))


@pytest.mark.parametrize(("on_mains", "shut"), [(True, False), (None, False), (False, True)])
def test_on_battery_nothing_is_done_and_who_does_not_know_does_it(on_mains, shut):
    assert is_typed(closed(mains_only=True, facts=Facts(on_mains=on_mains))) is shut


@pytest.mark.parametrize(("busy", "shut"), [(0.5, False), (0.51, True), (None, False)])
def test_my_other_programs_come_first(busy, shut):
    assert is_typed(closed(busy_cores_max=0.5, facts=Facts(busy_cores=busy))) is shut


@pytest.mark.parametrize(("size", "shut"), [(1000, False), (1001, True)])
def test_a_full_share_of_the_disk_closes_the_node(size, shut):
    assert is_typed(closed(disk_bytes_max=1000, facts=Facts(disk_bytes=size))) is shut


def test_every_reason_is_told_the_owners_word_first():
    wanted = Limits(
        quiet_hours=("00:00-24:00",), mains_only=True, busy_cores_max=0.0, disk_bytes_max=0
    )
    facts = Facts(on_mains=False, busy_cores=1.0, disk_bytes=1)
    found = list(limits.closings(wanted, Pause(), facts, NOON))
    assert len(found) == 5
    assert "paused" in found[0].message
    assert all(map(is_typed, found))


def test_an_unknown_fact_is_said_to_limit_nothing():
    wanted = Limits(mains_only=True, busy_cores_max=1.0)
    assert limits.unknown(wanted, Facts()) == ["mains_only", "busy_cores_max"]
    assert limits.unknown(wanted, Facts(on_mains=True, busy_cores=0.0)) == []
    assert limits.unknown(Limits(), Facts()) == []


def test_facts_are_read_only_where_a_limit_asks_for_them():
    assert not limits.needs_facts(Limits(quiet_hours=("22:00-07:00",), day_micro_credits=1))
    for wanted in (
        Limits(mains_only=True),
        Limits(busy_cores_max=0.0),
        Limits(disk_bytes_max=0),
    ):
        assert limits.needs_facts(wanted)


# ------------------------------------------------------------------ operations and days


def test_operations_are_allowed_and_denied_by_name_and_no_beats_yes():
    only = Limits(operations_allowed=("mesh.noop",))
    assert limits.not_offered(only, "mesh.noop") is None
    assert is_typed(limits.not_offered(only, "inference.generate"))
    both = Limits(operations_allowed=("mesh.noop",), operations_denied=("mesh.noop",))
    assert is_typed(limits.not_offered(both, "mesh.noop"))
    assert limits.not_offered(Limits(operations_denied=("mesh.noop",)), "other") is None


def test_a_peer_takes_its_days_worth_and_not_one_micro_credit_more():
    wanted, day = Limits(peer_day_micro_credits=1000), Day(peers={"p": 990, "q": 5}, total=995)
    assert limits.over_day(wanted, day, "p", 10) is None
    assert is_typed(limits.over_day(wanted, day, "p", 11))
    assert limits.over_day(wanted, day, "q", 995) is None
    day.add("p", 10)
    assert is_typed(limits.over_day(wanted, day, "p"))
    assert limits.day_is_spent(wanted, day) is None


def test_all_together_take_the_days_worth_and_then_the_node_is_closed():
    wanted, day = Limits(day_micro_credits=1000), Day(peers={"p": 600, "q": 399}, total=999)
    assert limits.over_day(wanted, day, "r", 1) is None
    assert is_typed(limits.over_day(wanted, day, "r", 2))
    assert limits.day_is_spent(wanted, day) is None
    day.add("r", 1)
    assert is_typed(limits.day_is_spent(wanted, day))


def test_a_day_turns_at_midnight_by_the_owners_clock():
    day = Day()
    day.turn(at("00:00:00"))
    day.add("p", 7)
    day.turn(at("23:59:59"))
    assert day.total == 7
    day.turn(at("23:59:59") + timedelta(seconds=1))
    assert (day.total, day.date) == (0, "2026-11-28")


def test_what_leaves_keeps_to_the_rate_but_for_one_answer():
    pace, now, sent = Pace(), 100.0, []
    for size in (50, 10, 300, 1, 40):
        now += pace.wait_seconds(size, 10, now)
        sent.append((now, size))
    for start, (began, _) in enumerate(sent):
        for end in range(start + 1, len(sent)):
            between = sum(size for _, size in sent[start:end])
            assert between <= 10 * (sent[end][0] - began) + 1e-6
    assert pace.wait_seconds(1, 10, now + 1000.0) == 0.0  # it is free again, and saves up nothing
    assert pace.wait_seconds(1, 10, now + 1000.0) == pytest.approx(0.1)


# ------------------------------------------------------------------ changing them


def test_limits_are_set_from_what_is_typed_and_unset_by_nothing():
    typed = {
        "quiet_hours": "22:00-07:00, 12:00-13:00",
        "mains_only": "true",
        "busy_cores_max": "0.5",
        "day_micro_credits": "1000",
        "operations_denied": "mesh.noop",
    }
    found = limits.changed(Limits(), typed, OPERATIONS)
    assert found == Limits(
        quiet_hours=("22:00-07:00", "12:00-13:00"), mains_only=True, busy_cores_max=0.5,
        day_micro_credits=1000, operations_denied=("mesh.noop",),
    )  # fmt: skip
    assert limits.changed(found, dict.fromkeys(typed, ""), OPERATIONS) == Limits()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Limits) == found


@pytest.mark.parametrize(
    ("key", "text", "word"),
    [
        ("quiet_hour", "22:00-07:00", "quiet_hours"),
        ("zzz", "1", "limits"),
        ("price_floor_percent", "1", "limits"),
        ("quiet_hours", "22-7", "quiet_hours"),
        ("quiet_hours", "24:00-07:00", "quiet_hours"),
        ("quiet_hours", "08:00-08:00", "00:00-24:00"),
        ("mains_only", "perhaps", "battery"),
        ("busy_cores_max", "-0.1", "cores"),
        ("busy_cores_max", "nan", "cores"),
        ("sent_bytes_per_second_max", "0", "rate"),
        ("day_micro_credits", "-1", "worth"),
        ("operations_denied", "mesh.nop", "mesh.noop"),
        ("operations_allowed", "no.such", "operations"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_write(key, text, word):
    with pytest.raises(RequestError) as caught:
        limits.changed(Limits(), {key: text}, OPERATIONS)
    assert caught.value.code == "BAD_REQUEST"
    assert word in caught.value.next_step


def test_a_floor_is_a_percentage_of_a_known_operations_price_and_zero_takes_it_away():
    found = limits.with_floor(Limits(), "mesh.noop", limits.FLOOR_PERCENT_MAX, OPERATIONS)
    assert found.price_floor_percent == {"mesh.noop": limits.FLOOR_PERCENT_MAX}
    assert limits.with_floor(found, "mesh.noop", 0, OPERATIONS) == Limits()
    for operation, percent in (("mesh.nop", 5), ("mesh.noop", -1)):
        with pytest.raises(RequestError):
            limits.with_floor(Limits(), operation, percent, OPERATIONS)
    with pytest.raises(RequestError):
        limits.with_floor(Limits(), "mesh.noop", limits.FLOOR_PERCENT_MAX + 1, OPERATIONS)


def test_each_limit_has_its_line_of_documentation():
    assert set(limits.describe()) == set(Limits.__struct_fields__) - {"price_floor_percent"}
    assert all(limits.describe().values())
