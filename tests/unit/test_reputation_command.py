"""`reputation` on the command line: what it says in words, and what it refuses."""

from __future__ import annotations

import argparse

import pytest

from aivillage.cli import jobs
from aivillage.cli import main as cli
from aivillage.cli.reputation import explained
from aivillage.node.verifier import CutOff, Trust
from aivillage.protocols.errors import EXIT_NO_DAEMON, EXIT_USAGE
from tests.conftest import make_peer

P = make_peer(1)
NOW = 1_000_000.0
SPENDING = {
    "jobs_micro_credits": 2_000_000,
    "checks_micro_credits": 150_000,
    "checks_percent": 7.5,
    "room_micro_credits": 950_000,
    "trusted_checks_percent": 4.5,
    "verify_percent_max": 50,
    "unchecked": {"nobody else of its kernel class was there": 3},
}


def told(trust: Trust, cut: CutOff | None = None, kernel="torch/avx2", evidence=()):
    """What is said of one peer, as one text."""
    cut = cut or CutOff()
    row = {
        "peer": P, "operation": "inference.generate", "model": "smol", "kernel": kernel,
        "count": trust.count, "done": trust.done, "checked": trust.checked,
        "failed": trust.failed, "unsettled": trust.unsettled, "chance": trust.chance,
        "faults": cut.faults, "since": cut.since, "until": cut.until,
    }  # fmt: skip
    peers = [{"peer": P, "results": [row], "evidence": list(evidence)}]
    return "\n".join(explained({"peers": peers, "spending": SPENDING}, NOW))


def test_it_says_how_many_were_done_checked_and_wrong_and_what_is_next():
    text = told(Trust(count=3, done=7, checked=4, failed=1))
    assert "inference.generate smol: 7 done, 4 done again, 1 wrong" in text
    assert "every result is done again: 3 right in a row, trusted from 10" in text
    assert "20 right in a row: one in 20 is done again" in told(Trust(count=20))
    assert "one in 100 is done again" in told(Trust(count=5000))


def test_it_says_since_when_and_until_when_a_peer_is_cut_off_and_why():
    evidence = [{"at_unix": NOW, "job": "ab" * 16, "reason": "token 3 is not what x computed"}]
    text = told(Trust(failed=2), CutOff(2, NOW - 60, NOW + 60), evidence=evidence)
    assert "cut off since 1970-01-12" in text
    assert "until 1970-01-12" in text
    assert "for time 2" in text
    assert "job abababab: token 3 is not what x computed" in text
    assert "back, under full checks" in told(Trust(), CutOff(1, NOW - 60, NOW - 1))
    assert "cut off" not in told(Trust())


def test_it_says_what_cannot_be_compared_and_what_was_left_out():
    assert "nothing of it can be compared" in told(Trust(done=1), kernel="")
    assert "5 disputed without a verdict" in told(Trust(unsettled=5))
    text = told(Trust())
    assert "checks cost 0.15 credits beside 2 for jobs (7.5 %)" in text
    assert "at trusted peers, since the start: 4.5 %" in text
    assert "0.95 more is allowed now (verify_percent_max 50)" in text
    assert "not checked since the start, 3: nobody else of its kernel class was there" in text


def test_before_anything_was_done_it_says_so():
    assert explained({"peers": [], "spending": SPENDING}, NOW)[0].startswith("nobody did anything")


def test_a_list_of_jobs_tells_those_that_do_another_one_again(capsys):
    row = {
        "job": "cd" * 16, "operation": "inference.generate", "state": "done", "created_unix": NOW,
        "receipt": {"price_micro_credits": 269}, "message": "",
    }  # fmt: skip
    rows = [row | {"parent": "check of " + "ab" * 16}, row | {"parent": "ef" * 16}]
    jobs._list(argparse.Namespace(json=False), rows)
    _, again, other = capsys.readouterr().out.splitlines()
    assert again.endswith("  check of abababab")
    assert other.endswith("0.000269")


def test_forgiving_needs_a_name(tmp_path, capsys):
    code = cli.main(["reputation", "--forgive", "--data-dir", str(tmp_path)])
    assert code == EXIT_USAGE
    assert "--forgive PEER" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], [P], [P, "--forgive"]])
def test_without_a_daemon_it_says_so(words, tmp_path):
    assert cli.main(["reputation", *words, "--data-dir", str(tmp_path)]) == EXIT_NO_DAEMON
