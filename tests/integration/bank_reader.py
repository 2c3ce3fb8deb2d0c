"""Looks at books as the command line does, from a process of its own, until its input ends.

`python -m tests.integration.bank_reader FOLDER` prints how many snapshots it took. A process of
its own, since a second SQLite library in one process would undo the locks of the first.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from pathlib import Path

from aivillage.ledger import reader
from aivillage.ledger.queries import Balance


def unbalanced(found: Balance) -> str:
    """What does not add up in one snapshot; empty when all does."""
    with_peers = sum(peer.net for peer in found.peers)
    explained = (
        found.earned - found.spent + found.gifts + found.unlabelled - found.routed
        - (found.written_off - found.doubtful)
    )  # fmt: skip
    if found.net == with_peers == explained:
        return ""
    return f"net {found.net}, with peers {with_peers}, by accounts {explained}"


def main() -> int:
    paths = sorted(Path(sys.argv[1]).glob("*.db"))
    asked_to_end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), asked_to_end.set()), daemon=True).start()
    wrong, snapshots = [], 0
    for path in itertools.cycle(paths):
        if asked_to_end.is_set():
            break
        if found := unbalanced(reader.read_balance(path)):
            wrong.append(f"{path.name}: {found}")
        snapshots += 1
    print(json.dumps({"snapshots": snapshots, "wrong": wrong[:5]}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
