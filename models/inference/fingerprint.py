"""What an answer's hidden states leave behind: one number a token, sent per 32 tokens.

After TOPLOC (arXiv 2501.16007), which commits to the largest activations of 32 tokens. Ours
projects the state that drew a token on signs keyed by its position: all activations of all tokens
count, a wrong place gives another number, and 32 tokens are 133 bytes. Whoever reads prompt and
answer in one pass gets the same numbers, if the same model made them
(docs/decisions/0010-fingerprints.md). Standard library and msgspec only: the daemon loads this.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from aivillage.models.inference.grammar import LIBRARY
from aivillage.protocols.errors import RequestError

SPAN_TOKENS_MAX: Final = 32
_HEAD: Final = struct.Struct(">IB")
_VALUE_BYTES: Final = 4
SPAN_BYTES_MAX: Final = _HEAD.size + _VALUE_BYTES * SPAN_TOKENS_MAX

DEVIATION_MAX: Final = 3e-5
"""Of a span, relative to the states' length: honest float32 reached 4e-6 over instruction sets,
the nearest cheat (weights rounded to float16) 4e-4: docs/verification.md."""
LOGIT_MARGIN: Final = 0.002
"""Two tokens so close may change places in another kernel class; honest logits differ by 2e-4."""
LOGPROB_MARGIN: Final = 2 * LOGIT_MARGIN
"""What a log-probability may differ by then: its logit moves, and so does the sum of all."""
_EXACT: Final = ("torch", "openvino")
"""Engines that compute in float32 throughout."""
DRAW_MARGIN_MAX: Final = 0.05
"""Of a draw in [0, 1): what `LOGIT_MARGIN` can move, over the temperature, and no more."""


class Fingerprint(msgspec.Struct, frozen=True):
    """`values` of the tokens from position `first` of the answer on."""

    first: int
    values: tuple[float, ...]

    @property
    def end(self) -> int:
        return self.first + len(self.values)


def packed(fingerprint: Fingerprint) -> bytes:
    """First position, count, and a float32 a token."""
    count = len(fingerprint.values)
    head = _HEAD.pack(fingerprint.first, count)
    return head + struct.pack(f">{count}f", *fingerprint.values)


def read(body: bytes) -> Fingerprint:
    """Raises: RequestError: it is no fingerprint of 1 to 32 tokens, or holds no finite number."""
    count, rest = divmod(len(body) - _HEAD.size, _VALUE_BYTES)
    if rest or not 1 <= count <= SPAN_TOKENS_MAX:
        raise RequestError(f"a fingerprint of {len(body)} bytes")
    first, said = _HEAD.unpack_from(body)
    values = struct.unpack_from(f">{count}f", body, _HEAD.size)
    if said != count or not all(map(math.isfinite, values)):
        raise RequestError("a fingerprint that says nothing")
    return Fingerprint(first, values)


def require_span(body: bytes, first: int, tokens: int) -> int:
    """Where `body` ends, which must begin at `first` and not go beyond `tokens`.

    Raises:
        RequestError: it is of another span, or no fingerprint.
    """
    found = read(body)
    if found.first != first or found.end > tokens:
        raise RequestError(
            f"a fingerprint of tokens {found.first} to {found.end} where it begins at {first} and "
            f"{tokens} are there"
        )
    return found.end


def in_order(bodies: Sequence[bytes], tokens: int) -> list[Fingerprint]:
    """The fingerprints of an answer of `tokens` tokens; gaps are where a seller was lost.

    Raises:
        RequestError: one is malformed, overlaps another, or lies beyond the answer.
    """
    found: list[Fingerprint] = []
    for body in bodies:
        fingerprint = read(body)
        if fingerprint.end > tokens or (found and fingerprint.first < found[-1].end):
            raise RequestError("a fingerprint of the wrong span")
        found.append(fingerprint)
    return found


def family(kernel_class: str, *, in_format: bool = False) -> str:
    """Weights and number type of a class whose numbers ours may be held against; else empty.

    Classes of one family differ in their last bits only. The names are `engine_torch`'s and
    `engine_openvino`'s, whose first version rounded its inputs. Of answers `in_format` a family has
    one grammar library too: another version may forbid other tokens.
    """
    parts = kernel_class.split("/")
    is_exact = parts[0].startswith(_EXACT) and parts[0] != "openvino1"
    is_ours = len(parts) > 4 and is_exact and parts[3] == "float32"
    library = [part for part in parts if in_format and part.startswith(LIBRARY)]
    return "/".join(parts[2:4] + library) if is_ours else ""
