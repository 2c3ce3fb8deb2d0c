"""The owner's word on the command line: what it shows, and what it refuses."""

from __future__ import annotations

import json

import msgspec
import pytest

from aivillage.cli import balance as shown
from aivillage.cli import main as cli
from aivillage.cli import people
from aivillage.ledger import exposure
from aivillage.ledger.queries import Balance, PeerBalance
from aivillage.protocols.errors import EXIT_NO_DAEMON
from tests.conftest import make_peer
from tests.unit.ledger.test_steps import BUYER, B, book, forged, item, take

P, Q = make_peer(1), make_peer(2)
COMMANDS = [
    ["trust", P, "5"],
    ["trust", P, "--village"],
    ["block", P],
    ["unblock", P],
    ["share", P, Q],
    ["share", "--stop", P],
    ["gift", P, "0.5"],
    ["release"],
    ["release", "00ff"],
    ["release", "--peer", P],
    ["write-off", P, "--reason", "gone"],
    ["compact"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:1]))
def test_without_a_daemon_it_says_so_and_what_to_do(command, tmp_path, capsys):
    code = cli.main([*command, "--data-dir", str(tmp_path), "--json"])
    assert code == EXIT_NO_DAEMON
    answer = json.loads(capsys.readouterr().out)
    assert "start" in answer["next_step"]


@pytest.mark.parametrize(
    "command",
    [
        ["trust", P],
        ["trust", P, "5", "--village"],
        ["trust", P, "--village", "--exposure", "1"],
        ["trust", P, "much"],
        ["gift", P, "-1"],
        ["release", "00ff", "--peer", P],
    ],
)
def test_what_makes_no_sense_is_refused_before_anybody_is_asked(command, tmp_path, capsys):
    assert cli.main([*command, "--data-dir", str(tmp_path), "--json"]) not in {0, EXIT_NO_DAEMON}
    assert json.loads(capsys.readouterr().out)["error"] == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "may owe you 0.005 credits, 0.0001 of it unsigned"),
        ({"shared": True}, "pays nothing for work"),
        ({"blocked": True}, "is blocked"),
        ({"told": False}, "hears so when it comes"),
    ],
)
def test_a_word_is_shown_as_it_is_in_force(changes, said, capsys):
    word = {"peer": P, "line": 5_000, "exposure": 100, "blocked": False, "shared": False}
    people._show_word(word | {"told": True} | changes)
    assert said in "".join(capsys.readouterr())


def peer(name, **changes):
    fields = dict.fromkeys(
        ("net", "spendable", "in_transit", "at_risk", "line", "received_line"), 0
    )
    return PeerBalance(peer=name, **(fields | changes))


def table(*peers, **changes):
    fields = dict.fromkeys(("net", "earned", "spent", "at_risk", "in_transit"), 0)
    return msgspec.to_builtins(Balance(peers=list(peers), **(fields | changes)))


def test_a_balance_names_only_the_parts_that_are_there(capsys):
    shown.show_balance(table(net=70, earned=100, spent=30))
    said = capsys.readouterr().out
    assert "(earned 0.0001, spent 0.00003)" in said
    assert "held" not in said
    shown.show_balance(table(net=80, earned=100, spent=30, gifts=10, written_off=5, doubtful=5,
                             held=9, at_risk=2))  # fmt: skip
    said = capsys.readouterr().out
    assert "gifts 0.00001, written off -0.000005, of that owed all the same 0.000005" in said
    assert "0.000007 in transfers of mine" in said


def test_devices_of_one_owner_are_listed_under_it(capsys):
    one, two = peer(P, owner="ownerabc", net=5, line=9), peer(Q, owner="ownerabc", net=-2, line=9)
    shown.show_balance(table(peer(make_peer(3), net=1), one, two))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[1].split()[:4] == ["owner", "ownerabc", "0.000003", "0"]
    assert lines[1].endswith("2 devices")
    assert [line.startswith("  ") for line in lines] == [False, False, True, True]


def test_a_peers_line_says_what_one_should_know_of_it(capsys):
    shown.show_balance(
        table(peer(P, blocked=True, shared=True, doubtful=1, helped_me=2, helped_it=3, proofs=2))
    )
    line = capsys.readouterr().out.splitlines()[-1]
    for words in (
        "blocked",
        "pays nothing here",
        "0.000001 written off",
        "helped me for nothing: 0.000002",
        "I helped it for nothing: 0.000003",
        "contradicted itself: 2 proofs",
    ):
        assert words in line


def test_an_audit_names_who_contradicted_itself(tmp_path, capsys):
    db = book(B)
    exposure.certify(db, BUYER, 1_000, 160, 1)
    for voucher in (forged(1, 20, item(1, 20)), forged(1, 10, item(2, 10))):
        take(db, voucher)
    db.execute("VACUUM INTO ?", (str(tmp_path / "ledger.db"),))
    assert cli.main(["audit", "--data-dir", str(tmp_path)]) == 0
    assert f"{BUYER[-8:]} contradicted itself: 1 proof\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "pool"), [("", 0), ("stranger_pool_micro_credits = 700\n", 700)]
)
def test_a_balance_without_a_daemon_knows_the_pool_of_the_strangers(
    tmp_path, capsys, written, pool
):
    db = book(B)
    take(db, forged(1, 20, item(1, 20)))  # of a stranger
    db.execute("VACUUM INTO ?", (str(tmp_path / "ledger.db"),))
    (tmp_path / "config.toml").write_text(written)
    assert cli.main(["balance", "--json", "--data-dir", str(tmp_path)]) == 0
    (stranger,) = json.loads(capsys.readouterr().out)["peers"]
    assert (stranger["known"], stranger["line"], stranger["exposure"]) == (False, pool, pool)


def test_a_balance_without_a_daemon_goes_by_the_environment_too(tmp_path, capsys, monkeypatch):
    db = book(B)
    take(db, forged(1, 20, item(1, 20)))
    db.execute("VACUUM INTO ?", (str(tmp_path / "ledger.db"),))
    monkeypatch.setenv("AIVILLAGE_STRANGER_POOL_MICRO_CREDITS", "900")
    assert cli.main(["balance", "--json", "--data-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["peers"][0]["line"] == 900
