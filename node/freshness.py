"""How long signed news is still good, where its author's clock may be wrong.

News says when it ends by its author's clock, and how long it lives. Where the two clocks agree the
end counts, so that it is the same everywhere. Where they plainly do not, its lifetime counts from
the moment when it is first heard, within bounds: such news can be played again later, and what
forgets it must remember it for longer than those bounds.
"""

from __future__ import annotations

from typing import Final

LIFETIME_MS_MAX: Final = 600_000
CLOCK_SKEW_MS_MAX: Final = 900_000
"""Clocks of people's machines that differ by more are for their owners to set."""
REPLAY_MS_MAX: Final = LIFETIME_MS_MAX + 2 * CLOCK_SKEW_MS_MAX
"""After this from when it was said no node takes it any more: its author's clock may be ahead by
the skew, and so may ours be behind."""


def left_ms(not_after_ms: int, lifetime_ms: int, now_ms: int) -> int | None:
    """What is left of news on hearing it first; None: it is over, or claims too much.

    `lifetime_ms` is 0 in news of an earlier version: then clocks have to agree.
    """
    if lifetime_ms > LIFETIME_MS_MAX:
        return None
    left = not_after_ms - now_ms
    if 0 <= left <= (lifetime_ms or LIFETIME_MS_MAX):
        return left
    if lifetime_ms and -CLOCK_SKEW_MS_MAX <= left <= lifetime_ms + CLOCK_SKEW_MS_MAX:
        return lifetime_ms
    return None
