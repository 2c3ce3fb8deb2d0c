"""backup, restore: one file that holds the identity and the books."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from aivillage.cli import show
from aivillage.cli.node import places

CAREFUL = (
    "Until this node has SYNCed with a peer, nothing is delivered to it on credit and no transfer "
    "is passed on to it; with each peer work goes on as soon as it is met."
)


def backup(args: argparse.Namespace) -> int:
    """Whether or not the node runs; the file appears when it is whole."""
    from aivillage.node.backup import backup as make

    target = Path(args.file).expanduser().absolute()
    manifest = make(places(args), target, force=args.force)
    if args.json:
        show.as_json({"path": str(target)} | msgspec.to_builtins(manifest))
        return 0
    names = ", ".join(member.name for member in manifest.members)
    print(f"{target}: node {manifest.peer}, {names}")
    show.note("Whoever has this file can be this node: keep it as you keep a key.")
    show.note(f"  to use it: aivillage-node restore {target}")
    return 0


def restore(args: argparse.Namespace) -> int:
    """Into a data folder on which no node runs."""
    from aivillage.node.backup import restore as put_back

    found = put_back(places(args), Path(args.file).expanduser(), force=args.force)
    if args.json:
        show.as_json(msgspec.to_builtins(found) | {"note": CAREFUL})
        return 0
    print(f"restored node {found.peer} of {show.ago(found.created_unix_ms / 1000)}")
    print(f"its folder: {found.data_dir}")
    if found.jobs_cancelled:
        print(f"jobs that were running then, and are cancelled: {found.jobs_cancelled}")
    if found.kept_aside:
        print(f"what was there: {found.kept_aside}")
    print(CAREFUL)
    print("next: aivillage-node start")
    return 0
