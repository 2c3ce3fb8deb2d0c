"""The doctor finds what is wrong, says what to do, and never falls ill itself."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from aivillage import __version__
from aivillage.cli import doctor as doctor_file
from aivillage.cli import main as cli_main
from aivillage.cli import packages
from aivillage.node import identity
from aivillage.node.paths import paths
from aivillage.protocols import codec
from aivillage.protocols.messages import Answer
from tests.conftest import make_hello
from tests.house import ROOT, pyproject


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A node that was made and never started, whose port is free."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("AIVILLAGE_LISTEN", "127.0.0.1:0")
    monkeypatch.delenv("AIVILLAGE_DEV_MODE", raising=False)
    identity.create(tmp_path / "node")
    return tmp_path / "node"


@pytest.fixture
def examined(folder, capsys):
    """Runs the doctor; (exit code, findings by name, worst last)."""

    def run():
        code = cli_main.main(["doctor", "--data-dir", str(folder), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] == (code == 0)
        order = ["ok", "warn", "FAIL"]
        checks = sorted(found["checks"], key=lambda check: order.index(check["level"]))
        return code, {check["what"]: check for check in checks}

    return run


def assert_fails(examined, what, about, step):
    code, found = examined()
    assert code == 3
    assert (found[what]["level"], about in found[what]["detail"]) == ("FAIL", True), found[what]
    assert step in found[what]["next_step"]


def test_a_healthy_node_passes_in_under_three_seconds_of_work(examined):
    started = time.process_time()
    code, found = examined()
    assert code == 0, found
    assert time.process_time() - started < 3
    assert found["data folder"]["level"] == found["identity"]["level"] == "ok"
    assert found["node"] == {
        "level": "warn",
        "what": "node",
        "detail": "not running",
        "next_step": "aivillage-node start",
    }


def test_each_finding_is_one_line_and_each_warning_has_a_next_step(folder, capsys):
    (folder / "config.toml").write_text("slots = 0")
    assert cli_main.main(["doctor", "--data-dir", str(folder)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15
    for line in lines:
        level = line.split()[0]
        assert level in {"ok", "warn", "FAIL"}
        assert ("  -> " in line) == (level != "ok"), line


def test_what_is_wanted_is_what_pyproject_wants():
    project = pyproject()["project"]
    wanted = {name + wish for name, wish in packages.PACKAGES.items()}
    assert wanted == set(project["dependencies"])
    models = {name + wish for name, wish in packages.MODEL_PACKAGES.items()}
    assert models == set(project["optional-dependencies"]["models"])
    least = ".".join(map(str, doctor_file.PYTHON_LEAST))
    assert project["requires-python"] == f">={least}"


@pytest.mark.parametrize(
    ("version", "wish", "fit"),
    [
        ("0.8.1", "==0.8.1", True),
        ("0.8.10", "==0.8.1", False),
        ("3.51.3.0", ">=3.51.3", True),
        ("3.51.2.9", ">=3.51.3", False),
        ("2.13.0+cpu", ">=2.13", True),
        ("2.9", ">=2.13", False),
    ],
)
def test_versions_are_compared_as_numbers(version, wish, fit):
    assert doctor_file.fits(version, wish) is fit


def _pretend(monkeypatch, **versions):
    real = doctor_file.installed
    monkeypatch.setattr(doctor_file, "installed", lambda name: versions.get(name, real(name)))


def test_another_libp2p_fails(examined, monkeypatch):
    _pretend(monkeypatch, libp2p="0.9.0")
    assert_fails(examined, "libp2p", "0.9.0 is here", "libp2p==0.8.1")


def test_a_missing_libp2p_says_what_building_it_lacks(examined, monkeypatch, tmp_path):
    _pretend(monkeypatch, libp2p=None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda _: str(tmp_path))
    assert_fails(examined, "libp2p", "a C compiler, Python.h", "apt-get install -y gcc python3-dev")


def test_an_old_sqlite_under_the_writer_fails(examined, monkeypatch):
    import apsw

    monkeypatch.setattr(apsw, "sqlite_lib_version", lambda: "3.51.2")
    assert_fails(examined, "sqlite writer", "3.51.2", "apsw")


def test_missing_model_packages_are_a_warning_that_names_them(examined, monkeypatch):
    _pretend(monkeypatch, torch=None, gguf="0.1")
    code, found = examined()
    assert code == 0
    assert found["model packages"]["level"] == "warn"
    assert "gguf 0.1, torch missing" in found["model packages"]["detail"]
    assert "'torch>=2.13'" in found["model packages"]["next_step"]


def test_a_key_that_others_can_read_fails(examined, folder):
    (folder / "identity.key").chmod(0o644)
    assert_fails(examined, "identity", "others can read", "chmod 600")


def test_a_data_folder_that_others_can_look_into_is_a_warning(examined, folder):
    folder.chmod(0o755)
    code, found = examined()
    assert (code, found["data folder"]["level"]) == (0, "warn")
    assert "chmod 700" in found["data folder"]["next_step"]


def test_a_file_in_place_of_the_data_folder_fails(examined, folder):
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert_fails(examined, "data folder", "no folder", "--data-dir")


def test_a_wrong_setting_is_reported_once_with_what_to_write(examined, folder):
    (folder / "config.toml").write_text("slots = 0")
    code, found = examined()
    assert code == 3
    wrong = [check for check in found.values() if check["level"] == "FAIL"]
    assert [check["what"] for check in wrong] == ["config"]
    assert "slots" in wrong[0]["detail"]
    assert "slots" in wrong[0]["next_step"]


def test_development_mode_is_a_warning(examined, monkeypatch):
    monkeypatch.setenv("AIVILLAGE_DEV_MODE", "true")
    assert examined()[1]["config"]["level"] == "warn"


def test_a_full_disk_fails(examined, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1 << 20))
    assert_fails(examined, "disk", "takes no work", "free some space")


def test_a_port_that_somebody_else_holds_fails(examined, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("AIVILLAGE_LISTEN", f"127.0.0.1:{other.getsockname()[1]}")
        assert_fails(examined, "port", "in use", "--listen")


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", "1.2.3.4.5:80"])
def test_an_address_that_is_none_fails(examined, monkeypatch, listen):
    monkeypatch.setenv("AIVILLAGE_LISTEN", listen)
    code, found = examined()
    assert (code, found["port"]["level"]) == (3, "FAIL")


def test_a_ledger_that_is_no_ledger_fails(examined, folder):
    (folder / "ledger.db").write_bytes(b"garbage" * 1000)
    assert_fails(examined, "ledger", "cannot be read", "backup")


def test_a_large_ledger_is_left_to_the_audit(examined, folder):
    with (folder / "ledger.db").open("wb") as file:
        file.truncate(doctor_file.AUDIT_BYTES_MAX + 1)
    code, found = examined()
    assert (code, found["ledger"]["next_step"]) == (0, "aivillage-node audit")


def test_a_clock_that_lost_its_battery_fails(examined, monkeypatch):
    class Stopped(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1970, 1, 1, tzinfo=tz)

    monkeypatch.setattr(doctor_file.dt, "datetime", Stopped)
    assert_fails(examined, "clock", "1970", "ntp")


def test_a_socket_path_that_is_too_long_fails(examined, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    assert_fails(examined, "control socket", "too long", "XDG_RUNTIME_DIR")


def test_a_check_that_crashes_is_a_finding_and_the_others_go_on(examined, monkeypatch):
    def crash(_patient):
        raise ZeroDivisionError("oh")
        yield

    monkeypatch.setattr(doctor_file, "CHECKS", (("first", crash), *doctor_file.CHECKS))
    assert_fails(examined, "first", "ZeroDivisionError", "report")
    assert examined()[1]["disk"]["level"] == "ok"


@pytest.mark.parametrize("missing", ["msgspec", "apsw", "cryptography", "aiosqlite", "trio"])
def test_a_missing_package_makes_findings_and_no_traceback(folder, missing):
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from aivillage.cli.main import main\n"
        f"sys.exit(main(['doctor', '--data-dir', {str(folder)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert "FAIL" in done.stdout or missing == "aiosqlite"  # there is no ledger to read yet
    assert done.returncode == (3 if "FAIL" in done.stdout else 0)


# ------------------------------------------------------------------ beside a running node

HEALTHY = {
    "version": __version__,
    "state": "ready",
    "uptime_seconds": 5.0,
    "addresses": ["/ip4/127.0.0.1/tcp/4051"],
    "loop_lag_ms": {"p50": 0.1, "p99": 1.0},
}


@contextmanager
def daemon_says(folder, answers):
    """Answers the control socket; a question that is not in `answers` is left hanging."""
    path = paths(str(folder)).socket
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    kept = []

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            kept.append(client)
            client.sendall(codec.frame(make_hello()))
            ask = client.recv(65536)
            if ask:
                question = codec.decode(ask[codec.LENGTH_BYTES :])
                if question.what in answers:
                    value = answers[question.what]
                    client.sendall(codec.frame(Answer(id=question.id, value=value)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for client in kept:
            client.close()


def test_a_running_node_is_asked_and_its_port_is_its_own(examined, folder):
    (folder / "ledger.db").write_bytes(b"")
    audit = {"ok": True, "entries": 7, "first_error": ""}
    with daemon_says(folder, {"status": HEALTHY, "audit": audit}):
        code, found = examined()
    assert code == 0
    assert {found[what]["level"] for what in ("node", "control socket", "port", "ledger")} == {"ok"}
    assert "held by our node" in found["port"]["detail"]
    assert "7 entries" in found["ledger"]["detail"]


@pytest.mark.parametrize(
    ("change", "level", "about"),
    [
        ({"version": "0.0.1"}, "FAIL", "the running node is 0.0.1"),
        ({"state": "refusing work: the disk is full"}, "FAIL", "the disk is full"),
        ({"state": "closed to others: the owner paused it"}, "warn", "the owner paused it"),
        ({"loop_lag_ms": {"p99": 50.0}}, "warn", "50.0 ms late"),
    ],
)
def test_a_running_node_that_is_not_well_is_told(examined, folder, change, level, about):
    with daemon_says(folder, {"status": HEALTHY | change}):
        code, found = examined()
    assert code == (3 if level == "FAIL" else 0)
    assert found["node"]["level"] == level
    assert about in found["node"]["detail"]


def test_a_book_that_the_node_finds_wrong_fails(examined, folder):
    (folder / "ledger.db").write_bytes(b"")
    audit = {"ok": False, "entries": 7, "first_error": "entry 3 is forged"}
    with daemon_says(folder, {"status": HEALTHY, "audit": audit}):
        assert_fails(examined, "ledger", "entry 3 is forged", "audit")


def test_a_node_that_hangs_fails_and_the_doctor_does_not_hang_with_it(examined, folder):
    (folder / "ledger.db").write_bytes(b"garbage")
    started = time.monotonic()
    with daemon_says(folder, {}):
        assert_fails(examined, "node", "does not answer", "end its process")
        assert time.monotonic() - started < 15  # and not for ever


def test_a_socket_that_nobody_answers_is_a_warning(examined, folder):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(paths(str(folder)).socket))
    code, found = examined()
    assert (code, found["control socket"]["level"]) == (0, "warn")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_data_folder_that_cannot_be_read_fails(examined, folder):
    folder.chmod(0)
    try:
        assert examined()[0] == 3
    finally:
        folder.chmod(0o700)


def test_a_cluster_that_is_not_there_is_told_and_nobody_asks_without_the_setting(examined, folder):
    assert "ray" not in examined()[1]
    (folder / "config.toml").write_text('executor = "ray"\nray_address = "127.0.0.1:1"\n')
    code, found = examined()
    assert (code, found["ray"]["level"]) == (3, "FAIL")
    assert found["ray"]["detail"].startswith("127.0.0.1:1: ")
    assert "ray" in found["ray"]["next_step"]
