"""Stages that hand what they compute to the next one: who, and by which ticket."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from aivillage.protocols.types import Name

PASSED_MINOR: Final = 4
"""From this minor version on a stage can be asked to."""
TICKET_BYTES: Final = 16
"""At random by the buyer: whoever shows them may feed the call."""

Ticket = Annotated[bytes, msgspec.Meta(max_length=TICKET_BYTES)]


class Passing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of one call. Empty tickets: it passes nothing on, or nobody but its buyer feeds it."""

    to: Name = ""
    """The peer whose call takes what this one gives, by the ticket `by`."""
    by: Ticket = b""
    fed_by: Ticket = b""
    """Whoever shows it may feed this call beside its buyer."""
