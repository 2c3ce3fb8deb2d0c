"""A call that may cost nothing: it has a seller load what a later call may need, and no more.

The ceiling is 0, so there is nothing that it could be paid for; the seller's owner and its memory
decide whether it does that.
"""

from __future__ import annotations

import secrets
from typing import Final

import trio

from aivillage.node.attempt import next_frame
from aivillage.node.gossip import send_or_drop
from aivillage.node.inbox import Inbox
from aivillage.node.market import Choice
from aivillage.protocols import messages
from aivillage.protocols.errors import PeerError
from aivillage.protocols.messages import Finished, Started
from aivillage.protocols.types import KernelName, Seconds

LOAD_SECONDS: Final[Seconds] = 60.0
"""To load from a slow disk."""
ASKED_MAX: Final = 3
"""Peers asked, one after the other: all others may be as full."""
_SIGNS_OF_LIFE: Final = (messages.Accepted, messages.Progress)


async def loaded(
    choice: Choice, operation: str, request: bytes, *, until: type[Started | Finished]
) -> KernelName:
    """What computes at a seller, once it has loaded it for `request`.

    `until` is the frame that says so: what would go on after `Started` is cancelled there.

    Raises:
        PeerError: it is gone, is not done in time, or says what cannot be.
        AivillageError: it refused.
    """
    link, call = choice.link, choice.link.next_id()
    inbox = link.open_inbox(call)
    has_ended = False
    try:
        link.send(
            messages.Call(
                id=call, attempt=secrets.token_bytes(16), operation=operation,
                request=request, quote_hash=choice.quote_hash,
                ceiling_micro_credits=0, deadline_seconds=LOAD_SECONDS,
            )
        )  # fmt: skip
        with trio.fail_after(LOAD_SECONDS):
            kernel = await _loaded(inbox, until)
        has_ended = until is Finished
    except trio.TooSlowError:
        raise PeerError(f"nothing loaded within {LOAD_SECONDS:.0f} s", code="PEER_LOST") from None
    finally:
        if not has_ended:
            send_or_drop(link, messages.Cancel(id=call))
        link.close_inbox(call)
    return kernel


async def _loaded(inbox: Inbox[messages.Frame], until: type[Started | Finished]) -> KernelName:
    kernel = ""
    while True:
        frame = await next_frame(inbox)
        if isinstance(frame, Started):
            kernel = frame.kernel_class
        elif not isinstance(frame, (*_SIGNS_OF_LIFE, until)):
            raise PeerError("it did more than load", code="BAD_REQUEST")
        if isinstance(frame, until):
            return kernel
