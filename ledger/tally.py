"""What an audit has seen so far, and how it stops: shared by its passes."""

from __future__ import annotations

from aivillage.protocols.types import public_key

Place = tuple[str, str, bytes]
"""A lane: side (`in` or `out`), peer, lane."""


class WrongError(Exception):
    """The book contradicts itself here; the text names the place."""


class Tally:
    """Sums of one audit. Grows with peers, lanes and transfers, never with entries."""

    def __init__(self) -> None:
        self.entries = self.vouchers = self.receipts = 0
        self.prev = bytes(32)
        self.mine: tuple[bytes, ...] = ()
        """Keys of this book, the one in force first; likewise `theirs`."""
        self.theirs: dict[str, tuple[bytes, ...]] = {}
        self.cums: dict[Place, tuple[int, int]] = {}
        """Highest n and cum that was signed."""
        self.booked: dict[Place, tuple[int, int]] = {}
        """Highest n with an entry, and the money of all entries."""
        self.confirmed: dict[tuple[str, bytes], int] = {}
        """Of my lanes: the highest cum for which there is a receipt."""
        self.sums: dict[str, int] = {}
        self.balances: dict[str, int] = {}
        self.doubtful: dict[str, int] = {}
        self.routed: dict[bytes, int] = {}
        self.sent: dict[bytes, int] = {}
        """What my vouchers sent on, per transfer."""
        self.given_up: dict[bytes, tuple[int, int]] = {}
        """Per transfer: what corrections say that it cost, and the last of their entries."""

    def keys_of(self, peer: str) -> tuple[bytes, ...]:
        """Raises: ValueError: `peer` is no peer's id."""
        keys = self.theirs.get(peer)
        if keys is None:
            keys = self.theirs[peer] = (public_key(peer),)
        return keys
