"""Two nodes behind two routers: where these allow it, they do without the relay in the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from tests.integration.daemons import Daemon, Yard, settled, wait_for
from tests.integration.netns import Wires, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "present")]

RELAY = "10.77.0.1"
HOMES = {"ann": ("192.168.71.2", "10.77.0.8"), "bob": ("192.168.72.2", "10.77.0.9")}
RANDOM = "masquerade fully-random"
PER_GIB = 1 << 22
"""256 bytes are a micro-credit."""
PRICE = ("--set", f"relay_price_micro_credits_per_gib={PER_GIB}")
PAYS = ("--set", f"relay_price_max_micro_credits_per_gib={PER_GIB}")


class Village(NamedTuple):
    wires: Wires
    relay: Daemon
    ann: Daemon
    bob: Daemon


@contextmanager
def village(folder, nat: str) -> Iterator[Village]:
    """A private one. The relay is on the bridge; the two others are behind routers."""
    outside = [RELAY, *(router for _, router in HOMES.values())]
    with Wires() as wires, Yard(folder) as yard:
        wires.place("relay", RELAY)
        relay = wires.move(yard.daemon("relay"), RELAY)
        assert relay.run("init").code == relay.run("village-key", "new").code == 0
        relay.start(*PRICE)
        homes = []
        for name, (address, router) in HOMES.items():
            wires.hide(name, address, router=router, reaches=outside, nat=nat)
            wires.silence(name)  # as most home routers are
            home = wires.move(yard.daemon(name), address)
            token = relay.ask("invite")["token"]
            homes.append(home.start("--join", token, "--set", "through_relay=always", *PAYS))
        found = Village(wires, relay, *homes)
        for one, other in (homes, homes[::-1]):
            wait_for(lambda a=one, b=other: linked(a, b), 40, yard.logs)
        yield found
        for daemon in yard.daemons:
            assert "Traceback" not in daemon.log.read_text(), daemon.log_end(200)


def linked(one: Daemon, other: Daemon) -> bool:
    return any(row["peer"] == other.peer and row["connected"] for row in one.ask("peers"))


def through(one: Daemon, other: Daemon) -> str | None:
    """The relay between the two; empty where there is no link."""
    rows = [row for row in one.ask("peers") if row["peer"] == other.peer and row["connected"]]
    return rows[0]["through"] if rows else ""


def count(daemon: Daemon, name: str) -> int:
    return int(daemon.ask("events")["counts"].get(name, 0))


def carried(relay: Daemon) -> int:
    return int(relay.ask("status")["relay"]["carried"]["bytes_today"])


def buys(here: Village) -> None:
    wait_for(lambda: here.bob.peer in here.ann.sellers_known("mesh.noop"), 40, here.ann.log_end)
    job = here.ann.submit("mesh.noop", peer=here.bob.peer, note="hello")
    assert here.ann.job_ended(job, 60)["state"] == "done"
    settled([here.relay, here.ann, here.bob], 20)


def test_behind_routers_that_keep_ports_the_link_leaves_the_relay(tmp_path):
    with village(tmp_path, "masquerade") as here:
        wires, relay, ann, bob = here
        assert not wires.can_connect("ann", HOMES["bob"][1], bob.port)
        wait_for(
            lambda: through(ann, bob) is None and through(bob, ann) is None, 60,
            lambda: f"{ann.log_end()}\n{bob.log_end()}",
        )  # fmt: skip
        # The relay is paid for what it carried until then, and for nothing after it.
        before = carried(relay)
        due = before * PER_GIB >> 30
        # Less what is below a micro-credit on either holder's tab.
        wait_for(lambda: relay.ask("balance")["earned"] >= due - 1, 20, relay.log_end)
        settled([relay, ann, bob], 20)
        earned = relay.ask("balance")["earned"]
        assert earned <= due
        buys(here)
        assert carried(relay) == before
        assert relay.ask("balance")["earned"] == earned
        assert relay.ask("balance")["spent"] == 0
        assert sum(node.ask("balance")["net"] for node in (relay, ann, bob)) == 0
        # Each still holds its reservation: that it was met does not make it reachable.
        for home in (ann, bob):
            assert home.ask("status")["relay"]["reachable_through"] == [relay.peer]


def test_behind_routers_that_draw_ports_the_relay_stays_and_the_link_too(tmp_path):
    with village(tmp_path, RANDOM) as here:
        _, relay, ann, bob = here
        first = min((ann, bob), key=lambda daemon: daemon.peer)
        wait_for(lambda: count(first, "punch_failed"), 60, first.log_end)
        assert through(ann, bob) == through(bob, ann) == relay.peer
        buys(here)
        assert not count(first, "punched")
        assert not count(first, "direct_way_found")
