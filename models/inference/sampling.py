"""Logits -> one token. Pure: the draw for a position depends on seed and position alone."""

from __future__ import annotations

import hashlib
import math
from typing import Final

import torch
from torch import Tensor

from aivillage.models.inference.logprobs import TokenLogprobs

_LIKELY: Final = 1e-4
"""Of the likeliest token's weight, which is 1: few others have more."""


def uniform(seed: int, position: int) -> float:
    """U = blake2b-64(seed || position) / 2^64, both as 8 bytes big-endian; rounding may give 1."""
    key = seed.to_bytes(8, "big") + position.to_bytes(8, "big")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose(logits: Tensor, *, temperature: float, top_p: float, u: float) -> int:
    """The token for `logits` (vocabulary,): greedy at temperature 0, ties to the lowest id.

    Else the inverse of the cumulative distribution at `u`, in token-id order and float64.
    """
    if temperature == 0:
        return int(torch.argmax(logits))
    weights = _weights(logits, temperature, top_p)
    edges = torch.cumsum(weights, dim=0)
    target = u * float(edges[-1])
    # The first edge beyond the target: a token of weight 0 has no room between edges.
    index = int(torch.searchsorted(edges, target, right=True))
    return min(index, int(torch.nonzero(weights)[-1]))


def interval(
    logits: Tensor, *, temperature: float, top_p: float, token: int
) -> tuple[float, float] | None:
    """The numbers u for which `choose` takes `token`, above temperature 0; None: it never does."""
    weights = _weights(logits, temperature, top_p)
    if not float(weights[token]):
        return None
    total = float(weights.sum())
    before = float(weights[:token].sum())
    return before / total, (before + float(weights[token])) / total


def log_probabilities(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of `token` and of the `count` likeliest of `logits` (vocabulary,), ties to the lowest id.

    Log-softmax in float64, rounded to float32 once: no order of summing shows in it.
    """
    values = _log_softmax(logits)
    floor = torch.topk(logits, count).values[-1]
    likely = torch.nonzero(logits >= floor).squeeze(1)  # in id order
    _, places = torch.sort(logits[likely], descending=True, stable=True)
    top = likely[places[:count]]
    own, *others = values[torch.cat([torch.tensor([token]), top])].float().tolist()
    return TokenLogprobs(own, tuple(top.tolist()), tuple(others))


def off_by(logits: Tensor, token: int, said: TokenLogprobs) -> float:
    """How far `said` is from what `log_probabilities` gives at most; 0 where every bit is the same.

    Its own value, those of the ids that it names, and those that the likeliest ids have.
    """
    if any(not 0 <= other < len(logits) for other in said.top_ids):
        return math.inf
    values = _log_softmax(logits).float()
    named, likeliest = values[[token, *said.top_ids]], torch.topk(values, len(said.top_ids)).values
    ours = torch.cat([named, likeliest]).double()
    theirs = torch.tensor(
        [said.logprob, *said.top_logprobs, *said.top_logprobs], dtype=torch.float64
    )
    return float((ours - theirs).abs().max())


def _log_softmax(logits: Tensor) -> Tensor:
    lasting = logits.to(torch.float64)
    return lasting - torch.logsumexp(lasting, dim=0)


def _weights(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Float64 (vocabulary,), the likeliest one's 1."""
    scaled = logits.to(torch.float64) / temperature
    weights = torch.exp(scaled - scaled.max())
    return _nucleus(weights, top_p) if top_p < 1 else weights


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """`weights` with all but the likeliest tokens of mass `top_p` zeroed; ties to the lowest id.

    The likeliest are looked at first: sorting a whole vocabulary costs as much as reading a token.
    """
    target = top_p * float(weights.sum())
    for floor in (_LIKELY, 0.0):
        likely = torch.nonzero(weights >= floor).squeeze(1)  # in id order
        ordered, places = torch.sort(weights[likely], descending=True, stable=True)
        edges = torch.cumsum(ordered, dim=0)
        if float(edges[-1]) >= target:
            break  # what is left out comes after all that is kept
    kept = likely[places[edges - ordered < target]]
    return torch.zeros_like(weights).index_copy(0, kept, weights[kept])
