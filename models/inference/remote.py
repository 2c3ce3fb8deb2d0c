"""Models that answer elsewhere, behind a URL: what both sides of a sale know of them.

Their names begin with `remote-`, so that whoever reads an offer, a quote or a receipt knows that
the text goes to a server which nobody of the mesh can look into, and what a token of theirs is:
up to 3 bytes of UTF-8 text, the bytes as a number. So the payer counts again without a tokenizer.
Standard library only: the daemon loads this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

NAME_PREFIX: Final = "remote-"
PIECE_BYTES: Final = 3
"""Ids stay below 2^24, the most that a payer accepts who does not know the model."""
END_TOKEN_ID: Final = 0
"""No text: the server said that the answer is whole."""
VOCABULARY: Final = 1 << 8 * PIECE_BYTES
_FULL_FROM: Final = 1 << 8 * (PIECE_BYTES - 1)


def is_remote(model: str) -> bool:
    """Whether a model of that name answers elsewhere."""
    return model.startswith(NAME_PREFIX)


def token_bytes(token: int) -> bytes:
    """The text that a token stands for."""
    return token.to_bytes((token.bit_length() + 7) // 8, "big")


def is_full(token: int) -> bool:
    """Whether it has as many bytes as a token may have."""
    return token >= _FULL_FROM


def fault_of(token_ids: Sequence[int]) -> str:
    """Why these cannot be what a text was cut into; empty: they can.

    Only the last piece may be short, or an answer would cost more than its bytes.
    """
    ended = bool(token_ids) and token_ids[-1] == END_TOKEN_ID
    pieces = token_ids[:-1] if ended else token_ids
    return "" if all(map(is_full, pieces[:-1])) else "a piece of the text is short"


class Pieces:
    """Text as it comes -> tokens: full ones at once, the rest when no more comes."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, text: bytes) -> list[int]:
        """`text` has no zero bytes, which would vanish at the head of a number."""
        whole = self._rest + text
        end = len(whole) - len(whole) % PIECE_BYTES
        self._rest = whole[end:]
        return [
            int.from_bytes(whole[at : at + PIECE_BYTES], "big") for at in range(0, end, PIECE_BYTES)
        ]

    def flush(self) -> list[int]:
        """What is left of the text, as the last piece."""
        rest, self._rest = self._rest, b""
        return [int.from_bytes(rest, "big")] if rest else []


def utf8(text: str) -> bytes:
    """`text` as bytes that pieces can hold: none is zero."""
    return text.replace("\0", "\ufffd").encode()
