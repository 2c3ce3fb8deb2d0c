"""What comes next on a descriptor, in one turn of the loop."""

from __future__ import annotations

import os
from contextlib import suppress

import trio


async def arrived(file: int, size_bytes_max: int) -> bytes:
    """At least a byte. Empty: it ended, broke or was closed (-1), and who waits finds out how.

    Trio's streams ask the descriptor first and wait only then, since more may be there already. A
    daemon mostly waits for the next small message: that question is a call and an exception more.
    """
    with suppress(OSError, trio.ClosedResourceError):  # an end, however it came
        while file >= 0:
            await trio.lowlevel.wait_readable(file)
            with suppress(BlockingIOError):  # woken for nothing
                return os.read(file, size_bytes_max)
    return b""
