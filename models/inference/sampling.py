"""Logits -> one token. Pure: the draw for a position depends on seed and position alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
    scaled = logits.to(torch.float64) / temperature
    weights = torch.exp(scaled - scaled.max())  # (vocabulary,)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    edges = torch.cumsum(weights, dim=0)
    target = u * float(edges[-1])
    # The first edge beyond the target: a token of weight 0 has no room between edges.
    index = int(torch.searchsorted(edges, target, right=True))
    return min(index, int(torch.nonzero(weights)[-1]))


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """`weights` with all but the likeliest tokens of mass `top_p` zeroed; ties to the lowest id."""
    ordered, ids = torch.sort(weights, descending=True, stable=True)
    before = torch.cumsum(ordered, dim=0) - ordered
    kept = ids[before < top_p * float(weights.sum())]
    return torch.zeros_like(weights).index_copy(0, kept, weights[kept])
