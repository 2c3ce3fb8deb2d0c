"""One node per folder."""

import argparse
import subprocess
import sys
import threading
import time

import pytest

from aivillage.cli import node as commands
from aivillage.cli.client import NoDaemonError
from aivillage.node import daemon, identity, lock
from aivillage.node.config import Settings
from aivillage.node.paths import Paths
from aivillage.protocols.errors import ConfigError, NodeError
from tests.house import ROOT


def test_the_second_holder_is_refused_and_the_next_one_is_not(tmp_path):
    assert not lock.is_held(tmp_path)
    with lock.held(tmp_path):
        assert lock.is_held(tmp_path)
        with pytest.raises(ConfigError, match="running"), lock.held(tmp_path):
            pass
        assert lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path)
    with lock.held(tmp_path):
        pass
    assert (tmp_path / lock.LOCK_FILE).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"), lock.held(tmp_path / "nowhere"):
        pass


def test_a_killed_holder_leaves_nothing_locked_and_its_children_do_not_hold_on(tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "from aivillage.node import lock\n"
        "with lock.held(pathlib.Path(sys.argv[1])):\n"
        "    child = subprocess.Popen(['sleep', '20'])\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(holder.stdout.readline())
    try:
        assert lock.is_held(tmp_path)
        holder.kill()
        holder.wait()
        assert not lock.is_held(tmp_path)
    finally:
        subprocess.run(["kill", str(child)], check=False)
        holder.stdout.close()


def stop_of(folder, **changes):
    return commands.stop(argparse.Namespace(data_dir=str(folder), json=False, **changes))


def test_stop_waits_for_a_node_that_answers_no_more_and_says_the_truth(
    tmp_path, monkeypatch, capsys
):
    """Its socket is gone first; the ledger is still open."""
    monkeypatch.setattr(commands, "STOP_SECONDS", 0.3)
    with lock.held(tmp_path), pytest.raises(NodeError, match="still running"):
        stop_of(tmp_path)
    assert "stopped" not in capsys.readouterr().out
    with pytest.raises(NoDaemonError):
        stop_of(tmp_path)
    monkeypatch.setattr(commands, "STOP_SECONDS", 10)
    going = threading.Event()

    def live():
        with lock.held(tmp_path):
            going.set()
            time.sleep(0.4)

    node = threading.Thread(target=live)
    node.start()
    going.wait()
    assert stop_of(tmp_path) == 0
    assert not lock.is_held(tmp_path)
    node.join()


async def test_a_second_start_touches_nothing_of_the_first(tmp_path):
    identity.create(tmp_path)
    where = Paths(tmp_path, tmp_path / "s", tmp_path / "cache")
    with lock.held(tmp_path), pytest.raises(ConfigError, match="running") as caught:
        await daemon.run(Settings(listen="127.0.0.1:0"), [], where, lambda _desk: None)
    assert "stop" in caught.value.next_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity.key", lock.LOCK_FILE]
