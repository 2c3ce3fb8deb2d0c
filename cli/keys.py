"""rotate-key: a new key for a node that stands still; village-key: the one of its village."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aivillage.cli import show
from aivillage.cli.node import places
from aivillage.protocols.errors import RequestError


def rotate_key(args: argparse.Namespace) -> int:
    """The old key names the new one, and both sign it; balances and lines go on."""
    import trio

    from aivillage.node.rotation import rotate

    old, new = trio.run(rotate, places(args))
    if args.json:
        show.as_json({"former": old, "peer": new})
        return 0
    print(f"this node is {new} from now on, formerly {show.short(old)}")
    show.note("Peers of this version follow by themselves; for older ones it is a stranger.")
    show.note("Invitations made before are void. The old key's file stays in the data folder.")
    return 0


def village_key(args: argparse.Namespace) -> int:
    """The pre-shared key of a private village. A running node takes a change at its next start."""
    from aivillage.node import identity
    from aivillage.node import village_key as keys

    folder = places(args).data_dir
    identity.load(folder)
    if args.action == "new":
        keys.store(folder, keys.new())
    elif args.action == "import":
        keys.store(folder, keys.from_text(_text_of(args.file)))
    elif args.action == "remove":
        keys.store(folder, None)
    key = keys.load(folder)
    mark = keys.fingerprint(key) if key else ""
    if args.json:
        show.as_json({"private": key is not None, "fingerprint": mark})
        return 0
    print(f"village key {mark}" if key else "no village key: whoever reaches this node can connect")
    if args.action != "show":
        show.note("In force from the next start. Who joins by an invite made after it has it too;")
        show.note("who belongs already needs such an invite, or the file.")
    return 0


def _text_of(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read(_READ_MAX)
        with Path(name).open(encoding="ascii") as file:
            return file.read(_READ_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{name} cannot be read: {error}", next_step="name a village.key or swarm.key"
        ) from None


_READ_MAX = 4096
