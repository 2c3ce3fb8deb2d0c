"""What the library's errors mean to whoever dials or reads."""

from __future__ import annotations

import re
from typing import Final

from aivillage.node.transport.psk import KEY_STEP, WrongKeyError
from aivillage.protocols.errors import PeerError
from aivillage.protocols.ports import SomebodyElseError
from aivillage.protocols.types import PeerId

_SOMEBODY_ELSE: Final = re.compile(r"remote_peer_id_from_pubkey=(\w+)")


def lost(message: str) -> PeerError:
    return PeerError(message, code="PEER_LOST", next_step="dial the peer again")


def _cause(error: BaseException) -> BaseException:
    """The innermost one: the library wraps what happened three times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason_of(error: BaseException) -> str:
    cause = _cause(error)
    return str(cause) or repr(cause)


def tell_who_is_there(error: PeerError, address: str) -> None:
    """Says it of whoever answered and is not whom we wanted.

    Raises:
        SomebodyElseError: whoever is at the address proved to be another peer.
        PeerError: PEER_LOST, it is outside of the village's private network, or we are.
    """
    cause = _cause(error)
    if isinstance(cause, WrongKeyError):
        raise PeerError(
            f"{address} answers, but {cause}", code="PEER_LOST", next_step=KEY_STEP
        ) from error
    found = _SOMEBODY_ELSE.search(error.message)
    if found:
        peer = PeerId(found[1])
        raise SomebodyElseError(f"{peer} answered at {address}", peer) from error
