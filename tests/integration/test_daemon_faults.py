"""Wrong files, a full disk and rude callers: typed errors, nothing overwritten, service goes on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from aivillage.protocols import codec, messages
from aivillage.protocols.errors import AivillageError
from tests.integration.daemons import Daemon, Done, Yard, paused, settled, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two neighbours; whatever a test sends them, they must serve the next one."""
    with Yard(tmp_path_factory.mktemp("pair")) as made:
        daemons = made.village("ann", "bob")
        made.know_each_other(*daemons)
        yield daemons
        print(made.logs())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The folder of a node that traded and was stopped: to be copied and spoilt."""
    with Yard(tmp_path_factory.mktemp("stopped")) as made:
        ann, bob = made.village("ann", "bob")
        made.know_each_other(ann, bob)
        assert bob.run("submit", "mesh.noop", "x").code == 0
        settled([ann, bob], 10)
        assert bob.stop() == 0
        yield bob.data_dir


# ------------------------------------------------------------------ wrong files


def _group_readable(folder: pathlib.Path) -> None:
    (folder / "identity.key").chmod(0o640)


def _foreign_key(folder: pathlib.Path) -> None:
    (folder / "identity.key").unlink()
    command = [sys.executable, "-m", "aivillage", "init", "--data-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def _writes(name: str, body: bytes) -> Callable[[pathlib.Path], None]:
    def write(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(body)

    return write


def _cut(name: str, keep_bytes: int) -> Callable[[pathlib.Path], None]:
    def cut(folder: pathlib.Path) -> None:
        os.truncate(folder / name, keep_bytes)

    return cut


def _scribbled(name: str, start: int) -> Callable[[pathlib.Path], None]:
    def scribble(folder: pathlib.Path) -> None:
        body = bytearray((folder / name).read_bytes())
        body[start:] = random.Random(7).randbytes(len(body) - start)
        (folder / name).write_bytes(body)

    return scribble


FAULTS = {
    "config is no toml": (_writes("config.toml", b"listen = ["), ("config.toml",)),
    "config is no text": (_writes("config.toml", b"\xff\xfe\x00"), ("config.toml",)),
    "setting misspelt": (_writes("config.toml", b"slot = 3\n"), ("slot", "write 'slots'")),
    "setting unheard of": (_writes("config.toml", b"zzz = 3\n"), ("zzz", "config show")),
    "setting of a wrong type": (_writes("config.toml", b'slots = "many"\n'), ("slots",)),
    "setting out of range": (_writes("config.toml", b"slots = 0\n"), ("slots",)),
    "ledger is no database": (_writes("ledger.db", b"hello" * 100), ("ledger.db", "backup")),
    "ledger scribbled over": (_scribbled("ledger.db", 100), ("ledger.db", "backup")),
    "ledger cut short": (_cut("ledger.db", 5000), ("ledger.db", "backup")),
    "ledger of another key": (_foreign_key, ("ledger.db",)),
    "jobs is no database": (_writes("jobs.db", b"hello" * 100), ("jobs.db", "mv ")),
    "jobs scribbled over": (_scribbled("jobs.db", 100), ("jobs.db", "mv ")),
    "jobs cut short": (_cut("jobs.db", 5000), ("jobs.db", "mv ")),
    "key cut short": (_cut("identity.key", 40), ("identity.key", "backup")),
    "key is empty": (_cut("identity.key", 0), ("identity.key", "backup")),
    "key that others can read": (_group_readable, ("identity.key", "chmod 600")),
    "ledger of another program": (
        _writes("ledger.db", b"SQLite format 3\0" + bytes(84)),
        ("ledger.db",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named_and_left_alone(yard, stopped, fault):
    spoil, words = FAULTS[fault]
    node = yard.daemon("node")
    shutil.copytree(stopped, node.data_dir)
    spoil(node.data_dir)
    before = _contents(node.data_dir)
    done = node.run("start", "--listen", f"127.0.0.1:{node.port}", seconds=20)
    assert done.code == 3, done
    assert "Traceback" not in done.text, done
    assert "next:" in done.err, done
    assert all(word in done.err for word in words), done
    assert _contents(node.data_dir) == before
    assert not node.socket.exists()


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(("-wal", "-shm", ".lock"))
    }


def test_a_wrong_ledger_is_named_by_the_reads_that_need_no_daemon(yard, stopped):
    node = yard.daemon("node")
    shutil.copytree(stopped, node.data_dir)
    for spoil in (_scribbled("ledger.db", 100), _cut("ledger.db", 5000)):
        spoil(node.data_dir)
        for read in ("balance", "history", "audit"):
            done = node.run(read)
            assert (done.code, "ledger.db" in done.err) == (3, True), done
            assert "Traceback" not in done.text


def test_a_wrong_flag_or_variable_is_named_with_where_it_was(yard):
    node = yard.daemon("node")
    assert node.run("init").code == 0
    for words, environment, told in (
        (("--set", "slotz=3"), {}, "'slots'"),
        (("--set", "slots"), {}, "KEY=VALUE"),
        (("--listen", "nowhere"), {}, "listen"),
        (("--listen", "127.0.0.1:99999"), {}, "listen"),
        ((), {"AIVILLAGE_SLOTS": "many"}, "environment"),
    ):
        done = node.run("start", *words, seconds=20, **environment)
        assert (done.code, told in done.err) == (3, True), done
        assert "Traceback" not in done.text


def test_a_folder_without_a_node_is_told_how_to_make_one(yard):
    done = yard.daemon("node").run("start")
    assert (done.code, "aivillage-node init" in done.err) == (3, True), done


def test_a_folder_that_cannot_be_written_is_named(yard):
    (yard.folder / "file").write_text("in the way")
    node = yard.daemon("node", yard.folder / "file" / "node")
    node.log = node.out = yard.folder / "unused"
    done = yard.daemon("other").run("init", "--data-dir", str(node.data_dir))
    assert (done.code, "--data-dir" in done.err) == (3, True), done


# ------------------------------------------------------------------ a full disk


@contextlib.contextmanager
def _small_disk(folder: pathlib.Path, size_mb: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small filesystem takes rights that we have not")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_new_work_and_nothing_else(yard):
    disk = yard.folder / "disk"
    with _small_disk(disk, 120), contextlib.ExitStack() as last:
        ann = yard.daemon("ann").start()
        bob = yard.daemon("bob", disk / "bob")
        bob.log, bob.out = yard.folder / "bob.log", yard.folder / "bob.out"
        bob.start("--join", ann.ask("invite")["token"])
        last.callback(lambda: bob.running() and bob.kill())
        yard.know_each_other(ann, bob)
        assert bob.run("submit", "mesh.noop", "x").code == 0
        jobs = [
            bob.submit("mesh.noop", note="x" * 4096, sleep_seconds=seconds, parts=parts)
            for seconds, parts in ((4.0, 40), (2.0, 0), (4.0, 0))
        ]
        ballast = disk / "ballast"
        with contextlib.suppress(OSError):  # that it does not fit is the point
            ballast.write_bytes(bytes(120 << 20))
        assert shutil.disk_usage(disk).free < 64 << 10
        wait_for(lambda: bob.ask("status")["state"] != "ready", 10, "the daemon notices")
        refused = bob.run("submit", "mesh.noop", "x")
        assert "DISK_FULL" in refused.err, refused
        assert "free" in refused.err
        assert "Traceback" not in refused.text
        for read in ("status", "peers", "balance", "history", "audit", "operations", "config"):
            assert bob.run(read, "--json").code == 0, read
        assert "mesh.noop" not in bob.ask("status")["serves"]
        during = bob.running()
        ballast.unlink()
        assert during, bob.log_end()
        wait_for(lambda: bob.ask("status")["state"] == "ready", 15, "the daemon recovers")
        for job in jobs:
            ended = bob.job_ended(job, 30)
            assert ended["state"] == "done", ended
        assert bob.run("submit", "mesh.noop", "x").code == 0
        settled([ann, bob], 20)
        assert bob.stop() == 0


# ------------------------------------------------------------------ rude clients of the socket


def _rude(daemon: Daemon, data: bytes) -> bytes:
    """What the daemon answers after its hello."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(10)
        wire.connect(str(daemon.socket))
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        found = b""
        with contextlib.suppress(ConnectionResetError):  # a door slammed is an answer too
            while chunk := wire.recv(65_536):
                found += chunk
        return found


RUDE = {
    "nothing": b"",
    "garbage": random.Random(1).randbytes(4096),
    "a length without an end": b"\xff\xff\xff\xff",
    "a length just above the limit": (codec.FRAME_BYTES_MAX + 1).to_bytes(4, "big"),
    "a cut frame": codec.frame(messages.Ask(id=1, what="status"))[:-3],
    "an empty frame": bytes(4),
    "a message nobody knows": b"\x00\x00\x00\x0a" + b"\x82\xa1t\xa3zzz\xa2id\x01",
    "no map": b"\x00\x00\x00\x02\x91\x01",
    "a peer's message": codec.frame(messages.ListOperations(id=1)),
    "a question of a wrong type": b"\x00\x00\x00\x10" + b"\x83\xa1t\xa3ask\xa2id\xa1x\xa4what\x01",
    "deep nesting": (200).to_bytes(4, "big") + b"\x91" * 200,
}


@pytest.mark.parametrize("kind", RUDE)
def test_bad_bytes_on_the_control_socket_end_one_client(pair, kind):
    _rude(pair[0], RUDE[kind])
    assert pair[0].ask("status")["state"] == "ready"


def test_a_question_that_nobody_knows_gets_a_typed_answer(pair):
    for what, args, told in (
        ("nonsense", {}, "does not know"),
        ("job", {}, "job"),
        ("jobs", {"limit": "many"}, "many"),
        ("history", {"limit": None}, "history"),
        ("join", {}, "token"),
        ("invite", {"line_micro_credits": "much"}, "invite"),
    ):
        with pytest.raises(AivillageError, match=told):
            pair[0].ask(what, **args)
    assert pair[0].ask("status")["state"] == "ready"


def test_a_submission_that_is_no_request_gets_a_typed_answer(pair):
    for request in (b"", b"\xc1", b"\x81\xa4note\x01", b"\x91\x01", b"\x80" + b"x" * 1000):
        with pair[1].client() as client:
            client.send(messages.Submit(id=1, operation="mesh.noop", request=request))
            with pytest.raises(AivillageError) as caught:
                list(client.frames(1))
            assert caught.value.code == "BAD_REQUEST", request
    assert pair[1].ask("status")["state"] == "ready"


def test_forty_clients_at_once_are_all_answered(pair):
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(pair[0].ask("status")["state"])
        except AivillageError as error:
            answers.append(error.code)

    clients = [threading.Thread(target=ask) for _ in range(40)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    assert len(answers) == 40
    assert set(answers) <= {"ready", "BUSY"}
    assert answers.count("ready") >= 32


def test_clients_that_stay_do_not_lock_the_owner_out_in_silence(pair):
    with contextlib.ExitStack() as open_ones:
        for _ in range(32):
            open_ones.enter_context(pair[0].client())
        done = pair[0].run("status", seconds=10)
        assert (done.code, "BUSY" in done.err) == (5, True), done
    wait_for(lambda: _is_answered(pair[0]), 5, "room again")


def _is_answered(daemon: Daemon) -> bool:
    return daemon.run("status").code == 0


def test_a_client_that_never_reads_does_not_stop_the_others(pair):
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(1)
        wire.connect(str(pair[0].socket))
        question = codec.frame(messages.Ask(id=1, what="operations"))
        with contextlib.suppress(OSError):  # the daemon may cut it off, or the pipe be full
            for _ in range(20_000):
                wire.sendall(question)
        assert pair[0].ask("status")["state"] == "ready"
    assert pair[0].rss_mb() < 400


def test_a_daemon_that_stands_still_is_told_from_none(yard):
    ann = yard.daemon("ann").start()
    with paused(ann):
        command = ann.spawn("status")
        with pytest.raises(subprocess.TimeoutExpired):
            command.communicate(timeout=3)
        ann.kill()
        out, err = command.communicate(timeout=10)
        assert "Traceback" not in out + err
        assert (command.returncode, "the node ended" in err) == (1, True), Done(1, out, err)
        ann.restart()


def test_a_daemon_killed_under_a_submit_is_told(yard):
    ann, bob = yard.village("ann", "bob")
    yard.know_each_other(ann, bob)
    command = bob.spawn("submit", "mesh.noop", "x", "--sleep-seconds", "20")
    wait_for(lambda: ann.ask("status")["sales_running"], 10, "it works")
    bob.kill()
    out, err = command.communicate(timeout=10)
    assert "Traceback" not in out + err
    assert command.returncode == 1
    assert "the node ended" in err


# ------------------------------------------------------------------ rude callers of the port


def _call_port(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        wire.settimeout(0.5)
        with contextlib.suppress(OSError):  # hung up on, or left waiting: both are fine
            wire.sendall(data)
            wire.recv(4096)


def test_noise_on_the_port_for_peers_leaves_the_daemon_serving(pair):
    ann, bob = pair
    dice = random.Random(3)
    half = b"\x13/multistream/1.0.0\n"
    for data in (
        b"",
        dice.randbytes(10_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(100),
        half,
        half + b"\x07/noise\n",
        half + b"\x07/noise\n" + b"\x00\x20" + dice.randbytes(32),
        half + b"\x07/noise\n" + b"\xff\xff" + dice.randbytes(65_535),
        b"\xff" * 200_000,
    ):
        _call_port(ann.port, data)
    idle = [socket.create_connection(("127.0.0.1", ann.port), timeout=5) for _ in range(50)]
    assert ann.ask("status")["state"] == "ready"
    assert bob.run("submit", "mesh.noop", "x").code == 0
    for wire in idle:
        wire.close()
    assert bob.run("submit", "mesh.noop", "x").code == 0
    assert ann.running()
    assert "Traceback" not in ann.log.read_text(), ann.log_end(200)
