"""Signed bytes as one word that a person can copy: a prefix that says what it is, and base64."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from aivillage.protocols.errors import RequestError

CHARACTERS_MAX: Final = 4096


def to_text(prefix: str, raw: bytes) -> str:
    """`raw` behind `prefix`."""
    return prefix + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def from_text(prefix: str, text: str, what: str) -> bytes:
    """The bytes of a token of this prefix; `what` it should be is for the message.

    Raises:
        RequestError: BAD_REQUEST, it is cut or something else.
    """
    text = text.strip()
    if not text.startswith(prefix) or len(text) > CHARACTERS_MAX:
        raise bad(what, "it does not start with " + prefix)
    body = text.removeprefix(prefix)
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(what, str(error)) from None


def bad(what: str, reason: str) -> RequestError:
    return RequestError(
        f"this {what} is not valid: {reason}",
        next_step="copy the whole token, or ask for a new one",
    )
