"""rotate-key: a new key for a node that stands still."""

from __future__ import annotations

import argparse

from aivillage.cli import show
from aivillage.cli.node import places


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
