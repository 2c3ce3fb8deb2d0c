"""Two machines on one cable: network namespaces with a veth pair, and real multicast DNS."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.integration.daemons import Daemon, Yard, wait_for

pytestmark = pytest.mark.slow

PORT = 4051
ON, OFF = ("--set", "mdns=true"), ("--set", "mdns=false")
QUICK = ("--set", "heartbeat_seconds=1")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` here (package iproute2)"
    name = f"try{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


WHY_NOT = why_not()


class Housed(Daemon):
    """A daemon in a network namespace: as on a machine of its own."""

    space = ""

    def _command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space, *super()._command(*words)]

    def begin(self, *flags: str, port: int = PORT) -> None:
        self.start("--listen", f"0.0.0.0:{port}", *QUICK, *flags)


@contextlib.contextmanager
def cable() -> Iterator[list[str]]:
    """Two namespaces whose only network is a cable between them."""
    tag = secrets.token_hex(3)
    spaces, ends = [f"a{tag}", f"b{tag}"], [f"va{tag}", f"vb{tag}"]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for space, end in zip(spaces, ends, strict=True):
            ip("link", "set", end, "netns", space, "name", "lan0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "lan0", "up")
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def address(spaces: list[str], network: str) -> None:
    """The first gets number 1 on `network`, the other 2; what they had is gone."""
    for number, space in enumerate(spaces, start=1):
        ip("-n", space, "addr", "flush", "dev", "lan0", "scope", "global")
        ip("-n", space, "addr", "add", f"{network}.{number}/24", "dev", "lan0")


def housed(yard: Yard, name: str, folder: pathlib.Path, space: str) -> Housed:
    made = Housed(name, folder / name, yard.environment)
    made.space = space
    yard.daemons.append(made)
    return made


def members(daemon: Daemon) -> int:
    return int(daemon.ask("status")["members"])


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_villagers_whose_addresses_all_changed_find_each_other_on_the_network(tmp_path):
    with cable() as spaces, Yard(tmp_path) as yard:
        ann = housed(yard, "ann", tmp_path, spaces[0])
        bob = housed(yard, "bob", tmp_path, spaces[1])
        cat = housed(yard, "cat", tmp_path, spaces[0])
        address(spaces, "10.77.0")
        assert ann.run("init").code == 0
        assert ann.run("village-key", "new").code == 0  # all of this in a private village
        ann.begin(*OFF)
        bob.begin("--join", ann.ask("invite")["token"], *OFF)
        for daemon in (ann, bob):
            wait_for(lambda d=daemon: members(d) == 1, 20, f"they meet\n{yard.logs()}")
        for daemon in (ann, bob):
            daemon.stop()
        address(spaces, "10.78.0")  # another router, say: what each knew of the other is void
        for daemon in (ann, bob):
            daemon.begin(*OFF)
        time.sleep(5)
        assert (members(ann), members(bob)) == (0, 0)
        for daemon in (ann, bob):
            daemon.stop()
            daemon.begin(*ON)
        cat.begin(*ON, port=PORT + 1)  # of a village of its own
        for daemon in (ann, bob):
            wait_for(lambda d=daemon: members(d) == 1, 30, f"they find each other\n{yard.logs()}")
        assert any("10.78.0" in place for place in bob.ask("peers")[0]["addresses"])
        time.sleep(3)
        assert [peer["peer"] for peer in ann.ask("peers")] == [bob.peer]
        assert cat.ask("peers") == []
        # The owner's next look finds it reachable on this network, by the other.
        found = wait_for(
            lambda: (f := ann.ask("status")["reachable"])["state"] == "reachable" and f,
            20, "bob dialled back",
        )  # fmt: skip
        assert "10.78.0.1:4051, on the same network" in found["why"]
