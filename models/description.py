"""A module -> what the mesh may know of it: name, schemas, default terms."""

from __future__ import annotations

from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from aivillage.models import registry
from aivillage.protocols.codec import unpack
from aivillage.protocols.errors import JobError, RequestError
from aivillage.protocols.messages import OperationInfo
from aivillage.protocols.ports import Module, Verdict
from aivillage.protocols.pricing import Terms

DESCRIPTION_BYTES_MAX: Final = 1 << 15
"""A list of 20 operations still fits one frame between peers."""


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


def vetted(info: OperationInfo, entry: registry.Entry) -> OperationInfo:
    """What a stranger's module says of itself, under the name that it was installed as.

    Raises:
        JobError: it names no price, or says too much.
    """
    if info.terms is None:
        raise JobError(f"{entry.operation} names no price")
    if len(msgspec.msgpack.encode(info)) > DESCRIPTION_BYTES_MAX:
        raise JobError(f"{entry.operation} describes itself in over {DESCRIPTION_BYTES_MAX} bytes")
    return msgspec.structs.replace(info, name=entry.operation)
