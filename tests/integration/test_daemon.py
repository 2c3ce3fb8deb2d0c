"""Real daemons and the real command line, from the first command to the last receipt."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from aivillage.node import identity, village
from tests.house import ROOT
from tests.integration.daemons import Daemon, DaemonError, Done, Yard, paused, settled, wait_for

pytestmark = pytest.mark.slow

READS = [
    ("status",),
    ("peers",),
    ("balance",),
    ("history",),
    ("history", "--since", "1d"),
    ("audit",),
    ("export", "--beancount"),
    ("operations",),
    ("jobs", "list"),
    ("config",),
    ("config", "show", "--origin"),
    ("limits",),
    ("price",),
    ("paths",),
    ("doctor",),
]
NEEDS_NO_DAEMON = {"balance", "history", "audit", "export", "config", "paths", "doctor"}


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two neighbours that the tests of this file share; each leaves them as it found them."""
    with Yard(tmp_path_factory.mktemp("pair")) as made:
        daemons = made.village("ann", "bob")
        made.know_each_other(*daemons)
        yield daemons
        for daemon in daemons:
            assert "Traceback" not in daemon.log.read_text(), daemon.log_end(200)


def refused(done: Done, exit_code: int, *words: str) -> None:
    """The command ended with that code, a typed line and a next step, and no traceback."""
    assert done.code == exit_code, done
    assert "Traceback" not in done.text, done
    assert all(word in done.text for word in words), (words, done)


# ------------------------------------------------------------------ the way in


def test_two_commands_lead_from_nothing_to_a_paid_answer(yard):
    ann = yard.daemon("ann").start()
    token = ann.run("invite").out.strip()
    bob = yard.daemon("bob").start("--join", token)
    done = bob.run("submit", "mesh.noop", "hello")
    assert done.code == 0, done
    assert "hello" in done.out
    assert ann.peer[-8:] in done.err
    assert "0.00001 credits" in done.err
    settled([ann, bob], 10)
    assert bob.read("balance")["net"] == -10
    assert ann.read("balance")["net"] == 10
    for path in ann.data_dir.rglob("*"):
        assert not path.is_file() or not path.stat().st_mode & 0o077, path


@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_every_read_prints_one_json_value(pair, words):
    done = pair[0].run(*words, "--json")
    assert done.code == 0, done
    assert isinstance(done.json, dict | list)
    assert len(done.out.splitlines()) == 1
    assert not done.err


@pytest.mark.parametrize("words", READS, ids=" ".join)
def test_every_read_has_something_to_say_to_a_person(pair, words):
    done = pair[0].run(*words)
    assert done.code == 0, done
    assert done.out.strip()
    assert "Traceback" not in done.text


def test_the_money_reads_the_same_with_and_without_a_daemon(yard):
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    for parts in (0, 2, 5):
        assert bob.run("submit", "mesh.noop", "x", "--parts", str(parts)).code == 0
    settled([ann, bob], 10)
    # What is reserved ahead is given back some seconds after the last sale, or at the end.
    wait_for(lambda: not ann.ask("balance")["at_risk"], 20, "ann gives back what it reserved")
    running = _money_of([ann, bob])
    assert running["bob balance"]["net"] == -(10 + 30 + 60)
    for daemon in (ann, bob):
        assert daemon.stop() == 0
    assert running == _money_of([ann, bob])


def test_what_another_packages_module_cost_is_explained_while_a_node_can_ask_its_meter(yard):
    info = yard.folder / "site" / "aivillage_wordcount-0.1.0.dist-info"  # as pip would put it
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: w\nVersion: 0.1.0\n")
    target = "text.count_words = aivillage_wordcount:MODULE"
    (info / "entry_points.txt").write_text(f"[aivillage.modules]\n{target}\n")
    shutil.copy(ROOT / "examples" / "wordcount" / "aivillage_wordcount.py", info.parent)
    yard.environment["PYTHONPATH"] += f":{info.parent}"
    flags = ("--enable", "text.count_words", "--dev-mode")  # not every machine can fence it in
    ann, bob = yard.village("ann", "bob", flags=flags)
    yard.know_each_other(ann, bob)
    wait_for(lambda: ann.sellers_known("text.count_words"), 20, "bob offers it")
    done = ann.run("submit", "text.count_words", "three short words", "--json")
    assert done.code == 0, done
    job = done.json["receipt"]["job"]
    found = ann.read("explain", job)
    (attempt,) = found["attempts"]
    assert [(line["unit"], line["count"]) for line in attempt["lines"]] == [("characters", 17)]
    assert found["sum_micro_credits"] == found["signed_micro_credits"] == 17
    ann.stop()
    found = ann.read("explain", job)
    assert (found["ok"], found["sum_micro_credits"]) == (True, None)
    assert "only a running node" in found["attempts"][0]["note"]


def test_a_statement_of_a_running_node_convinces_the_other(yard, tmp_path):
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    job = bob.submit("mesh.noop", note="x", parts=3)
    assert bob.job_ended(job, 30)["state"] == "done"
    settled([ann, bob], 10)
    for teller, hearer in ((ann, bob), (bob, ann)):
        path = tmp_path / f"{teller.name}.json"
        whole = teller.run("statement", "--peer", hearer.peer[-8:], "--output", str(path))
        assert whole.code == 0, whole
        heard = hearer.run("verify-statement", str(path))
        assert (heard.code, f"{bob.peer} owes {ann.peer} 0.00004" in heard.out) == (0, True), heard
    one = bob.run("statement", "--peer", ann.peer, "--job", job[:10])
    assert one.code == 0, one
    assert one.json["amount"] == 40
    assert one.json["proofs"][0]["attested"]


def _money_of(daemons: list[Daemon]) -> dict[str, Any]:
    reads = ("balance", "history", "history --limit 2", "audit")
    found = {f"{d.name} {words}": d.read(*words.split()) for d in daemons for words in reads}
    for daemon in daemons:
        # A running seller has some credit reserved ahead, which it gives back when it stops.
        balance = found[f"{daemon.name} balance"]
        for entry in (balance, *balance["peers"]):
            entry.pop("at_risk")
    return found


# ------------------------------------------------------------------ requests that cannot be


def test_without_a_daemon_every_command_says_that_and_how_to_start_one(tmp_path):
    with Yard(tmp_path) as made:
        nobody = made.daemon("nobody")
        assert nobody.run("init").code == 0
        for words in (
            *READS,
            ("submit", "mesh.noop"),
            ("stop",),
            ("invite",),
            ("jobs", "show", "ab"),
        ):
            if words[0] not in NEEDS_NO_DAEMON:
                refused(nobody.run(*words), 4, "no node is running", "aivillage-node start")


def test_an_unknown_operation_is_named(pair):
    refused(pair[0].run("submit", "mesh.nope"), 5, "UNKNOWN_OPERATION", "mesh.nope", "operations")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--sleep-seconds", "soon"), "--sleep-seconds"),
        (("--sleep-seconds", "61"), "sleep_seconds"),
        (("--parts", "-1"), "parts"),
        (("--parts", "10001"), "parts"),
        (("--colour", "red"), "--colour"),
        (("--max-price", "much"), "much"),
        (("--max-price", "-1"), "-1"),
        (("--deadline", "soon"), "--deadline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_field_is_named(pair, flags, field):
    done = pair[1].run("submit", "mesh.noop", "x", *flags)
    assert done.code in {2, 5}, done
    assert field in done.err
    assert "Traceback" not in done.text


def test_a_job_above_its_ceiling_is_refused_before_any_work(pair):
    before = pair[1].ask("balance")["spent"]
    done = pair[1].run("submit", "mesh.noop", "x", "--max-price", "0.000001")
    refused(done, 5, "PRICE_ABOVE_CEILING", "0.00001", "--max-price")
    assert pair[1].ask("balance")["spent"] == before


def test_a_refusal_is_one_json_value_too(pair):
    done = pair[1].run("submit", "mesh.noop", "x", "--max-price", "0.000001", "--json")
    assert done.code == 5
    assert done.json["error"] == "PRICE_ABOVE_CEILING"
    assert done.json["next_step"]


def test_a_job_that_nobody_does_ends_in_no_peer_within_fifteen_seconds(yard):
    lonely = yard.daemon("lonely").start()
    began = time.monotonic()
    refused(lonely.run("submit", "mesh.noop", "x"), 5, "NO_PEER", "aivillage-node peers")
    assert time.monotonic() - began < 15


def test_a_job_id_that_fits_no_job_is_named(pair):
    refused(pair[0].run("jobs", "show", "zz"), 2, "zz", "jobs list")
    refused(pair[0].run("jobs", "cancel", "0000"), 2, "0000", "jobs list")


# ------------------------------------------------------------------ stopping a job


def _working(daemon: Daemon) -> str:
    """The id of the job that a peer works on now."""

    def found() -> str:
        jobs = daemon.ask("jobs")
        return next((job["job"] for job in jobs if job["state"] == "working"), "")

    return wait_for(found, 10, f"a job of {daemon.name} works\n{daemon.log_end()}")


def test_a_job_cancelled_by_its_id_ends_at_once_and_frees_the_slot(pair):
    ann, bob = pair
    job = bob.submit("mesh.noop", note="long", sleep_seconds=30.0, parts=300)
    _working(bob)
    assert ann.ask("status")["sales_running"] == 1
    assert bob.run("jobs", "cancel", job[:8]).code == 0
    ended = bob.job_ended(job, 5)
    assert (ended["state"], ended["code"]) == ("cancelled", "CANCELLED")
    wait_for(lambda: not ann.ask("status")["sales_running"], 5, "the seller stops")
    refused(bob.run("jobs", "cancel", job), 2, "cancelled already")
    settled(pair, 10)


def test_ctrl_c_at_a_submit_cancels_its_job(pair):
    ann, bob = pair
    command = bob.spawn("submit", "mesh.noop", "long", "--sleep-seconds", "30", "--parts", "300")
    job = _working(bob)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=10)
    refused(Done(command.returncode, out, err), 6, "CANCELLED", "cancelling")
    assert bob.job_ended(job, 5)["state"] == "cancelled"
    wait_for(lambda: not ann.ask("status")["sales_running"], 5, "the seller stops")


def test_a_detached_job_goes_on_without_its_command(pair):
    _, bob = pair
    done = bob.run("submit", "mesh.noop", "later", "--sleep-seconds", "0.5", "--detach")
    assert done.code == 0
    ended = bob.job_ended(done.out.strip(), 10)
    assert ended["state"] == "done"
    assert ended["result"]["note"] == "later"


def test_a_submit_that_is_killed_leaves_its_job_to_the_daemon(pair):
    _, bob = pair
    command = bob.spawn("submit", "mesh.noop", "on", "--sleep-seconds", "2", "--parts", "20")
    job = _working(bob)
    command.kill()
    command.communicate()
    assert bob.job_ended(job, 15)["state"] == "done"


def test_a_deadline_ends_a_job_in_time(pair):
    _, bob = pair
    began = time.monotonic()
    done = bob.run("submit", "mesh.noop", "x", "--sleep-seconds", "30", "--deadline", "1")
    refused(done, 6, "DEADLINE")
    assert time.monotonic() - began < 15  # not the 30 that the job would take


# ------------------------------------------------------------------ invites


def test_an_invite_is_good_for_one_guest(yard):
    ann, bob = yard.village("ann")[0], yard.daemon("bob")
    token = ann.ask("invite")["token"]
    bob.start("--join", token)
    cat = yard.daemon("cat").start()
    refused(cat.run("join", token), 5, "OWNER_LIMIT", "used already", "new one")
    # The guest it was for may repeat its command: nothing is used up by that.
    bob.stop()
    bob.start("--join", token)
    dan = yard.daemon("dan")
    dan.launch("--join", token, json_output=False)
    assert dan.process is not None
    assert dan.process.wait(30) == 5
    assert "used already" in dan.log.read_text()
    assert "Traceback" not in dan.log.read_text()


def test_who_belongs_already_starts_with_the_old_token_though_the_inviter_is_away(yard):
    ann = yard.daemon("ann").start()
    token = ann.ask("invite")["token"]
    bob = yard.daemon("bob").start("--join", token)
    village_joined = bob.ask("status")["village"]
    bob.stop()
    ann.stop()
    bob.start("--join", token)
    assert bob.ask("status")["village"] == village_joined


def test_an_expired_or_changed_invite_is_refused(pair, yard):
    ann, bob = pair[0], yard.daemon("stranger").start()
    own_village = bob.ask("status")["village"]
    key = identity.load(ann.data_dir)
    addresses = ann.ask("status")["addresses"]
    ago_ms = int((time.time() - 8 * 86_400) * 1000)
    expired = village.make_invite(key, village.village_of(ann.peer), addresses, 1000, ago_ms)
    refused(bob.run("join", expired), 5, "OWNER_LIMIT", "expired", "new one")
    token = ann.ask("invite")["token"]
    at = len(token) // 2
    changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
    for wrong in (changed, token[:-20], "hello", "", "aiv1.", "aiv1." + "x" * 5000):
        refused(bob.run("join", wrong), 2, "invite is not valid", "copy the whole token")
    assert bob.ask("status")["village"] == own_village


def test_only_the_founder_invites(pair):
    refused(pair[1].run("invite"), 5, "OWNER_LIMIT", "founder")


def test_an_invite_never_reaches_a_log(pair):
    token = pair[0].ask("invite")["token"]
    assert not [d for d in pair if "aiv1." in d.log.read_text() or token in d.log.read_text()]


# ------------------------------------------------------------------ stop and go


def test_a_second_start_on_a_folder_is_refused_and_the_first_lives_on(pair):
    ann = pair[0]
    pid, uptime = ann.pid, ann.ask("status")["uptime_seconds"]
    refused(ann.run("start", "--listen", "127.0.0.1:0"), 3, "CONFIG", "running", "next:", "stop")
    assert ann.pid == pid
    assert ann.ask("status")["uptime_seconds"] > uptime


def test_a_port_in_use_is_named(yard, pair):
    other = yard.daemon("other")
    assert other.run("init").code == 0
    port = pair[0].port
    done = other.run("start", "--listen", f"127.0.0.1:{port}")
    refused(done, 3, "CONFIG", str(port), "next:")
    assert not other.socket.exists()


def test_sigterm_stops_a_daemon_cleanly(yard):
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    bob.submit("mesh.noop", note="long", sleep_seconds=30.0, parts=300)
    _working(bob)
    for daemon in (bob, ann):
        assert daemon.socket.is_socket()
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10  # not the 30 that the job would take
        assert not daemon.socket.exists()
        assert "Traceback" not in daemon.log.read_text(), daemon.log_end(100)


def test_the_stop_command_returns_when_the_daemon_is_gone(yard):
    ann = yard.daemon("ann").start()
    assert ann.run("stop").code == 0
    assert ann.process is not None
    assert ann.process.wait(5) == 0
    assert not ann.socket.exists()


def test_what_a_crash_leaves_behind_is_no_obstacle(yard):
    ann = yard.daemon("ann").start()
    ann.kill()
    assert ann.socket.is_socket()
    refused(ann.run("status"), 4, "no node is running")
    ann.restart()
    assert ann.read("status")["state"] == "ready"


def test_workers_die_with_a_daemon_that_was_killed(yard):
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    bob.submit("mesh.noop", note="long", sleep_seconds=30.0, parts=300)
    _working(bob)
    workers = _workers_of(ann.pid)
    assert workers
    ann.kill()
    wait_for(
        lambda: not [w for w in workers if pathlib.Path(f"/proc/{w}").exists()], 5, "workers end"
    )


def _workers_of(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for listing in children for child in listing.read_text().split()]


def test_a_reader_that_closes_its_pipe_early_is_no_error(pair):
    for words in READS:
        reading, writing = os.pipe()
        os.close(reading)
        command = pair[0].spawn(*words, stdout=writing)
        os.close(writing)
        _, err = command.communicate(timeout=30)
        assert command.returncode == 0, (words, err)
        assert not err, words


def test_a_daemon_whose_terminal_is_gone_serves_on(yard):
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    reading, writing = os.pipe()
    command = ann.spawn(
        "start", "--listen", f"127.0.0.1:{ann.port}", stdout=writing, stderr=writing
    )
    os.close(writing)
    try:
        wait_for(ann.socket.is_socket, 30, "the daemon is up")
        wait_for(lambda: b"ready" in os.read(reading, 65_536), 30, "it said so")
        os.close(reading)
        bob = yard.daemon("bob").start("--join", ann.ask("invite")["token"])
        assert bob.run("submit", "mesh.noop", "x").code == 0
        assert command.poll() is None
    finally:
        command.terminate()
        command.communicate(timeout=10)
    assert command.returncode == 0


# ------------------------------------------------------------------ peers that vanish


def test_a_peer_that_stands_still_is_reported_gone_and_the_job_goes_elsewhere(yard):
    ann, bob, cat = yard.village("ann", "bob", "cat", flags=("--set", "heartbeat_seconds=0.5"))
    yard.know_each_other(ann, bob, cat)
    job = cat.submit("mesh.noop", note="x", sleep_seconds=6.0, parts=30)
    _working(cat)
    seller = cat.ask("job", job=job)["attempts"][0]["seller"]
    still = next(daemon for daemon in (ann, bob) if daemon.peer == seller)
    other = next(daemon for daemon in (ann, bob) if daemon.peer != seller)
    with paused(still):
        wait_for(lambda: not _peer(cat, seller)["connected"], 10, f"cat misses it\n{cat.log_end()}")
        ended = cat.job_ended(job, 30)
        assert ended["state"] == "done", ended
        assert [attempt["seller"] for attempt in ended["attempts"]] == [seller, other.peer]
    wait_for(lambda: _peer(cat, seller)["connected"], 30, f"it is back\n{cat.log_end()}")
    settled([ann, bob, cat], 20)


def _peer(daemon: Daemon, peer: str) -> dict[str, object]:
    return next(found for found in daemon.ask("peers") if found["peer"] == peer)


# ------------------------------------------------------------------ what it costs


def test_a_daemon_that_traded_never_loads_the_libraries_of_models(pair):
    bob = pair[1]
    assert bob.run("submit", "mesh.noop", "x").code == 0
    heavy = ("torch", "transformers", "numpy", "tokenizers", "fastapi")
    for daemon in pair:
        maps = pathlib.Path(f"/proc/{daemon.pid}/maps").read_text()
        assert not [name for name in heavy if f"/{name}" in maps]
        assert daemon.rss_mb() < 120


def test_a_daemon_that_cannot_come_up_is_told_with_its_log(yard):
    ann = yard.daemon("ann")
    assert ann.run("init").code == 0
    (ann.data_dir / "config.toml").write_text("slots = 0\n")
    with pytest.raises(DaemonError, match="slots"):
        ann.start()
