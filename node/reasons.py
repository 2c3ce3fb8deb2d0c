"""Why somebody is not linked: the last thing that was seen of each peer, as one line."""

from __future__ import annotations

import collections
import time
from typing import Final

from aivillage.protocols.types import PeerId

REASONS_MAX: Final = 1000
"""As many peers as are looked for; strangers by the thousand push each other out."""
REASON_CHARACTERS_MAX: Final = 200
"""A peer may have written it."""


class Reasons:
    """The newest reason per peer; the oldest is forgotten first."""

    def __init__(self) -> None:
        self._found: collections.OrderedDict[PeerId, tuple[float, str]] = collections.OrderedDict()

    def note(self, peer: PeerId, reason: str) -> None:
        self._found.pop(peer, None)
        self._found[peer] = (time.monotonic(), " ".join(reason.split())[:REASON_CHARACTERS_MAX])
        if len(self._found) > REASONS_MAX:
            self._found.popitem(last=False)

    def forget(self, peer: PeerId) -> None:
        """It is linked: what was before says nothing any more."""
        self._found.pop(peer, None)

    def last(self, peer: PeerId) -> str:
        """`what was seen, 12 s ago`; empty where nothing was."""
        at, reason = self._found.get(peer, (0.0, ""))
        return f"{reason}, {time.monotonic() - at:.0f} s ago" if reason else ""
