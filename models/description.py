"""A module -> what the mesh may know of it: name, schemas, default terms."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

from aivillage.models import registry
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import RequestError
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.ports import Module, Verdict
from aivillage.protocols.pricing import Terms


@runtime_checkable
class CarefulModule(Protocol):
    """A module some of whose requests only a worker can look at, once, before they cost anything.

    It is asked wherever a worker estimates.
    """

    def validate(self, request: Any) -> None:
        """Raises: RequestError: this cannot be done, by anybody."""
        ...


def described(module: Module, operation: str) -> OperationInfo:
    """MCP's tool shape plus the prices; the same in the daemon and in a worker."""
    return OperationInfo(
        name=operation,
        title=module.title,
        positional=module.positional,
        stability=registry.entry(operation).stability,
        request_schema=msgspec.json.schema(module.Request),
        result_schema=msgspec.json.schema(module.Result),
        terms=Terms(prices_micro_credits=module.prices_micro_credits()),
    )


def checked(module: Module, request: msgspec.Struct, result: bytes) -> Verdict:
    """What the module says of a result; one that is none of its type is a verdict too."""
    try:
        typed = unpack(module.Result, result)
    except RequestError as error:
        return Verdict(ok=False, reason=error.message)
    return module.check(request, typed)
