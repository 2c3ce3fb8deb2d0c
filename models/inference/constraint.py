"""What a format lets an answer say next: a mask over the logits, moved on token by token.

It depends on the format and the tokens so far, and on nothing else: whoever goes on with an answer
draws from the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from aivillage.models.inference import grammar
from aivillage.models.inference.formats import Format
from aivillage.models.inference.tokenizer import Speaker
from aivillage.protocols.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Constraint:
    """Of one answer. Made by `of_format`."""

    def __init__(self, matcher: LLMatcher, end_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._ends = list(end_token_ids)

    def masked(self, logits: Tensor) -> Tensor:
        """`logits` (vocabulary,) with those of all tokens that may not follow at minus infinity.

        Raises:
            RequestError: nothing may follow, or telling what may takes too much.
        """
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        matcher = self._matcher
        if not matcher.is_stopped():
            bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            count = min(len(bias), len(logits))
            allowed[:count] = bias[:count] > 0
        if matcher.is_error():
            raise RequestError(f"the format is too much for a step: {matcher.get_error()[:200]}")
        allowed[self._ends] = matcher.is_accepting()
        if not bool(allowed.any()):
            raise RequestError("no token of this model goes on in the format")
        return logits.masked_fill(~allowed, -torch.inf)

    def advance(self, token: int) -> None:
        """`token` follows. An end token changes nothing: nothing comes after it.

        Raises:
            RequestError: it may not.
        """
        if token not in self._ends and not self._matcher.consume_token(token):
            why = self._matcher.get_error()[:200]
            raise RequestError(f"token {token} leaves the format, or it is too large: {why}")

    def copy(self) -> Constraint:
        """Another one at the same place: 30 us."""
        return Constraint(self._matcher.deep_copy(), self._ends)


def of_format(wanted: Format | None, speaker: Speaker, vocabulary: int) -> Constraint | None:
    """None: everything may be said.

    Raises:
        RequestError: the format is wrong, matches nothing, or is too large.
        RefusedError: NOT_OFFERED, the library is not installed.
    """
    if wanted is None:
        return None
    if not speaker.end_token_ids:
        raise RequestError("this model has no end token: an answer in a format could not end")
    tokens = _tokens(cast("Any", speaker), vocabulary)
    return Constraint(grammar.matcher(wanted, tokens), sorted(speaker.end_token_ids))


def make_ready(speaker: Speaker, vocabulary: int) -> None:
    """Takes a fifth of a second and 23 MB while nobody waits for a step."""
    if grammar.is_installed() and speaker.end_token_ids:
        _tokens(cast("Any", speaker), vocabulary)


@functools.lru_cache(maxsize=4)
def _tokens(speaker: Speaker, vocabulary: int) -> LLTokenizer:
    words: Sequence[bytes] = [speaker.token_bytes(token) for token in range(vocabulary)]
    return grammar.tokenizer(words, sorted(speaker.end_token_ids), speaker.encode)
