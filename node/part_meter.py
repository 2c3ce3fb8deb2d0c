"""Counts the parts of a module that is paid by them, on both sides by the same rule.

Each part is paid once in the life of a job, to whoever delivered it. Of other modules the result is
the one delivery, and their parts count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aivillage.models import registry
from aivillage.protocols.codec import unpack
from aivillage.protocols.pricing import Usage


class PartMeter:
    """Takes a job's parts in order; `usage` is that of all of them."""

    def __init__(self, operation: str, request: bytes, parts: Sequence[bytes] = ()) -> None:
        """`parts` were taken before. Raises: RequestError: as `take`, or the request is none."""
        self._module = registry.paid_by_parts(operation)
        self._request: Any = None
        self._count = 0
        if self._module is not None:
            self._request = unpack(registry.of_models(operation).Request, request)
            for part in parts:
                self.take(part)

    @property
    def usage(self) -> Usage:
        if self._module is None or not self._count:
            return {}
        return self._module.usage_of(self._request, self._count)

    def take(self, part: bytes) -> None:
        """Raises: RequestError: this can be no next part of a result; nothing is counted."""
        if self._module is not None:
            self._count += self._module.count_part(self._request, part, self._count)


def at_once(operation: str, request: bytes, usage: Usage) -> Usage:
    """What of `usage` has to be deliverable in one piece."""
    module = registry.paid_by_parts(operation)
    if module is None:
        return usage
    return module.dearest_item(unpack(registry.of_models(operation).Request, request))
