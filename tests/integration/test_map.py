"""`map` on real daemons: order, a machine that dies, money, kill -9 of the buyer."""

from __future__ import annotations

import itertools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import apsw
import pytest

from tests.integration.daemons import Daemon, Yard, paused, settled, wait_for

pytestmark = pytest.mark.slow

FLAGS = ("--set", "heartbeat_seconds=0.5", "--set", "slots=4", "--set", "module_workers=4")
PRICE = 10
"""Micro-credits of one `mesh.noop`."""


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


def _input(yard: Yard, *requests: Any) -> str:
    path = yard.folder / "requests.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return str(path)


def _sleeps(count: int, seconds: float) -> list[dict[str, Any]]:
    return [{"note": f"task {n}", "sleep_seconds": seconds} for n in range(1, count + 1)]


def _notes(lines: list[dict[str, Any]]) -> list[str]:
    return [line["result"]["note"] for line in lines]


def _begun(buyer: Daemon, requests: list[dict[str, Any]], **options: Any) -> str:
    """The id of a map under way."""
    name = str(buyer.ask("map_new", operation="mesh.noop")["map"])
    lines = [(n, json.dumps(request)) for n, request in enumerate(requests, 1)]
    buyer.ask("map_add", map=name, lines=lines)
    buyer.ask("map_start", map=name, **options)
    return name


def _ended(buyer: Daemon, name: str, seconds: float = 40) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = buyer.ask("map_wait", map=name, seconds=1)
        return None if found["state"] == "running" else found

    found = wait_for(ended, seconds, f"map {name[:8]} ends\n{buyer.log_end()}")
    assert found is not None
    return found


def _lines(buyer: Daemon, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while (page := buyer.ask("map_lines", map=name, after=len(found)))["lines"]:
        found += page["lines"]
    return found


def _spent(buyer: Daemon) -> int:
    return int(buyer.ask("balance")["spent"])


def _sold(seller: Daemon) -> int:
    return int(seller.ask("events")["counts"].get("sale_ended", 0))


def test_a_map_over_three_machines_survives_one_of_them(yard):
    ann, bob, cat = yard.village("ann", "bob", "cat", flags=FLAGS)
    yard.know_each_other(ann, bob, cat)
    path = _input(yard, *_sleeps(30, 0.5))
    command = cat.spawn("map", "mesh.noop", "--input", path, "--json")
    wait_for(lambda: _sold(bob) >= 4, 20, f"bob did some tasks\n{cat.log_end()}")
    wait_for(lambda: bob.ask("status")["sales_running"] >= 2, 5, "bob works on others")
    bob.kill()
    out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    found = json.loads(out)
    assert _notes(found["lines"]) == [f"task {n}" for n in range(1, 31)]
    assert [line["line"] for line in found["lines"]] == list(range(1, 31))
    by = {peer for line in found["lines"] for peer in line["by"]}
    assert by == {ann.peer, bob.peer, cat.peer}
    bob.restart()
    settled([ann, bob, cat], 30)
    paid = sum(line["micro_credits"] for line in found["lines"])
    away = [line for line in found["lines"] if line["by"] != [cat.peer]]
    assert paid == found["micro_credits"] == PRICE * len(away)
    # What bob had done and could not tell any more is claimed by bob, within its allowance.
    assert paid <= _spent(cat) <= paid + 4 * PRICE


def test_a_killed_buyer_goes_on_with_its_map_and_pays_no_finished_task_twice(yard):
    ann, bob, cat = yard.village("ann", "bob", "cat", flags=FLAGS)
    yard.know_each_other(ann, bob, cat)
    name = _begun(cat, _sleeps(40, 0.4))
    wait_for(lambda: cat.ask("map_wait", map=name)["done"] >= 14, 20, "some tasks are done")
    before = {line["line"]: line["job"] for line in _lines(cat, name) if "job" in line}
    cat.kill()
    cat.restart()
    ended = _ended(cat, name)
    assert (ended["state"], ended["done"], ended["failed"]) == ("done", 40, 0)
    lines = _lines(cat, name)
    assert _notes(lines) == [f"task {n}" for n in range(1, 41)]
    after = {line["line"]: line["job"] for line in lines}
    assert len(before) >= 14
    assert {number: after[number] for number in before} == before, "done once, and not again"
    jobs = [job for job in cat.read("jobs", "list", "--limit", "200") if job["parent"]]
    done = [job["parent"] for job in jobs if job["state"] == "done"]
    assert len(done) == len(set(done)) == 40
    settled([ann, bob, cat], 30)
    away = [line for line in lines if line["by"] != [cat.peer]]
    assert ended["micro_credits"] == PRICE * len(away)
    assert ended["micro_credits"] <= _spent(cat) <= ended["micro_credits"] + 8 * PRICE


def test_a_wrong_line_fails_alone_and_the_command_says_so(yard):
    ann, bob = yard.village("ann", "bob", flags=FLAGS)
    yard.know_each_other(ann, bob)
    path = yard.folder / "some.jsonl"
    path.write_text('{"note": "one"}\n\nno json\n{"nothing": 1}\n[1]\n{"note": "six"}\n')
    output = yard.folder / "results.jsonl"
    done = bob.run("map", "mesh.noop", "--input", str(path), "--output", str(output))
    assert done.code == 6, done
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 3, 4, 5, 6]
    assert [line.get("error") for line in lines] == [None, *["BAD_REQUEST"] * 3, None]
    assert [line["result"]["note"] for line in lines if "result" in line] == ["one", "six"]
    assert "2/5 done, 3 failed" in done.err
    assert not done.out


def test_a_budget_holds_and_what_it_does_not_buy_is_done_here(yard):
    ann, bob = yard.village("ann", "bob", flags=FLAGS)
    yard.know_each_other(ann, bob)
    path = _input(yard, *_sleeps(24, 0.1))
    found = bob.run("map", "mesh.noop", "--input", path, "--max-price", "0.00005", "--json").json
    assert found["done"] == 24
    assert found["micro_credits"] == found["budget_micro_credits"] == 5 * PRICE
    settled([ann, bob], 20)
    assert _spent(bob) == 5 * PRICE


def test_the_results_are_reduced_by_one_more_task(yard):
    ann, bob = yard.village("ann", "bob", flags=FLAGS)
    yard.know_each_other(ann, bob)
    path = _input(yard, {"note": "a"}, {"note": "b"})
    done = bob.run("map", "mesh.noop", "--input", path, "--reduce", "mesh.noop")
    assert done.code == 0, done
    *_, reduced = [json.loads(line) for line in done.out.splitlines()]
    assert reduced["line"] == 0
    notes = [json.loads(line)["note"] for line in reduced["result"]["note"].splitlines()]
    assert notes == ["a", "b"]


def test_a_stopped_map_is_gone_on_with(yard):
    ann, bob = yard.village("ann", "bob", flags=FLAGS)
    yard.know_each_other(ann, bob)
    name = _begun(bob, _sleeps(30, 0.3))
    wait_for(lambda: bob.ask("map_wait", map=name)["done"] >= 4, 20, "some tasks are done")
    stopped = bob.ask("map_stop", map=name)
    assert stopped["state"] == "stopped"
    assert 4 <= stopped["done"] < 30
    done = bob.run("map", "--resume", name[:8], "--json")
    assert done.code == 0, done
    assert _notes(done.json["lines"]) == [f"task {n}" for n in range(1, 31)]
    settled([ann, bob], 20)
    assert _spent(bob) == done.json["micro_credits"]


def test_a_straggler_is_overtaken_and_only_the_first_result_is_paid(yard):
    """Bob's machine sleeps, its lid closed, while it has tasks; its link is not lost for long."""
    flags = ("--set", "slots=4", "--set", "module_workers=4")
    ann, bob, cat = yard.village("ann", "bob", "cat", flags=flags)
    yard.know_each_other(ann, bob, cat)
    name = _begun(cat, _sleeps(12, 1.0))
    wait_for(lambda: bob.ask("status")["sales_running"] >= 4, 20, "bob works")
    with paused(bob):
        wait_for(lambda: cat.ask("map_wait", map=name)["done"] == 12, 20, "all is done without bob")
        time.sleep(1.5)  # a cancelled seller has a second to say that it stopped
    ended = _ended(cat, name, 20)
    assert (ended["done"], ended["failed"]) == (12, 0)
    lines = _lines(cat, name)
    assert _notes(lines) == [f"task {n}" for n in range(1, 13)]
    assert not any(bob.peer in line["by"] for line in lines)
    away = [line for line in lines if line["by"] != [cat.peer]]
    assert ended["micro_credits"] == PRICE * len(away)
    settled([ann, bob, cat], 30)
    assert _spent(cat) == PRICE * len(away)


def _halves(buyer: Daemon, name: str, line: int) -> list[tuple[str, list[int], int]]:
    """Every try at a line that had parts: its end, the parts, and the first that was its own."""
    db = apsw.Connection(str(buyer.data_dir / "jobs.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = db.execute(
            "SELECT j.id, j.state, d.seq, a.job = j.id FROM job j JOIN delivered d ON d.job = j.id"
            " JOIN attempt a ON a.id = d.attempt WHERE j.parent = ? ORDER BY j.created, d.seq",
            (f"{name}/{line}",),
        ).fetchall()
    finally:
        db.close()
    found = []
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        parts = list(group)
        own = [seq for _, _, seq, is_own in parts if is_own]
        if own:
            found.append((str(parts[0][1]), [seq for _, _, seq, _ in parts], own[0]))
    return found


def test_a_task_goes_on_from_its_parts_at_another_peer_and_after_a_kill_of_its_buyer(yard):
    """One place here, and a task that keeps it: the others are for peers."""
    ann = yard.daemon("ann").start(*FLAGS)
    here = ("--set", "heartbeat_seconds=0.5", "--set", "slots=1")
    bob, cat = (
        yard.daemon(guest).start("--join", ann.ask("invite")["token"], *flags)
        for guest, flags in (("bob", FLAGS), ("cat", here))
    )
    yard.know_each_other(ann, bob, cat)
    halves = {"note": "x", "parts": 100, "sleep_seconds": 8}
    name = _begun(cat, [{"sleep_seconds": 12}, halves, halves])
    wait_for(lambda: len(_halves(cat, name, 2) + _halves(cat, name, 3)) == 2, 20, "parts came")
    bob.kill()
    twice = wait_for(
        lambda: [n for n in (2, 3) if len(_halves(cat, name, n)) == 2], 20, "ann goes on"
    )
    cat.kill()
    cat.restart()
    assert _ended(cat, name)["done"] == 3
    tries = _halves(cat, name, twice[0])
    assert [state for state, *_ in tries] == ["failed", "cancelled", "done"]
    for (_, had, had_first), (_, parts, own_first) in itertools.pairwise(tries):
        assert set(range(own_first)) <= set(parts), "what it had is kept with it"
        assert set(had) >= set(range(own_first)), "and came from the one before"
        assert own_first > had_first
    assert tries[-1][1] == list(range(100))
    assert [line["result"].get("parts") for line in _lines(cat, name)] == [0, 100, 100]
    bob.restart()
    settled([ann, bob, cat], 30)
