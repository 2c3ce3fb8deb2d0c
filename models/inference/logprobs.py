"""Log-probabilities of an answer's tokens: how they travel, and what can be told of them.

A value is the float32 log-softmax of the model's logits as it computed them: at temperature 1, of
all tokens, before a format forbids any. The daemon loads this: no torch.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from aivillage.protocols.errors import RequestError

ALTERNATIVES_MAX: Final = 20
_SUM_MAX: Final = 1.001
"""Of probabilities that are rounded to float32."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Of one token: its own value, and the likeliest ones there, the likeliest first."""

    logprob: float
    top_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=ALTERNATIVES_MAX)]
    top_logprobs: Annotated[tuple[float, ...], msgspec.Meta(max_length=ALTERNATIVES_MAX)]


def token_size(alternatives: int) -> int:
    """Bytes of one token's on the wire: a float32, then an id and a float32 for each other."""
    return 4 + 8 * alternatives if alternatives else 0


def packed(token: TokenLogprobs) -> bytes:
    pairs = zip(token.top_ids, token.top_logprobs, strict=True)
    return struct.pack(">f", token.logprob) + b"".join(struct.pack(">If", *pair) for pair in pairs)


def packed_all(said: Sequence[TokenLogprobs]) -> bytes:
    """Raises: RequestError: a value or id is none that travels, or two are not as many."""
    try:
        return b"".join(map(packed, said))
    except (struct.error, OverflowError, ValueError) as error:
        raise RequestError(f"these are no log-probabilities: {error}") from None


def require_size(body: bytes, tokens: int, alternatives: int) -> None:
    """Raises: RequestError: it is not of so many tokens."""
    if len(body) != tokens * token_size(alternatives):
        raise RequestError(f"{len(body)} bytes of log-probabilities beside {tokens} tokens")


def read(body: bytes, tokens: int, alternatives: int) -> tuple[TokenLogprobs, ...]:
    """Of so many tokens; none where none were asked for.

    Raises:
        RequestError: it is not of so many tokens.
    """
    require_size(body, tokens, alternatives)
    if not alternatives:
        return ()
    found = []
    for own, *top in struct.iter_unpack(f">f{'If' * alternatives}", body):
        found.append(TokenLogprobs(own, tuple(top[::2]), tuple(top[1::2])))
    return tuple(found)


def fault(
    said: Sequence[TokenLogprobs], token_ids: Sequence[int], alternatives: int, vocabulary: int
) -> str:
    """What cannot be true of `said`, told without the model; empty: nothing.

    Whether the values are the model's, a recheck tells: it has the model.
    """
    if len(said) != (len(token_ids) if alternatives else 0):
        return "log-probabilities of another number of tokens"
    for token, its in zip(token_ids, said, strict=False):
        if why := _token_fault(token, its, alternatives, vocabulary):
            return f"a token's log-probabilities {why}"
    return ""


def _token_fault(token: int, said: TokenLogprobs, alternatives: int, vocabulary: int) -> str:
    ids, values = said.top_ids, said.top_logprobs
    if not len(ids) == len(values) == alternatives or len(set(ids)) != alternatives:
        return f"do not name {alternatives} others"
    if not all(0 <= other < vocabulary for other in ids):
        return "name an id outside the vocabulary"
    if not all(math.isfinite(value) and value <= 0 for value in (said.logprob, *values)):
        return "are no logarithms of probabilities"
    if any(after > before for before, after in itertools.pairwise(values)):
        return "are not in order"
    if sum(map(math.exp, values)) > _SUM_MAX:
        return "add up to more than 1"
    if token in ids:
        return "" if values[ids.index(token)] == said.logprob else "say two things of it"
    return "leave it out" if said.logprob > values[-1] else ""
