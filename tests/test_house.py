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


def run_python(folder, *arguments):
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_the_results_file_names_every_test_with_outcome_and_seconds(tmp_path):
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
    run_python(tmp_path, "-m", "pytest", *options, "--continue-on-collection-errors", ".")
    results = json.loads((tmp_path / "r.json").read_text())
    assert {r["name"].rpartition("::")[2]: r["outcome"] for r in results} == {
        "test_broken.py": "failed",
        "test_good": "passed",
        "test_bad": "failed",
        "test_bad_at_the_end": "failed",
        "test_left_out": "skipped",
    }
    assert all(r["seconds"] >= 0 for r in results)


FLAWED = """
import pathlib
def test_good(): pass
def test_bad(): assert 0
def test_bad_once():
    seen = pathlib.Path("seen")
    was_there = seen.exists()
    seen.touch()
    assert was_there
"""


def run_tests(folder, *options):
    plugin = ("-q", "-p", "tests.results_plugin", "--results", "r.json")
    ended = run_python(folder, "-m", "pytest", *plugin, *options, ".").returncode
    told = run_python(folder, "-m", "tests.results_plugin", "r.json")
    return ended, json.loads((folder / "r.json").read_text()), told


def test_a_second_attempt_is_written_beside_the_first_and_told(tmp_path):
    (tmp_path / "test_some.py").write_text(FLAWED)
    assert run_tests(tmp_path)[0] == 1
    ended, results, told = run_tests(tmp_path, "--last-failed", "--again")
    assert (ended, told.returncode) == (1, 1)
    assert {
        r["name"].rpartition("::")[2]: (r["outcome"], r.get("attempts", 1)) for r in results
    } == {
        "test_good": ("passed", 1),
        "test_bad": ("failed", 2),
        "test_bad_once": ("passed", 2),
    }
    assert told.stdout.decode().splitlines() == [
        "passed only at its second attempt: test_some.py::test_bad_once",
        "1 failed, 2 passed",
    ]


def test_a_run_that_ended_early_stays_failed_whatever_passes_later(tmp_path):
    (tmp_path / "test_some.py").write_text(FLAWED.replace("def test_bad(): assert 0", ""))
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    ended, results, _ = run_tests(tmp_path)
    assert ended == 2
    assert {"name": "pytest itself, exit 2", "outcome": "failed", "seconds": 0.0} in results
    (tmp_path / "test_broken.py").write_text("")
    (tmp_path / "seen").touch()
    ended, _, told = run_tests(tmp_path, "--again")
    assert (ended, told.returncode) == (0, 1)


def test_no_tests_are_no_success(tmp_path):
    ended, results, told = run_tests(tmp_path)
    assert (ended, told.returncode) == (5, 1)
    assert [entry["name"] for entry in results] == ["pytest itself, exit 5"]


KEPT = sorted((pathlib.Path(__file__).parent.parent / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_figures_are_of_todays_script_and_hold_their_bars(path):
    """After an edit of the script: run it with --save."""
    kept = json.loads(path.read_text())
    script = path.parent.parent / f"{path.stem}.py"
    assert kept["script_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert all(kept[key] for key in kept if key.endswith("_ok"))
