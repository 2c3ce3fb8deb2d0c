"""The tests' own machinery."""

from __future__ import annotations

import hashlib
import json
import pathlib
import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["connect", "connect_ex"])
def test_a_connection_off_this_machine_is_refused_and_remembered(name, strangers_dialled):
    with socket.socket() as sock, pytest.raises(PermissionError):
        getattr(sock, name)(("192.0.2.1", 9))
    assert strangers_dialled == [("192.0.2.1", 9)]
    strangers_dialled.clear()


def test_a_name_that_needs_a_lookup_is_refused(strangers_dialled):
    with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(PermissionError):
        sock.sendto(b"hello", ("a.name.invalid", 53))
    assert strangers_dialled.pop()[0] == "a.name.invalid"


def test_a_connection_to_this_machine_is_let_through():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        sock.connect(server.getsockname())


def test_the_results_file_names_every_test_with_outcome_and_seconds(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.fixture\n"
        "def broken():\n    yield\n    assert 0\n"
        "def test_bad_at_the_end(broken): pass\n"
        "def test_left_out(): pytest.skip('why')\n"
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    options = ["-q", "-p", "tests.results_plugin", "-p", "no:cacheprovider", "--results", "r.json"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", "."],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        check=False,
        timeout=60,
    )
    results = json.loads((tmp_path / "r.json").read_text())
    assert {r["name"].rpartition("::")[2]: r["outcome"] for r in results} == {
        "test_broken.py": "failed",
        "test_good": "passed",
        "test_bad": "failed",
        "test_bad_at_the_end": "failed",
        "test_left_out": "skipped",
    }
    assert all(r["seconds"] >= 0 for r in results)


KEPT = sorted((pathlib.Path(__file__).parent.parent / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_figures_are_of_todays_script_and_hold_their_bars(path):
    """After an edit of the script: run it with --save."""
    kept = json.loads(path.read_text())
    script = path.parent.parent / f"{path.stem}.py"
    assert kept["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert all(kept[key] for key in kept if key.endswith("_ok"))
