"""Prices and quotes, places, step frames, events: small things that others lean on."""

import json
import logging

import pytest
import trio

from aivillage.node import daemon, pricelist
from aivillage.node.config import Settings
from aivillage.node.events import Events, LineFormatter
from aivillage.node.paths import paths
from aivillage.node.pricelist import QUOTES_MAX, PriceList, listed, quote_hash, read_quote
from aivillage.node.steps import StepWriter
from aivillage.protocols.errors import PeerError, RefusedError
from aivillage.protocols.messages import OperationInfo, StepItem
from aivillage.protocols.pricing import Terms
from tests.conftest import make_key, make_peer

NOOP = OperationInfo(name="mesh.noop", terms=Terms(prices_micro_credits={"calls": 10, "parts": 3}))


# ------------------------------------------------------------------ prices


@pytest.mark.parametrize(
    ("percent", "calls", "parts"), [(100, 10, 3), (50, 5, 2), (1, 1, 1), (0, 0, 0), (333, 34, 10)]
)
def test_a_price_is_scaled_and_rounded_up_so_that_none_becomes_free(percent, calls, parts):
    terms = PriceList(make_key(1), percent).terms(NOOP)
    assert terms.prices_micro_credits == {"calls": calls, "parts": parts}


def test_a_quote_is_signed_good_for_a_minute_and_for_its_operation_only(monkeypatch):
    now = [1_800_000_000.0]
    monkeypatch.setattr(pricelist.time, "time", lambda: now[0])
    prices = PriceList(make_key(1), 100)
    envelope = prices.quote(NOOP, listed(NOOP), {"calls": 1}, 0.5)
    quote = read_quote(envelope, make_peer(1), "mesh.noop")
    assert (quote.estimate, quote.seconds, quote.seller) == ({"calls": 1}, 0.5, make_peer(1))
    name = quote_hash(envelope)
    assert prices.find(name, "mesh.noop") == prices.find(name, "mesh.noop") == quote
    for wrong in ((name, "inference.generate"), (bytes(32), "mesh.noop")):
        with pytest.raises(RefusedError) as caught:
            prices.find(*wrong)
        assert caught.value.code == "QUOTE_EXPIRED"
    now[0] += pricelist.QUOTE_SECONDS - 0.01
    prices.find(name, "mesh.noop")
    now[0] += 0.02
    with pytest.raises(RefusedError):
        prices.find(name, "mesh.noop")


def test_a_quote_of_somebody_else_or_for_something_else_is_no_quote():
    envelope = PriceList(make_key(1), 100).quote(NOOP, listed(NOOP), {}, 0.0)
    for seller, operation in ((2, "mesh.noop"), (1, "inference.generate")):
        with pytest.raises(PeerError):
            read_quote(envelope, make_peer(seller), operation)
    with pytest.raises(PeerError):
        read_quote(envelope[:-1] + bytes([envelope[-1] ^ 1]), make_peer(1), "mesh.noop")


def test_the_oldest_quotes_are_forgotten(monkeypatch):
    monkeypatch.setattr(pricelist, "QUOTES_MAX", 2)
    prices = PriceList(make_key(1), 100)
    names = [quote_hash(prices.quote(NOOP, listed(NOOP), {"calls": n}, 0.0)) for n in range(3)]
    with pytest.raises(RefusedError):
        prices.find(names[0], "mesh.noop")
    assert prices.find(names[1], "mesh.noop")
    assert QUOTES_MAX >= 256  # calls in flight with one peer


# ------------------------------------------------------------------ places


@pytest.mark.parametrize("runtime", ["/run/user/1000", ""])
def test_a_socket_path_is_short_however_long_the_folder(tmp_path, monkeypatch, runtime):
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    found = paths(str(tmp_path / ("x" * 200) / ("y" * 200)))
    assert len(str(found.socket).encode()) < 108
    assert found.socket != paths(str(tmp_path / "other")).socket
    assert found.socket == paths(str(found.data_dir)).socket


def test_the_data_folder_is_flag_then_environment_then_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("AIVILLAGE_DATA_DIR", str(tmp_path / "env"))
    assert paths(str(tmp_path / "flag")).data_dir == tmp_path / "flag"
    assert paths(None).data_dir == tmp_path / "env"
    monkeypatch.delenv("AIVILLAGE_DATA_DIR")
    assert paths(None).data_dir.name == "aivillage"
    monkeypatch.chdir(tmp_path)
    assert paths("here").data_dir == tmp_path / "here"
    assert set(paths("here").listing()) >= {"data_dir", "socket", "ledger", "jobs", "key", "cache"}


# ------------------------------------------------------------------ steps


class Wire:
    def __init__(self, error=None):
        self.peer, self.frames, self.error = make_peer(1), [], error

    def send(self, frame, *, may_ride=False):
        if self.error:
            raise self.error
        self.frames.append(frame)


def item(session, first=0):
    return StepItem(session, first, (5,), "x", bytes(8))


async def test_items_of_one_moment_leave_in_one_frame_in_order():
    wire = Wire()
    writer = StepWriter(wire)
    for session in (1, 2, 1):
        writer.add(item(session))
    assert wire.frames == []
    await trio.testing.wait_all_tasks_blocked()
    writer.add(item(3))
    await trio.testing.wait_all_tasks_blocked()
    assert [[i.session for i in frame.items] for frame in wire.frames] == [[1, 2, 1], [3]]
    assert [frame.seq for frame in wire.frames] == [1, 2]


async def test_a_flush_goes_before_what_follows_and_leaves_nothing_for_later():
    wire = Wire()
    writer = StepWriter(wire)
    writer.add(item(1))
    writer.flush()
    writer.flush()
    await trio.testing.wait_all_tasks_blocked()
    assert len(wire.frames) == 1


async def test_steps_for_a_peer_that_is_gone_are_dropped():
    writer = StepWriter(Wire(PeerError("gone", code="PEER_LOST")))
    writer.add(item(1))
    await trio.testing.wait_all_tasks_blocked()
    writer.flush()


# ------------------------------------------------------------------ events


def test_events_are_counted_kept_and_logged_with_their_fields(caplog):
    events = Events()
    with caplog.at_level(logging.INFO, "aivillage"):
        events.emit("job_ended", job="x", micro_credits=3)
        events.emit("noise", level=logging.DEBUG)
        events.emit("odd", value=object)
    assert events.counts == {"job_ended": 1, "noise": 1, "odd": 1}
    assert [name for _, name, _ in events.recent] == ["job_ended", "noise", "odd"]
    name, fields = caplog.messages[0].split(" ", 1)
    assert (name, json.loads(fields)) == ("job_ended", {"job": "x", "micro_credits": 3})
    assert len(caplog.messages) == 2


def test_only_the_last_events_are_kept():
    events = Events()
    for number in range(1000):
        events.emit("tick", number=number)
    assert len(events.recent) == 256
    assert events.recent[-1][2] == {"number": 999}
    assert events.counts["tick"] == 1000


def test_a_log_line_shows_its_fields_whoever_wrote_it():
    record = logging.getLogger("aivillage.links").makeRecord(
        "aivillage.links", logging.INFO, "f", 1, "link_refused", (), None,
        extra={"peer": "12D3", "reason": "bad \x1b[2Jnews" + "x" * 10_000},
    )  # fmt: skip
    line = LineFormatter().format(record)
    assert ' INFO aivillage.links link_refused {"peer": "12D3", "reason": "bad ' in line
    assert "\x1b" not in line
    assert len(line) < 700


def test_a_line_without_fields_ends_with_its_message_and_a_defect_with_its_traceback():
    try:
        raise ValueError("\x1b[31mred")
    except ValueError as error:
        caught = (type(error), error, error.__traceback__)
    record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "it_broke", (), caught)
    first, *rest = LineFormatter().format(record).splitlines()
    assert first.endswith(" ERROR x it_broke")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ValueError: \ufffd[31mred"


def test_more_slots_than_an_engine_holds_are_for_other_work():
    assert daemon.worker_settings(Settings(slots=256)).engine_slots == daemon.ENGINE_SLOTS_MAX
    assert daemon.worker_settings(Settings(slots=3)).engine_slots == 3


def test_the_owners_cores_threads_and_niceness_reach_the_workers():
    settings = Settings(worker_cores=3, worker_threads=2, worker_nice=19)
    limits = daemon.worker_settings(settings).limits
    assert (limits.cores, limits.threads, limits.nice) == (3, 2, 19)
