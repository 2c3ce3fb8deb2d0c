"""owner init, adopt, join, show: several devices under one key."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from aivillage.cli import show
from aivillage.cli.client import NoDaemonError
from aivillage.cli.node import connect, places
from aivillage.protocols.errors import ConfigError


def owner(args: argparse.Namespace) -> int:
    """One of the four."""
    actions = {"init": _init, "adopt": _adopt, "join": _join, "show": _show}
    found, text = actions[args.action](args)
    if args.json:
        show.as_json(found)
    else:
        print(text)
    return 0


def _key_of(folder: Path) -> Any:
    from aivillage.node import identity
    from aivillage.node.owners import OWNER_FILE

    if not identity.exists(folder, OWNER_FILE):
        raise ConfigError(
            f"there is no owner's key in {folder}", next_step="aivillage-node owner init"
        )
    return identity.load(folder, OWNER_FILE)


def _init(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from aivillage.node import identity
    from aivillage.node.owners import OWNER_FILE

    folder = places(args).data_dir
    peer = identity.peer_of(identity.create(folder, OWNER_FILE))
    text = f"made owner {peer}\nits key: {folder / OWNER_FILE} (keep it on one machine)"
    return {"owner": peer}, f"{text}\nnext: aivillage-node owner adopt DEVICE"


def _adopt(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from aivillage.node.owners import adopt

    key = _key_of(places(args).data_dir)
    token = adopt(key, args.device, args.days, int(time.time() * 1000))
    show.note(f"Good for that device and {args.days} days. On it, with its node running:")
    show.note("  aivillage-node owner join TOKEN")
    return {"token": token}, token


def _join(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    with connect(args) as client:
        found = client.ask("owner_join", token=args.token)
    return found, f"this node is a device of {found['owner']}, {_until(found)}"


def _show(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from aivillage.node import identity
    from aivillage.node.owners import OWNER_FILE

    folder = places(args).data_dir
    has_key = identity.exists(folder, OWNER_FILE)
    found: dict[str, Any] = {
        "owner_key": identity.peer_of(_key_of(folder)) if has_key else None,
    }
    try:
        with connect(args) as client:
            found |= client.ask("owner")
    except NoDaemonError:
        show.note("the node does not run: whose device it is, is not looked up")
    lines = [f"key here     {found['owner_key'] or 'none'}"]
    if found.get("owner"):
        lines.append(f"device of    {found['owner']}, {_until(found)}")
        lines += [f"other device {peer}" for peer in found["devices"]]
    return found, "\n".join(lines)


def _until(found: dict[str, Any]) -> str:
    return "until " + time.strftime("%Y-%m-%d", time.localtime(found["not_after_unix_ms"] / 1000))
