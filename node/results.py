"""Results as the owner sees them: of the operation's own type, and nothing else that a peer put in.

Unknown fields pass on the wire, so that versions can talk; here they end.
"""

from __future__ import annotations

from typing import Any

import msgspec

from aivillage.models import registry
from aivillage.protocols import codec
from aivillage.protocols.errors import RequestError


def shown(operation: str, body: bytes | None) -> Any:
    """The result of `operation` as plain values; None where there is none.

    Raises:
        RequestError: it is no result of that operation, or of no shape that travels.
    """
    if body is None:
        return None
    if module := registry.built_in(operation):
        body = codec.pack(codec.unpack(module.Result, body))
    if fault := codec.shape_fault(body):
        raise RequestError(f"the result is {fault}", next_step="have another peer try")
    try:
        return msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"the result is no msgpack: {error}") from None


def shown_or_why(operation: str, body: bytes | None) -> dict[str, Any]:
    """`result`, and where it cannot be shown `result_fault` says why."""
    try:
        return {"result": shown(operation, body)}
    except RequestError as error:
        return {"result": None, "result_fault": str(error)}
