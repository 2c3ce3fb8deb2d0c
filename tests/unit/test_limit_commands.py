"""pause, resume, limits and price on the command line: what they refuse before anybody is asked."""

from __future__ import annotations

import json

import pytest

from aivillage.cli import limits
from aivillage.cli import main as cli
from aivillage.protocols.errors import EXIT_NO_DAEMON, RequestError

COMMANDS = [
    ["pause"],
    ["pause", "--for", "2h"],
    ["resume"],
    ["limits"],
    ["limits", "quiet_hours=22:00-07:00", "mains_only="],
    ["price"],
    ["price", "mesh.noop", "--floor", "150"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_daemon_it_says_so_and_what_to_do(command, tmp_path, capsys):
    code = cli.main([*command, "--data-dir", str(tmp_path), "--json"])
    assert code == EXIT_NO_DAEMON
    assert "start" in json.loads(capsys.readouterr().out)["next_step"]


@pytest.mark.parametrize(
    "command",
    [
        ["pause", "--for", "a while"],
        ["pause", "--for", "2"],
        ["limits", "mains_only"],
        ["price", "mesh.noop"],
        ["price", "--floor", "5"],
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused_before_anybody_is_asked(command, tmp_path, capsys):
    code = cli.main([*command, "--data-dir", str(tmp_path), "--json"])
    assert code not in {0, EXIT_NO_DAEMON}
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == "BAD_REQUEST"
    assert answer["next_step"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("2h", 7200.0), ("1d", 86400.0)]
)
def test_a_span_of_time_is_read_in_its_unit(text, seconds):
    assert limits.span_seconds(text) == seconds
    with pytest.raises(RequestError):
        limits.span_seconds(text.upper())
