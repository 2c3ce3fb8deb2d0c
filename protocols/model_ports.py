"""What a module may be beside `ports.Module`: of models, paid by its parts, comparable."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from aivillage.protocols.ports import Module
from aivillage.protocols.pricing import Usage


class ModelModule(Module, Protocol):
    """A module whose requests name the model that does it, in their field `model`."""

    def prices_of(self, active_parameters: int) -> dict[str, int]:
        """The default price of each unit for a model of that size."""
        ...

    def require_fits(self, request: Any, context_tokens: int) -> None:
        """Raises: RequestError: TOO_LARGE, more than a model with that context can take."""
        ...


@runtime_checkable
class PaidByPartsModule(Protocol):
    """A module each of whose parts is some items of its result, and is paid as it comes."""

    def count_part(self, request: Any, part: bytes, first: int) -> int:
        """How many items `part` has, at least one; those before it are `first`.

        Raises:
            RequestError: it can be no part of a result that would pass its check.
        """
        ...

    def usage_of(self, request: Any, count: int) -> Usage:
        """Of the first `count` items."""
        ...

    def dearest_item(self, request: Any) -> Usage:
        """What has to be deliverable ahead of its pay: of the largest item alone."""
        ...


@runtime_checkable
class ComparedModule(Protocol):
    """A module whose results are lists of items that any two honest machines agree about."""

    def parting(self, request: Any, first: Any, second: Any) -> int | None:
        """The first item at which two results differ by more than rounding; None: they agree."""
        ...

    def items_of(self, result: Any, part: bytes, first: int) -> int:
        """How many items of `result`, from `first` on, one part gave; 0: they are others."""
        ...
