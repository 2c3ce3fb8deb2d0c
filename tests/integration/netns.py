"""Networks of this machine's own: namespaces, a bridge, routers with NAT. Root only.

    with Wires() as wires:
        wires.place("relay", "10.77.0.1")
        wires.hide("seller", "192.168.77.2", router="10.77.0.9", reaches=["10.77.0.1"])
        subprocess.run([*wires.inside("seller"), "ping", "10.77.0.1"])

Leaving the block deletes every namespace, and with them what is in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Self

from tests.integration.daemons import Daemon


def missing() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian package {package})"
    probe = f"aiv{os.getpid()}probe"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"this kernel gives no network namespaces: {made.stderr.strip()}"
    rules = run_in(probe, "nft", "add table ip probe", check=False)
    run("ip", "netns", "del", probe)
    return f"no nftables in this kernel: {rules.stderr.strip()}" if rules.returncode else ""


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done


def run_in(space: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("ip", "netns", "exec", space, *words, check=check)


class Wires:
    """A bridge, and machines that hang on it or hide behind a router on it."""

    def __init__(self) -> None:
        self._prefix = f"aiv{os.getpid()}"
        self._spaces: list[str] = []
        self._hub = ""

    def __enter__(self) -> Self:
        try:
            self._hub = self._space("hub")
            run("ip", "-n", self._hub, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self._hub, "link", "set", "br0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            run("ip", "netns", "del", space, check=False)

    def inside(self, name: str) -> tuple[str, ...]:
        """The words before a command that is to run on the machine `name`."""
        return "ip", "netns", "exec", self._name(name)

    def move(self, daemon: Daemon, address: str) -> Daemon:
        """The daemon of that name is to run on the machine of that name."""
        daemon.launcher, daemon.host = self.inside(daemon.name), address
        return daemon

    def place(self, name: str, address: str) -> None:
        """A machine on the bridge."""
        self._plug(self._space(name), address)

    def hide(
        self, name: str, address: str, *, router: str, reaches: list[str], nat: str = "masquerade"
    ) -> None:
        """A machine behind a router with NAT, which lets it out to `reaches` and nobody in.

        `nat`: `masquerade` keeps a port outside as it is inside, where it can; `masquerade
        fully-random` draws another one for each connection.
        """
        box, home = self._space(f"{name}box"), self._space(name)
        self._plug(box, router)
        gateway = address.rpartition(".")[0] + ".1"
        self._pair(box, "lan0", f"{gateway}/24", home, "eth0", f"{address}/24")
        run("ip", "-n", home, "route", "add", "default", "via", gateway)
        run_in(box, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        allowed = ", ".join(reaches)
        for rule in (
            "add table ip home",
            "add chain ip home behind { type nat hook postrouting priority 100 ; }",
            f"add rule ip home behind oifname eth0 {nat}",
            "add chain ip home through { type filter hook forward priority 0 ; policy drop ; }",
            "add rule ip home through ct state established,related accept",
            f"add rule ip home through iifname lan0 ip daddr {{ {allowed} }} accept",
        ):
            run_in(box, "nft", rule)

    def silence(self, name: str) -> None:
        """The router before `name` answers nobody who was not asked, not even with a refusal."""
        for rule in (
            "add chain ip home door { type filter hook input priority 0 ; }",
            "add rule ip home door iifname eth0 ct state new drop",
        ):
            run_in(self._name(f"{name}box"), "nft", rule)

    def can_connect(self, name: str, address: str, port: int) -> bool:
        """Whether a TCP connection from the machine `name` is accepted within two seconds."""
        attempt = f"exec 3<>/dev/tcp/{address}/{port}"
        words = *self.inside(name), "timeout", "2", "bash", "-c", attempt
        return run(*words, check=False).returncode == 0

    def _name(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _space(self, name: str) -> str:
        space = self._name(name)
        run("ip", "netns", "add", space)
        self._spaces.append(space)
        run("ip", "-n", space, "link", "set", "lo", "up")
        return space

    def _plug(self, space: str, address: str) -> None:
        port = f"p{len(self._spaces)}"
        self._pair(space, "eth0", f"{address}/24", self._hub, port, "")
        run("ip", "-n", self._hub, "link", "set", port, "master", "br0")

    def _pair(self, one: str, here: str, mine: str, other: str, there: str, its: str) -> None:
        run("ip", "-n", one, "link", "add", here, "type", "veth",
            "peer", "name", there, "netns", other)  # fmt: skip
        for space, device, address in ((one, here, mine), (other, there, its)):
            if address:
                run("ip", "-n", space, "addr", "add", address, "dev", device)
            run("ip", "-n", space, "link", "set", device, "up")
