"""The daemons of the integration tests, as benchmarks wait for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.integration.daemons import Daemon, DaemonError, settled, wait_for


def known(buyer: Daemon, sellers: Sequence[Daemon], operation: str) -> None:
    """Returns once the buyer is linked with all of them and has heard what they offer.

    Raises:
        DaemonError: not within 40 s.
    """

    def linked() -> bool:
        found = {peer["peer"]: peer for peer in buyer.ask("peers")}
        return all(s.peer in found and found[s.peer]["connected"] for s in sellers)

    wait_for(linked, 40, "the buyer is linked with every seller")
    peers = {seller.peer for seller in sellers}
    wait_for(lambda: peers <= buyer.sellers_known(operation), 40, "all offers came")


def books_exact(nodes: list[Daemon]) -> int:
    """1 where all books agree and come to nothing within 30 s, else 0 and why on stderr."""
    try:
        settled(nodes, 30)
    except DaemonError as wrong:
        print(wrong, file=sys.stderr)
        return 0
    return 1
