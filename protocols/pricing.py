"""Terms x usage -> micro-credits. Both sides compute the same number from the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, TypeAlias

import msgspec

from aivillage.protocols.errors import RequestError
from aivillage.protocols.types import AMOUNT_MAX, Amount, Count, MicroCredits

Usage = Mapping[str, int]
"""Unit -> count, such as `{"prompt_quads": 12, "output_tokens": 40}`. Counts only grow."""

UNITS_MAX: Final = 16
MODELS_MAX: Final = 16
"""Of one seller, in an offer and in its list of operations."""
FLOPS_PER_MICRO_CREDIT: Final = 1_000_000

ModelName: TypeAlias = Annotated[str, msgspec.Meta(max_length=128)]
ModelPrices: TypeAlias = Annotated[dict[ModelName, Amount], msgspec.Meta(max_length=MODELS_MAX)]
"""Model -> price of one unit."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Posted prices: micro-credits for one of each unit."""

    prices_micro_credits: dict[str, int]

    def __post_init__(self) -> None:
        if len(self.prices_micro_credits) > UNITS_MAX:
            raise ValueError(f"terms name at most {UNITS_MAX} units")
        if any(not 0 <= price <= AMOUNT_MAX for price in self.prices_micro_credits.values()):
            raise ValueError("a price is between 0 and 2^53-1 micro-credits")


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that does an operation, as its manifest has it, and what a unit costs with it.

    Default prices follow from `active_parameters`: a buyer computes them without the weights.
    """

    name: ModelName
    parameters: Count = 0
    active_parameters: Count = 0
    context_tokens: Count = 0
    licence: ModelName = ""
    sha256: ModelName = ""
    """Of the weights, in hexadecimal."""
    prices_micro_credits: Annotated[dict[str, Amount], msgspec.Meta(max_length=UNITS_MAX)] = {}


Models: TypeAlias = Annotated[tuple[ModelInfo, ...], msgspec.Meta(max_length=MODELS_MAX)]


def token_price(active_parameters: int) -> MicroCredits:
    """The default price of a token, and of a quad of prompt bytes, whatever the model.

    2 operations for each weight that a token multiplies, a micro-credit a million, rounded up.
    """
    return -(-2 * active_parameters // FLOPS_PER_MICRO_CREDIT)


def price(terms: Terms, usage: Usage) -> MicroCredits:
    """What `usage` costs at `terms`.

    Raises:
        RequestError: the usage names a unit without a price, or the sum leaves the range.
    """
    total = 0
    for unit, count in usage.items():
        if unit not in terms.prices_micro_credits or count < 0:
            raise RequestError(f"the terms have no price for {count} x {unit!r}")
        total += terms.prices_micro_credits[unit] * count
    if total > AMOUNT_MAX:
        raise RequestError(f"{total} micro-credits is beyond any price", code="TOO_LARGE")
    return total


def price_of_rest(terms: Terms, usage: Usage, done: Usage) -> MicroCredits:
    """What `usage` costs where `done` of it was already accepted from an earlier attempt.

    Each accepted unit is paid once in the life of a job, whoever delivers it.

    Raises:
        RequestError: as `price`, or a count in `done` is negative.
    """
    if any(count < 0 for count in (*usage.values(), *done.values())):
        raise RequestError("a count of delivered work is negative")
    rest = {unit: max(0, count - done.get(unit, 0)) for unit, count in usage.items()}
    return price(terms, rest)


def is_free(terms: Terms) -> bool:
    """Whether nothing costs anything."""
    return not any(terms.prices_micro_credits.values())


def dearest_unit(terms: Terms) -> MicroCredits:
    """Price of the dearest single unit: the smallest exposure under which work can move."""
    return max(terms.prices_micro_credits.values(), default=0)
