"""Whom a person means: a whole peer id, or the end of one that this node knows."""

from __future__ import annotations

from collections.abc import Iterable

from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import PeerId, public_key


def named(text: str, known: Iterable[PeerId]) -> PeerId:
    """The peer that `text` names.

    Raises:
        RequestError: BAD_REQUEST, no peer id and the end of none, or of several.
    """
    found = {peer for peer in known if text and peer.endswith(text)}
    if len(found) == 1:
        return found.pop()
    try:
        public_key(PeerId(text))
    except ValueError:
        reason = f"{len(found)} peers end in" if found else "nobody known here ends in"
        raise RequestError(f"{reason} {text!r}", next_step="aivillage-node peers") from None
    return PeerId(text)
