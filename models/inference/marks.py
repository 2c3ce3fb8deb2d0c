"""Hidden states -> the numbers of a fingerprint. `fingerprint.py` says what they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from aivillage.models.inference.fingerprint import SPAN_TOKENS_MAX, Fingerprint, packed


def signs(positions: Sequence[int], width: int) -> Tensor:
    """+1 and -1 by the bits of shake-256(position), the lowest first: (positions, width)."""
    size = -(-width // 8)
    drawn = [hashlib.shake_256(b"mark" + at.to_bytes(8, "big")).digest(size) for at in positions]
    rows = torch.frombuffer(bytearray(b"".join(drawn)), dtype=torch.uint8).view(-1, size, 1)
    bits = (rows >> torch.arange(8, dtype=torch.uint8)) & 1  # (positions, size, 8)
    return bits.view(len(drawn), -1)[:, :width].double() * 2 - 1


def marks(states: Tensor, first: int) -> list[float]:
    """Of `states` (tokens, width) that drew the tokens from position `first` on.

    In float64 the sum of a row's float32 numbers is all but exact: no order of summing shows in it.
    """
    turned = signs(range(first, first + len(states)), states.shape[1])
    found: list[float] = (states.double() * turned).sum(dim=1).float().tolist()
    return found


class Recorder:
    """Collects the marks of one session's own tokens, which begin at position `first`."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._values: list[float] = []

    def add(self, state: Tensor) -> None:
        """`state` (width,) drew the next token."""
        self._values += marks(state.unsqueeze(0), self._first + len(self._values))

    def taken(self, *, ended: bool) -> bytes:
        """The fingerprint of a full span, or at the end of what is left; else empty."""
        if not self._values or (len(self._values) < SPAN_TOKENS_MAX and not ended):
            return b""
        span = tuple(self._values[:SPAN_TOKENS_MAX])
        body = packed(Fingerprint(self._first, span))
        self._first += len(span)
        self._values = self._values[len(span) :]
        return body
