"""Who made which part of a result: one walk over the parts, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from aivillage.node.verifier import Share
from aivillage.protocols.types import AttemptId, PeerId


def shares_of(
    rows: Iterable[tuple[Any, ...]], count_of: Callable[[bytes, int], int]
) -> list[Share]:
    """One share for each attempt, those of nothing included.

    `rows`: (attempt, seller, kernel, identical, quote, part). `count_of`: how many tokens or items
    a part is, and the number of the first one.
    """
    shares: list[Share] = []
    first = 0
    for (attempt, seller, kernel, identical, quote), parts in groupby(rows, lambda row: row[:5]):
        begun = first
        for part in parts:
            first += count_of(part[5], first)
        shares.append(
            Share(
                attempt=AttemptId(attempt), seller=PeerId(seller), kernel=kernel,
                identical=identical, first=begun, count=first - begun, quote=quote,
            )
        )  # fmt: skip
    return shares
