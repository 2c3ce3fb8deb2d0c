"""init, start, stop, status, peers, join, paths, config."""

from __future__ import annotations

import argparse
import time
from decimal import Decimal, InvalidOperation
from typing import Any

from aivillage.cli import show
from aivillage.cli.client import Client, NoDaemonError
from aivillage.node import config as settings_file
from aivillage.node import identity, lock
from aivillage.node.paths import Paths, paths
from aivillage.protocols.errors import ConfigError, NodeError, RequestError
from aivillage.protocols.types import MICRO_CREDITS_PER_CREDIT, as_credits

STOP_SECONDS = 30.0


def places(args: argparse.Namespace) -> Paths:
    return paths(args.data_dir)


def connect(args: argparse.Namespace) -> Client:
    return Client(places(args).socket)


def amount(text: str) -> int:
    """`0.5` credits -> 500000 micro-credits."""
    try:
        micro = Decimal(text) * MICRO_CREDITS_PER_CREDIT
        is_amount = micro == int(micro) and micro >= 0
    except (InvalidOperation, ValueError, OverflowError):
        is_amount = False
    if not is_amount:
        raise RequestError(
            f"{text!r} is no amount of credits", next_step="write something like 0.25"
        )
    return int(micro)


def init(args: argparse.Namespace) -> int:
    """Makes a node; an existing one is left alone and named."""
    where = places(args)
    is_new = not identity.exists(where.data_dir)
    key = identity.create(where.data_dir) if is_new else identity.load(where.data_dir)
    found = {"peer": identity.peer_of(key), "data_dir": str(where.data_dir), "new": is_new}
    if args.json:
        show.as_json(found)
        return 0
    print(f"{'made' if is_new else 'found'} node {found['peer']}")
    print(f"its folder: {where.data_dir} (keep identity.key: it is who you are)")
    print("next: aivillage-node start")
    return 0


def start(args: argparse.Namespace) -> int:
    """Runs the daemon in the foreground."""
    where = places(args)
    if not identity.exists(where.data_dir) and args.join:
        identity.create(where.data_dir)
    settings, origins = settings_file.load(where.data_dir, _flags(args))
    identity.load(where.data_dir)

    from aivillage.cli.serve import serve

    return serve(settings, origins, where, join=args.join, as_json=args.json)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: no value", next_step="write --set KEY=VALUE")
        flags[key] = value.split(",") if key in {"enable", "announce"} else value
    for key in ("listen", "enable", "dev_mode", "price_percent"):
        if getattr(args, key) is not None:
            flags[key] = getattr(args, key)
    return flags


def stop(args: argparse.Namespace) -> int:
    """Returns when the daemon is gone.

    Raises:
        NodeError: it still runs, and for how long we waited.
    """
    where = places(args)
    try:
        with connect(args) as client:
            client.ask("stop")
    except NoDaemonError:
        if not lock.is_held(where.data_dir):  # else it is stopping, or not yet up
            raise
    deadline = time.monotonic() + STOP_SECONDS
    while lock.is_held(where.data_dir):
        if time.monotonic() > deadline:
            raise NodeError(
                f"asked to stop, and still running after {STOP_SECONDS:g} s",
                next_step="look at its log; `aivillage-node stop` waits again",
            )
        time.sleep(0.05)
    if args.json:
        show.as_json({"stopped": True})
    else:
        print("stopped")
    return 0


def _village(found: dict[str, Any]) -> str:
    name, private = str(found["village"][:16]), found["private"]
    if not private["fingerprint"]:
        return name
    return f"{name}, private (key {private['fingerprint'][:8]}, {private['refused']} kept out)"


def _relays(relay: dict[str, Any]) -> str:
    carried, through = relay["carried"], relay["reachable_through"]
    reached = f"I am reached through {len(through)}; " if through else ""
    pay = "; ".join(_fare(*fare) for fare in relay["paying"].items())
    return (
        f"{reached}{carried['circuits']} circuits carried for others, "
        f"{carried['bytes_today'] / 1e6:.1f} of {carried['bytes_a_day'] / 1e6:.0f} MB today, "
        f"takes {as_credits(carried['price_micro_credits_per_gib'])} credits a GiB, earned "
        f"{as_credits(carried['earned_micro_credits'])} since the start{pay and '; '}{pay}"
    )


def _fare(peer: str, fare: dict[str, Any]) -> str:
    cost = as_credits(fare["micro_credits"])
    return f"{show.short(peer)} gets {cost} of mine for {fare['counted_bytes'] / 1e6:.1f} MB"


def status(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("status")
    if args.json:
        show.as_json(found)
        return 0
    lag = found["loop_lag_ms"]
    show.pairs(
        {
            "node": found["peer"],
            "state": found["state"] + (" [DEVELOPMENT MODE]" if found["dev_mode"] else ""),
            "up": f"{found['uptime_seconds']:.0f} s",
            "reached at": ", ".join(found["addresses"]) or "nowhere",
            "from outside": _reachable(found["reachable"]),
            "relays": _relays(found["relay"]),
            "village": _village(found),
            "peers": f"{found['peers']} connected, {found['members']} of my village",
            "balance": f"{as_credits(found['balance_micro_credits'])} credits",
            "my jobs": f"{found['jobs_running']} running",
            "others' jobs": f"{found['sales_running']} running, {found['sales_waiting']} waiting, "
            f"{found['slots_free']} slots free",
            "models loaded": _engines(found["engines"]),
            "offers": ", ".join(found["serves"]) or "nothing",
            "health": f"{found['rss_mb']} MB, loop lag p99 {lag['p99']} ms",
        }
    )
    return 0


def _engines(found: list[dict[str, Any]]) -> str:
    named = [
        f"{each['model']} {each['sessions']} of {each['slots']} slots on {each['device']}"
        for each in found
    ]
    return ", ".join(named) or "none"


def _reachable(found: dict[str, Any]) -> str:
    step = f" -> {found['next_step']}" if found["next_step"] else ""
    return f"{found['state']}: {found['why']}{step}"


def peers(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("peers")
    if args.why:
        found = [peer for peer in found if peer["peer"].endswith(args.why)]
        if not found:
            raise RequestError(f"nobody known is {args.why!r}", next_step="aivillage-node peers")
    if args.json:
        show.as_json(found)
        return 0
    if args.why is not None:
        show.table(
            [(show.short(peer["peer"]), _seen(peer), peer["why"]) for peer in found],
            ("peer", "seen", "why"),
        )
        return 0
    show.table(
        [
            (
                show.short(peer["peer"]),
                _seen(peer),
                _standing(peer),
                f"{peer['rtt_ms']} ms" if peer["connected"] else "",
                f"{peer['units_per_second']}/s" if peer["units_per_second"] else "",
                f"{peer['good']} good, {peer['bad']} bad",
                ", ".join(peer["offers"]),
            )
            for peer in found
        ],
        ("peer", "seen", "who", "rtt", "speed", "jobs", "offers"),
    )
    return 0


def _standing(peer: dict[str, Any]) -> str:
    """What it is to us, and the owner's word on it."""
    if peer["blocked"]:
        return "blocked"
    kind = "member" if peer["member"] else "trusted" if peer["line"] else "stranger"
    words = [kind] if peer["connected"] else []
    return ", ".join([*words, "free"] if peer["shared"] else words)


def _seen(peer: dict[str, Any]) -> str:
    if peer["connected"]:
        return "here"
    return show.ago(peer["last_seen_unix"]) if peer["last_seen_unix"] else "heard of"


def join(args: argparse.Namespace) -> int:
    with connect(args) as client:
        found = client.ask("join", token=args.token)
    if args.json:
        show.as_json(found)
    else:
        print(f"joined village {found['village'][:16]}, invited by {show.short(found['inviter'])}")
    return 0


def show_paths(args: argparse.Namespace) -> int:
    found = places(args).listing()
    if args.json:
        show.as_json(found)
    else:
        show.pairs(found)
    return 0


def config(args: argparse.Namespace) -> int:
    """Of the running node, else of the files and the environment."""
    try:
        with connect(args) as client:
            found = client.ask("config")
    except NoDaemonError:
        _, origins = settings_file.load(places(args).data_dir, {})
        found = [{"key": o.key, "value": o.value, "origin": o.origin} for o in origins]
    if args.json:
        show.as_json(found)
        return 0
    texts = settings_file.describe()
    rows = [(o["key"], o["value"], o["origin"], texts.get(o["key"], "")) for o in found]
    if args.origin:
        show.table(rows, ("setting", "value", "from", "meaning"))
    else:
        show.table([(k, v, t) for k, v, _, t in rows], ("setting", "value", "meaning"))
    return 0
