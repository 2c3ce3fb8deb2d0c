"""Keys, owners, grants and compared books with real daemons and the real command line."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.integration.daemons import Daemon, Yard, settled, wait_for

pytestmark = pytest.mark.slow

FLAGS = ("--set", "heartbeat_seconds=0.5")


@pytest.fixture
def yard(tmp_path: pathlib.Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made
        print(made.logs())


def run(daemon: Daemon, command: str, action: str, *words: str) -> str:
    """A command whose flags come after its action."""
    done = subprocess.run(
        [sys.executable, "-m", "aivillage", command, action, "--data-dir", str(daemon.data_dir),
         *words],
        capture_output=True, text=True, check=False, timeout=60, env=daemon._environment,
        cwd=daemon.data_dir.parent,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout.strip()


def line_of(daemon: Daemon, other: str) -> int:
    """What `other`, by its first id, may owe."""
    peers = {peer["peer"]: peer for peer in daemon.ask("balance")["peers"]}
    return int(peers[other]["line"]) if other in peers else 0


def test_a_node_with_a_new_key_goes_on_with_its_account(yard):
    ann, bob = yard.village("ann", "bob", flags=FLAGS)
    yard.know_each_other(ann, bob)
    assert bob.run("submit", "mesh.noop", "hello", "--peer", ann.peer).code == 0
    settled([ann, bob], 20)
    first = {daemon.name: daemon.peer for daemon in (ann, bob)}
    refused = bob.run("rotate-key")
    assert refused.code == 3, refused  # it runs
    for daemon in (ann, bob):
        daemon.stop()
    for daemon in (ann, bob):
        assert daemon.run("rotate-key", "--json").json["former"] == first[daemon.name]
        daemon.restart()
        assert daemon.peer != first[daemon.name]
    yard.know_each_other(ann, bob)
    assert bob.run("submit", "mesh.noop", "again", "--peer", ann.peer).code == 0

    def earned() -> bool:
        return ann.ask("balance")["net"] == -bob.ask("balance")["net"] == 20

    wait_for(earned, 20, "both jobs are on one account")
    for one, other in ((ann, bob), (bob, ann)):
        done = one.run("audit", "--peer", other.peer[-8:])
        assert done.code == 0, done
        assert "both books agree" in done.out
        assert one.run("audit").code == 0
    guest = yard.daemon("guest").start("--join", ann.ask("invite")["token"], *FLAGS)
    yard.know_each_other(guest, bob)


def test_a_founder_grants_and_devices_of_one_owner_know_each_other(yard):
    ann, bob, cam = yard.village("ann", "bob", "cam", flags=FLAGS)
    before = wait_for(lambda: line_of(ann, bob.peer), 20, "a member's line")
    done = ann.run("grant", bob.peer[-8:], "2.5")
    assert done.code == 0, done
    assert "sent to" in done.err
    wait_for(lambda: line_of(ann, bob.peer) == before + 2_500_000, 20, "the grant counts")
    assert "2.5" in bob.run("grants").out
    assert "2.5" in run(bob, "grants", "import", done.out.strip())  # the copy
    assert ann.run("grant", bob.peer, "99").code == 5  # beyond the cap
    run(bob, "owner", "init")
    for device in (bob, cam):
        token = run(bob, "owner", "adopt", device.peer)
        assert "this node is a device" in run(device, "owner", "join", token)
    wait_for(lambda: cam.peer in run(bob, "owner", "show"), 30, "bob met cam")
    assert bob.peer in run(cam, "owner", "show")
