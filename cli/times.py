"""Points in time as people type them: `7d`, `2026-11-01`, `2026-11-01T12:30`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

from aivillage.protocols.errors import RequestError

_AGO: Final = re.compile(r"(\d{1,5})([dhm])")
_UNITS: Final = {"d": "days", "h": "hours", "m": "minutes"}


def unix_ms(text: str, *, end: bool = False) -> int:
    """Unix milliseconds; a day without an hour is its first moment, or its last if `end`.

    Raises:
        RequestError: BAD_REQUEST, it is no time.
    """
    try:
        ago = _AGO.fullmatch(text)
        if ago:
            at = datetime.now().astimezone() - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        else:
            at = datetime.fromisoformat(text).astimezone()
            if end and len(text) <= len("2026-11-01"):
                at += timedelta(days=1, milliseconds=-1)
        return int(at.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise RequestError(
            f"{text!r} is no time",
            code="BAD_REQUEST",
            next_step="write 7d, 12h, 2026-11-01 or 2026-11-01T12:30",
        ) from None
